"""
The states of a conversation in the serve protocol, and every step from one to another, as tables. The connection
objects of L{nixserve.codec.connection} move along them.

Theory of operation. Each side first says hello: a magic number and a version. The lower version is spoken from there
on, and no request that depends on it may be sent before it is known. Then the client makes requests and the server
answers each, in the order of the requests. There is no reply that says "no": whoever cannot go on ends the session. The
client ends it otherwise, by an end of input between two requests.

What the B{server} receives and sends is one sequence, as with Nix: request, reply, request. So it is one machine
(L{SERVER_STEPS}), and between the end of a request and that of its reply the connection object is paused: what arrives
meanwhile waits. But where small requests of one kind come without waiting for answers, the owner may put off a reply
(C{POSTPONE}) and read on, to work them off together. A second machine (L{SERVER_POSTPONED}) then stands for the replies
that are owed: they come before any other, and even behind the end of input.

The B{client} may have any number of requests under way. So sending (L{CLIENT_SENDING}) and receiving
(L{CLIENT_RECEIVING}) are two machines that do not wait for each other. How many replies are owed, and to which
requests, is no state but a queue: of requests sent and not answered. With an empty one any reply is a mistake; with
another one the end of input is.

Three things are as long as the peer wants, and have states of their own: a NAR within a request or reply (C{NAR}), an
export stream (C{IMPORT}, which alternates with a NAR and what is said of it, on the side that reads it), and a reply
that is sent in pieces (C{STREAM}).

A step without a row is an error: of the peer if it came from the wire (L{nixserve.errors.RemoteProtocolError}), ours
otherwise (L{nixserve.errors.LocalProtocolError}). After an error a machine is C{FAILED} and allows nothing: the
protocol has no way to say "never mind".
"""

from __future__ import annotations

import enum

from nixserve.errors import LocalProtocolError

__all__ = [
    "CLIENT_RECEIVING",
    "CLIENT_SENDING",
    "SERVER_POSTPONED",
    "SERVER_STEPS",
    "State",
    "StateMachine",
    "Step",
]


class State(enum.Enum):
    """Where one direction of a conversation stands."""

    MAGIC = "before the peer's magic"
    HELLO = "before our hello"
    VERSION = "before the peer's version"
    IDLE = "between requests"
    REQUEST = "inside a request"
    NAR = "inside the NAR of a request or reply"
    IMPORT = "between the objects of an export stream"
    IMPORT_NAR = "inside a NAR of an export stream"
    IMPORT_ITEM = "behind a NAR of an export stream"
    REPLY = "before the reply"
    STREAM = "inside a reply that is a stream"
    CLOSED = "ended"
    FAILED = "failed"


class Step(enum.Enum):
    """What can happen, received or sent."""

    MAGIC = "magic"
    HELLO = "hello"
    VERSION = "version"
    COMMAND = "command"
    REQUEST = "request"
    NAR_REQUEST = "request with a NAR"
    IMPORT_REQUEST = "request with an export stream"
    NAR_END = "end of NAR"
    ITEM_START = "start of an object"
    ITEM = "end of an object"
    IMPORT_END = "end of the export stream"
    REPLY = "reply"
    POSTPONE = "postponed reply"
    STREAM_START = "start of a stream"
    STREAM_END = "end of a stream"
    EOF = "end of input"
    ERROR = "error"


SERVER_STEPS: dict[tuple[State, Step], State] = {
    (State.MAGIC, Step.MAGIC): State.HELLO,
    (State.HELLO, Step.HELLO): State.VERSION,
    (State.VERSION, Step.VERSION): State.IDLE,
    (State.IDLE, Step.COMMAND): State.REQUEST,
    (State.IDLE, Step.EOF): State.CLOSED,
    (State.REQUEST, Step.REQUEST): State.REPLY,
    (State.REQUEST, Step.NAR_REQUEST): State.NAR,
    (State.REQUEST, Step.IMPORT_REQUEST): State.IMPORT,
    (State.NAR, Step.NAR_END): State.REPLY,
    (State.IMPORT, Step.ITEM_START): State.IMPORT_NAR,
    (State.IMPORT_NAR, Step.NAR_END): State.IMPORT_ITEM,
    (State.IMPORT_ITEM, Step.ITEM): State.IMPORT,
    (State.IMPORT, Step.IMPORT_END): State.REPLY,
    (State.REPLY, Step.REPLY): State.IDLE,
    (State.REPLY, Step.POSTPONE): State.IDLE,
    (State.REPLY, Step.STREAM_START): State.STREAM,
    (State.STREAM, Step.STREAM_END): State.IDLE,
}
"""The server's side: what it receives and sends is one sequence, but for replies that it postpones."""

SERVER_POSTPONED: dict[tuple[State, Step], State] = {
    (State.IDLE, Step.REPLY): State.IDLE,
    (State.IDLE, Step.STREAM_START): State.STREAM,
    (State.STREAM, Step.STREAM_END): State.IDLE,
}
"""The server's postponed replies, independent of what it receives meanwhile, even of its end. They come before
any other."""

CLIENT_SENDING: dict[tuple[State, Step], State] = {
    (State.HELLO, Step.HELLO): State.IDLE,
    (State.IDLE, Step.REQUEST): State.IDLE,
    (State.IDLE, Step.NAR_REQUEST): State.NAR,
    (State.NAR, Step.NAR_END): State.IDLE,
    (State.IDLE, Step.IMPORT_REQUEST): State.IMPORT,
    (State.IMPORT, Step.IMPORT_END): State.IDLE,
    (State.IDLE, Step.EOF): State.CLOSED,
}
"""What the client sends. An export stream it sends as a store wrote it."""

CLIENT_RECEIVING: dict[tuple[State, Step], State] = {
    (State.MAGIC, Step.MAGIC): State.VERSION,
    (State.VERSION, Step.VERSION): State.IDLE,
    (State.IDLE, Step.REPLY): State.IDLE,
    (State.IDLE, Step.STREAM_START): State.NAR,
    (State.NAR, Step.STREAM_END): State.IDLE,
    (State.IDLE, Step.IMPORT_REQUEST): State.IMPORT,
    (State.IMPORT, Step.ITEM_START): State.IMPORT_NAR,
    (State.IMPORT_NAR, Step.NAR_END): State.IMPORT_ITEM,
    (State.IMPORT_ITEM, Step.ITEM): State.IMPORT,
    (State.IMPORT, Step.STREAM_END): State.IDLE,
    (State.IDLE, Step.EOF): State.CLOSED,
}
"""What the client receives, independent of what it sends meanwhile."""


class StateMachine:
    """One state, moved along one table."""

    __slots__ = ("_steps", "state")

    def __init__(self, state: State, steps: dict[tuple[State, Step], State]) -> None:
        self.state = state
        self._steps = steps

    def allows(self, step: Step) -> bool:
        """Is there a row for this step?"""
        return (self.state, step) in self._steps

    def go(self, step: Step) -> None:
        """
        Make a step.

        @raise LocalProtocolError: the state does not allow it.
        """
        if step is Step.ERROR:
            self.state = State.FAILED
            return
        try:
            self.state = self._steps[self.state, step]
        except KeyError:
            raise LocalProtocolError(f"{step.value} is not possible {self.state.value}") from None
