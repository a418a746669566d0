"""
Derivations: recipes for building store objects. Their text in .drv files both ways, the hash that identifies them,
and the output paths that follow from it.

Nix's C{hashDerivationModulo}: the path of an input-addressed output must depend on everything that goes into the build
but not on itself, and not on how a fixed output comes about. So a derivation is hashed with its own output paths left
out ("masked") and with each input derivation named by such a hash of its own instead of its path. Source: Nix 2.8,
src/libstore/derivations.cc and local-store.cc (C{checkDerivationOutputs}).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Protocol, TypeVar

from nixserve.codec.aterm import ATermReader, BadATerm, quote, quoteRaw, writeList
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash, digestSize, hashBytes
from nixserve.codec.storepath import DRV_EXTENSION, StoreDir, StorePath, checkName, outputPathName
from nixserve.codec.text import encodeText
from nixserve.errors import FormatError

__all__ = [
    "BadDerivation",
    "BasicDerivation",
    "Derivation",
    "DerivationOutput",
    "Lookup",
    "Memo",
    "OutputKind",
    "checkDerivationOutputs",
    "derivationName",
    "drvPathOf",
    "hashDerivationModulo",
    "outputPaths",
    "parseDerivation",
    "unparse",
    "verifyBasicDerivation",
]

K = TypeVar("K", bound=str)
V = TypeVar("V")

#: Characters of a derivation that is kept while its inputs are looked at. Most have some thousands.
MAX_KEPT_SIZE = 256 * 1024

#: What an entry counts besides.
_ENTRY_SIZE = 100

#: Stands in the place of the hash of an impure output.
_IMPURE = "impure"


class BadDerivation(FormatError):
    """A derivation breaks a rule, or its outputs are not those that follow from it."""


class OutputKind(Enum):
    """How the path of an output is determined."""

    #: By the derivation: known before the build.
    INPUT_ADDRESSED = "input-addressed"
    #: By the hash that the contents must have: known before the build.
    FIXED = "fixed"
    #: By the contents that the build gives.
    FLOATING = "floating"
    #: By the derivation, once the floating outputs among its inputs are known.
    DEFERRED = "deferred"
    #: By the contents, which differ from build to build.
    IMPURE = "impure"


@dataclass(frozen=True, slots=True)
class DerivationOutput:
    """
    An output as the three strings that stand for it in .drv files and on the wire.

    @ivar path: where it goes; C{None}, written as the empty string, if that is not known yet.
    @ivar hashAlgo: empty, or the algorithm after the prefix of a L{ContentAddressMethod}: C{r:sha256}.
    @ivar hash: empty, the digest of a fixed output (Nix writes base-16, but takes the other bare forms from the wire),
        or C{impure}.
    """

    path: StorePath | None
    hashAlgo: str = ""
    hash: str = ""

    def __post_init__(self) -> None:
        kind = self.kind
        if kind is OutputKind.FIXED:
            self._parseHash()
        elif self.hashAlgo:
            digestSize(self.methodAndAlgo[1])
        elif self.hash:
            raise BadDerivation("derivation output has a hash without an algorithm", found=f"'{self.hash:.100}'")
        if (self.path is not None) != (kind in (OutputKind.INPUT_ADDRESSED, OutputKind.FIXED)):
            raise BadDerivation(f"bad path '{self.path or ''}' in derivation: this output is {kind.value}")

    @property
    def kind(self) -> OutputKind:
        """What the three strings say, in the order in which Nix decides."""
        if self.hashAlgo:
            if self.hash == _IMPURE:
                return OutputKind.IMPURE
            return OutputKind.FIXED if self.hash else OutputKind.FLOATING
        return OutputKind.DEFERRED if self.path is None else OutputKind.INPUT_ADDRESSED

    @property
    def methodAndAlgo(self) -> tuple[ContentAddressMethod, str]:
        """What C{hashAlgo} consists of; for outputs that have one."""
        return ContentAddressMethod.split(self.hashAlgo)

    @property
    def contentAddress(self) -> ContentAddress | None:
        """What a fixed output must contain; C{None} for all others."""
        return ContentAddress(self.methodAndAlgo[0], self._parseHash()) if self.kind is OutputKind.FIXED else None

    def _parseHash(self) -> Hash:
        return Hash.parseBare(self.hash, self.methodAndAlgo[1])


@dataclass(frozen=True, slots=True)
class BasicDerivation:
    """
    A derivation whose inputs are all known: what the serve protocol's BuildDerivation carries.

    @ivar name: what its outputs are called after, without C{.drv}.
    @ivar outputs: by name.
    @ivar inputSrcs: the store paths that the build may use.
    @ivar platform: what it must run on, such as C{x86_64-linux}.
    @ivar builder: the program to run.
    @ivar args: its arguments.
    @ivar env: its environment; an entry C{__json} holds structured attributes.
    """

    name: str
    outputs: Mapping[str, DerivationOutput]
    inputSrcs: frozenset[StorePath]
    platform: str
    builder: str
    args: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def knownOutputPaths(self) -> dict[str, StorePath]:
        """Where outputs go, by name: those of which that is known before the build."""
        return {name: output.path for name, output in self.outputs.items() if output.path is not None}

    @property
    def mentioned(self) -> set[StorePath]:
        """Sources, and outputs whose paths are known: what must not vanish while it is built."""
        return {*self.inputSrcs, *self.knownOutputPaths.values()}

    def kind(self) -> OutputKind:
        """
        The kind that all outputs have in common.

        @raise BadDerivation: outputs that do not go together, or none.
        """
        kinds = {output.kind for output in self.outputs.values()}
        if not kinds:
            raise BadDerivation("must have at least one output")
        if len(kinds) > 1:
            raise BadDerivation("can't mix derivation output types")
        [kind] = kinds
        if kind is OutputKind.FIXED:
            if len(self.outputs) > 1:
                raise BadDerivation("only one fixed output is allowed for now")
            if "out" not in self.outputs:
                raise BadDerivation('single fixed output must be named "out"')
        if kind is OutputKind.FLOATING and len({output.methodAndAlgo[1] for output in self.outputs.values()}) > 1:
            raise BadDerivation("all floating outputs must use the same hash algorithm")
        return kind


@dataclass(frozen=True, slots=True)
class Derivation(BasicDerivation):
    """
    A derivation as .drv files hold it.

    @ivar inputDrvs: the derivations whose outputs it uses, and the names of these outputs.
    """

    inputDrvs: Mapping[StorePath, frozenset[str]]


#: Finds the derivation of a .drv path; raises what it likes if it cannot.
Lookup = Callable[[StorePath], Derivation]


class Memo(Protocol):
    """The hashes modulo that are known, by path; C{None}: deferred. A dictionary is one."""

    def __contains__(self, path: object, /) -> bool: ...

    def __getitem__(self, path: StorePath, /) -> Hash | None: ...

    def __setitem__(self, path: StorePath, found: Hash | None, /) -> None: ...


def derivationName(drvPath: StorePath) -> str:
    """
    @return: the name of the derivation that lies at C{drvPath}.
    @raise BadDerivation: the path is not one of a derivation.
    """
    if not drvPath.isDerivation:
        raise BadDerivation(f"'{drvPath}' is not a derivation", expected="a path that ends in '.drv'")
    return drvPath.name[: -len(DRV_EXTENSION)]


# Text.


def parseDerivation(data: bytes, name: str, storeDir: StoreDir) -> Derivation:
    """
    Read the contents of a .drv file.

    @param name: from the file's name: see L{derivationName}.
    @return: the derivation, for which L{unparse} gives C{data} again. Whether its outputs are the right ones is not
        looked at: see L{checkDerivationOutputs}.
    @raise BadATerm: C{data} is nothing that Nix writes.
    """
    reader = _DerivationReader(data, name, storeDir)
    try:
        return reader.derivation()
    except BadATerm:
        raise
    except FormatError as error:
        raise reader.terms.error(f"{error}, right before this") from error


class _DerivationReader:
    """Reads the one derivation of a .drv file, part by part, in the order of the text."""

    def __init__(self, data: bytes, name: str, storeDir: StoreDir) -> None:
        self.terms = ATermReader(data)
        self.name = name
        self.storeDir = storeDir

    def derivation(self) -> Derivation:
        terms = self.terms
        if terms.accept(b"DrvWithVersion("):
            raise terms.error(f"derivation '{self.name}' has the form 'DrvWithVersion', which is not supported")
        if not terms.accept(b"Derive("):
            raise terms.error("derivation does not start with 'Derive' or 'DrvWithVersion'")
        outputs = self.ascending("outputs", terms.items(self.output))
        terms.expect(b",")
        inputDrvs = self.ascending("input derivations", terms.items(self.inputDrv))
        terms.expect(b",")
        inputSrcs = self.ascending("input sources", [(path, path) for path in terms.items(self.storePath)])
        terms.expect(b",")
        platform = terms.rawString()
        terms.expect(b",")
        builder = terms.string()
        terms.expect(b",")
        args = tuple(terms.items(terms.string))
        terms.expect(b",")
        env = self.ascending("environment variables", terms.items(self.variable))
        terms.expect(b")")
        terms.finish()
        return Derivation(self.name, outputs, frozenset(inputSrcs), platform, builder, args, env, inputDrvs)

    def output(self) -> tuple[str, DerivationOutput]:
        self.terms.expect(b"(")
        name = self.terms.rawString()
        checkName(name)
        self.terms.expect(b",")
        path = None if self.terms.accept(b'""') else self.storePath()
        self.terms.expect(b",")
        hashAlgo = self.terms.rawString()
        self.terms.expect(b",")
        output = DerivationOutput(path, hashAlgo, self.terms.rawString())
        if output.contentAddress is not None and output.hash != output.contentAddress.hash.hex:
            raise BadDerivation(f"hash '{output.hash}' is not in base-16")
        self.terms.expect(b")")
        return name, output

    def inputDrv(self) -> tuple[StorePath, frozenset[str]]:
        self.terms.expect(b"(")
        path = self.storePath()
        derivationName(path)
        self.terms.expect(b",")
        names = self.ascending("wanted outputs", [(name, name) for name in self.terms.items(self.terms.rawString)])
        if not names:
            raise BadDerivation(f"inputDrvs entry for '{path}' specifies no outputs")
        self.terms.expect(b")")
        return path, frozenset(names)

    def variable(self) -> tuple[str, str]:
        self.terms.expect(b"(")
        name = self.terms.string()
        self.terms.expect(b",")
        value = self.terms.string()
        self.terms.expect(b")")
        return name, value

    def storePath(self) -> StorePath:
        text = self.terms.rawString()
        path = self.storeDir.parse(text)
        if path != text:
            raise BadDerivation(f"path '{text}' is not canonical")
        return path

    def ascending(self, what: str, items: list[tuple[K, V]]) -> dict[K, V]:
        """The items by key, if they are in the order in which Nix writes them, which also rules out duplicates."""
        if not all(a < b for a, b in pairwise(encodeText(key) for key, _ in items)):
            raise BadDerivation(f"{what} are not in ascending order")
        return dict(items)


def unparse(
    drv: BasicDerivation, maskOutputs: bool = False, actualInputs: Mapping[str, Collection[str]] | None = None
) -> bytes:
    """
    Write a derivation as .drv files hold it. A L{BasicDerivation} has no input derivations.

    @param maskOutputs: leave out the output paths, also where environment variables named like outputs repeat them.
    @param actualInputs: to be written as the input derivations, by whatever stands for them.
    @raise FormatError: a string that cannot be written.
    """
    inputDrvs: Mapping[str, Collection[str]]
    if actualInputs is not None:
        inputDrvs = actualInputs
    elif isinstance(drv, Derivation):
        # StorePath is a str, but Mapping is invariant in its keys.
        inputDrvs = {str(path): names for path, names in drv.inputDrvs.items()}
    else:
        inputDrvs = {}
    masked: Collection[str] = drv.outputs if maskOutputs else ()
    outputs = (_writeOutput(name, drv.outputs[name], maskOutputs) for name in _bytewise(drv.outputs))
    inputs = (
        b"(" + quoteRaw(key) + b"," + writeList(map(quoteRaw, _bytewise(inputDrvs[key]))) + b")"
        for key in _bytewise(inputDrvs)
    )
    env = (b"(" + quote(key) + b"," + quote("" if key in masked else drv.env[key]) + b")" for key in _bytewise(drv.env))
    fields = [
        writeList(outputs),
        writeList(inputs),
        writeList(map(quoteRaw, sorted(drv.inputSrcs))),
        quoteRaw(drv.platform),
        quote(drv.builder),
        writeList(map(quote, drv.args)),
        writeList(env),
    ]
    return b"Derive(%b)" % b",".join(fields)


def _writeOutput(name: str, output: DerivationOutput, mask: bool) -> bytes:
    if mask:
        return b'(%b,"","","")' % quoteRaw(name)
    ca = output.contentAddress
    hash = output.hash if ca is None else ca.hash.hex
    return b"(%b)" % b",".join(map(quoteRaw, (name, output.path or "", output.hashAlgo, hash)))


def _bytewise(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=encodeText)


# Paths and hashes.


def drvPathOf(drv: BasicDerivation, storeDir: StoreDir) -> StorePath:
    """
    The path of the .drv file: that of a text which refers to the inputs, but not to the outputs.
    """
    inputDrvs = drv.inputDrvs if isinstance(drv, Derivation) else {}
    return storeDir.makeTextPath(
        drv.name + DRV_EXTENSION, hashBytes("sha256", unparse(drv)), [*drv.inputSrcs, *inputDrvs]
    )


def hashDerivationModulo(drv: Derivation, lookup: Lookup, storeDir: StoreDir, memo: Memo) -> Hash | None:
    """
    The hash that stands for C{drv} in derivations that use it.

    The graph may be of any depth: no stack of Python's is needed for it.

    @param lookup: finds the input derivations; called once for each that C{memo} lacks, twice for a large one.
    @param memo: hashes of derivations found before, by path; those found now are added.
    @return: C{None} if it is deferred: the derivation or one that it uses has outputs whose paths are not known.
    @raise BadDerivation: outputs that do not go together, or input derivations that use each other in a circle.
    """
    _hashInputs(drv, lookup, storeDir, memo)
    return _hashModulo(drv, storeDir, memo)


def outputPaths(drv: Derivation, lookup: Lookup, storeDir: StoreDir, memo: Memo) -> dict[str, StorePath | None]:
    """
    Compute where the outputs must go, whatever the derivation says.

    @param lookup: as in L{hashDerivationModulo}.
    @param memo: as in L{hashDerivationModulo}.
    @return: the paths by output name; C{None} if it is not known before the build.
    """
    _hashInputs(drv, lookup, storeDir, memo)
    inputs = _actualInputs(drv, memo) if drv.kind() is OutputKind.INPUT_ADDRESSED else None
    return _outputPaths(drv, inputs, storeDir)


def _outputPaths(
    drv: BasicDerivation, inputs: Mapping[str, Collection[str]] | None, storeDir: StoreDir
) -> dict[str, StorePath | None]:
    """
    @param inputs: what stands for the input derivations; C{None} if the hash of one is deferred.
    """
    kind = drv.kind()
    if kind is OutputKind.FIXED:
        return {"out": _fixedPath(drv, storeDir)}
    if kind is not OutputKind.INPUT_ADDRESSED or inputs is None:
        return dict.fromkeys(drv.outputs)
    # One hash serves all outputs; their names make the paths differ.
    masked = hashBytes("sha256", unparse(drv, maskOutputs=True, actualInputs=inputs))
    return {name: storeDir.makeOutputPath(name, masked, drv.name) for name in drv.outputs}


def _hashInputs(drv: Derivation, lookup: Lookup, storeDir: StoreDir, memo: Memo) -> None:
    """Make sure that the memo has every input of C{drv} if its hash depends on them."""
    # The derivations whose inputs are being hashed: each is an input of the one before it. Large ones are not kept but
    # looked up again: a chain of them would not fit into any memory.
    open_: dict[StorePath, Derivation | None] = {}
    stack = _unknownInputs(drv, memo)
    while stack:
        path = stack[-1]
        if path not in open_ and path not in memo:
            opened = lookup(path)
            open_[path] = opened if _size(opened) <= MAX_KEPT_SIZE else None
            missing = _unknownInputs(opened, memo)
            for needed in missing:
                if needed in open_:
                    raise BadDerivation(f"cycle detected in the inputs of derivation '{path}'", found=f"'{needed}'")
            stack += missing
            continue
        stack.pop()
        if path in open_:
            memo[path] = _hashModulo(open_.pop(path) or lookup(path), storeDir, memo)


def _size(drv: Derivation) -> int:
    """About how many characters there are in it, as far as whoever writes it can easily have many."""
    entries = len(drv.env) + len(drv.args) + len(drv.outputs) + len(drv.inputSrcs) + len(drv.inputDrvs)
    return sum(map(len, drv.args)) + sum(map(len, drv.env.values())) + _ENTRY_SIZE * entries


def _unknownInputs(drv: Derivation, memo: Memo) -> list[StorePath]:
    # The hash of any other sort of derivation does not depend on its inputs.
    if drv.kind() is not OutputKind.INPUT_ADDRESSED:
        return []
    return [path for path in drv.inputDrvs if path not in memo]


def _hashModulo(drv: Derivation, storeDir: StoreDir, memo: Memo) -> Hash | None:
    """The hash, from those of the inputs."""
    kind = drv.kind()
    if kind is OutputKind.FIXED:
        output = drv.outputs["out"]
        ca = output.contentAddress
        assert ca is not None  # that is what makes it fixed
        text = f"fixed:out:{output.hashAlgo}:{ca.hash.hex}:{_fixedPath(drv, storeDir)}"
        return hashBytes("sha256", text.encode("ascii"))
    inputs = _actualInputs(drv, memo) if kind is OutputKind.INPUT_ADDRESSED else None
    return None if inputs is None else hashBytes("sha256", unparse(drv, actualInputs=inputs))


def _actualInputs(drv: Derivation, memo: Memo) -> dict[str, set[str]] | None:
    """
    The input derivations by their hashes. Those with the same hash become one.

    Nix hashes each output of a fixed derivation separately and uses it as C{out}; as the only output of such a
    derivation is C{out}, that is no special case.
    """
    inputs: dict[str, set[str]] = {}
    for path, outputNames in drv.inputDrvs.items():
        hash = memo[path]
        if hash is None:
            return None
        inputs.setdefault(hash.hex, set()).update(outputNames)
    return inputs


def _fixedPath(drv: BasicDerivation, storeDir: StoreDir) -> StorePath:
    ca = drv.outputs["out"].contentAddress
    assert ca is not None  # the caller has looked at the kind
    return storeDir.makeContentAddressedPath(ca, outputPathName(drv.name, "out"))


# Checks.


def checkDerivationOutputs(
    drvPath: StorePath,
    drv: Derivation,
    lookup: Lookup,
    storeDir: StoreDir,
    memo: Memo | None = None,
) -> None:
    """
    Make sure that a derivation says of its outputs what follows from it, as a store does before it registers the .drv.

    Nix 2.8 puts up with two things that this does not: a fixed output with another path than its hash gives, and the
    right path in an environment variable in a form that is not canonical.

    @param lookup: as in L{hashDerivationModulo}.
    @param memo: as in L{hashDerivationModulo}, if there is one.
    @raise BadDerivation: it does not, in Nix's words.
    """
    _checkName(drvPath, drv)
    paths = outputPaths(drv, lookup, storeDir, {} if memo is None else memo)
    _checkOutputs(drvPath, drv, paths)
    for name, path in paths.items():
        if path is not None and name not in drv.env:
            raise _badVariable(drvPath, name, path)


def verifyBasicDerivation(drvPath: StorePath, basic: BasicDerivation, storeDir: StoreDir) -> None:
    """
    Make sure that whoever built C{basic} could put the results only where they belong, so that an untrusted peer may
    ask for it: outputs are floating, fixed, or input-addressed with paths that follow from C{basic} alone.

    The last can be only if the derivation had no input derivations: the hashes of these cannot be computed from
    their outputs. That each of C{inputSrcs} is valid is for the caller to check, and that the build is sandboxed.

    @raise BadDerivation: a path or environment variable is another than what follows, or nothing follows.
    """
    _checkName(drvPath, basic)
    kind = basic.kind()
    if kind in (OutputKind.DEFERRED, OutputKind.IMPURE):
        raise BadDerivation(f"derivation '{drvPath}' cannot be verified: its outputs are {kind.value}")
    if isinstance(basic, Derivation) and basic.inputDrvs:
        raise BadDerivation(f"derivation '{drvPath}' cannot be verified: it has input derivations")
    _checkOutputs(drvPath, basic, _outputPaths(basic, {}, storeDir))


def _checkName(drvPath: StorePath, drv: BasicDerivation) -> None:
    name = derivationName(drvPath)
    if drv.name != name:
        raise BadDerivation(f"derivation '{drvPath}' has the wrong name", expected=f"'{name}'", found=f"'{drv.name}'")


def _checkOutputs(drvPath: StorePath, drv: BasicDerivation, paths: Mapping[str, StorePath | None]) -> None:
    for name, path in paths.items():
        stated = drv.outputs[name].path
        if stated != path:
            should = f"should be '{path}'" if path else "whose path is not known before its inputs are built"
            raise BadDerivation(f"derivation '{drvPath}' has incorrect output '{stated}', {should}")
        # The hash does not cover these variables, so each must be looked at. That one is absent it does cover.
        if path is not None and drv.env.get(name, path) != path:
            raise _badVariable(drvPath, name, path)


def _badVariable(drvPath: StorePath, name: str, path: StorePath) -> BadDerivation:
    return BadDerivation(f"derivation '{drvPath}' has incorrect environment variable '{name}', should be '{path}'")
