"""
Nix's C{nix-store --serve} in Python on Twisted: a server, a client and a store.

The layers, lowest first: L{nixserve.errors}, L{nixserve.codec} (pure), L{nixserve.store} (blocking, no Twisted),
L{nixserve.protocol} (Twisted), L{nixserve.ssh} (Conch), L{nixserve.app}. C{docs/architecture.md} says why.
"""

__version__ = "0.1.0"
