"""
Content addresses: what a store object's path was computed from, if from its contents.

C{text:sha256:<nix32>} (text files with references, among them every .drv), C{fixed:<algo>:<nix32>} (a flat file),
C{fixed:r:<algo>:<nix32>} (a NAR), C{fixed:git:<algo>:<nix32>} (a git tree; experimental in Nix). Source: Nix 2.8,
src/libstore/content-address.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nixserve.codec.hashes import Hash
from nixserve.errors import FormatError

__all__ = ["ContentAddress", "ContentAddressMethod"]


class ContentAddressMethod(Enum):
    """
    What was hashed. The value is the prefix of the algorithm in a derivation's C{hashAlgo} and in C{fixed:out:…}.
    """

    #: The bytes of a file, with the references beside them.
    TEXT = "text:"
    #: The bytes of a file that is not executable and refers to nothing.
    FLAT = ""
    #: The NAR.
    NAR = "r:"
    #: The git object.
    GIT = "git:"

    @classmethod
    def split(cls, text: str) -> tuple[ContentAddressMethod, str]:
        """
        Cut the prefix off a text such as C{r:sha256}.

        @return: the method and the rest.
        """
        for method in (cls.TEXT, cls.NAR, cls.GIT):
            if text.startswith(method.value):
                return method, text[len(method.value) :]
        return cls.FLAT, text


@dataclass(frozen=True, slots=True)
class ContentAddress:
    """
    @ivar method: what was hashed.
    @ivar hash: its hash. That of a NAR with self-references leaves these out, so it is not the narHash.
    """

    method: ContentAddressMethod
    hash: Hash

    @classmethod
    def parse(cls, text: str) -> ContentAddress:
        """
        @param text: one of the forms above. The hash may also be in base-16 or base-64, as Nix accepts.
        @raise FormatError: it is not.
        """
        kind, _, rest = text.partition(":")
        if kind == "text":
            method = ContentAddressMethod.TEXT
        elif kind == "fixed" and not rest.startswith(ContentAddressMethod.TEXT.value):
            method, rest = ContentAddressMethod.split(rest)
        else:
            raise FormatError(f"content address '{text:.200}' is malformed", expected="'text:' or 'fixed:'")
        algo, colon, digest = rest.partition(":")
        if not colon:
            raise FormatError(f"content address '{text:.200}' is malformed", expected="an algorithm and a hash")
        if method is ContentAddressMethod.TEXT and algo != "sha256":
            raise FormatError(f"text content address hash should use sha256, but instead uses '{algo:.200}'")
        return cls(method, Hash.parseBare(digest, algo))

    def __str__(self) -> str:
        """The form that Nix writes."""
        if self.method is ContentAddressMethod.TEXT:
            return f"text:{self.hash}"
        return f"fixed:{self.method.value}{self.hash}"
