"""
The seams of the Twisted side, as zope interfaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProducer, IProtocol, ITransport
from zope.interface import Attribute, Interface

from nixserve.protocol.policy import Peer, Policy

__all__ = [
    "IErrorReceiver",
    "IServeSessions",
    "IServeTransport",
    "ISharedWorkers",
    "IWorkers",
    "Interruptible",
]


class IServeTransport(ITransport):
    """
    What one session's protocol talks to: the three standard streams and the exit status of the command
    C{nix-store --serve}, wherever they lead.

    After C{pauseProducing} no C{dataReceived} happens until C{resumeProducing}: what arrives meanwhile stays
    with the transport and slows down the sender.
    """

    sent = Attribute(
        "Bytes of standard output that have left for the peer, as far as this side can tell: it grows as long as the "
        "peer reads."
    )

    unsent = Attribute("Bytes of standard output that were written and have not left.")

    def writeError(data: bytes) -> None:
        """
        Write to the session's standard error. Never blocks and never grows without bound: what the peer
        does not read is dropped in the end.
        """

    def allowUnread(size: int) -> int:
        """
        Let the peer send at least C{size} bytes on while the session is paused.

        @return: how many of such bytes this process may come to hold; 0 where the system holds them.
        """

    def registerProducer(producer: IProducer, streaming: bool) -> None:
        """
        As L{twisted.internet.interfaces.IConsumer}; push producers only (C{streaming} true). One that comes when too
        much is unsent already is paused at once.
        """

    def unregisterProducer() -> None:
        """As L{twisted.internet.interfaces.IConsumer}."""

    def pauseProducing() -> None:
        """Deliver no more bytes for now."""

    def resumeProducing() -> None:
        """Deliver bytes again."""

    def exit(status: int) -> None:
        """Flush both streams, report the exit status and close. What is written afterwards is dropped."""

    def abortConnection() -> None:
        """Close at once, flushing nothing."""


class IServeSessions(Interface):
    """
    Gives a protocol for each session that an endpoint lets in.
    """

    def isServed(storeURI: str) -> bool:
        """
        Is this the store served here? An endpoint refuses a command that names another one.
        """

    def buildSession(policy: Policy, peer: Peer) -> IProtocol:
        """
        A protocol that also provides L{twisted.internet.interfaces.IHalfCloseableProtocol}, to be connected
        to an L{IServeTransport}. C{readConnectionLost} is the client's EOF; C{connectionLost} ends the
        session, whatever it was doing.

        @raise nixserve.errors.PolicyError: there are too many sessions.
        """


class IErrorReceiver(Interface):
    """
    A client's protocol that wants to see the remote's standard error.
    """

    def errorReceived(data: bytes) -> None:
        """Some bytes of it, cut anywhere."""


class IWorkers(Interface):
    """
    Where blocking code runs.
    """

    reactor = Attribute("The clock by which waits are counted: an L{twisted.internet.interfaces.IReactorTime}.")

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """Run C{function} somewhere it may block; its result arrives in the reactor's thread."""


class ISharedWorkers(IWorkers):
    """
    Workers that several clients share.
    """

    def of(client: str, atOnce: int) -> IWorkers:
        """
        The same workers for one client, who takes turns with the others. C{call} itself is one client more.

        @param atOnce: how many calls of this client may run at once.
        """


@runtime_checkable
class Interruptible(Protocol):
    """
    A store's session whose calls may wait for somebody far away. Sessions know nothing of zope interfaces.
    """

    def interrupt(self) -> None:
        """Have a call that runs in a thread fail soon; only closing is of use afterwards. Never waits."""
