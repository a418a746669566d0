"""
What holds for all tests.

They follow the packages: the tests of C{nixserve/codec/nar.py} are in C{tests/codec/test_nar.py}. Beside them are
C{interop}, against real Nix and real SSH; C{fuzz}, whatever bytes arrive; C{docs}, what the documentation says; and
C{bench}, programs that measure, which compare with the real pair in the same run and print ratios.
"""

import signal

from hypothesis import settings

# Machines that run tests are slow at times; how fast something is, benchmarks say.
settings.register_profile("nixserve", deadline=None)
settings.load_profile("nixserve")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it starts in the background, and the programs that are tested would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
