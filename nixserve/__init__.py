"""
Nix's C{nix-store --serve} in Python on Twisted: a server, a client and a store.

The layers, lowest first: L{nixserve.errors}, L{nixserve.codec} (pure), L{nixserve.store} (blocking, no Twisted),
L{nixserve.builder} (likewise), L{nixserve.protocol} (Twisted), L{nixserve.ssh} (Conch), L{nixserve.remote},
L{nixserve.hook}, L{nixserve.app}. C{docs/architecture.md} says why.

What programs need is offered here, and loaded when it is first used: a program that only reads a store does not pay for
importing Twisted. C{docs/programming.md} shows it.
"""

from importlib import import_module

# Not from typing: whoever uses none of this, as the build hook's small first process, is not to wait for that.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from nixserve.codec.derivation import BasicDerivation as BasicDerivation
    from nixserve.codec.derivation import Derivation as Derivation
    from nixserve.codec.messages import BuildOptions as BuildOptions
    from nixserve.codec.pathinfo import ValidPathInfo as ValidPathInfo
    from nixserve.codec.storepath import StoreDir as StoreDir
    from nixserve.codec.storepath import StorePath as StorePath
    from nixserve.errors import NixServeError as NixServeError
    from nixserve.protocol.client import ServeClient as ServeClient
    from nixserve.protocol.copying import CopyProgress as CopyProgress
    from nixserve.protocol.copying import copyClosure as copyClosure
    from nixserve.protocol.deferredsession import DeferredSession as DeferredSession
    from nixserve.protocol.deferredsession import openSession as openSession
    from nixserve.protocol.remotebuild import buildRemotely as buildRemotely
    from nixserve.remote.connecting import connect as connect
    from nixserve.store.local import LocalStore as LocalStore
    from nixserve.store.memory import MemoryStore as MemoryStore

__version__ = "0.1.0"

_PLACES = {
    "BasicDerivation": "codec.derivation",
    "BuildOptions": "codec.messages",
    "CopyProgress": "protocol.copying",
    "DeferredSession": "protocol.deferredsession",
    "Derivation": "codec.derivation",
    "LocalStore": "store.local",
    "MemoryStore": "store.memory",
    "NixServeError": "errors",
    "ServeClient": "protocol.client",
    "StoreDir": "codec.storepath",
    "StorePath": "codec.storepath",
    "ValidPathInfo": "codec.pathinfo",
    "buildRemotely": "protocol.remotebuild",
    "connect": "remote.connecting",
    "copyClosure": "protocol.copying",
    "openSession": "protocol.deferredsession",
}
"""In which module each name is."""

__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(f"nixserve.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'nixserve' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
