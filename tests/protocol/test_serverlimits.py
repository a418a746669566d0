"""What one key can have the server hold and do: replies that nobody reads, half requests, crowds of sessions."""

import tracemalloc

import pytest
from twisted.internet.task import Clock

from nixserve.codec.messages import Command
from nixserve.codec.serve import writeReply
from nixserve.protocol.commands import INFOS_AT_ONCE
from nixserve.protocol.conversation import FIRST_WINDOW, MAX_SMALL_REQUEST, STALL_SECONDS, WORK_MEMORY
from nixserve.protocol.limits import FULL_WINDOW, Limits
from nixserve.protocol.policy import EVERYTHING, READ_ONLY, Peer
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.turns import Turns
from nixserve.store.memory import MemoryStore
from nixserve.testing import FakeStore, ManualWorkers, RecordingTransport
from tests.protocol.serversessions import ADD_LARGE, ANSWER, HELLO, Session
from tests.protocol.vectorstore import storeWith
from tests.vectors.serve.messages import LIB, narInfo, path, wire

MIB = 1024 * 1024
CAPACITY = 64 * 1024
PATHS = [path(f"p{n}") for n in range(5000)]
INFOS = {each: narInfo(each.name, b"", *PATHS[:5]) for each in PATHS}
LARGE_REPLY = wire(sorted(PATHS))


class ManyPaths(FakeStore):
    """
    A store whose closures are large, and whose path infos are made up.

    @ivar closure: that of any path.
    """

    closure = frozenset(PATHS)

    def perform(self, method, *args):
        """As L{FakeStore.perform}."""
        if method.__name__ == "queryClosure":
            self.record("queryClosure", *args)
            return set(self.closure)
        if method.__name__ == "queryPathInfos":
            self.record("queryPathInfos", *args)
            return {each: INFOS[each] for each in args[0]}
        return super().perform(method, *args)


class SharedWorkers(ManualWorkers):
    """Workers that obey, whose clients take turns."""

    def __init__(self, threads=8):
        super().__init__()
        self._turns = Turns(self.reactor, self.call, threads)

    def of(self, client, atOnce):
        """See L{ISharedWorkers}."""
        return self._turns.of(client, atOnce)


class Crowd:
    """Many sessions of one service."""

    def __init__(self, store=None, threads=8, **limits):
        self.store = store or ManyPaths()
        self.workers = SharedWorkers(threads)
        self.sessions = ServeSessions(self.store, self.workers, self.workers.reactor, limits=Limits(**limits))
        self.all = []

    def session(self, key="key", policy=READ_ONLY, capacity=CAPACITY):
        """
        A session that has said hello.

        @return: its protocol, and what it is connected to.
        """
        server = self.sessions.buildSession(policy, Peer("here", key, len(self.all)))
        transport = RecordingTransport(capacity)
        self.all.append((server, transport))
        server.makeConnection(transport)
        server.dataReceived(HELLO)
        return server, transport

    def end(self):
        """Everybody goes."""
        for server, _ in self.all:
            server.connectionLost()
        self.workers.drain()
        assert len(self.sessions) == 0
        assert self.workers.reactor.getDelayedCalls() == []


def asked(store, name):
    """How often a store was asked for something."""
    return store.names.count(name)


# --- replies ------------------------------------------------------------------------------------------------


def test_repliesWaitForTheirReader():
    """A client that pipelines requests and reads nothing has one of them performed; it gets all as it reads."""
    session = Session(ManyPaths(), ManualWorkers(), capacity=CAPACITY)
    session.send(HELLO + wire(7, 0, [LIB.path]) * 100).drain()
    assert asked(session.store, "queryClosure") == 1
    assert session.transport.unsent < CAPACITY + 256 * 1024
    for _ in range(1000):
        session.transport.take()
        session.drain()
        assert session.transport.unsent < CAPACITY + 256 * 1024
    assert session.replies == LARGE_REPLY * 100
    session.eof().drain().ended(0)


@pytest.mark.parametrize("request_", [wire(1, 0, 0, []), ADD_LARGE, wire(4, 0), wire(3, LIB.path)])
def test_smallRepliesWaitForTheirReader(request_):
    """The same with replies that are small, acknowledgements too: they are no way to have us hold without bound."""
    session = Session(storeWith(LIB), ManualWorkers(), capacity=CAPACITY)
    session.send(HELLO).drain()
    session.transport.write(bytes(2 * CAPACITY))
    session.send(request_).drain()
    performed = len(session.transport.written)
    session.send(request_ * 10).drain()
    assert len(session.transport.written) == performed
    session.transport.take()
    session.drain()
    session.eof().drain()
    assert session.transport.status == 0 and len(session.transport.written) > performed


