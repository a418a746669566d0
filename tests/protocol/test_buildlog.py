"""
The log of a build: how much of it is kept, and who hears it.
"""

import threading

from nixserve.protocol.buildlog import MAX_KEPT_LOG, MAX_PENDING_LOG, BuildLog
from tests.protocol.buildworld import Reactor


def test_longLog():
    """Who comes late to a long log gets its beginning and is told how much is missing, in the right place."""
    reactor = Reactor()
    log = BuildLog(reactor)
    line = b"x" * 1023 + b"\n"
    for _ in range(MAX_KEPT_LOG // 1024 + 10):
        log.feed(line)
        reactor.turn()
    log.feed(b"short\n")
    reactor.turn()
    seen = []
    log.listen(seen.append)
    text = b"".join(seen)
    assert text.startswith(line * (MAX_KEPT_LOG // 1024))
    notice = text[MAX_KEPT_LOG:]
    assert notice == b"[11 lines of this log were dropped here; the log on the build machine has them]\n"
    log.feed(b"live\n")
    reactor.turn()
    assert seen[-1] == b"live\n"


def test_fastLog():
    """What comes faster than the reactor turns is bounded; the gap is where the notice is, and nothing is behind it."""
    reactor = Reactor()
    log = BuildLog(reactor)
    seen = []
    log.listen(seen.append)
    line = b"y" * 1023 + b"\n"
    for _ in range(MAX_PENDING_LOG // 1024 + 7):
        log.feed(line)
    log.feed(b"small\n")
    assert len(reactor.turns) == 1 and log._pendingSize <= MAX_PENDING_LOG
    reactor.turn()
    assert b"".join(seen) == line * (MAX_PENDING_LOG // 1024) + (
        b"[8 lines of this log were dropped here; the log on the build machine has them]\n"
    )
    log.feed(b"again\n")
    reactor.turn()
    assert seen[-1] == b"again\n"


def test_largePiece():
    """One piece larger than the buffer passes: it is the builder's side that bounds it."""
    reactor = Reactor()
    log = BuildLog(reactor)
    seen = []
    log.listen(seen.append)
    log.feed(b"z" * 2 * MAX_PENDING_LOG + b"\n")
    reactor.turn()
    assert len(b"".join(seen)) == 2 * MAX_PENDING_LOG + 1


def test_logFromThreads():
    """Lines that are fed while others are delivered are lost only with a notice."""
    reactor = Reactor()
    log = BuildLog(reactor)
    seen = []
    log.listen(seen.append)
    feeder = threading.Thread(target=lambda: [log.feed(b"%d\n" % number) for number in range(20_000)])
    feeder.start()
    while feeder.is_alive() or reactor.turns:
        if reactor.turns:
            reactor.turn()
    lines = b"".join(seen).splitlines()
    dropped = sum(int(line.split()[0][1:]) for line in lines if line.startswith(b"["))
    numbers = [int(line) for line in lines if not line.startswith(b"[")]
    assert numbers == sorted(set(numbers)) and len(numbers) + dropped == 20_000
