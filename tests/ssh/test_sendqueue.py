"""
L{nixserve.ssh.sendqueue}: output and errors on their way to the peer.
"""

from nixserve.ssh.sendqueue import MAX_ERROR_BYTES, SendQueue
from nixserve.ssh.transport import MAX_PACKET


def test_queueCutsAndJoins():
    """Large pieces are cut to packets, small ones joined, nothing lost or reordered."""
    queue = SendQueue()
    pieces = [b"a" * 5, b"b" * 100, b"c", b"d", b"", b"e" * 7]
    for piece in pieces:
        queue.write(piece)
    taken = []
    while queue:
        isError, data = queue.take(1000, 10, 0)
        assert not isError
        assert 0 < len(data) <= 10
        taken.append(bytes(data))
    assert b"".join(taken) == b"".join(pieces)
    assert queue.outSize == 0
    assert taken[-1] == b"cd" + b"e" * 7 or len(taken[-1]) == 9


def test_queueTakesTurns():
    """Standard error and output take turns, so that neither starves."""
    queue = SendQueue()
    queue.write(b"o" * 30)
    queue.writeError(b"e" * 30)
    order = [queue.take(1000, 10, 0)[0] for _ in range(6)]
    assert order == [True, False, True, False, True, False]
    assert not queue


def test_queueReservesWindowForOutput():
    """Standard error leaves the reserve of the window alone; output may use all of it."""
    queue = SendQueue()
    queue.writeError(b"e" * 100)
    assert queue.take(60, 100, 50) == (True, b"e" * 10)
    assert queue.take(50, 100, 50)[1] == b""
    queue.write(b"o" * 100)
    assert queue.take(50, 100, 50) == (False, b"o" * 50)
    assert queue.take(0, 100, 50)[1] == b""


def test_queueDropsErrors():
    """What nobody reads is dropped, and one line says how much."""
    queue = SendQueue()
    queue.writeError(b"x" * (MAX_ERROR_BYTES - 1) + b"\n")
    queue.writeError(b"one\ntwo\n")
    queue.writeError(b"three")
    assert queue.errorSize == MAX_ERROR_BYTES
    queue.take(MAX_PACKET, MAX_PACKET, 0)
    queue.writeError(b"four\n")
    rest = b""
    while queue:
        rest += bytes(queue.take(MAX_PACKET, MAX_PACKET, 0)[1])
    assert rest.endswith(b"x\n[3 lines of messages were dropped: they were not read]\nfour\n")
