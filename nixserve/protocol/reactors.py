"""
What we need of a reactor. A parameter is typed by what must be provided: C{IReactorTime} where a clock is all, else one
of these.

They are for type checkers, and nothing provides them by name: a reactor, which type checkers do not know, is made one
of them where a process gets hold of it.
"""

from __future__ import annotations

from twisted.internet.interfaces import (
    IReactorCore,
    IReactorFDSet,
    IReactorPluggableNameResolver,
    IReactorProcess,
    IReactorTCP,
    IReactorThreads,
    IReactorTime,
    IReactorUNIX,
)

__all__ = ["IClientReactor", "IProcessReactor", "IServiceReactor", "IStreamReactor", "IThreadReactor"]


class IThreadReactor(IReactorTime, IReactorThreads):
    """Of work in threads: counts the waits, and takes the results back."""


class IStreamReactor(IReactorTime, IReactorFDSet):
    """Of descriptors that are here already: pipes and standard streams."""


class IProcessReactor(IStreamReactor, IReactorProcess):
    """Of child processes, whose streams we read and write ourselves."""


class IClientReactor(IThreadReactor, IProcessReactor, IReactorTCP, IReactorUNIX, IReactorPluggableNameResolver):
    """Of a session on another store, by whichever way its address leads there."""


class IServiceReactor(IClientReactor, IReactorCore):
    """Of a whole process, from its start to its end."""
