"""
The contract of a store: several small objects at once.
"""

from __future__ import annotations

from dataclasses import replace

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import hashBytes
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir
from nixserve.errors import FormatError, NixServeError, StoreError
from nixserve.store.api import Busy, InvalidPath, StoreSession
from nixserve.testing.contractbase import StoreCase
from nixserve.testing.objects import Executable, Tree, makeInfo, makeNar

__all__ = ["SmallPathsContract"]


class SmallPathsContract(StoreCase):
    """
    L{nixserve.store.api.StoreSession.addSmallPaths}.
    """

    def addAll(self, session: StoreSession, objects: list[tuple[ValidPathInfo, bytes]]) -> None:
        """Add them as every user of C{addSmallPaths} does."""
        added = 0
        while added < len(objects):
            added += session.addSmallPaths(objects[added:])

    def assertStopsAt(
        self, objects: list[tuple[ValidPathInfo, bytes]], text: str, family: type[NixServeError] = StoreError
    ) -> None:
        """
        Of three objects the middle one is refused: the first is added, the last is not, and is not in the way. Alone
        in front it is refused as well.
        """
        self.assertEqual(self.session.addSmallPaths(objects), 1)
        for _ in range(2):
            with self.assertRaisesRegex(family, text):
                self.session.addSmallPaths(objects[1:])
        valid = self.session.queryValidPaths([info.path for info, _ in objects])
        self.assertEqual(valid, {objects[0][0].path})
        other = self.store.openSession()
        self.assertEqual(other.addSmallPaths(objects[2:]), 1)

    def test_addSmallPaths(self) -> None:
        """Objects of every shape come out as they went in, with everything that was said about them."""
        trees: list[Tree] = [
            b"hello\n",
            b"",
            Executable(b"#!/bin/sh\n"),
            "target",
            {},
            {"a": b"abc", "b": {"c": "d"}},
            bytes(5000),
        ]
        deriver = makeInfo("x.drv", b"").path
        sigs = frozenset({"a-1:" + "A" * 86 + "=="})
        objects = []
        for number, tree in enumerate(trees):
            nar = makeNar(tree)
            objects.append((makeInfo(f"x-{number}", nar, deriver=deriver, sigs=sigs), nar))
        self.addAll(self.session, objects)
        self.assertEqual(
            self.session.queryPathInfos([info.path for info, _ in objects]),
            {info.path: self.told(info) for info, _ in objects},
        )
        for info, nar in objects:
            self.assertEqual(b"".join(self.session.narFromPath(info.path)), nar)

    def test_addSmallPathsInOrder(self) -> None:
        """Each may refer to itself, to what is valid and to what stands before it, however many there are."""
        before = self.add("before")
        objects = []
        references = [before]
        for number in range(300):
            info = makeInfo(f"x-{number}", self.HELLO, references[-3:])
            info = replace(info, references=info.references | {info.path})
            objects.append((info, self.HELLO))
            references.append(info.path)
        self.addAll(self.session, objects)
        self.assertEqual(self.session.queryClosure([references[-1]]), set(references))

    def test_addSmallPathsOfNothing(self) -> None:
        """None are none."""
        self.assertEqual(self.session.addSmallPaths([]), 0)

    def test_addSmallPathsOutOfOrder(self) -> None:
        """None may refer to what stands behind it."""
        last = makeInfo("last", self.HELLO)
        early = makeInfo("early", self.HELLO, [last.path])
        objects = [(makeInfo("first", self.HELLO), self.HELLO), (early, self.HELLO), (last, self.HELLO)]
        self.assertStopsAt(objects, f"path '{last.path}' is not valid", InvalidPath)
        self.assertEqual(self.session.addSmallPaths([(early, self.HELLO)]), 1)

    def test_addSmallPathsRefused(self) -> None:
        """What one object alone is refused for, it is refused for among others, which are not concerned."""
        missing = makeInfo("missing", self.HELLO).path
        ca = ContentAddress(ContentAddressMethod.FLAT, hashBytes("sha256", b"something else"))
        longer, shorter, bad = self.HELLO + bytes(8), self.HELLO[:-8], bytes(120)
        wrong: list[tuple[ValidPathInfo, bytes, str, type[NixServeError]]] = [
            (makeInfo("x", self.HELLO, narHash=hashBytes("sha256", b"")), self.HELLO, "hash mismatch", StoreError),
            (makeInfo("x", self.HELLO, narHash=hashBytes("sha1", self.HELLO)), self.HELLO, "not sha256", StoreError),
            (makeInfo("x", self.HELLO, narSize=119), self.HELLO, "size mismatch", StoreError),
            (makeInfo("x", self.HELLO, narSize=121), self.HELLO, "", NixServeError),
            (makeInfo("x", self.HELLO, narSize=0), self.HELLO, "size of its NAR is not known", StoreError),
            (makeInfo("x", self.HELLO, [missing]), self.HELLO, f"path '{missing}' is not valid", InvalidPath),
            (makeInfo("x", longer), longer, "", NixServeError),
            (makeInfo("x", shorter), shorter, "bad archive", FormatError),
            (makeInfo("x", bad), bad, "bad archive", FormatError),
            (makeInfo("x", self.HELLO, sigs=frozenset({"k:short"})), self.HELLO, "signature by key 'k'", FormatError),
            (makeInfo("x", self.HELLO, storeDir=StoreDir("/foo/store")), self.HELLO, "whose directory is", StoreError),
            (makeInfo("x", self.HELLO, ca=ca), self.HELLO, "claims to be content-addressed but isn't", StoreError),
            (
                makeInfo("x", self.HELLO, path=StoreDir().makeContentAddressedPath(ca, "x"), ca=ca),
                self.HELLO,
                "ca hash mismatch",
                StoreError,
            ),
            (makeInfo("x.drv", self.HELLO), self.HELLO, "", FormatError),
        ]
        for number, (info, nar, text, family) in enumerate(wrong):
            first, last = makeInfo(f"first-{number}", self.HELLO), makeInfo(f"last-{number}", self.HELLO)
            self.assertStopsAt([(first, self.HELLO), (info, nar), (last, self.HELLO)], text, family)
        info = makeInfo("x", self.HELLO)
        self.assertEqual(self.session.addSmallPaths([(info, self.HELLO)]), 1)

    def test_addSmallPathsAlreadyValid(self) -> None:
        """What is valid already is counted and dropped, whatever it is; but it must have the size that was said."""
        valid = self.add("valid")
        same = makeInfo("valid", self.HELLO, path=valid)
        first, last = makeInfo("first", self.HELLO), makeInfo("last", self.HELLO, [valid])
        objects = [(first, self.HELLO), (replace(same, narSize=len(self.TREE)), self.TREE), (last, self.HELLO)]
        self.addAll(self.session, objects)
        self.assertEqual(b"".join(self.session.narFromPath(valid)), self.HELLO)
        self.assertTrue(self.isValid(last.path))
        self.assertEqual(self.session.addSmallPaths([(first, self.HELLO)]), 1)
        with self.assertRaisesRegex(StoreError, "size mismatch"):
            self.session.addSmallPaths([(same, self.HELLO + bytes(8))])

    def test_addSmallPathsTwice(self) -> None:
        """The same path twice in one batch is valid the second time."""
        info, other = makeInfo("x", self.HELLO), makeInfo("other", self.HELLO)
        self.addAll(self.session, [(info, self.HELLO), (other, self.HELLO), (info, self.HELLO)])
        self.assertEqual(self.session.queryPathInfos([info.path]), {info.path: self.told(info)})
        self.assertTrue(self.isValid(other.path))

    def test_addSmallPathsLocked(self) -> None:
        """One that somebody else is adding ends the batch; in front it asks to come back, and keeps no lock."""
        infos = [makeInfo(name, self.HELLO) for name in ("a", "b", "c")]
        objects = [(info, self.HELLO) for info in infos]
        release = self.hold(infos[1])
        self.assertEqual(self.session.addSmallPaths(objects), 1)
        with self.assertRaises(Busy):
            self.session.addSmallPaths(objects[1:])
        self.hold(infos[2])()
        release()
        self.assertEqual(self.session.addSmallPaths(objects[1:]), 2)
        self.assertEqual(self.session.queryValidPaths([info.path for info in infos]), {info.path for info in infos})

    def test_addSmallPathsAreRoots(self) -> None:
        """What came in a batch stays as long as the session."""
        objects = [(makeInfo(name, self.HELLO), self.HELLO) for name in ("a", "b")]
        self.session.addSmallPaths(objects)
        self.collectGarbage(self.store)
        self.assertTrue(all(self.isValid(info.path) for info, _ in objects))
        self.session.close()
        with self.assertRaises(StoreError):
            self.session.addSmallPaths(objects)
        self.collectGarbage(self.store)
        self.assertFalse(any(self.isValid(info.path) for info, _ in objects))

    def test_addSmallPathsWithDerivations(self) -> None:
        """The known outputs of a derivation that came in a batch are registered, with it."""
        text = self.derivationText(self.FOO_OUT, self.FOO_DEV)
        ca = ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", text))
        drv = StoreDir().makeContentAddressedPath(ca, "foo.drv")
        nar = makeNar(text)
        out = makeInfo("foo", self.HELLO, path=self.FOO_OUT, deriver=drv)
        self.addAll(self.session, [(makeInfo("foo.drv", nar, path=drv, ca=ca), nar), (out, self.HELLO)])
        self.assertEqual(self.session.queryClosure([drv], includeOutputs=True), {drv, out.path})
