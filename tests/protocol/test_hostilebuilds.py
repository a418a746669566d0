"""
A remote that answers builds with other outputs than those that were asked for: the derivation decides, whatever it
says.
"""

from dataclasses import replace

import pytest

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, Derivation, DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.codec.realisation import realisations
from nixserve.errors import NixServeError, RemoteError, StoreError
from nixserve.protocol.buildoutputs import checkBuiltOutputs
from nixserve.store.memory import MemoryStore
from nixserve.testing import Built, Joined, addObject, makeInfo, makeNar
from tests.protocol.farm import STORE_DIR, Farm, addressed, put

EVIL = makeNar(b"evil")
GOOD = b"good"


class _Unchecked(MemoryStore):
    """A store that says what it is told to say, true or not."""

    def __init__(self):
        super().__init__()
        self.lies = {}

    def openSession(self):
        """See L{MemoryStore}."""
        session = super().openSession()
        honest = session.queryPathInfos
        session.queryPathInfos = lambda paths: {path: self.lies.get(path, info) for path, info in honest(paths).items()}
        return session


class HostileFarm(Farm):
    """
    A farm whose remote says what it likes.
    """

    def __init__(self):
        super().__init__()
        self.remote = _Unchecked()
        self.joined = Joined(self.remote, build=self.answer)
        self.client = self.joined.client

    def leaf(self, name, output, env=None):
        """A derivation without inputs."""
        outputs = output if isinstance(output, dict) else {"out": output}
        drv = Derivation(name, outputs, frozenset(), "x86_64-linux", "/bin/sh", (), env or {}, {})
        return self.write(drv)

    def fixed(self, name, contents=GOOD, method=ContentAddressMethod.FLAT, algo="sha256"):
        """A derivation of a fixed output, and its path."""
        data = makeNar(contents) if method is ContentAddressMethod.NAR else contents
        ca = ContentAddress(method, hashBytes(algo, data))
        path = STORE_DIR.makeContentAddressedPath(ca, name)
        output = DerivationOutput(path, f"{method.value}{algo}", ca.hash.hex)
        return self.leaf(name, output, {"out": path}), path

    def says(self, name, outputs, objects=()):
        """What the remote answers."""
        self.answers[name] = Built(BuildResult(BuildStatus.BUILT, builtOutputs=outputs), objects)

    def nothingCame(self):
        """Is the store here as it was?"""
        return set(self.local._objects) == set(self.drvs)


def refused(farm, drv, match, kind=RemoteError):
    """The build ends with one line, and nothing has come."""
    with pytest.raises(kind, match=match) as caught:
        farm.build(drv)
    assert "\n" not in str(caught.value)
    assert farm.nothingCame()


def test_anotherPathForAKnownOutput():
    """Another path than that of the derivation is refused, whether it is input-addressed or fixed."""
    farm = HostileFarm()
    evil = makeInfo("top", EVIL)
    for drv in (farm.derivation("top"), farm.fixed("top")[0]):
        asked = farm.drvs[drv].outputs["out"].path
        farm.says("top", {"out": Realisation(evil.path)}, [(evil, EVIL)])
        refused(farm, drv, f"memory, asked to build '{drv}', says that it has built '{evil.path}' as .*'{asked}'")


def test_outputsOfOthers():
    """An output that the derivation has not got, or that is said to be another derivation's, is refused."""
    farm = HostileFarm()
    drv = farm.derivation("top")
    path = farm.drvs[drv].outputs["out"].path
    farm.says("top", {"bin": Realisation(path)})
    refused(farm, drv, "says that it has built the output 'bin'; asked for was only out")
    # Protocol 2.8 has no hashes of derivations any more; what servers below say is looked at.
    other = farm.drvs[farm.derivation("other", outputs=("dev", "out"))]
    stated = realisations(other, {"out": path}, STORE_DIR)
    result = BuildResult(BuildStatus.BUILT, builtOutputs=stated)
    match = f"of the derivation '{stated['out'].drvHash}'; asked for was that of 'sha256:"
    with pytest.raises(RemoteError, match=match):
        checkBuiltOutputs("memory", drv, farm.drvs[drv], result, STORE_DIR)


def test_renamedFloatingOutput():
    """A floating output has the name that the derivation gives it, so no other output can stand in for it."""
    farm = HostileFarm()
    drv = farm.leaf("top", {"out": DerivationOutput(None, "r:sha256"), "dev": DerivationOutput(None, "r:sha256")})
    good, evil = addressed("top", EVIL), addressed("other", EVIL)
    farm.says("top", {"out": Realisation(good.path), "dev": Realisation(evil.path)}, [(good, EVIL), (evil, EVIL)])
    refused(farm, drv, f"has built '{evil.path}' as its output 'dev'; asked for was a path called 'top-dev'")