def test_readerOfRepliesThatNeverReads():
    """Whoever reads nothing of a reply for ten minutes is given up."""
    session = Session(ManyPaths(), ManualWorkers(), capacity=CAPACITY)
    session.send(HELLO + wire(7, 0, [LIB.path])).drain()
    session.clock.pump([10] * int(STALL_SECONDS / 10 * 2))
    session.drain()
    session.ended(1, "error: nothing has moved for too long in the middle of a request; giving up\n")


def test_slowReaderOfReplies():
    """Whoever reads a little now and then gets everything."""
    session = Session(ManyPaths(), ManualWorkers(), capacity=CAPACITY)
    session.send(HELLO + wire(7, 0, [LIB.path])).drain()
    for _ in range(30):
        session.clock.pump([STALL_SECONDS / 2])
        session.transport.take(1000)
    assert session.transport.status is None
    while session.transport.unsent:
        session.transport.take()
    session.eof().drain()
    assert session.replies == LARGE_REPLY
    session.ended(0)


def test_manyPathInfosComeInParts():
    """
    Infos of many paths are asked for and sent in parts: none is held that waits for its reader, and between two parts
    the workers are free for others.
    """
    session = Session(ManyPaths(), ManualWorkers(), capacity=CAPACITY)
    session.send(HELLO + wire(2, PATHS)).drain()
    assert asked(session.store, "queryPathInfos") < 20
    while session.transport.unsent:
        session.transport.take()
        session.drain()
    calls = [args[0] for name, args in session.store.calls if name == "queryPathInfos"]
    assert max(map(len, calls)) == INFOS_AT_ONCE and sum(map(len, calls)) == len(PATHS)
    assert session.replies == writeReply(Command.QUERY_PATH_INFOS, INFOS, 0x207)
    session.eof().drain().ended(0)


# --- requests -----------------------------------------------------------------------------------------------


def test_halfRequestsOfOneKeyAreBounded():
    """
    Sessions of one key that each send half of a large request are paused but for one when its memory is full, whose
    request is answered when it is complete; then the next one goes on.
    """
    crowd = Crowd(keyMemory=4 * MIB)
    sessions = [crowd.session() for _ in range(10)]
    crowd.workers.drain()
    pieces = [wire(*PATHS[n : n + 500]) for n in range(0, 5000, 500)]
    request = [wire(1, 0, 0, 5000), *pieces]
    left = {server: list(request) for server, _ in sessions}
    tracemalloc.start()
    try:
        for _ in request[:-1]:
            for server, transport in sessions:
                if not transport.paused:
                    server.dataReceived(left[server].pop(0))
        assert tracemalloc.get_traced_memory()[1] < 9 * MIB
    finally:
        tracemalloc.stop()
    assert sum(transport.paused for _, transport in sessions) >= 5
    while any(left.values()):
        moving = [(server, transport) for server, transport in sessions if left[server] and not transport.paused]
        assert moving, "everybody waits for everybody"
        for server, _ in moving:
            server.dataReceived(left[server].pop(0))
        crowd.workers.drain()
    assert all(bytes(transport.written) == ANSWER + wire([]) for _, transport in sessions)
    crowd.end()


def test_halfRequestsAreGivenUp():
    """Of half requests that are never continued each is given up in turn, and who waited for its memory goes on."""
    crowd = Crowd(keyMemory=4 * MIB)
    half = [wire(1, 0, 0, 5000), *[wire(*PATHS[n : n + 500]) for n in range(0, 4000, 500)]]
    for server, transport in [crowd.session() for _ in range(10)]:
        crowd.workers.drain()
        for piece in half:
            if not transport.paused:
                server.dataReceived(piece)
    assert any(transport.paused for _, transport in crowd.all)
    crowd.workers.reactor.pump([30] * int(12 * STALL_SECONDS / 30))
    crowd.workers.drain()
    assert not any(transport.paused and transport.status is None for _, transport in crowd.all)
    crowd.end()


