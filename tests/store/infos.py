"""
Infos that differ only in their names.
"""

from nixserve.testing import makeInfo, makeNar

HELLO = makeNar(b"hello\n")
A, B, C, D = (makeInfo(name, HELLO) for name in "abcd")
