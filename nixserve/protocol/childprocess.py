"""
A client's transport to a child process that speaks the protocol.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from twisted.internet import main
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IProcessTransport, IProtocol, IReactorProcess
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.reactors import IProcessReactor
from nixserve.protocol.stdio import InputStream, OutputStream, StreamPair

__all__ = ["ProcessTransport"]

KILL_SECONDS = 2.0
"""How long a child that is told to end may take: ssh and nix-store need a fraction of it."""

ERROR_SECONDS = 1.0
"""How long the standard error of a child that has exited is read. What the child wrote is there at once; but another
process that it has left behind may keep the pipe open."""


class _ChildOutput(InputStream):
    """
    The standard output of a child.

    @ivar exited: the child is gone. When the pipe is empty then, this is the end, whoever else may hold it open.
    """

    exited = False

    @property
    def unread(self) -> int:
        """How many bytes are in the pipe and were not read."""
        size = array.array("i", [0])
        fcntl.ioctl(self.fileno(), termios.FIONREAD, size)
        return size[0]

    def doRead(self) -> Exception | None:
        """Read and deliver. The end of the pipe is also when the child is gone and the pipe is empty."""
        end = super().doRead()
        # Delivering the bytes may have ended everything.
        if end is None and self.exited and not self.disconnected and not self.unread:
            return main.CONNECTION_DONE
        return end


@implementer(IServeTransport)
class ProcessTransport(StreamPair, ProcessProtocol):
    """
    A client's transport to a child process, such as C{ssh HOST nix-store --serve --write}: its protocol's bytes go
    to the child's standard input and come from its standard output.

    The protocol hears of the end of the child in C{connectionLost}, with
    L{twisted.internet.error.ProcessDone} or L{ProcessTerminated}, when it has got everything that the child wrote.
    What other processes, started by the child, still hold open does not delay that.
    """

    _input: _ChildOutput | None

    def __init__(self, protocol: IProtocol, reactor: IProcessReactor) -> None:
        self._protocol = protocol
        self._reactor = reactor
        self._process: IProcessTransport | None = None
        self._ended: Failure | None = None
        self._aborted = False
        # The next step against a child, or against what it has left behind, that does not end.
        self._deadline: IDelayedCall | None = None

    @classmethod
    def spawn(
        cls, protocol: IProtocol, reactor: IProcessReactor, argv: Sequence[str], env: Mapping[str, str]
    ) -> ProcessTransport:
        """
        Start a child and connect C{protocol} to it.

        @param argv: the program, looked up in PATH, and its arguments.
        """
        transport = cls(protocol, reactor)
        # Pipes of our own rather than Twisted's: theirs are read 8 KiB at a time.
        inputRead, inputWrite = os.pipe()
        outputRead, outputWrite = os.pipe()
        try:
            transport._process = IReactorProcess(reactor).spawnProcess(
                transport, argv[0], argv, env=env, path=None, childFDs={0: inputRead, 1: outputWrite, 2: "r"}
            )
        except BaseException:
            os.close(inputWrite)
            os.close(outputRead)
            raise
        finally:
            os.close(inputRead)
            os.close(outputWrite)
        transport._begin(inputWrite, outputRead)
        return transport

    def _begin(self, inputWrite: int, outputRead: int) -> None:
        self._output = OutputStream(self._reactor, inputWrite, partial(self._outputLost, inputWrite))
        self._input = _ChildOutput(
            self._reactor, outputRead, self._protocol.dataReceived, partial(self._inputLost, outputRead)
        )
        self._input.startReading()
        self._protocol.makeConnection(self)

    def _outputLost(self, fd: int, reason: Failure) -> None:
        # A reactor that stops ends all streams, also one that another has ended meanwhile.
        if self._output is not None:
            self._output = None
            os.close(fd)

    def _inputLost(self, fd: int, reason: Failure) -> None:
        if self._input is None:
            return
        self._input = None
        os.close(fd)
        if self._ended is not None:
            self._finish(self._ended)

    def errReceived(self, data: bytes) -> None:
        """For the reactor: standard error of the child."""
        receiver = IErrorReceiver(self._protocol, None)
        if receiver is not None:
            receiver.errorReceived(data)

    def processExited(self, reason: Failure) -> None:
        """For the reactor: the child is gone; its standard error may not have been read."""
        self._setDeadline(0.0 if self._aborted else ERROR_SECONDS, self._closeErrors)

    def _closeErrors(self) -> None:
        assert self._process is not None, "a child that has exited was started"
        self._process.closeChildFD(2)

    def processEnded(self, reason: Failure) -> None:
        """For the reactor: the child is gone and its standard error has been read."""
        self._setDeadline(None)
        self._ended = reason
        if self._input is None:
            self._finish(reason)
        elif self._aborted or not self._input.unread:
            self._input.connectionLost(reason)
        else:
            self._input.exited = True

    def _finish(self, reason: Failure) -> None:
        if self._output is not None:
            self._output.connectionLost(reason)
        # In a turn of its own: the reactor may still hold events for the descriptors that were closed just now, which a
        # child that is started from here would be given again.
        self._reactor.callLater(0, self._protocol.connectionLost, reason)

    def writeError(self, data: bytes) -> None:
        """See L{IServeTransport}; a client has nobody to write errors to."""

    def loseConnection(self) -> None:
        """End the child's input; it is to end by itself then."""
        if self._output is not None:
            self._output.loseConnection()

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        self.loseConnection()

    def abortConnection(self) -> None:
        """
        End the child: politely, then by force. What it wrote last is not read any more.
        """
        if self._aborted:
            return
        self._aborted = True
        if self._ended is not None and self._input is not None:
            self._input.connectionLost(self._ended)
        elif self._signal("TERM"):
            self._setDeadline(KILL_SECONDS, self._signal, "KILL")

    def _signal(self, name: str) -> bool:
        """Send a signal to the child, if there is one."""
        if self._process is None:
            return False
        try:
            self._process.signalProcess(name)
        except ProcessExitedAlready:
            return False
        return True

    def _setDeadline(self, seconds: float | None, *call: Any) -> None:
        """Have something called at the latest then, in place of what was to be."""
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = None if seconds is None else self._reactor.callLater(seconds, *call)
