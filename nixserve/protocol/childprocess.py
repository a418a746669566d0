"""
A client's transport to a child process that speaks the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport, IProtocol, IReactorProcess
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.stdio import InputStream, OutputStream, StreamPair

__all__ = ["ProcessTransport"]


@implementer(IServeTransport)
class ProcessTransport(StreamPair, ProcessProtocol):
    """
    A client's transport to a child process, such as C{ssh HOST nix-store --serve --write}: its protocol's bytes go
    to the child's standard input and come from its standard output.

    The protocol hears of the end of the child in C{connectionLost}, with
    L{twisted.internet.error.ProcessDone} or L{ProcessTerminated}, when it has got everything that the child wrote.
    """

    def __init__(self, protocol: IProtocol, reactor: Any) -> None:
        self._protocol = protocol
        self._reactor = reactor
        self._process: IProcessTransport | None = None
        self._ended: Failure | None = None
        self._aborted = False

    @classmethod
    def spawn(cls, protocol: IProtocol, reactor: Any, argv: Sequence[str], env: Mapping[str, str]) -> ProcessTransport:
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
        self._input = InputStream(
            self._reactor, outputRead, self._protocol.dataReceived, partial(self._inputLost, outputRead)
        )
        self._input.startReading()
        self._protocol.makeConnection(self)

    def _outputLost(self, fd: int, reason: Failure) -> None:
        self._output = None
        os.close(fd)

    def _inputLost(self, fd: int, reason: Failure) -> None:
        self._input = None
        os.close(fd)
        if self._ended is not None:
            self._finish(self._ended)

    def errReceived(self, data: bytes) -> None:
        """For the reactor: standard error of the child."""
        receiver = IErrorReceiver(self._protocol, None)
        if receiver is not None:
            receiver.errorReceived(data)

    def processEnded(self, reason: Failure) -> None:
        """For the reactor: the child is gone and its standard error has been read."""
        self._ended = reason
        if self._input is None:
            self._finish(reason)
        elif self._aborted:
            self._input.connectionLost(reason)
        # Otherwise its last bytes still lie in the pipe, and the end of it follows them.

    def _finish(self, reason: Failure) -> None:
        if self._output is not None:
            self._output.connectionLost(reason)
        self._protocol.connectionLost(reason)

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
        """Kill the child; what it wrote last is not read any more."""
        self._aborted = True
        if self._ended is not None and self._input is not None:
            self._input.connectionLost(self._ended)
        if self._process is not None:
            with suppress(ProcessExitedAlready):
                self._process.signalProcess("TERM")
