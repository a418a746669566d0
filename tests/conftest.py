"""
What holds for all tests.
"""

import signal

from hypothesis import settings

# Machines that run tests are slow at times; how fast something is, benchmarks say.
settings.register_profile("nixserve", deadline=None)
settings.load_profile("nixserve")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it starts in the background, and the programs that are tested would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
