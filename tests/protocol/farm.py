"""
A store here and one that builds, joined in memory, for builds on the other one.
"""

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import Derivation, DerivationOutput, drvPathOf, outputPaths, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.narwriter import regularEnd, regularStart
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir
from nixserve.protocol.remotebuild import buildRemotely
from nixserve.store.memory import MemoryStore
from nixserve.testing import Joined, addObject, buildTrees, makeInfo, makeNar

STORE_DIR = StoreDir()


ANY = makeInfo("any", b"").path
"""Stands for outputs while their paths are being computed."""


class Farm:
    """
    A store here and one there.

    @ivar built: what the remote has been asked to build: names, with what each could use.
    @ivar answers: what comes of a build, by name, if not success.
    """

    def __init__(self):
        self.local, self.remote = MemoryStore(), MemoryStore()
        self.built, self.answers, self.drvs = [], {}, {}
        self.joined = Joined(self.remote, build=self.answer)
        self.client = self.joined.client
        self.here = self.joined.session(self.local)

    def answer(self, drvPath, drv):
        """Play the builder."""
        self.built.append((drv.name, {path.name for path in drv.inputSrcs}))
        if drv.name in self.answers:
            return self.answers[drv.name]
        return buildTrees(drvPath, drv, {name: f"{drv.name}-{name}".encode() for name in drv.outputs})

    def add(self, store, name):
        """A source in a store."""
        nar = makeNar(name.encode())
        return put(store, makeInfo(name, nar), nar)

    def derivation(self, name, inputs=(), sources=(), outputs=("out",)):
        """
        A .drv in the store here.

        @param inputs: pairs of a .drv and names of its outputs.
        """
        inputDrvs = {path: frozenset(names) for path, names in inputs}
        bare = Derivation(
            name, {output: DerivationOutput(ANY) for output in outputs}, frozenset(sources), "x86_64-linux", "/bin/sh",
            ("-c", ":"), dict.fromkeys(outputs, ""), inputDrvs,
        )  # fmt: skip
        paths = outputPaths(bare, self.drvs.__getitem__, STORE_DIR, {})
        return self.write(Derivation(
            name, {output: DerivationOutput(path) for output, path in paths.items()}, bare.inputSrcs, bare.platform,
            bare.builder, bare.args, dict(paths), inputDrvs,
        ))  # fmt: skip

    def write(self, drv):
        """A .drv in the store here, as it is."""
        text = unparse(drv)
        nar = regularStart(b"", False, len(text)) + text + regularEnd(b"", len(text))
        path = drvPathOf(drv, STORE_DIR)
        ca = ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", text))
        references = frozenset(drv.inputDrvs) | drv.inputSrcs
        info = ValidPathInfo(path, hashBytes("sha256", nar), len(nar), references, ca=ca)
        self.drvs[path] = drv
        return put(self.local, info, nar)

    def output(self, store, drvPath, name="out"):
        """Make an output valid without building it."""
        path = self.drvs[drvPath].outputs[name].path
        nar = makeNar(path.name.encode())
        return put(store, makeInfo(path.name, nar, path=path, deriver=drvPath), nar)

    def build(self, drv, **options):
        """Build, to the end."""
        return self.joined.result(buildRemotely(self.client, drv, self.here, **options))

    def valid(self, store, *paths):
        """Are they?"""
        return store.openSession().queryValidPaths(paths) == set(paths)


def addressed(name, nar):
    """What a store knows about a content-addressed object."""
    return makeInfo(name, nar, ca=ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", nar)))


def put(store, info, nar):
    """Make a path valid, which nothing keeps from the collector then."""
    session = store.openSession()
    addObject(session, info, nar)
    session.close()
    return info.path