def test_missingOutputs():
    """An output that is not told, or not there after all, or left out of its own closure, is refused."""
    farm = HostileFarm()
    drv = farm.leaf("top", DerivationOutput(None, "r:sha256"))
    farm.says("top", {})
    refused(farm, drv, f"memory does not say where the output 'out' of '{drv}' is")
    farm = HostileFarm()
    drv = farm.derivation("top")
    farm.says("top", {})
    refused(farm, drv, "memory: .*path '.*-top' is not valid")
    farm = HostileFarm()
    drv = farm.derivation("top")
    path = farm.output(farm.remote, drv)
    session = farm.remote.openSession()
    type(session).queryClosure, honest = lambda *args: set(), type(session).queryClosure
    try:
        refused(farm, drv, f"memory was asked for '{path}' and what it refers to, and left it out")
    finally:
        type(session).queryClosure = honest


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize(
    ("method", "algo"),
    [
        (ContentAddressMethod.FLAT, "sha256"),
        (ContentAddressMethod.FLAT, "sha1"),
        (ContentAddressMethod.NAR, "sha256"),
        (ContentAddressMethod.NAR, "sha512"),
        (ContentAddressMethod.TEXT, "sha256"),
    ],
)
def test_wrongContentsOfAFixedOutput(method, algo, claimed):
    """The contents of a fixed output are compared with the hash that the derivation states, by every method."""
    farm = HostileFarm()
    drv, path = farm.fixed("top", method=method, algo=algo)
    info = makeInfo("top", EVIL, path=path)
    farm.says("top", {"out": Realisation(path)}, [(info, EVIL)])
    if claimed:
        ca = farm.drvs[drv].outputs["out"].contentAddress
        farm.remote.lies[path] = replace(info, ca=ca)
    refused(farm, drv, f"hash mismatch importing path '{path}'", StoreError)
    assert farm.local.openSession().queryPathInfos([path]) == {}


@pytest.mark.parametrize("method", list(ContentAddressMethod)[:3])
def test_rightContentsOfAFixedOutput(method):
    """What a fixed output should be is taken, and registered as content-addressed, whatever the remote says of that."""
    farm = HostileFarm()
    drv, path = farm.fixed("top", method=method)
    nar = makeNar(GOOD)
    farm.says("top", {"out": Realisation(path)}, [(makeInfo("top", nar, path=path), nar)])
    assert farm.build(drv).outputs == {"out": path}
    assert farm.local.openSession().queryPathInfos([path])[path].ca == farm.drvs[drv].outputs["out"].contentAddress


def test_fixedOutputThatIsThere():
    """It makes no difference that nothing had to be built there."""
    farm = HostileFarm()
    drv, path = farm.fixed("top")
    put(farm.remote, makeInfo("top", EVIL, path=path), EVIL)
    refused(farm, drv, "hash mismatch importing path", StoreError)
    assert farm.built == []


def test_fixedOutputWithReferences():
    """A fixed output refers to nothing: a reference would bring whatever it refers to along."""
    farm = HostileFarm()
    drv, path = farm.fixed("top")
    evil = put(farm.remote, addressed("evil", EVIL), EVIL)
    nar = makeNar(GOOD)
    info = makeInfo("top", nar, [evil], path=path)
    farm.says("top", {"out": Realisation(path)}, [(info, nar)])
    refused(farm, drv, f"memory says that '{path}' refers to '{evil}', but its derivation fixes")


def test_wrongContentsOfADependency():
    """A fixed output that comes along because the output refers to it is compared as well."""
    farm = HostileFarm()
    low, lowPath = farm.fixed("low")
    top = farm.derivation("top", [(low, ["out"])])
    evil = makeInfo("low", EVIL, path=lowPath)
    farm.says("low", {"out": Realisation(lowPath)}, [(evil, EVIL)])
    path, nar = farm.drvs[top].outputs["out"].path, makeNar(b"top")
    farm.says("top", {"out": Realisation(path)}, [(makeInfo("top", nar, [lowPath], path=path), nar)])
    refused(farm, top, f"hash mismatch importing path '{lowPath}'", StoreError)


