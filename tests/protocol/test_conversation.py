"""L{nixserve.protocol.conversation}: what is waited for, and what ends it. More of it with a whole server."""

from functools import partial

import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from nixserve.codec.connection import ServerConnection
from nixserve.codec.storepath import StoreDir
from nixserve.errors import PolicyError, RemoteProtocolError
from nixserve.protocol.conversation import HALF_CLOSED_SECONDS, STALL_SECONDS, Conversation
from nixserve.protocol.memory import Memory
from nixserve.protocol.workers import Door
from nixserve.testing import ManualWorkers, RecordingTransport, result


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def conversation(clock):
    """One in the middle of a request."""
    made = Conversation(
        ServerConnection(StoreDir()),
        RecordingTransport(),
        Door(ManualWorkers()),
        partial(Memory(clock).open, "key", True),
        clock,
        STALL_SECONDS,
    )
    made.requestBegins()
    return made


def begun(waiting):
    """
    @return: a L{Deferred} for the result of a coroutine.
    """
    return Deferred.fromCoroutine(waiting)


def stalls(clock, conversation, seconds=STALL_SECONDS):
    """Is the peer given up if nothing moves?"""
    clock.pump([seconds / 8] * 12)
    return conversation.cause is not None and conversation.cause.check(RemoteProtocolError) is not None


LOST = Failure(ConnectionLost())


def test_endsWhatIsWaitedFor(conversation):
    """What ends the conversation ends what is waited for, which fails with what that is cancelled with."""
    pending = Deferred()
    waiting = begun(conversation.wait(pending))
    conversation.end(LOST)
    assert pending.called
    with pytest.raises(CancelledError):
        result(waiting)
    assert conversation.cause is LOST


def test_endsWhatComesThen(conversation):
    """Nothing is waited for any more then: it is cancelled at once, and the cause is raised."""
    conversation.end(LOST)
    cancelled = []
    for wait in (conversation.wait, conversation.ours, conversation.interruptible):
        with pytest.raises(ConnectionLost):
            result(begun(wait(Deferred(cancelled.append))))
    with pytest.raises(ConnectionLost):
        result(begun(conversation.more()))
    assert len(cancelled) == 3


def test_firstCauseCounts(conversation):
    """Of several causes the first one is told."""
    conversation.end(LOST)
    conversation.end(Failure(PolicyError("later")))
    assert conversation.cause is LOST


def test_nothingEndsWhatIsOver(conversation):
    """When the exit status has been told, nothing is a cause any more, and the first status counts."""
    conversation.exit(0)
    conversation.end(LOST)
    conversation.exit(1)
    assert conversation.cause is None
    assert conversation.transport.status == 0


def test_more(conversation):
    """Who waits for the peer goes on when something has come, when nothing will, or when it is over."""
    for event in (partial(conversation.receive, b"x"), conversation.receiveEOF, partial(conversation.end, LOST)):
        waiting = begun(conversation.more())
        assert not waiting.called
        event()
        assert result(waiting) is None


def test_peerIsGivenUp(conversation, clock):
    """While the peer has to act it is given up when nothing moves, and what is waited for ends."""
    waiting = begun(conversation.wait(Deferred()))
    assert stalls(clock, conversation)
    with pytest.raises(CancelledError):
        result(waiting)


def test_afterTheRequest(conversation, clock):
    """Between requests a peer may be silent for ever."""
    conversation.requestEnds()
    assert not stalls(clock, conversation)


@pytest.mark.parametrize("ours", ["ours", "interruptible"])
@pytest.mark.parametrize("end", [lambda pending: pending.callback(5), lambda pending: pending.errback(KeyError())])
def test_peerNeedNotActMeanwhile(conversation, clock, ours, end):
    """What takes us long is not held against the peer; but it counts again from there, whatever came of that."""
    pending = Deferred()
    waiting = begun(getattr(conversation, ours)(pending))
    waiting.addErrback(lambda failure: failure.trap(KeyError))
    assert not stalls(clock, conversation)
    end(pending)
    assert result(waiting) in (5, KeyError)
    assert stalls(clock, conversation)


def test_storeTakesItsTime(conversation, clock):
    """So with what a worker does."""
    waiting = begun(conversation.call(lambda: 5))
    assert not stalls(clock, conversation)
    conversation.door._workers.run()()
    assert result(waiting) == 5
    assert stalls(clock, conversation)


def test_halfClosed(conversation, clock):
    """A peer that has sent EOF is given up sooner."""
    conversation.receiveEOF()
    assert stalls(clock, conversation, HALF_CLOSED_SECONDS)


def test_buildsEndWithTheInput(conversation):
    """A build that runs ends with the end of input."""
    building = begun(conversation.interruptible(Deferred()))
    conversation.receiveEOF()
    with pytest.raises(CancelledError):
        result(building)
    assert "interrupted by the user" in str(conversation.cause.value)


def test_buildsAfterTheInput(conversation):
    """The same if the end has come before."""
    conversation.receiveEOF()
    assert conversation.cause is None
    with pytest.raises(PolicyError, match="interrupted by the user"):
        result(begun(conversation.interruptible(Deferred())))


@pytest.mark.parametrize("wait", ["wait", "ours"])
def test_nothingElseEndsWithTheInput(conversation, wait):
    """Whatever else is waited for goes on, whether the end of input comes before it, meanwhile, or after a build."""
    result(begun(conversation.interruptible(succeed(None))))
    pending = Deferred()
    waiting = begun(getattr(conversation, wait)(pending))
    conversation.receiveEOF()
    assert not pending.called and conversation.cause is None
    pending.callback(5)
    assert result(waiting) == 5
    assert result(begun(getattr(conversation, wait)(succeed(6)))) == 6


@pytest.mark.parametrize("before", [True, False])
def test_storeGoesOnAfterTheInput(conversation, before):
    """So does what a worker does."""
    if before:
        conversation.receiveEOF()
    waiting = begun(conversation.call(lambda: 5))
    if not before:
        conversation.receiveEOF()
    conversation.door._workers.run()()
    assert result(waiting) == 5 and conversation.cause is None


def test_closed(conversation, clock):
    """In the end nothing is left that would come round."""
    conversation.close()
    conversation.receive(b"x")
    assert clock.getDelayedCalls() == []
