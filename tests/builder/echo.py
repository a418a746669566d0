"""A builder in Python that says what it was given."""

import os
import sys


def main():
    """Print environment, standard input, directory and process number."""
    print(dict(os.environ), sys.stdin.read(), os.getcwd(), os.getpid())
    return 0
