"""
For our tests and those of our users: contract suites that an implementation runs, and what they build on.

A suite is a mixin for L{unittest.TestCase}; pytest, trial and unittest run it::

    class MyStoreTests(StoreContract, unittest.TestCase):
        def makeStore(self) -> Store:
            return MyStore()
"""

from __future__ import annotations

import unittest
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import outputPaths, parseDerivation
from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import Contents, Directory, EndDirectory, Event, Regular, Symlink, encodeNar
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.codec.wire import encodeString, encodeU64
from nixserve.errors import FormatError, NixServeError, StoreError
from nixserve.store.api import Busy, InvalidPath, Store, StoreSession

__all__ = ["Executable", "StoreContract", "Tree", "addObject", "makeInfo", "makeNar"]

if TYPE_CHECKING:
    _Suite = unittest.TestCase
else:
    _Suite = object


class Executable(bytes):
    """The contents of an executable file."""


Tree = bytes | str | Mapping[str, "Tree"]
"""A file by its contents (L{Executable} or not), a symbolic link by its target, or a directory by its entries."""


def makeNar(tree: Tree) -> bytes:
    """
    @return: the NAR of C{tree}.
    """
    return b"".join(encodeNar(_events(b"", tree)))


def _events(name: bytes, tree: Tree) -> Iterator[Event]:
    if isinstance(tree, bytes):
        yield Regular(name, isinstance(tree, Executable), len(tree))
        if tree:
            yield Contents(tree)
    elif isinstance(tree, str):
        yield Symlink(name, tree.encode())
    else:
        yield Directory(name)
        for entry, child in sorted((entry.encode(), child) for entry, child in tree.items()):
            yield from _events(entry, child)
        yield EndDirectory()


def makeInfo(
    name: str, nar: bytes, references: Collection[StorePath] = (), storeDir: StoreDir | None = None, **fields: Any
) -> ValidPathInfo:
    """
    An info that a store accepts for C{nar}. Its path follows from the contents, but it states no content address.

    @param fields: others of the info, or another path.
    """
    narHash = hashBytes("sha256", nar)
    path = (storeDir or StoreDir()).makeFixedOutputPath(ContentAddressMethod.NAR, narHash, name, references)
    info = ValidPathInfo(path, narHash, len(nar), frozenset(references), registrationTime=1_600_000_000)
    return replace(info, **fields)


def addObject(session: StoreSession, info: ValidPathInfo, nar: bytes) -> None:
    """
    Add an object at once.

    @raise NixServeError: it is refused.
    """
    writer = session.addToStore(info)
    writer.feed(nar)
    writer.finish()


