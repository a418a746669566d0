"""
The contract of a store: which objects it takes, and which it refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import (
    Derivation,
    DerivationOutput,
    drvPathOf,
    outputPaths,
    parseDerivation,
)
from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import Directory, EndDirectory
from nixserve.codec.narwriter import encodeNar
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError, NixServeError, StoreError
from nixserve.store.api import Busy, InvalidPath
from nixserve.testing.contractbase import StoreCase
from nixserve.testing.objects import Executable, addObject, makeInfo, makeNar

__all__ = ["ObjectContract"]


def _nested(levels: int, name: bytes) -> bytes:
    """The NAR of directories in each other."""
    return b"".join(encodeNar([Directory(b""), *[Directory(name)] * levels, *[EndDirectory()] * (levels + 1)]))


class ObjectContract(StoreCase):
    """
    What must be true of an object.
    """

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
        twoInADatabase = replace(info, sigs=frozenset({"a b-1:" + "A" * 86 + "=="}))
        self.assertRefused(twoInADatabase, self.HELLO, "signature by key 'a b-1' is corrupt", FormatError)

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

    # --- names

    def test_namedLikeALockFile(self) -> None:
        """
        An object may be called what a store calls the lock file of another path. Adding that other path, in whatever
        way, leaves it as it is, however that ends.
        """
        for number, nar in enumerate((self.HELLO, makeNar(b""), makeNar("nowhere"), self.TREE, makeNar({}))):
            info = makeInfo(f"Cargo-{number}", self.TREE)
            lock = self.add(info.path.name, nar, path=StorePath(f"{info.path}.lock"))
            with contextlib.suppress(NixServeError):
                addObject(self.session, replace(info, narHash=hashBytes("sha256", b"")), self.TREE)
            self._assertUnharmed(lock, nar)
            with contextlib.suppress(NixServeError):
                self.session.addSmallPaths([(info, self.TREE)])
            self._assertUnharmed(lock, nar)
            writer = self.session.importPath()
            writer.feed(self.TREE)
            with contextlib.suppress(NixServeError):
                writer.finish(info.path, [], None)
            self._assertUnharmed(lock, nar)
            with contextlib.suppress(NixServeError):
                addObject(self.session, info, self.TREE)
            self._assertUnharmed(lock, nar)

    def test_namedLikeALockFileInUse(self) -> None:
        """
        While a path is being added, an object called like its lock file has to wait, or comes first. What is valid in
        the end is whole.
        """
        info = makeInfo("Cargo", self.TREE)
        lock = makeInfo("Cargo", self.HELLO, path=StorePath(f"{info.path}.lock"))
        writer = self.session.addToStore(info)
        writer.feed(self.TREE[:200])
        other = self.store.openSession()
        self.addCleanup(other.close)
        with contextlib.suppress(Busy):
            addObject(other, lock, self.HELLO)
        importer = other.importPath()
        importer.feed(self.HELLO)
        with contextlib.suppress(Busy):
            importer.finish(lock.path, [], None)
        with contextlib.suppress(NixServeError):
            writer.feed(self.TREE[200:])
            writer.finish()
        last = self.store.openSession()
        self.addCleanup(last.close)
        addObject(last, lock, self.HELLO)
        self._assertUnharmed(lock.path, self.HELLO)
        if self.isValid(info.path):
            self._assertUnharmed(info.path, self.TREE)

    def _assertUnharmed(self, path: StorePath, nar: bytes) -> None:
        session = self.store.openSession()
        self.addCleanup(session.close)
        self.assertEqual(session.queryValidPaths([path]), {path})
        self.assertEqual(b"".join(session.narFromPath(path)), nar)

    def test_pathsThatAreTooLong(self) -> None:
        """An object in which a path is longer than the kernel takes is refused: it could never be collected."""
        for nar in (_nested(30, b"x" * 200), _nested(300, b"x" * 20)):
            self.assertRefused(makeInfo("x", nar), nar, "File name too long", NixServeError)
            writer = self.session.importPath()
            with self.assertRaisesRegex(NixServeError, "File name too long"):
                writer.feed(nar)
                writer.finish(makeInfo("x", nar).path, [], None)
            writer.abort()
            with self.assertRaisesRegex(NixServeError, "File name too long"):
                self.session.addSmallPaths([(makeInfo("x", nar), nar)])
        self.add("x", _nested(18, b"x" * 200))

    # --- derivations

    def test_noDerivation(self) -> None:
        """What is called .drv must be a derivation."""
        self.assertRefused(makeInfo("x.drv", self.HELLO), self.HELLO, "", FormatError)

    def test_derivationWithForeignOutput(self) -> None:
        """A derivation must not claim an output that is not its own."""
        stranger = makeInfo("foo", self.HELLO).path
        nar = makeNar(self.derivationText(stranger, "/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev"))
        self.assertRefused(makeInfo("foo.drv", nar), nar, "has incorrect output", FormatError)

    def test_readDerivation(self) -> None:
        """A derivation reads as it is written in its file."""
        drv, out, dev = self.addDerivation()
        expected = parseDerivation(self.derivationText(out, dev), "foo", StoreDir())
        self.assertEqual(self.session.readDerivation(drv), expected)

    def test_readWhatIsNoDerivation(self) -> None:
        """What is not valid, is no file or no derivation is not read as one."""
        missing = makeInfo("missing.drv", self.HELLO).path
        with self.assertRaises(InvalidPath) as caught:
            self.session.readDerivation(missing)
        self.assertEqual(caught.exception.path, missing)
        with self.assertRaises(FormatError):
            self.session.readDerivation(self.add("text"))
        with self.assertRaisesRegex(StoreError, "is not a regular file"):
            self.session.readDerivation(self.add("tree", self.TREE))

    def test_writeDerivation(self) -> None:
        """A derivation that is written has the path that follows from it, and is a text that refers to its inputs."""
        first, _, _ = self.addDerivation()
        source = self.add("source")
        self.assertEqual(self.session.addDerivation(self.session.readDerivation(first)), first)
        drv = self._fixed({source}, {first: frozenset({"dev"})})
        path = self.session.addDerivation(drv)
        self.assertEqual(path, drvPathOf(drv, StoreDir()))
        self.assertEqual(self.session.readDerivation(path), drv)
        info = self.session.queryPathInfos([path])[path]
        self.assertEqual(info.references, {first, source})
        self.assertTrue(info.isContentAddressed(StoreDir()))

    def test_writeDerivationWithoutInput(self) -> None:
        """A derivation is not written before its inputs are."""
        missing = makeInfo("missing", self.HELLO).path
        drv = self._fixed({missing})
        with self.assertRaisesRegex(InvalidPath, f"path '{missing}' is not valid"):
            self.session.addDerivation(drv)
        self.assertFalse(self.isValid(drvPathOf(drv, StoreDir())))

    def _fixed(
        self, sources: Collection[StorePath], inputs: Mapping[StorePath, frozenset[str]] | None = None
    ) -> Derivation:
        """A derivation of something that everybody knows."""
        ca = ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", self.HELLO))
        out = StoreDir().makeContentAddressedPath(ca, "bar")
        return Derivation(
            name="bar",
            outputs={"out": DerivationOutput(out, "r:sha256", ca.hash.hex)},
            inputSrcs=frozenset(sources),
            platform="x86_64-linux",
            builder="/bin/sh",
            args=("-c", "echo > $out"),
            env={"out": str(out)},
            inputDrvs=inputs or {},
        )

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
