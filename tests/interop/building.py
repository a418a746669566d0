"""
Builds beside real Nix: its sandbox and ours with the same C{/bin/sh}, and the build commands of the serve protocol in
raw bytes.

A store that does not lie where its paths say, as all here, is built for in a sandbox only, by real Nix and by us.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from nixserve.builder.sandbox import findShell, sandboxProblem
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir, StorePath
from tests.interop.conversations import Session, buildPaths, string, strings, u64
from tests.interop.nix import NIX_CONFIG, ourProgram, unavailable
from tests.interop.stores import named

DERIVATIONS = Path(__file__).parent / "derivations"
TREE = DERIVATIONS / "tree.nix"

#: What the derivations of L{TREE} need that not every machine has.
FEATURE = "foo"

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def requireSandbox():
    """
    What confined builds need.

    @return: what in the environment gives real Nix the same sandbox as ours.
    """
    shell = findShell()
    if shell is None:
        unavailable("there is no static busybox here")
    if problem := sandboxProblem():
        unavailable(f"builds cannot be confined: {problem}")
    settings = {
        "sandbox": "true",
        "sandbox-fallback": "false",
        "sandbox-paths": f"/bin/sh={shell.source}",
        "system-features": FEATURE,
    }
    return {"NIX_CONFIG": NIX_CONFIG + "".join(f"{name} = {value}\n" for name, value in settings.items())}


def withoutEscapes(text):
    """A message without colours, as users read it."""
    return _ESCAPES.sub("", text)


def builders(url, features=FEATURE):
    """The options of C{nix-build} that have everything built elsewhere, four at a time."""
    return ["--max-jobs", "0", "--builders", f"{url} x86_64-linux,builtin - 4 1 {features}"]


def stdioURL(who, root):
    """A server that Nix runs itself, without SSH: C{real} or C{ours}."""
    if who == "real":
        return f"ssh://localhost?remote-store={root}"
    return (
        f"ssh://localhost?remote-program={ourProgram('nixserve-store')}&remote-store={root}?system-features={FEATURE}"
    )


@dataclass(frozen=True)
class Recipe:
    """
    A derivation for a raw client.

    @ivar outputs: name to path, hash algorithm and hash.
    """

    drvPath: str
    outputs: dict
    script: str
    inputs: tuple = ()
    env: dict = field(default_factory=dict)
    platform: str = "x86_64-linux"
    builder: str = "/bin/sh"

    @property
    def paths(self):
        """Of the outputs."""
        return [path for path, _, _ in self.outputs.values()]

    @property
    def args(self):
        """Of the builder."""
        return ["-ec", self.script]

    @property
    def allEnv(self):
        """The environment, with the paths of the outputs."""
        return {name: path for name, (path, _, _) in self.outputs.items()} | self.env

    @property
    def wire(self):
        """As BuildDerivation sends it, with its path."""
        parts = [string(self.drvPath), u64(len(self.outputs))]
        for name, triple in sorted(self.outputs.items()):
            parts += map(string, (name, *triple))
        parts += [strings(sorted(self.inputs)), string(self.platform), string(self.builder)]
        parts += [strings(self.args), u64(len(self.allEnv))]
        for name, value in sorted(self.allEnv.items()):
            parts += [string(name), string(value)]
        return b"".join(parts)


def recipe(name, script, outputs=("out",), **fields):
    """
    A L{Recipe} with input-addressed outputs, whose paths follow from all the rest.

    @param name: what a store knows nothing of yet.
    """
    unknown = Recipe(named(f"{name}.drv"), dict.fromkeys(outputs, ("", "", "")), script, **fields)
    drv = BasicDerivation(
        name,
        {output: DerivationOutput(None) for output in outputs},
        frozenset(map(StorePath, unknown.inputs)),
        unknown.platform,
        unknown.builder,
        tuple(unknown.args),
        unknown.allEnv,
    )
    masked = hashBytes("sha256", unparse(drv, maskOutputs=True))
    paths = {output: (StoreDir().makeOutputPath(output, masked, name), "", "") for output in outputs}
    return replace(unknown, outputs=paths)


def flatRecipe(nix, name, script, contents, **fields):
    """A L{Recipe} whose output is to be a file with these contents."""
    digest = hashlib.sha256(contents).hexdigest()
    (path,) = nix.lines("nix-store", "--print-fixed-path", "sha256", digest, name, store="dummy://")
    return Recipe(named(f"{name}.drv"), {"out": (path, "sha256", digest)}, script, **fields)


def buildOptions(minor, silence=0, timeout=0, logSize=0, keepFailed=0):
    """BuildOptions as a client of some minor version sends them."""
    data = u64(silence) + u64(timeout)
    if minor >= 2:
        data += u64(logSize)
    if minor >= 3:
        data += u64(0) + u64(0)
    if minor >= 7:
        data += u64(keepFailed)
    return data


def buildDerivation(made, minor=7, **options):
    """Command 8."""
    return u64(8) + made.wire + buildOptions(minor, **options)


@dataclass(frozen=True)
class Result:
    """
    A BuildResult as it was read.

    @ivar times: how often built, whether that differed, start, stop; nothing below minor version 3.
    @ivar outputs: of minor versions from 6.
    """

    status: int
    message: str
    times: tuple = ()
    outputs: dict = field(default_factory=dict)

    @property
    def text(self):
        """The message as users read it."""
        return withoutEscapes(self.message)


def readResult(session, minor, surplus=False):
    """A BuildResult, in the layout of some minor version."""
    status, message = session.readU64(), session.readString()
    times = tuple(session.readU64() for _ in range(4)) if minor >= 3 else ()
    outputs = {}
    for _ in range(session.readU64() if minor >= 6 or surplus else 0):
        key = session.readString()
        outputs[key] = session.readString() if minor < 8 else (session.readString(), session.readStrings())
    return Result(status, message, times, outputs)


def readStatus(session):
    """
    What BuildPaths answers.

    @return: the status, and the message as users read it.
    """
    status = session.readU64()
    return status, withoutEscapes(session.readString()) if status else ""


class Talk(Session):
    """
    A conversation with a server that runs as a child, from the greeting to the end of the block.

    @ivar minor: of the version that is spoken.
    @ivar process: the server, or the ssh that leads there.
    """

    @classmethod
    @contextlib.contextmanager
    def withServer(cls, nix, command, minor=7, environment=(), timeout=60):
        """@param timeout: seconds, after which the server is killed."""
        with tempfile.TemporaryFile() as errors:
            process = nix.start(
                *command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                environment=environment,
                timeout=timeout,
            )
            talk = cls.ofProcess(process)
            talk.process, talk.minor, talk._errors = process, minor, errors
            try:
                talk.greet(0x200 | minor)
                yield talk
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                try:
                    process.wait(20)
                finally:
                    process.kill()
                    process.wait(20)
                    process.stdout.close()
                    talk._said = talk.stderr()
                    talk._errors = None

    def stderr(self):
        """What the server has said on standard error so far, as users read it."""
        if self._errors is None:
            return self._said
        descriptor = self._errors.fileno()
        # The server writes where the file's position is: that must stay.
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return withoutEscapes(data.decode(errors="replace"))

    #: Does the server send outputs to clients that do not know them? Nix 2.4 to 2.8 does.
    surplus = False

    def build(self, made, **options):
        """Have a L{Recipe} built; the L{Result}."""
        self.write(buildDerivation(made, self.minor, **options))
        return readResult(self, self.minor, self.surplus)

    def buildPaths(self, targets, **options):
        """Have what is in the store built; status and message."""
        self.write(buildPaths(targets, buildOptions(self.minor, **options)))
        return readStatus(self)


def serverCommand(who, root):
    """
    The command of a server that builds.

    @param who: C{real} or C{ours}.
    """
    if who == "real":
        return ["nix-store", "--serve", "--write", "--store", root]
    return [ourProgram("nixserve-store"), "--serve", "--write", "--store", f"{root}?system-features={FEATURE}"]
