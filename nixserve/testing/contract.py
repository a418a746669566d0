"""
The contract of a store, as a suite of tests that every implementation runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.codec.wire import encodeString, encodeU64
from nixserve.errors import FormatError, StoreError
from nixserve.store.api import Busy, InvalidPath, StoreSession
from nixserve.testing.contractobjects import ObjectContract
from nixserve.testing.contractsmall import SmallPathsContract
from nixserve.testing.objects import addObject, makeInfo, makeNar

__all__ = ["StoreContract"]


class StoreContract(ObjectContract, SmallPathsContract):
    """
    What every L{nixserve.store.api.Store} does. Its logical store directory is C{/nix/store}.

    A test case gives C{makeStore}, and C{collectGarbage} if there is a collector.
    """

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
        self.assertEqual(self.session.queryPathInfos([info.path]), {info.path: self.told(info)})

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
        self.assertLessEqual(max(map(len, self.session.narFromPath(path))), MAX_CHUNK)

    def test_narOfInvalidPath(self) -> None:
        """A path that is not valid is refused before the first chunk is asked for."""
        with self.assertRaises(InvalidPath):
            self.session.narFromPath(makeInfo("x", self.HELLO).path)

    def test_narsOfSeveralPaths(self) -> None:
        """NARs come one behind the other, in the order asked for, as often as asked for."""
        a, b = self.add("a"), self.add("b", self.TREE)
        self.assertEqual(b"".join(self.session.narsFromPaths([a, b, a, a])), self.HELLO + self.TREE + self.HELLO * 2)
        self.assertLessEqual(max(map(len, self.session.narsFromPaths([b, b]))), MAX_CHUNK)
        self.assertEqual(b"".join(self.session.narsFromPaths([])), b"")

    def test_narsOfInvalidPaths(self) -> None:
        """A path that is not valid is refused at once if it is the first one, else after the NARs before it."""
        valid, missing = self.add("x"), makeInfo("missing", self.HELLO).path
        with self.assertRaises(InvalidPath):
            self.session.narsFromPaths([missing, valid])
        stream = self.session.narsFromPaths([valid, missing, valid])
        self.assertEqual(next(stream), self.HELLO)
        with self.assertRaises(InvalidPath) as caught:
            next(stream)
        self.assertEqual(caught.exception.path, missing)

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
        """While somebody else adds the path, finishing an import asks to come back, and then succeeds."""
        info = makeInfo("x", self.HELLO)
        release = self.hold(info)
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(Busy):
            writer.finish(info.path, [], None)
        release()
        writer.finish(info.path, [], None)
        self.assertTrue(self.isValid(info.path))

    def test_importBusyToTheEnd(self) -> None:
        """An import that was still asked to come back when its session ended is not finished afterwards."""
        info = makeInfo("x", self.HELLO)
        release = self.hold(info)
        writer = self.session.importPath()
        writer.feed(self.HELLO)
        with self.assertRaises(Busy):
            writer.finish(info.path, [], None)
        self.session.close()
        release()
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