class StoreContract(_Suite):
    """
    What every L{nixserve.store.api.Store} does. Its logical store directory is C{/nix/store}.
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

    # --- queries

    def test_storeDir(self) -> None:
        """Store and session say which store directory their paths are in."""
        self.assertEqual(self.store.storeDir, StoreDir())
        self.assertEqual(self.session.storeDir, StoreDir())

    def test_validPaths(self) -> None:
        """Of the paths asked about exactly the registered ones are valid."""
        valid, other = self.add("valid"), makeInfo("other", self.HELLO).path
        self.assertEqual(self.session.queryValidPaths([other, valid, valid]), {valid})
        self.assertEqual(self.session.queryValidPaths([]), set())

    def test_infos(self) -> None:
        """Everything that was said about an object comes back."""
        reference = self.add("reference")
        sigs = frozenset({"a-1:" + "A" * 86 + "==", "b-1:" + "A" * 86 + "=="})
        deriver = makeInfo("x.drv", b"").path
        info = makeInfo("x", self.TREE, [reference], deriver=deriver, sigs=sigs, ultimate=True)
        addObject(self.session, info, self.TREE)
        self.assertEqual(self.session.queryPathInfos([info.path]), {info.path: info})

    def test_infosOfInvalidPaths(self) -> None:
        """Paths that are not valid are left out."""
        self.assertEqual(self.session.queryPathInfos([makeInfo("x", self.HELLO).path]), {})

    def test_registrationTime(self) -> None:
        """An unknown time of registration becomes the present one."""
        path = self.add("x", registrationTime=0)
        self.assertGreater(self.session.queryPathInfos([path])[path].registrationTime, 1_600_000_000)

    def test_closure(self) -> None:
        """A closure is the paths and all that they refer to."""
        a = self.add("a")
        b = self.add("b", references=[a])
        c = self.add("c", references=[b])
        other = self.add("other", references=[a])
        self.assertEqual(self.session.queryClosure([c]), {a, b, c})
        self.assertEqual(self.session.queryClosure([b, other]), {a, b, other})
        self.assertEqual(self.session.queryClosure([]), set())

    def test_closureOfInvalidPath(self) -> None:
        """A path that is not valid has no closure."""
        missing = makeInfo("missing", self.HELLO).path
        with self.assertRaises(InvalidPath) as caught:
            self.session.queryClosure([self.add("a"), missing])
        self.assertEqual(caught.exception.path, missing)

    def test_closureWithOutputs(self) -> None:
        """With outputs a closure goes on from derivations to those of their outputs that are valid."""
        drv, out, dev = self.addDerivation()
        self.assertEqual(self.session.queryClosure([drv], includeOutputs=True), {drv})
        reference = self.add("reference")
        self.add("foo", path=out, references=[reference])
        self.assertEqual(self.session.queryClosure([drv]), {drv})
        self.assertEqual(self.session.queryClosure([drv], includeOutputs=True), {drv, out, reference})
        self.assertNotIn(dev, self.session.queryClosure([drv], includeOutputs=True))

    # --- NARs

    def test_narRoundTrip(self) -> None:
        """A NAR comes out as it went in, however it was cut."""
        for cut in (1, 7, 4096, 300_000):
            if cut == 1:
                nar = makeNar({"a": b"abc", "b": {"c": "target"}})
            else:
                nar = self.TREE
            info = makeInfo(f"cut-{cut}", nar)
            writer = self.session.addToStore(info)
            self.assertFalse(writer.alreadyValid)
            for start in range(0, len(nar), cut):
                writer.feed(nar[start : start + cut])
            writer.finish()
            self.assertEqual(b"".join(self.session.narFromPath(info.path)), nar)

    def test_narChunks(self) -> None:
        """A NAR is never handed out whole."""
        path = self.add("x", self.TREE)
        self.assertLessEqual(max(map(len, self.session.narFromPath(path))), 256 * 1024)

    def test_narOfInvalidPath(self) -> None:
        """A path that is not valid is refused before the first chunk is asked for."""
        with self.assertRaises(InvalidPath):
            self.session.narFromPath(makeInfo("x", self.HELLO).path)

    # --- what is refused

    def test_wrongHash(self) -> None:
        """A NAR with another hash is refused."""
        info = makeInfo("x", self.HELLO, narHash=hashBytes("sha256", b""))
        self.assertRefused(info, self.HELLO, "hash mismatch importing path '.*-x'")

    def test_wrongSize(self) -> None:
        """A NAR that is longer or shorter than announced is refused."""
        self.assertRefused(makeInfo("x", self.HELLO, narSize=119), self.HELLO, "size mismatch importing path '.*-x'")
        self.assertRefused(makeInfo("x", self.HELLO, narSize=121), self.HELLO, "size mismatch importing path '.*-x'")

    def test_unknownSize(self) -> None:
        """The size must be announced."""
        self.assertRefused(makeInfo("x", self.HELLO, narSize=0), self.HELLO, "size of its NAR is not known")

    def test_surplus(self) -> None:
        """What follows the end of the NAR does not belong to the object, even if it was announced."""
        nar = self.HELLO + bytes(8)
        self.assertRefused(makeInfo("x", nar), nar, "", NixServeError)

    def test_truncated(self) -> None:
        """A NAR that ends too early is refused."""
        nar = self.HELLO[:-8]
        self.assertRefused(makeInfo("x", nar), nar, "bad archive", FormatError)

    def test_noNar(self) -> None:
        """What is no NAR is refused."""
        for nar in (
            bytes(120),
            self.HELLO.replace(b"hello\n\0", b"hello\n\1"),
            makeNar({"a": b""}).replace(b"a\0", b"/\0"),
        ):
            self.assertRefused(makeInfo("x", nar), nar, "bad archive", FormatError)

    def test_missingReference(self) -> None:
        """Whatever an object refers to must be valid before."""
        missing = makeInfo("missing", self.HELLO).path
        info = makeInfo("x", self.HELLO, [missing])
        self.assertRefused(info, self.HELLO, f"path '{missing}' is not valid", InvalidPath)

    def test_malformedSignature(self) -> None:
        """Some versions of Nix fail on malformed signatures, so none gets in."""
        info = makeInfo("x", self.HELLO, sigs=frozenset({"key:short"}))
        self.assertRefused(info, self.HELLO, "signature by key 'key' is corrupt", FormatError)

    def test_otherStoreDir(self) -> None:
        """Objects of another store directory cannot be added."""
        info = makeInfo("x", self.HELLO, storeDir=StoreDir("/foo/store"))
        with self.assertRaisesRegex(StoreError, "in a store whose directory is '/nix/store'"):
            self.session.addToStore(info)

    def test_otherHashAlgorithm(self) -> None:
        """The hash of a NAR is a SHA-256."""
        self.assertRefused(makeInfo("x", self.HELLO, narHash=hashBytes("sha1", self.HELLO)), self.HELLO, "not sha256")

    def test_retryAfterRefusal(self) -> None:
        """A refused object is in nobody's way."""
        info = makeInfo("x", self.TREE)
        self.assertRefused(replace(info, narHash=hashBytes("sha256", b"")), self.TREE, "hash mismatch")
        addObject(self.session, info, self.TREE)
        self.assertTrue(self.isValid(info.path))

    # --- content addresses

    def test_contentAddresses(self) -> None:
        """True content addresses of each kind are accepted and come back."""
        text = hashBytes("sha256", b"hello\n")
        for ca in (
            ContentAddress(ContentAddressMethod.TEXT, text),
            ContentAddress(ContentAddressMethod.FLAT, text),
            ContentAddress(ContentAddressMethod.FLAT, hashBytes("sha1", b"hello\n")),
            ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", self.HELLO)),
            ContentAddress(ContentAddressMethod.NAR, hashBytes("sha512", self.HELLO)),
        ):
            path = self.add("x", path=StoreDir().makeContentAddressedPath(ca, "x"), ca=ca)
            self.assertEqual(self.session.queryPathInfos([path])[path].ca, ca)

    def test_contentAddressOfAnotherPath(self) -> None:
        """A content address that does not give the path is refused before anything is sent."""
        ca = ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", self.HELLO))
        with self.assertRaisesRegex(StoreError, "claims to be content-addressed but isn't"):
            self.session.addToStore(makeInfo("x", self.HELLO, path=makeInfo("x", self.TREE).path, ca=ca))

    def test_wrongContents(self) -> None:
        """A content address that gives the path, but is not that of the contents, is refused."""
        for method in (ContentAddressMethod.TEXT, ContentAddressMethod.FLAT, ContentAddressMethod.NAR):
            ca = ContentAddress(method, hashBytes("sha256", b"something else"))
            info = makeInfo("x", self.HELLO, path=StoreDir().makeContentAddressedPath(ca, "x"), ca=ca)
            self.assertRefused(info, self.HELLO, "ca hash mismatch importing path")

    def test_flatButNoFile(self) -> None:
        """Only a plain file can have the content address of a file."""
        ca = ContentAddress(ContentAddressMethod.FLAT, hashBytes("sha256", b"hello\n"))
        path = StoreDir().makeContentAddressedPath(ca, "x")
        for tree in ({"a": b"hello\n"}, Executable(b"hello\n"), "hello\n"):
            nar = makeNar(tree)
            self.assertRefused(
                makeInfo("x", nar, path=path, ca=ca), nar, "not a regular file without execute permission"
            )

    def test_selfReference(self) -> None:
        """The content address of an object that contains its own path leaves that out (a vector made by Nix 2.8)."""
        path = StoreDir().parse("/nix/store/c0s0sinnjqcd858h2lnk879jcixgh3h0-self")
        nar = makeNar(f"me {path}\n".encode())
        ca = ContentAddress.parse("fixed:r:sha256:0ys2nhqfxdanjy93wm174l8gxbwzllb9qsmxkw7cvgrq90s372v6")
        self.add("self", nar, [path], path=path, ca=ca)
        self.assertEqual(self.session.queryPathInfos([path])[path].references, {path})
        self.assertEqual(self.session.queryClosure([path]), {path})

    def test_selfReferenceWithoutContentAddress(self) -> None:
        """Any object may refer to itself."""
        path = makeInfo("x", b"").path
        self.add("x", path=path, references=[path])
        self.assertTrue(self.isValid(path))

    # --- derivations

    def addDerivation(self) -> tuple[StorePath, StorePath, StorePath]:
        """Add the derivation of two outputs that Nix 2.8 made: the .drv, its outputs out and dev."""
        out = StorePath("/nix/store/1f5018jnvzb10jsijwrp0hyklh9hmmsg-foo")
        dev = StorePath("/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev")
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

    def test_noDerivation(self) -> None:
        """What is called .drv must be a derivation."""
        self.assertRefused(makeInfo("x.drv", self.HELLO), self.HELLO, "", FormatError)

    def test_derivationWithForeignOutput(self) -> None:
        """A derivation must not claim an output that is not its own."""
        stranger = makeInfo("foo", self.HELLO).path
        nar = makeNar(self.derivationText(stranger, "/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev"))
        self.assertRefused(makeInfo("foo.drv", nar), nar, "has incorrect output", FormatError)

    def test_derivationOfDerivation(self) -> None:
        """The outputs of a derivation are checked with the derivations that it depends on."""
        first, firstOut, firstDev = self.addDerivation()

        def text(out: str) -> bytes:
            return (
                f'Derive([("out","{out}","","")],[("{first}",["out"])],[],"x86_64-linux","/bin/sh",[],'
                f'[("builder","/bin/sh"),("name","bar"),("out","{out}"),("system","x86_64-linux")])'
            ).encode()

        storeDir = StoreDir()
        known = parseDerivation(self.derivationText(firstOut, firstDev), "foo", storeDir)
        draft = parseDerivation(text(makeInfo("bar", b"").path), "bar", storeDir)
        out = outputPaths(draft, {first: known}.__getitem__, storeDir, {})["out"]
        assert out is not None
        wrong, right = makeNar(text(makeInfo("bar", b"").path)), makeNar(text(out))
        self.assertRefused(makeInfo("bar.drv", wrong, [first]), wrong, f"should be '{out}'", FormatError)
        path = self.add("bar.drv", right, [first])
        self.add("bar", path=out)
        self.assertEqual(self.session.queryClosure([path], includeOutputs=True), {first, path, out})

    def test_derivationWithoutInput(self) -> None:
        """A derivation can only be added after those that it depends on."""
        missing = makeInfo("missing.drv", b"").path
        out = makeInfo("bar", b"").path
        nar = makeNar(
            f'Derive([("out","{out}","","")],[("{missing}",["out"])],[],"x86_64-linux","/bin/sh",[],'
            f'[("builder","/bin/sh"),("name","bar"),("out","{out}"),("system","x86_64-linux")])'.encode()
        )
        self.assertRefused(makeInfo("bar.drv", nar, [missing]), nar, f"path '{missing}' is not valid", InvalidPath)

    # --- several writers

    def test_alreadyValid(self) -> None:
        """The NAR of a valid path is counted and dropped, whatever it is."""
        path = self.add("x")
        before = self.session.queryPathInfos([path])
        for other in (self.TREE, bytes(100)):
            writer = self.session.addToStore(makeInfo("x", other, path=path))
            self.assertTrue(writer.alreadyValid)
            writer.feed(other)
            writer.finish()
        self.assertEqual(self.session.queryPathInfos([path]), before)
        self.assertEqual(b"".join(self.session.narFromPath(path)), self.HELLO)

    def test_alreadyValidWrongCount(self) -> None:
        """Also of a dropped NAR exactly the announced bytes must come."""
        path = self.add("x")
        writer = self.session.addToStore(makeInfo("x", self.HELLO, path=path))
        with self.assertRaisesRegex(StoreError, "size mismatch"):
            writer.feed(self.HELLO + b"\0")
        writer = self.session.addToStore(makeInfo("x", self.HELLO, path=path))
        writer.feed(self.HELLO[:-1])
        with self.assertRaisesRegex(StoreError, "size mismatch"):
            writer.finish()
        writer.abort()

    def test_twoSessions(self) -> None:
        """While one session adds a path the other is told to come back, and finds it valid in the end."""
        info = makeInfo("x", self.HELLO)
        other = self.store.openSession()
        writer = self.session.addToStore(info)
        with self.assertRaises(Busy):
            other.addToStore(info)
        writer.feed(self.HELLO)
        with self.assertRaises(Busy):
            other.addToStore(info)
        writer.finish()
        self.assertTrue(other.addToStore(info).alreadyValid)

    def test_abort(self) -> None:
        """Giving up at any point frees the path, and registers nothing."""
        info = makeInfo("x", self.TREE)
        other = self.store.openSession()
        for fed in (0, 50, 3000, len(self.TREE)):
            writer = self.session.addToStore(info)
            writer.feed(self.TREE[:fed])
            writer.abort()
            writer.abort()
            self.assertFalse(self.isValid(info.path))
            with self.assertRaises(StoreError):
                writer.finish()
            self.assertFalse(self.isValid(info.path))
            other.addToStore(info).abort()
        addObject(other, info, self.TREE)
        self.assertTrue(self.isValid(info.path))

    def test_finishTwice(self) -> None:
        """A writer is finished once; giving up afterwards undoes nothing."""
        info = makeInfo("x", self.HELLO)
        writer = self.session.addToStore(info)
        writer.feed(self.HELLO)
        writer.finish()
        with self.assertRaises(StoreError):
            writer.finish()
        writer.abort()
        self.assertTrue(self.isValid(info.path))

    def test_closeFreesLocks(self) -> None:
        """The end of a session frees what it was adding."""
        info = makeInfo("x", self.HELLO)
        other = self.store.openSession()
        writer = self.session.addToStore(info)
        writer.feed(self.HELLO[:60])
        importer = self.session.importPath()
        importer.feed(self.HELLO[:60])
        self.session.close()
        self.session.close()
        addObject(other, info, self.HELLO)
        self.assertTrue(self.isValid(info.path))
        for late in (writer.finish, lambda: importer.finish(info.path, [], None)):
            with self.assertRaises(StoreError):
                late()
        writer.abort()
        importer.abort()

    def test_closedSession(self) -> None:
        """A closed session does nothing more; a stream that it gave out ends with an error."""
        path = self.add("x", makeNar(bytes(1_000_000)))
        stream = self.session.narFromPath(path)
        next(stream)
        self.session.close()
        with self.assertRaises(StoreError):
            b"".join(stream)
        for use in (self.session.queryValidPaths, self.session.addTempRoots, self.session.exportPaths):
            with self.assertRaises(StoreError):
                use([path])

    def test_closedStore(self) -> None:
        """Closing a store closes its sessions; a closed one opens none."""
        self.store.close()
        self.store.close()
        with self.assertRaises(StoreError):
            self.session.queryValidPaths([])
        with self.assertRaises(StoreError):
            self.store.openSession()

    # --- export and import

    def importStream(self, session: StoreSession, infos: Mapping[StorePath, ValidPathInfo], nars: list[bytes]) -> None:
        """Import objects as they stand in an export stream."""
        for info, nar in zip(infos.values(), nars, strict=True):
            writer = session.importPath()
            for start in range(0, len(nar), 1000):
                writer.feed(nar[start : start + 1000])
            writer.finish(info.path, info.references, info.deriver)

    def test_export(self) -> None:
        """An export stream holds exactly the paths, references first."""
        a = self.add("a")
        b = self.add("b", self.TREE, references=[a], deriver=makeInfo("b.drv", b"").path)
        stream = b"".join(self.session.exportPaths([b, a]))
        one, nothing, magic = encodeU64(1), encodeU64(0), encodeU64(0x4558494E)
        deriver = encodeString(makeInfo("b.drv", b"").path.encode())
        first = [one, self.HELLO, magic, encodeString(a.encode()), nothing, nothing, nothing]
        second = [one, self.TREE, magic, encodeString(b.encode()), one, encodeString(a.encode()), deriver, nothing]
        self.assertEqual(stream, b"".join([*first, *second, nothing]))
        self.assertEqual(b"".join(self.session.exportPaths([])), nothing)

    def test_exportOfInvalidPath(self) -> None:
        """Nothing is exported unless everything is valid."""
        with self.assertRaises(InvalidPath):
            self.session.exportPaths([self.add("a"), makeInfo("missing", self.HELLO).path])

    def test_import(self) -> None:
        """Imported objects are what they were, but for what a stream does not carry."""
        a = self.add("a")
        b = self.add("b", self.TREE, [a], deriver=makeInfo("b.drv", b"").path, ultimate=True)
        infos = self.session.queryPathInfos([a, b])
        other = self.makeStore()
        self.addCleanup(other.close)
        session = other.openSession()
        self.importStream(session, infos, [self.HELLO, self.TREE])
        found = session.queryPathInfos([a, b])
        self.assertEqual(
            {path: replace(info, registrationTime=0) for path, info in found.items()},
            {path: replace(info, registrationTime=0, ultimate=False) for path, info in infos.items()},
        )
        self.assertEqual(b"".join(session.narFromPath(b)), self.TREE)

    def test_importOfValidPath(self) -> None:
        """An already valid path is not compared, and stays what it is."""
        path = self.add("x")
        writer = self.session.importPath()
        writer.feed(self.TREE)
        writer.finish(path, [], None)
        self.assertEqual(b"".join(self.session.narFromPath(path)), self.HELLO)

    def test_importBusy(self) -> None:
        """While another session adds the path, finishing an import asks to come back, and then succeeds."""
        info = makeInfo("x", self.HELLO)
        other = self.store.openSession()
        blocker = other.addToStore(info)
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(Busy):
            writer.finish(info.path, [], None)
        blocker.abort()
        writer.finish(info.path, [], None)
        self.assertTrue(self.isValid(info.path))

    def test_importBusyToTheEnd(self) -> None:
        """An import that was still asked to come back when its session ended is not finished afterwards."""
        info = makeInfo("x", self.HELLO)
        blocker = self.store.openSession().addToStore(info)
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(Busy):
            writer.finish(info.path, [], None)
        self.session.close()
        blocker.abort()
        with self.assertRaises(StoreError):
            writer.finish(info.path, [], None)
        self.assertFalse(self.isValid(info.path))

    def test_importRefused(self) -> None:
        """Nothing is registered for a bad NAR, an incomplete one, or a missing reference."""
        info = makeInfo("x", self.HELLO)
        missing = makeInfo("missing", self.HELLO).path
        writer = self.session.importPath()
        with self.assertRaises(FormatError):
            writer.feed(bytes(120))
        writer = self.session.importPath()
        writer.feed(self.HELLO[:-8])
        with self.assertRaises(FormatError):
            writer.finish(info.path, [], None)
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(FormatError):
            writer.feed(b"\0")
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(InvalidPath):
            writer.finish(info.path, [missing], None)
        writer.abort()
        self.assertFalse(self.isValid(info.path))
        self.importStream(self.session, {info.path: info}, [self.HELLO])
        self.assertTrue(self.isValid(info.path))

    # --- roots

    def test_roots(self) -> None:
        """A collector spares what open sessions have rooted and all that it refers to, and only that."""
        reference = self.add("reference")
        kept = self.add("kept", references=[reference])
        dropped = self.add("dropped")
        session = self.store.openSession()
        session.addTempRoots([kept, makeInfo("missing", self.HELLO).path])
        self.session.close()
        self.collectGarbage(self.store)
        self.assertEqual(session.queryValidPaths([reference, kept, dropped]), {reference, kept})
        session.close()
        self.collectGarbage(self.store)
        self.assertFalse(self.isValid(kept))

    def test_rootsOfAdded(self) -> None:
        """What a session added stays as long as the session, and so does what it is still adding."""
        info = makeInfo("added", self.TREE)
        importer = self.session.importPath()
        importer.feed(self.TREE[:1000])
        writer = self.session.addToStore(info)
        writer.feed(self.TREE[:1000])
        self.collectGarbage(self.store)
        writer.feed(self.TREE[1000:])
        writer.finish()
        importer.feed(self.TREE[1000:])
        imported = makeInfo("imported", self.TREE).path
        importer.finish(imported, [], None)
        self.collectGarbage(self.store)
        for path in (info.path, imported):
            self.assertEqual(b"".join(self.session.narFromPath(path)), self.TREE)
