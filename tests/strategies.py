"""
Generators of values that property tests share. Every value is one that the constructors and parsers accept.
"""

from __future__ import annotations

from hypothesis import strategies as st

from nixserve.codec import base32
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import Derivation, DerivationOutput
from nixserve.codec.hashes import DIGEST_SIZES, Hash
from nixserve.codec.pathinfo import Signature, ValidPathInfo
from nixserve.codec.storepath import MAX_NAME_LENGTH, StoreDir, StorePath
from nixserve.codec.text import decodeText

STORE_DIR = StoreDir()

_NAME_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-._?="


def hashes(algo: str | None = None) -> st.SearchStrategy[Hash]:
    """Hashes, of one algorithm or of any."""
    algos = st.sampled_from(sorted(DIGEST_SIZES)) if algo is None else st.just(algo)
    return algos.flatmap(
        lambda name: st.binary(min_size=DIGEST_SIZES[name], max_size=DIGEST_SIZES[name]).map(lambda d: Hash(name, d))
    )


def storePathNames(maxSize: int = 20) -> st.SearchStrategy[str]:
    """Names of store objects, not longer than C{maxSize}."""
    names = st.text(_NAME_CHARACTERS, min_size=1, max_size=maxSize)
    return names.filter(lambda name: name.split("-")[0] not in (".", ".."))


def storePaths(
    names: st.SearchStrategy[str] | None = None, storeDir: StoreDir = STORE_DIR
) -> st.SearchStrategy[StorePath]:
    """Store paths; derivations among them only if C{names} say so."""
    if names is None:
        names = storePathNames().filter(lambda name: not name.endswith(".drv"))
    digests = st.binary(min_size=20, max_size=20)
    return st.builds(lambda d, name: storeDir.parseBaseName(f"{base32.encode(d)}-{name}"), digests, names)


def longStorePaths() -> st.SearchStrategy[StorePath]:
    """Store paths with names up to the greatest length."""
    return storePaths(storePathNames(MAX_NAME_LENGTH))


def drvPaths() -> st.SearchStrategy[StorePath]:
    """Store paths of derivations."""
    return storePaths(storePathNames().map(lambda name: name + ".drv"))


def contentAddresses() -> st.SearchStrategy[ContentAddress]:
    """Content addresses of every method."""
    text = st.builds(ContentAddress, st.just(ContentAddressMethod.TEXT), hashes("sha256"))
    fixed = st.sampled_from([ContentAddressMethod.FLAT, ContentAddressMethod.NAR, ContentAddressMethod.GIT])
    return st.one_of(text, st.builds(ContentAddress, fixed, hashes()))


def signatures() -> st.SearchStrategy[Signature]:
    """Well-formed signatures, of nothing."""
    keyNames = st.text(_NAME_CHARACTERS, min_size=1, max_size=10)
    return st.builds(Signature, keyNames, st.binary(min_size=64, max_size=64))


def pathInfos() -> st.SearchStrategy[ValidPathInfo]:
    """Path infos, with and without what may be missing; some refer to themselves."""

    def withSelfReference(info: ValidPathInfo, selfReference: bool) -> ValidPathInfo:
        references = info.references | ({info.path} if selfReference else set())
        return ValidPathInfo(
            info.path,
            info.narHash,
            info.narSize,
            references,
            info.deriver,
            info.registrationTime,
            info.ultimate,
            info.sigs,
            info.ca,
        )

    infos = st.builds(
        ValidPathInfo,
        path=storePaths(),
        narHash=hashes("sha256"),
        narSize=st.integers(1, 2**63 - 1),
        references=st.frozensets(storePaths(), max_size=4),
        deriver=st.none() | drvPaths(),
        registrationTime=st.integers(0, 2**40),
        ultimate=st.booleans(),
        sigs=st.frozensets(signatures().map(str), max_size=3),
        ca=st.none() | contentAddresses(),
    )
    return st.builds(withSelfReference, infos, st.booleans())


def derivationTexts(maxSize: int = 20) -> st.SearchStrategy[str]:
    """
    Strings of derivations: any bytes, decoded as nixserve decodes them; what is escaped in a .drv is frequent.
    """
    special = st.text('"\\\n\r\tn\0é\U0001f600', max_size=maxSize)
    return special | st.binary(max_size=maxSize).map(decodeText)


def outputNames() -> st.SearchStrategy[str]:
    """Names of outputs."""
    return st.sampled_from(["bin", "dev", "doc", "lib", "out", "static"]) | storePathNames(6)


def derivationOutputs() -> st.SearchStrategy[DerivationOutput]:
    """Outputs of every kind except fixed ones, whose path must agree with their hash."""
    methods = st.sampled_from(["", "r:", "text:", "git:"])
    algos = st.builds(str.__add__, methods, st.sampled_from(sorted(DIGEST_SIZES)))
    return st.one_of(
        st.builds(DerivationOutput, storePaths()),
        st.just(DerivationOutput(None)),
        st.builds(DerivationOutput, st.none(), algos, st.sampled_from(["", "impure"])),
    )


def derivations() -> st.SearchStrategy[Derivation]:
    """
    Derivations that have a text. Their outputs are of mixed kinds and their paths are not the right ones.
    """
    return st.builds(
        Derivation,
        name=storePathNames(),
        outputs=st.dictionaries(outputNames(), derivationOutputs(), max_size=3),
        inputSrcs=st.frozensets(storePaths(), max_size=3),
        platform=st.sampled_from(["x86_64-linux", "aarch64-linux", "builtin"]),
        builder=derivationTexts(),
        args=st.lists(derivationTexts(), max_size=3).map(tuple),
        env=st.dictionaries(derivationTexts(), derivationTexts(), max_size=4),
        inputDrvs=st.dictionaries(drvPaths(), st.frozensets(outputNames(), min_size=1, max_size=2), max_size=3),
    )