def test_endWhileWaitingForMemory():
    """A client that ends its side inside a request that waits for memory is told so when it goes on."""
    crowd = Crowd(keyMemory=4 * MIB)
    half = [wire(1, 0, 0, 5000), *[wire(*PATHS[n : n + 500]) for n in range(0, 4000, 500)]]
    sessions = [crowd.session() for _ in range(10)]
    crowd.workers.drain()
    for server, transport in sessions:
        for piece in half:
            if not transport.paused:
                server.dataReceived(piece)
    waiting, transport = next((server, transport) for server, transport in sessions if transport.paused)
    waiting.readConnectionLost()
    for server, _ in sessions:
        if server is not waiting:
            server.connectionLost()
    crowd.workers.drain()
    assert transport.errors == b"error: unexpected end-of-file\n"
    crowd.end()


def test_requestThatIsTooLargeForItsKey():
    """A request that needs more than its key may have is refused while it arrives, in one line."""
    crowd = Crowd(keyMemory=1 * MIB)
    server, transport = crowd.session()
    crowd.workers.drain()
    server.dataReceived(wire(1, 0, 0, 100_000))
    for n in range(0, 5000, 500):
        server.dataReceived(wire(*PATHS[n : n + 500]))
    crowd.workers.drain()
    assert transport.status == 1
    line = transport.errors.decode()
    assert line.startswith("error: this request needs more memory than the 1 MiB that a key may use here")
    assert line.count("\n") == 1
    crowd.end()


def test_otherKeysGoOn():
    """What one key has filled up keeps no session of another key from anything."""
    crowd = Crowd(untrustedMemory=16 * MIB)
    for server, _ in [crowd.session("greedy") for _ in range(20)]:
        crowd.workers.drain()
        server.dataReceived(wire(7, 0, [LIB.path]) * 100)
    crowd.workers.drain()
    late, transport = crowd.session("greedy")
    late.dataReceived(wire(1, 0, 0, []))
    server, other = crowd.session("other")
    server.dataReceived(wire(1, 0, 0, []))
    crowd.workers.drain()
    assert bytes(other.written) == ANSWER + wire([])
    assert bytes(transport.written) != ANSWER + wire([])
    crowd.end()


def test_unreadRepliesAreBounded():
    """Sessions of one key that do not read their replies are not given more of them than its memory holds."""
    crowd = Crowd(keyMemory=8 * MIB)
    sessions = [crowd.session() for _ in range(20)]
    crowd.workers.drain()
    for server, _ in sessions:
        server.dataReceived(wire(7, 0, [LIB.path]))
    crowd.workers.drain()
    performed = asked(crowd.store, "queryClosure")
    assert performed <= 8 * MIB // WORK_MEMORY + 1
    # Those who read make room for the others, and in the end everybody has been answered.
    for _ in range(40):
        for _, transport in sessions:
            transport.take()
        crowd.workers.reactor.advance(1)
        crowd.workers.drain()
    assert asked(crowd.store, "queryClosure") == len(sessions)
    crowd.end()


def test_sessionsOfOneKeyAreBounded():
    """When a key has so many sessions that they fill its memory, the next one is refused, in one line."""
    crowd = Crowd(keyMemory=2 * MIB)
    transports = [crowd.session()[1] for _ in range(20)]
    crowd.workers.drain()
    refused = [transport for transport in transports if transport.status is not None]
    assert 1 <= len(refused) < 15
    line = b"error: too much is under way for this key here, or its replies are not read: try again later\n"
    assert {(transport.status, bytes(transport.errors)) for transport in refused} == {(1, line)}
    assert crowd.session("other")[1].status is None
    crowd.end()


def test_windowGrowsWithRoom():
    """A session may be sent little at first, and more when it has shown that it needs it, while there is room."""
    crowd = Crowd(MemoryStore(), keyMemory=8 * MIB)
    sessions = [crowd.session(policy=EVERYTHING) for _ in range(4)]
    crowd.workers.drain()
    assert {transport.window for _, transport in sessions} == {FIRST_WINDOW}
    for server, _ in sessions:
        server.dataReceived(wire(9, path("big"), "", "0" * 64, [], 0, 64 * MIB, 0, [], "") + bytes(2 * FIRST_WINDOW))
    assert [transport.window for _, transport in sessions] == [FULL_WINDOW, *[FIRST_WINDOW] * 3]
    crowd.end()


# --- turns --------------------------------------------------------------------------------------------------


