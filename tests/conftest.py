"""
What holds for all tests.

They follow the packages: the tests of C{nixserve/codec/wire.py} are in C{tests/codec/test_wire.py}; what a module does
together with others, in a file beside it that says so. Where a module has no such file, a table in
C{tests/test_tree.py} says where its tests are. Beside the packages are C{interop}, against real Nix and real SSH;
C{fuzz}, whatever bytes arrive; C{docs}, what the documentation says; and C{bench}, programs that measure, which compare
with the real pair in the same run and print ratios.

What several files of tests need is in a module called after what it holds, such as C{tests/builder/workplace.py};
doubles that are of use to others as well are in L{nixserve.testing}. Only pytest imports tests and C{conftest.py}:
C{tests/test_tree.py} sees to that.
"""

import signal

from hypothesis import settings

# Machines that run tests are slow at times; how fast something is, benchmarks say.
settings.register_profile("nixserve", deadline=None)
settings.load_profile("nixserve")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what it starts in the background, and the programs that are tested would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
