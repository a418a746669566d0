"""
C{nixserve-store} without temporary roots: what the tests of roots are tested against.

    python tests/interop/rootless.py --serve --write --store ROOT
"""

import sys

from nixserve.app.storecommand import main
from nixserve.store.roots import TempRoots

if __name__ == "__main__":
    TempRoots.addTempRoots = lambda self, paths: None
    sys.exit(main())
