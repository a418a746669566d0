"""
What the parts of the contract of a store have in common.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import hashBytes
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError, StoreError
from nixserve.store.api import Store
from nixserve.testing.objects import Executable, addObject, makeInfo, makeNar

__all__ = ["StoreCase"]

if TYPE_CHECKING:
    _Suite = unittest.TestCase
else:
    _Suite = object


class StoreCase(_Suite):
    """
    A store that is to be tested, a session on it, and what the tests ask of both.

    @ivar store: from L{makeStore}.
    @ivar session: on that store.
    """

    HELLO = makeNar(b"hello\n")
    TREE = makeNar(
        {
            "bin": {"run": Executable(b"#!/bin/sh\n"), "link": "run"},
            "empty": {},
            "nothing": b"",
            "large": bytes(range(256)) * 1200,
        }
    )

    FOO_OUT = StorePath("/nix/store/1f5018jnvzb10jsijwrp0hyklh9hmmsg-foo")
    FOO_DEV = StorePath("/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev")

    def makeStore(self) -> Store:
        """
        @return: an empty store. The suite closes it.
        """
        raise NotImplementedError

    def collectGarbage(self, store: Store) -> None:
        """
        Collect what is not rooted. Tests of roots are skipped unless this is overridden.
        """
        raise unittest.SkipTest("this store has no collector")

    def hold(self, info: ValidPathInfo) -> Callable[[], None]:
        """
        Have the lock of a path, as somebody else who is adding it. A store whose sessions hold none while their peers
        are sending overrides this.

        @return: gives it back.
        """
        return self.store.openSession().addToStore(info).abort

    def told(self, info: ValidPathInfo) -> ValidPathInfo:
        """
        What a query says about an object that was added with C{info}. A store behind a protocol that does not carry
        everything overrides this.
        """
        return info

    def setUp(self) -> None:
        """A store and a session."""
        super().setUp()
        self.store = self.makeStore()
        self.addCleanup(self.store.close)
        self.session = self.store.openSession()

    def add(self, name: str, nar: bytes = HELLO, references: Collection[StorePath] = (), **fields: Any) -> StorePath:
        """Make an object valid."""
        info = makeInfo(name, nar, references, **fields)
        addObject(self.session, info, nar)
        return info.path

    def isValid(self, path: StorePath) -> bool:
        """Whether the store, not only our session, has the path."""
        session = self.store.openSession()
        try:
            return session.queryValidPaths([path]) == {path}
        finally:
            session.close()

    def assertRefused(
        self, info: ValidPathInfo, nar: bytes, text: str, family: type[NixServeError] = StoreError
    ) -> None:
        """Adding fails somewhere on the way, nothing is registered, and the right object can be added afterwards."""
        with self.assertRaisesRegex(family, text):
            addObject(self.session, info, nar)
        self.assertFalse(self.isValid(info.path))
        self.assertEqual(self.session.queryPathInfos([info.path]), {})

    def addDerivation(self) -> tuple[StorePath, StorePath, StorePath]:
        """Add the derivation of two outputs that Nix 2.8 made: the .drv, its outputs out and dev."""
        out, dev = self.FOO_OUT, self.FOO_DEV
        text = self.derivationText(out, dev)
        ca = ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", text))
        drv = StoreDir().makeContentAddressedPath(ca, "foo.drv")
        self.assertEqual(drv, "/nix/store/vq69sqp8jpimmv62milrq467xk9wkkg0-foo.drv")
        self.add("foo.drv", makeNar(text), path=drv, ca=ca)
        return drv, out, dev

    def derivationText(self, out: str, dev: str) -> bytes:
        """The text of a .drv file."""
        return (
            f'Derive([("dev","{dev}","",""),("out","{out}","","")],[],[],"x86_64-linux","/bin/sh",[],'
            f'[("builder","/bin/sh"),("dev","{dev}"),("name","foo"),("out","{out}"),("outputs","out dev"),'
            '("system","x86_64-linux")])'
        ).encode()
