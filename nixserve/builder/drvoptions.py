"""
What a derivation says about how it wants to be built: attributes that Nix itself looks at.

They stand in the environment, where lists are words and C{1} is true, or among the structured attributes, where they
are JSON. Source: Nix 2.8, src/libstore/parsed-derivations.cc and build/local-derivation-goal.cc (C{checkOutputs});
C{unsafeDiscardReferences} is younger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nixserve.builder.structuredattrs import JSON, STRUCTURED_ATTRS, parseStructuredAttrs
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.derivation import BasicDerivation, OutputKind
from nixserve.errors import BuildError

__all__ = ["DerivationOptions", "OutputChecks"]

#: Bytes of an attribute that has a meaning here, where it is an environment variable: no process can be given more
#: (Linux, MAX_ARG_STRLEN). Read as words, it becomes thirty times as much.
_MAX_VARIABLE = 128 * 1024

_isFileName = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*").fullmatch
_words = re.compile(r"[^ \t\n\r]+").findall


@dataclass(frozen=True, slots=True)
class OutputChecks:
    """
    What an output may refer to, and how large it may be. The sets hold store paths and names of outputs, as text.

    @ivar allowedReferences: nothing else may be referred to; C{None} allows everything.
    @ivar allowedRequisites: nothing else may be in the closure; C{None} allows everything.
    @ivar disallowedReferences: must not be referred to.
    @ivar disallowedRequisites: must not be in the closure.
    @ivar ignoreSelfRefs: for the two about the closure, the output itself does not count.
    @ivar maxSize: bytes of its NAR, or C{None}.
    @ivar maxClosureSize: bytes of the NARs of its closure, or C{None}.
    """

    allowedReferences: frozenset[str] | None = None
    allowedRequisites: frozenset[str] | None = None
    disallowedReferences: frozenset[str] = frozenset()
    disallowedRequisites: frozenset[str] = frozenset()
    ignoreSelfRefs: bool = False
    maxSize: int | None = None
    maxClosureSize: int | None = None


@dataclass(frozen=True, slots=True)
class DerivationOptions:
    """
    The attributes of one derivation.

    @ivar structuredAttrs: all of them, if they are structured.
    @ivar requiredSystemFeatures: what the machine must have; C{ca-derivations} too where the paths of the outputs are
        not known before the build.
    @ivar preferLocalBuild: not worth sending to another machine.
    @ivar allowSubstitutes: outputs may be fetched instead of built.
    @ivar noChroot: asks for a build without a sandbox.
    @ivar outputChecks: for each output.
    @ivar unsafeDiscardReferences: outputs that are not scanned for references.
    @ivar impureEnvVars: variables to take over from the outside, where the build is not sandboxed.
    @ivar passAsFile: variables to put into files. Structured attributes have none.
    @ivar exportReferencesGraph: paths whose closures are described to the builder: by the name of the file, or of the
        attribute if they are structured.
    """

    structuredAttrs: Mapping[str, JSON] | None = None
    requiredSystemFeatures: frozenset[str] = frozenset()
    preferLocalBuild: bool = False
    allowSubstitutes: bool = True
    noChroot: bool = False
    outputChecks: Mapping[str, OutputChecks] = field(default_factory=dict)
    unsafeDiscardReferences: frozenset[str] = frozenset()
    impureEnvVars: tuple[str, ...] = ()
    passAsFile: frozenset[str] = frozenset()
    exportReferencesGraph: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, drv: BasicDerivation) -> DerivationOptions:
        """
        Read the attributes of C{drv}.

        @raise BuildError: one is malformed.
        """
        text = drv.env.get(STRUCTURED_ATTRS)
        attrs: _Attributes = _EnvAttributes(drv.env) if text is None else _JSONAttributes(parseStructuredAttrs(text))
        features = set(attrs.strings("requiredSystemFeatures") or ())
        if drv.kind() not in (OutputKind.INPUT_ADDRESSED, OutputKind.FIXED):
            features.add("ca-derivations")
        return cls(
            structuredAttrs=attrs.structured,
            requiredSystemFeatures=frozenset(features),
            preferLocalBuild=attrs.flag("preferLocalBuild", False),
            allowSubstitutes=attrs.flag("allowSubstitutes", True),
            noChroot=attrs.flag("__noChroot", False),
            outputChecks={name: attrs.outputChecks(name) for name in drv.outputs},
            unsafeDiscardReferences=frozenset(name for name in drv.outputs if attrs.discardsReferences(name)),
            impureEnvVars=attrs.strings("impureEnvVars") or (),
            passAsFile=frozenset(attrs.strings("passAsFile") or ()) if text is None else frozenset(),
            exportReferencesGraph=attrs.exportReferencesGraph(),
        )


class _Attributes(Protocol):
    """Attributes in one of the two forms. Each method raises L{BuildError} for a value of the wrong type."""

    @property
    def structured(self) -> Mapping[str, JSON] | None: ...

    def flag(self, name: str, default: bool) -> bool: ...

    def strings(self, name: str) -> tuple[str, ...] | None:
        """C{None} if there is no such attribute."""

    def outputChecks(self, outputName: str) -> OutputChecks: ...

    def discardsReferences(self, outputName: str) -> bool: ...

    def exportReferencesGraph(self) -> dict[str, tuple[str, ...]]: ...


class _EnvAttributes:
    """The attributes are environment variables."""

    structured: None = None

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def flag(self, name: str, default: bool) -> bool:
        return self._env[name] == "1" if name in self._env else default

    def strings(self, name: str) -> tuple[str, ...] | None:
        return tuple(self._wordsOf(name)) if name in self._env else None

    def _wordsOf(self, name: str) -> list[str]:
        text = self._env.get(name, "")
        if len(text) > _MAX_VARIABLE:
            raise BuildError(
                BuildStatus.INPUT_REJECTED, f"attribute '{name}' of derivation is longer than {_MAX_VARIABLE} bytes"
            )
        return _words(text)

    def outputChecks(self, outputName: str) -> OutputChecks:
        # The same for all outputs.
        return _readChecks(self.strings, ignoreSelfRefs=True)

    def discardsReferences(self, outputName: str) -> bool:
        return False

    def exportReferencesGraph(self) -> dict[str, tuple[str, ...]]:
        text = self._env.get("exportReferencesGraph", "")
        words = self._wordsOf("exportReferencesGraph")
        if len(words) % 2:
            raise BuildError(
                BuildStatus.INPUT_REJECTED, f"odd number of tokens in 'exportReferencesGraph': '{text:.1000}'"
            )
        for fileName in words[::2]:
            if not _isFileName(fileName):
                raise BuildError(
                    BuildStatus.MISC_FAILURE, f"invalid file name '{fileName:.1000}' in 'exportReferencesGraph'"
                )
        return {fileName: (path,) for fileName, path in zip(words[::2], words[1::2], strict=True)}


class _JSONAttributes:
    """The attributes are the members of a JSON object; so are the checks of each output in turn."""

    def __init__(self, members: Mapping[str, JSON], title: str = "") -> None:
        self.structured = members
        self._title = title

    def flag(self, name: str, default: bool) -> bool:
        value = self.structured.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "a Boolean")
        return value

    def strings(self, name: str) -> tuple[str, ...] | None:
        if name not in self.structured:
            return None
        value = self.structured[name]
        if not isinstance(value, list):
            raise self._wrong(name, "a list of strings")
        return tuple(self._string(name, item) for item in value)

    def outputChecks(self, outputName: str) -> OutputChecks:
        checks = self._member("outputChecks")._member(outputName)
        return _readChecks(
            checks.strings,
            ignoreSelfRefs=False,
            maxSize=checks._number("maxSize"),
            maxClosureSize=checks._number("maxClosureSize"),
        )

    def discardsReferences(self, outputName: str) -> bool:
        return self._member("unsafeDiscardReferences").flag(outputName, False)

    def exportReferencesGraph(self) -> dict[str, tuple[str, ...]]:
        value = self.structured.get("exportReferencesGraph")
        # Nix ignores what is no object here.
        if not isinstance(value, dict):
            return {}
        return {key: tuple(self._flatten("exportReferencesGraph", item)) for key, item in value.items()}

    def _flatten(self, name: str, value: JSON) -> list[str]:
        """The strings in a string, or in lists of whatever depth."""
        if isinstance(value, list):
            return [text for item in value for text in self._flatten(name, item)]
        return [self._string(name, value)]

    def _string(self, name: str, value: JSON) -> str:
        if not isinstance(value, str):
            raise self._wrong(name, "a list of strings")
        return value

    def _number(self, name: str) -> int | None:
        value = self.structured.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self._wrong(name, "a number of bytes")
        return int(value)

    def _member(self, name: str) -> _JSONAttributes:
        """An attribute that is an object, or missing."""
        value = self.structured.get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return _JSONAttributes(value, f"{self._title}{name}.")

    def _wrong(self, name: str, expected: str) -> BuildError:
        return BuildError(BuildStatus.MISC_FAILURE, f"attribute '{self._title}{name}' of derivation must be {expected}")


class _Strings(Protocol):
    def __call__(self, name: str, /) -> tuple[str, ...] | None: ...


def _readChecks(
    strings: _Strings, ignoreSelfRefs: bool, maxSize: int | None = None, maxClosureSize: int | None = None
) -> OutputChecks:
    def allowed(name: str) -> frozenset[str] | None:
        words = strings(name)
        return None if words is None else frozenset(words)

    return OutputChecks(
        allowedReferences=allowed("allowedReferences"),
        allowedRequisites=allowed("allowedRequisites"),
        disallowedReferences=frozenset(strings("disallowedReferences") or ()),
        disallowedRequisites=frozenset(strings("disallowedRequisites") or ()),
        ignoreSelfRefs=ignoreSelfRefs,
        maxSize=maxSize,
        maxClosureSize=maxClosureSize,
    )