def test_sessionsOfOneKeyShareTheirTurns():
    """
    Sessions of one key, however many, are in a few threads only, and take turns with others as one: somebody else's
    question is next.
    """
    crowd = Crowd(threads=2, keyRequests=2)
    sessions = [crowd.session("greedy") for _ in range(50)]
    other, transport = crowd.session("other")
    crowd.workers.drain()
    for server, _ in sessions:
        server.dataReceived(wire(7, 0, [LIB.path]))
    assert len(crowd.workers.waiting) == 1
    other.dataReceived(wire(1, 0, 0, []))
    assert len(crowd.workers.waiting) == 2
    crowd.workers.step()
    crowd.workers.step()
    assert bytes(transport.written) == ANSWER + wire([])
    assert asked(crowd.store, "queryClosure") == 1
    crowd.end()


def test_streamsTakeTurnsToo():
    """Between two parts of a large reply it is somebody else's turn."""
    crowd = Crowd(threads=1, keyRequests=1)
    sessions = [crowd.session("greedy", capacity=1 << 60) for _ in range(10)]
    other, transport = crowd.session("other")
    crowd.workers.drain()
    for server, _ in sessions:
        server.dataReceived(wire(2, PATHS))
    crowd.workers.step()
    other.dataReceived(wire(1, 0, 0, []))
    crowd.workers.step()
    crowd.workers.step()
    assert bytes(transport.written) == ANSWER + wire([])
    assert len(sessions[0][1].written) < len(writeReply(Command.QUERY_PATH_INFOS, {}, 0x207)) + 2 * MIB
    crowd.end()


def test_smallRequestsAreNotLookedAt():
    """What most clients ever send asks for no room while it arrives."""
    assert MAX_SMALL_REQUEST >= 64 * 1024
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    session.server._conversation._account.wait = None
    session.send(wire(1, 0, 0, 500), *[wire(each) for each in PATHS[:499]])
    assert session.server.ended.called is False and session.transport.status is None
    session.lose().drain()


def test_clockOfLimits():
    """A service without waiting sessions has no timers of its own."""
    crowd = Crowd()
    crowd.session()
    crowd.workers.drain()
    assert isinstance(crowd.workers.reactor, Clock) and crowd.workers.reactor.getDelayedCalls() == []
    crowd.end()


# --- what is not known yet ----------------------------------------------------------------------------------


def test_crowdOfLargeAnswers():
    """Short questions whose answers are large, which nobody reads, are not all answered before the first is counted."""
    store = ManyPaths()
    store.closure = {path(f"q{n}") for n in range(30_000)}
    crowd = Crowd(store, keyMemory=24 * MIB)
    for _ in range(40):
        crowd.session(policy=EVERYTHING)
    crowd.workers.drain()
    for server, _ in crowd.all:
        server.dataReceived(wire(7, 0, [LIB.path]))
    crowd.workers.drain()
    assert sum(server._conversation._held() for server, _ in crowd.all) < 30 * MIB
    # They are as many as fit, and the next one comes when one of these has been read.
    answered = [transport for _, transport in crowd.all if transport.unsent > 1000]
    assert len(answered) >= 2
    while answered[0].unsent:
        answered[0].take()
        crowd.workers.drain()
    assert len([transport for _, transport in crowd.all if transport.unsent > 1000]) >= len(answered)
    crowd.end()


def test_smallRequestsAmongThoseWhoWait():
    """However many half requests wait for memory, a small request of another key does not go through all of them."""
    crowd = Crowd(MemoryStore(), untrustedMemory=16 * MIB)
    half = (2).to_bytes(8, "little") + (900_000).to_bytes(8, "little") + b"".join(wire(each) for each in PATHS[:1500])
    for _ in range(15):
        crowd.session("attacker")[0].dataReceived(half)
    crowd.workers.drain()
    waiting = [server for server, transport in crowd.all if transport.paused]
    assert len(waiting) >= 10
    victim, transport = crowd.session("victim")
    crowd.workers.drain()
    looks = []
    for server in waiting:
        account = server._conversation._account
        account.mayGoOn = lambda account=account: looks.append(account)
    for _ in range(100):
        victim.dataReceived(wire(1, 0, 0, [LIB.path]))
        crowd.workers.drain()
    assert transport.written.endswith(wire([]))
    assert looks == []
    crowd.workers.reactor.advance(1)
    assert len(looks) >= len(waiting)
    for server in waiting:
        del server._conversation._account.mayGoOn
    crowd.end()
