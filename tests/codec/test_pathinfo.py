"""What is known about objects, signatures, and the order of copying."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash, hashBytes
from nixserve.codec.pathinfo import CycleError, Signature, ValidPathInfo, topoSort
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError
from tests import strategies

STORE = StoreDir()
T = STORE.parse("/nix/store/nj4j70xcnmcdh9y4yfs0ddw3hhli4880-t.txt")
U = STORE.parse("/nix/store/a6v4xzwyn229x9d54hnvfiq9dwvid2jk-u.txt")
U_NAR_HASH = Hash.parse("sha256:1ahgc49sqjlrc221avaf7fc36rx9733cgnagyyl576za0bm62c41")
U_INFO = ValidPathInfo(
    U,
    U_NAR_HASH,
    168,
    frozenset({T}),
    ca=ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", f"see {T}\n".encode())),
)
SELF = STORE.parse("/nix/store/c0s0sinnjqcd858h2lnk879jcixgh3h0-self")
SELF_INFO = ValidPathInfo(
    SELF,
    Hash.parse("sha256:079c061d9a77b7d62cab7e6f332a53ca2cd3754c1b817ebc6beb5059ef382b5b"),
    168,
    frozenset({SELF}),
    ca=ContentAddress.parse("fixed:r:sha256:0ys2nhqfxdanjy93wm174l8gxbwzllb9qsmxkw7cvgrq90s372v6"),
)
SIGNATURE = "test-1:zcx7Do9azgmisTqU6ZnSj7SnVeSShLopq3Zreqi/YJv18V6rh/LP7mH40Jxa1yBiqd4dV20slu+PjK0uUPQ4Ag=="


def changed(info, **changes):
    """C{info} with other fields."""
    return ValidPathInfo(**{name: getattr(info, name) for name in info.__slots__} | changes)


def test_fingerprint():
    """The text that real Nix signed, and the signature over it holds."""
    fingerprint = f"1;{U};sha256:1ahgc49sqjlrc221avaf7fc36rx9733cgnagyyl576za0bm62c41;168;{T}"
    assert U_INFO.fingerprint() == fingerprint
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    publicKey = base64.b64decode("AtBPH395aasm74diyYpGUGUAms/w75vTTY+B1U0dXvg=")
    key = ed25519.Ed25519PublicKey.from_public_bytes(publicKey)
    key.verify(Signature.parse(SIGNATURE).signature, fingerprint.encode())


def test_fingerprintReferences():
    """References are full paths, sorted, the object itself among them."""
    info = changed(U_INFO, references=frozenset({T, U}))
    assert info.fingerprint().endswith(f";168;{U},{T}")
    assert changed(U_INFO, references=frozenset()).fingerprint().endswith(";168;")


def test_fingerprintNeedsSize():
    """Without a size there is nothing to sign."""
    with pytest.raises(FormatError, match="its size is not known"):
        changed(U_INFO, narSize=0).fingerprint()


@given(strategies.pathInfos())
def test_fingerprintCoverage(info):
    """Neither deriver nor signatures nor content address change the fingerprint."""
    other = changed(info, deriver=None, sigs=frozenset(), ca=None, ultimate=not info.ultimate, registrationTime=1)
    assert other.fingerprint() == info.fingerprint()


def test_isContentAddressed():
    """Objects from real Nix prove themselves; with anything changed that counts they do not."""
    assert U_INFO.isContentAddressed(STORE)
    assert SELF_INFO.isContentAddressed(STORE)
    assert (U_INFO.hasSelfReference, SELF_INFO.hasSelfReference) == (False, True)
    for info in (
        changed(U_INFO, references=frozenset()),
        changed(U_INFO, references=frozenset({T, SELF})),
        changed(U_INFO, references=frozenset({T, U})),
        changed(U_INFO, path=T),
        changed(U_INFO, ca=None),
        changed(U_INFO, ca=ContentAddress(ContentAddressMethod.FLAT, U_INFO.ca.hash)),
        changed(SELF_INFO, references=frozenset()),
        changed(SELF_INFO, ca=ContentAddress(ContentAddressMethod.NAR, SELF_INFO.narHash)),
    ):
        assert not info.isContentAddressed(STORE)
    assert not U_INFO.isContentAddressed(StoreDir("/other/store"))


def test_signature():
    """A signature of real Nix, both ways."""
    signature = Signature.parse(SIGNATURE)
    assert (signature.keyName, len(signature.signature)) == ("test-1", 64)
    assert str(signature) == SIGNATURE


@given(strategies.signatures())
def test_signatureRoundTrip(signature):
    """The text reads back as the value."""
    assert Signature.parse(str(signature)) == signature


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        SIGNATURE.partition(":")[2],
        SIGNATURE.removeprefix("test-1"),
        "test-1:",
        "test-1:AAAA",
        SIGNATURE[:-1],
        SIGNATURE + "=",
        SIGNATURE + "\n",
        SIGNATURE.replace("/", "_"),
        SIGNATURE.replace("Ag==", "Ah=="),
        SIGNATURE.replace("test-1:", "test-1:x:"),
        SIGNATURE + "é",
        # In the database of a store these would be two, or none.
        *(f"test{character}{SIGNATURE}" for character in (" ", "\t", "\n", "\0", "\x1b", "\x85", "\xa0", "\udc80")),
        f" {SIGNATURE}",
    ],
)
def test_signatureRejects(text):
    """Nothing but a name and the one base-64 text of 64 bytes is a signature."""
    with pytest.raises(FormatError, match="corrupt"):
        Signature.parse(text)


def p(name):
    """A store path that sorts as C{name} does."""
    return StorePath(f"/nix/store/{name * 32}-{name}")


A, B, C, D = (p(name) for name in "abcd")


@pytest.mark.parametrize(
    ("infos", "order"),
    [
        ({}, []),
        ({B: [], A: []}, [A, B]),
        ({A: [B], B: []}, [B, A]),
        ({A: [A]}, [A]),
        ({A: [C]}, [A]),
        ({A: [D, C], B: [D], C: [B], D: []}, [D, B, C, A]),
        ({A: [B, C, D], B: [D], C: [D], D: []}, [D, B, C, A]),
        ({D: [], C: [D], B: [D, A], A: []}, [A, D, B, C]),
    ],
)
def test_topoSort(infos, order):
    """Depth first in sorted order, each path after what it refers to."""
    assert topoSort(infos) == order
    assert topoSort({path: set(refs) for path, refs in reversed(infos.items())}) == order


@pytest.mark.parametrize("infos", [{A: [B], B: [A]}, {A: [B], B: [C], C: [B]}, {A: [], B: [C], C: [D], D: [B]}])
def test_topoSortCycle(infos):
    """A circle has no order."""
    with pytest.raises(CycleError, match="cycle detected in the references of") as caught:
        topoSort(infos)
    assert caught.value.path in infos[caught.value.parent]


def test_topoSortDeep():
    """A chain of 20,000 needs no stack of Python's."""
    paths = [StorePath(f"/nix/store/{i:032}-x") for i in range(20_000)]
    assert topoSort({path: paths[i + 1 : i + 2] for i, path in enumerate(paths)}) == paths[::-1]


@given(st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 12)), max_size=12))
def test_topoSortReference(graph):
    """The iterative form does what the recursive definition says, for every graph without circles."""
    infos = {
        StorePath(f"/nix/store/{k:032}-x"): {StorePath(f"/nix/store/{r:032}-x") for r in refs if r <= k}
        for k, refs in graph.items()
    }
    expected = []

    def visit(path):
        if path in expected:
            return
        for reference in sorted(infos[path]):
            if reference != path and reference in infos:
                visit(reference)
        expected.append(path)

    for path in sorted(infos):
        visit(path)
    assert topoSort(infos) == expected