def test_floatingOutputThatIsNotContentAddressed():
    """A floating output has a content address of the kind that the derivation asks for, and it is true."""
    for lie, match in (
        ({}, "is none, but its derivation asks for one of the kind 'r:sha256'"),
        ({"ca": ContentAddress(ContentAddressMethod.FLAT, hashBytes("sha256", b"evil"))}, "asks for one of the kind"),
        ({"ca": ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", b"x"))}, "claims to be content-addressed"),
    ):
        farm = HostileFarm()
        drv = farm.leaf("top", DerivationOutput(None, "r:sha256"))
        info = makeInfo("top", EVIL)
        farm.remote.lies[info.path] = replace(info, **lie)
        farm.says("top", {"out": Realisation(info.path)}, [(info, EVIL)])
        refused(farm, drv, match, NixServeError)


def test_floatingOutputWithOtherContents():
    """The contents of a floating output give its path."""
    farm = HostileFarm()
    drv = farm.leaf("top", DerivationOutput(None, "r:sha256"))
    good = addressed("top", makeNar(GOOD))
    info = makeInfo("top", EVIL, path=good.path)
    addObject(farm.remote.openSession(), info, EVIL)
    farm.remote.lies[good.path] = replace(info, ca=good.ca)
    farm.says("top", {"out": Realisation(good.path)})
    refused(farm, drv, f"ca hash mismatch importing path '{good.path}'", StoreError)


def chain(farm, low):
    """
    What a build needs whose dependencies are there: C{top}, which needs C{middle}, which needs C{low}.

    @param low: a derivation, and the path of its output.
    @return: C{top}, and the paths of its output and of that of C{middle}.
    """
    middle = farm.derivation("middle", [(low[0], ["out"])])
    top = farm.derivation("top-1.0", [(middle, ["out"])])
    nar, paths = makeNar(b"there"), [farm.drvs[drv].outputs["out"].path for drv in (top, middle)]
    put(farm.remote, makeInfo("middle", nar, [low[1]], path=paths[1]), nar)
    farm.says("top-1.0", {}, [(makeInfo("top-1.0", nar, [paths[1]], path=paths[0]), nar)])
    return top, *paths


def test_whatDerivationsMake():
    """What an output needs comes with it, however far behind it the derivation is that makes it."""
    farm = HostileFarm()
    low = farm.derivation("low-2.0-x", outputs=("out", "lib"))
    path = farm.output(farm.remote, low, "lib")
    top, *paths = chain(farm, (low, path))
    assert {info.path for info in farm.build(top).fetched.infos} == {path, *paths}


def test_whatNoDerivationMakes():
    """Anything else an output cannot have from its builder: a remote would have made it up. It does not come."""
    for drv in ("top", "top-1.0"):
        farm = HostileFarm()
        evil = put(farm.remote, makeInfo("low-2.0", EVIL), EVIL)
        low = farm.derivation("low-2.0")
        top, path, _ = chain(farm, (low, evil))
        if drv == "top":
            top = farm.derivation("top")
            path = farm.drvs[top].outputs["out"].path
            farm.says("top", {}, [(makeInfo("top", EVIL, [evil], path=path), EVIL)])
        refused(farm, top, f"memory says that what was built needs '{evil}', which no derivation behind it makes")


def test_contentsThatGiveTheirPath():
    """What its contents give its path comes whatever needs it: nobody can have anything else there."""
    farm = HostileFarm()
    low = addressed("low", EVIL)
    put(farm.remote, low, EVIL)
    top, *_ = chain(farm, (farm.derivation("low"), low.path))
    assert low.path in {info.path for info in farm.build(top).fetched.infos}


def test_wrongContentsFarBehind():
    """A fixed output is compared with the hash that its derivation states, also if that need not be looked at else."""
    farm = HostileFarm()
    low, path = farm.fixed("low")
    put(farm.remote, makeInfo("low", EVIL, path=path), EVIL)
    top, *_ = chain(farm, (low, path))
    refused(farm, top, f"hash mismatch importing path '{path}'", StoreError)


def test_sourcesThatOnlyTheRemoteHas():
    """Of what a caller's own derivation reads there nobody here knows what it brings along, so all of it comes."""
    farm = HostileFarm()
    low = put(farm.remote, makeInfo("low", EVIL), EVIL)
    source = put(farm.remote, makeInfo("source", EVIL, [low]), EVIL)
    path = makeInfo("top", EVIL).path
    drv = BasicDerivation("top", {"out": DerivationOutput(path)}, frozenset({source}), "x", "x", (), {"out": path})
    farm.says("top", {}, [(makeInfo("top", EVIL, [source], path=path), EVIL)])
    built = farm.build(drv, drvPath=farm.derivation("top"))
    assert {info.path for info in built.fetched.infos} == {low, source, path}


def test_floatingOutputThatIsHere():
    """A floating output that is here already is held to the derivation as well."""
    farm = HostileFarm()
    drv = farm.leaf("top", DerivationOutput(None, "r:sha256"))
    other = put(farm.local, makeInfo("top", EVIL), EVIL)
    farm.says("top", {"out": Realisation(other)}, [(makeInfo("top", EVIL), EVIL)])
    with pytest.raises(RemoteError, match=f"the content address of '{other}' is none, but its derivation asks"):
        farm.build(drv)
