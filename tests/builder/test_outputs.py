"""What becomes of the files that a builder has left: registered, rewritten, or refused."""

import contextlib
import fcntl
import mmap
import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace

import pytest

from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.outputs import BuiltOutputs, HashMismatch, OutputPlace, registerOutputs
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, outputPaths, parseDerivation
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StorePath
from nixserve.errors import BuildError, FormatError, StoreError
from nixserve.store.api import Busy
from nixserve.store.durability import Durability
from nixserve.store.files import deletePath, dumpPath, hashPath
from nixserve.store.local import LocalStore
from nixserve.store.pathlocks import PathLocks
from nixserve.testing import Executable, makeNar
from tests.builder.stores import add, info, someHash, writeTree
from tests.realcollector import collecting

INPUT_ADDRESSED = object()


class Build:
    """
    A build whose builder has ended, in the middle of its sandbox.

    @ivar scratch: where the builder was told to put each output.
    """

    def __init__(self, store, outputs=("out",), output=INPUT_ADDRESSED, env=None, inputs=(), valid=()):
        """
        @param output: how the outputs are addressed.
        @param valid: names of outputs that were valid before; their places are elsewhere.
        """
        self.store = store
        self.session = store.openSession()
        self.drvPath = store.storeDir.makeStorePath("test", someHash("drv"), "x.drv")
        self.inputs = inputs
        self.valid = valid
        self.known = {}
        self.scratch = {}
        for name in outputs:
            path = store.storeDir.makeStorePath("test", someHash(name), "x" if name == "out" else f"x-{name}")
            self.known[name] = path if output is INPUT_ADDRESSED else output.path
            self.scratch[name] = self.known[name] or path
            if name in valid:
                self.scratch[name] = store.storeDir.makeStorePath("scratch", someHash(name), path.name)
        made = {
            name: DerivationOutput(path) if output is INPUT_ADDRESSED else output for name, path in self.known.items()
        }
        self.drv = BasicDerivation("x", made, frozenset(inputs), "x86_64-linux", "/bin/sh", (), env or {})
        # As in a sandbox: what the builder takes for the store is another directory.
        self.root = f"{store.layout.realStoreDir}/{self.drvPath.baseName}.chroot"
        os.makedirs(f"{self.root}/root", exist_ok=True)

    def place(self, name):
        return f"{self.root}/root/{self.scratch[name].baseName}"

    def write(self, **trees):
        """What the builder does."""
        for name, tree in trees.items():
            writeTree(self.place(name), tree)
        return self

    def register(self, builderUids=None, patience=lambda attempt: attempt()):
        places = {
            name: OutputPlace(scratch, self.place(name), self.known[name], name in self.valid)
            for name, scratch in self.scratch.items()
        }
        options = DerivationOptions.of(self.drv)
        built = BuiltOutputs(self.drvPath, self.drv, options, places, set(self.inputs), self.root, builderUids)
        return registerOutputs(self.store.layout, self.store.validPaths, self.session, built, patience)

    def refused(self, status=BuildStatus.OUTPUT_REJECTED, **options):
        """The message with which the outputs are refused."""
        with pytest.raises(BuildError) as caught:
            self.register(**options)
        assert caught.value.status == status
        assert self.store.validPaths.queryValidPaths([path for path in self.known.values() if path]) == set()
        self.refusal = caught.value
        return str(caught.value)


def fixed(store, contents=b"hello", hashAlgo="sha256", wanted=None):
    """A fixed output, as a derivation specifies it."""
    digest = wanted or hashBytes(hashAlgo.rpartition(":")[2], contents)
    output = DerivationOutput(StorePath(f"{store.storeDir.path}/{'0' * 32}-x"), hashAlgo, digest.hex)
    path = store.storeDir.makeContentAddressedPath(output.contentAddress, "x")
    return DerivationOutput(path, hashAlgo, digest.hex)


FLOATING = DerivationOutput(None, "r:sha256", "")


@pytest.fixture
def nix(diverted):
    """Runs the real C{nix-store} on the store: takes arguments, gives the output."""
    program = shutil.which("nix-store")
    if program is None:
        pytest.skip("no nix-store on PATH")
    root = diverted.layout.realStoreDir.removesuffix("/nix/store")

    def run(*arguments):
        command = [program, "--store", root, *arguments]
        done = collecting(lambda: subprocess.run(command, capture_output=True, timeout=60))
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


def real(store, path):
    """Where an object is."""
    return store.layout.realPath(path)


def contents(store, path):
    """The bytes of an object that is a file."""
    with open(real(store, path), "rb") as stream:
        return stream.read()


def makeNested(place, levels, name):
    """Directories in each other, far beyond what a path can name."""
    os.mkdir(place)
    fd = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


@pytest.mark.parametrize("output", [INPUT_ADDRESSED, FLOATING], ids=["input-addressed", "floating"])
@pytest.mark.parametrize(("levels", "name"), [(30, "x" * 200), (300, "x" * 20)])
def test_pathsThatAreTooLong(diverted, output, levels, name):
    """A tree that could be neither collected nor copied is refused, as it is when it is imported."""
    build = Build(diverted, output=output)
    makeNested(build.place("out"), levels, name)
    message = build.refused()
    # Deeper than pytest's own clearing up can go.
    deletePath(build.root)
    assert re.match(
        r"cannot have '/[^\n]{,500}' in a store: File name too long: its path would have \d+ bytes", message
    )


@pytest.mark.parametrize("output", [INPUT_ADDRESSED, FLOATING], ids=["input-addressed", "floating"])
def test_pathsAsLongAsPossible(diverted, nix, output):
    """A path may be as long as it can be in its final place; real Nix verifies and collects it."""
    build = Build(diverted, output=output)
    left = 4095 - len(real(diverted, build.scratch["out"]))
    makeNested(build.place("out"), (left - 10) // 201, "x" * 200)
    path = build.register()["out"]
    nix("--verify", "--check-contents")
    build.session.close()
    nix("--gc")
    assert not os.path.exists(real(diverted, path))


def derivationText(out, name="y"):
    """The text of a .drv file."""
    return (
        f'Derive([("out","{out}","","")],[],[],"x86_64-linux","/bin/sh",[],'
        f'[("builder","/bin/sh"),("name","{name}"),("out","{out}"),("system","x86_64-linux")])'
    ).encode()


def ownDerivation(store):
    """The text of a derivation as it should be, and the path of its output."""
    draft = parseDerivation(
        derivationText(store.storeDir.makeStorePath("test", someHash(""), "y")), "y", store.storeDir
    )
    out = outputPaths(draft, {}.__getitem__, store.storeDir, {})["out"]
    return derivationText(out), out


@pytest.mark.parametrize("how", ["input-addressed", "floating", "fixed"])
def test_outputCalledLikeADerivation(diverted, nix, how):
    """
    What is built and called .drv is held to what is added and called so: it is a derivation, with outputs of its own,
    and they are registered, so that real Nix sees the same.
    """
    text, out = ownDerivation(diverted)
    for contents in (b"none", derivationText(add(diverted, "y")), {"drv": text}, Executable(text)):
        build = drvBuild(diverted, how, contents)
        build.write(out=contents)
        with pytest.raises((FormatError, StoreError), match=r"derivation|not a regular file"):
            build.register()
        assert not any(path.isDerivation for path in diverted.validPaths.queryAllValidPaths())
    build = drvBuild(diverted, how, text)
    build.write(out=text)
    path = build.register()["out"]
    assert path.isDerivation and diverted.validPaths.queryDerivationOutputs(path) == {"out": out}
    assert nix("-q", "--outputs", path).decode().split() == [out]


def drvBuild(store, how, contents):
    """A build whose output is called y.drv."""
    output = INPUT_ADDRESSED if how == "input-addressed" else FLOATING
    if how == "fixed":
        digest = hashBytes("sha256", makeNar(contents))
        specified = DerivationOutput(StorePath(f"{store.storeDir.path}/{'0' * 32}-y.drv"), "r:sha256", digest.hex)
        path = store.storeDir.makeContentAddressedPath(specified.contentAddress, "y.drv")
        output = replace(specified, path=path)
    build = Build(store, output=output)
    build.drv = replace(build.drv, name="y.drv")
    if how == "fixed":
        return build
    build.scratch["out"] = store.storeDir.makeStorePath("test", someHash(repr(contents)), "y.drv")
    if how == "input-addressed":
        build.known["out"] = build.scratch["out"]
        build.drv = replace(build.drv, outputs={"out": DerivationOutput(build.known["out"])})
    return build


def test_lockFileInPlaceOfAnOutput(diverted):
    """An output that is called like a lock file that is held waits for it, and does not replace it."""
    build = Build(diverted)
    plain = build.known["out"]
    build.scratch["out"] = build.known["out"] = StorePath(f"{plain}.lock")
    build.drv = replace(build.drv, outputs={"out": DerivationOutput(build.known["out"])})
    build.write(out=b"x")
    held = PathLocks([real(diverted, plain)])
    tries = []

    def patience(attempt):
        try:
            return attempt()
        except Busy:
            tries.append(os.path.getsize(real(diverted, plain) + ".lock"))
            held.unlock()
            return attempt()

    build.register(patience=patience)
    assert tries == [0] and contents(diverted, build.known["out"]) == b"x"


def test_flagsOfInodes(diverted):
    """Flags that a builder gives its files, which everybody may give to their own, are not those of the object."""
    build = Build(diverted)
    build.write(out={"directory": {}, "file": b"x"})
    place = build.place("out")
    names = ("", "/directory", "/file")
    for name in names:
        done = subprocess.run(["chattr", "+dA", place + name], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a file system without flags, or no chattr")
    path = real(diverted, build.register()["out"])
    listed = subprocess.run(["lsattr", "-d", *(path + name for name in names)], capture_output=True, check=True).stdout
    assert len(listed.split()) == 6 and not {*b"".join(listed.split()[::2])} & {*b"dA"}


# What is registered.


def test_registers(diverted):
    """Deriver, hash, size, the mark of what was built here; the object is in canonical form, the sandbox empty."""
    build = Build(diverted)
    build.write(out={"bin": {"run": Executable(b"#!/bin/sh\n")}, "link": "nowhere", "file": b"x"})
    assert build.register() == build.scratch
    path = build.scratch["out"]
    registered = info(diverted, path)
    assert (registered.narHash, registered.narSize) == hashPath(real(diverted, path))
    assert registered.deriver == build.drvPath and registered.ultimate
    assert registered.references == frozenset() and registered.ca is None and registered.sigs == frozenset()
    assert registered.registrationTime > 1_600_000_000
    status = os.lstat(f"{real(diverted, path)}/bin/run")
    assert stat.S_IMODE(status.st_mode) == 0o555 and status.st_mtime == 1
    assert stat.S_IMODE(os.lstat(f"{real(diverted, path)}/file").st_mode) == 0o444
    assert os.listdir(build.root) == ["root"] and os.listdir(f"{build.root}/root") == []


def test_findsReferences(diverted):
    """Contents, names and targets of links refer; only members of the closure and the outputs count."""
    inputs = [add(diverted, name) for name in ("contents", "name", "target", "unused")]
    foreign = add(diverted, "foreign")
    build = Build(diverted, ("out", "dev"), inputs=inputs)
    out, dev = build.scratch["out"], build.scratch["dev"]
    build.write(
        out={
            inputs[1].hashPart: b"",
            "f": inputs[0].encode(),
            "l": inputs[2],
            "o": dev.encode(),
            "x": foreign.encode(),
        },
        dev=dev.encode(),
    )
    build.register()
    assert info(diverted, out).references == {*inputs[:3], dev}
    assert info(diverted, dev).references == {dev}


def test_replacesWhatIsInvalid(diverted):
    """Something that lies at the place without being valid is nobody's."""
    build = Build(diverted).write(out={"new": b""})
    writeTree(real(diverted, build.scratch["out"]), {"old": {"deep": b""}})
    build.register()
    assert os.listdir(real(diverted, build.scratch["out"])) == ["new"]


def test_hardLinksBetweenOutputs(diverted):
    """One file in two outputs belongs to the builder only when it is seen first; that is no offence."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    build = Build(diverted, ("out", "dev")).write(dev=b"shared", out={})
    for name in ("dev", "out"):
        os.chown(build.place(name), 12345, 0)
    os.link(build.place("dev"), build.place("out") + "/link")
    build.register(builderUids=range(12345, 12346))
    assert os.lstat(real(diverted, build.scratch["out"]) + "/link").st_uid == os.geteuid()


@pytest.mark.parametrize("kept", ["descriptor", "mapping", "directory"])
@pytest.mark.parametrize("output", [INPUT_ADDRESSED, "fixed", "floating"])
def test_writerAfterwards(diverted, kept, output):
    """Who kept a descriptor or a mapping of an output changes nothing that is registered, however it is addressed."""
    outputs = {
        "fixed": fixed(diverted, makeNar({"f": b"good contents"}), "r:sha256"),
        "floating": FLOATING,
    }
    build = Build(diverted, output=outputs.get(output, output)).write(out={"f": b"good contents"})
    with open(f"{build.place('out')}/f", "r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapping:
        directory = os.open(build.place("out"), os.O_RDONLY)
        path = build.register()["out"]
        if kept == "descriptor":
            stream.write(b"evil")
            stream.flush()
        elif kept == "mapping":
            mapping[:4] = b"evil"
        else:
            # The directory may be there no more, with which it can take nothing.
            with contextlib.suppress(FileNotFoundError):
                os.close(os.open("evil", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
        os.close(directory)
    registered = info(diverted, path)
    assert (registered.narHash, registered.narSize) == hashPath(real(diverted, path))
    assert os.listdir(real(diverted, path)) == ["f"]


def test_partlyValid(diverted):
    """What was valid before stays; what the others say of its lent path becomes its own."""
    before = Build(diverted, ("two",)).write(two=b"genuine")
    two = before.register()["two"]
    deletePath(before.root)
    build = Build(diverted, ("out", "two"), valid=("two",))
    out, lent = build.scratch["out"], build.scratch["two"]
    assert build.known["two"] == two != lent
    build.write(out=b"see " + lent.encode(), two=b"a copy")
    assert build.register() == {"out": out, "two": two}
    assert contents(diverted, out) == b"see " + two.encode()
    assert info(diverted, out).references == {two}
    assert contents(diverted, two) == b"genuine"


def test_givesUpWhileReading(diverted):
    """A large output takes long to read; nobody need wait for that who does not want it any more."""
    build = Build(diverted).write(out=bytes(10_000_000))
    asked = []

    def patience(attempt):
        asked.append(attempt)
        if len(asked) > 5:
            raise BuildError(BuildStatus.MISC_FAILURE, "interrupted by the user")
        return attempt()

    assert build.refused(BuildStatus.MISC_FAILURE, patience=patience) == "interrupted by the user"
    assert len(asked) == 6


# What is refused.


def test_missingOutput(diverted):
    """In Nix's words."""
    build = Build(diverted, ("out", "dev")).write(out=b"")
    assert build.refused() == (
        f"builder for '{build.drvPath}' failed to produce output path for output 'dev' at '{build.scratch['dev']}'"
    )


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o777, 0o646])
def test_writableByOthers(diverted, mode):
    """Somebody else could still be changing it."""
    build = Build(diverted).write(out=b"")
    os.chmod(build.place("out"), mode)
    assert build.refused() == (
        f"suspicious ownership or permission on '{build.scratch['out']}' for output 'out'; rejecting this build output"
    )


def test_notTheBuilders(diverted):
    """An output must belong to the user that the build ran as, and so must all that is in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    build = Build(diverted).write(out={"file": b""})
    assert "suspicious ownership" in build.refused(builderUids=range(12345, 12346))
    os.chown(build.place("out"), 12345, 0)
    assert "invalid ownership on file" in build.refused(builderUids=range(12345, 12346))


def test_unsupportedType(diverted):
    """A FIFO is nothing that a store could hold."""
    build = Build(diverted).write(out={})
    os.mkfifo(f"{build.place('out')}/fifo")
    with pytest.raises(StoreError, match="has an unsupported type"):
        build.register()


def test_cycle(diverted):
    """Outputs that refer to each other cannot be registered; named as Nix names them."""
    build = Build(diverted, ("out", "two"))
    build.write(out=build.scratch["two"].encode(), two=build.scratch["out"].encode())
    assert build.refused() == (
        f"cycle detected in build of '{build.drvPath}' in the references of output 'out' from output 'two'"
    )


# Fixed outputs.


@pytest.mark.parametrize("hashAlgo", ["sha256", "sha1", "md5", "sha512"])
def test_flat(diverted, hashAlgo):
    """A file whose contents have the hash."""
    output = fixed(diverted, hashAlgo=hashAlgo)
    build = Build(diverted, output=output).write(out=b"hello")
    assert build.register() == {"out": output.path}
    assert info(diverted, output.path).ca == output.contentAddress


@pytest.mark.parametrize("hashAlgo", ["r:sha256", "r:sha1"])
def test_recursive(diverted, hashAlgo):
    """A tree whose NAR has the hash."""
    tree = {"run": Executable(b"hello")}
    output = fixed(diverted, makeNar(tree), hashAlgo)
    build = Build(diverted, output=output).write(out=tree)
    assert build.register() == {"out": output.path}
    assert info(diverted, output.path).ca == output.contentAddress


@pytest.mark.parametrize("tree", [{}, "target", Executable(b"hello")])
def test_flatIsAPlainFile(diverted, tree):
    """Nothing else has such a hash."""
    build = Build(diverted, output=fixed(diverted)).write(out=tree)
    assert build.refused() == (
        f"output path '{build.scratch['out']}' should be a non-executable regular file since recursive hashing is not "
        "enabled (outputHashMode=flat)"
    )


def test_wrongHash(diverted):
    """The build fails, in Nix's words to the last blank; what was made is valid under the path of its own hash."""
    build = Build(diverted, output=fixed(diverted, b"wanted")).write(out=b"hello")
    assert build.refused() == (
        f"hash mismatch in fixed-output derivation '{build.drvPath}':\n"
        f"  specified: {hashBytes('sha256', b'wanted').sri}\n"
        f"     got:    {hashBytes('sha256', b'hello').sri}"
    )
    assert isinstance(build.refusal, HashMismatch)
    assert build.refusal.specified == hashBytes("sha256", b"wanted")
    assert build.refusal.found == hashBytes("sha256", b"hello")
    actual = fixed(diverted, b"hello").path
    registered = info(diverted, actual)
    assert registered.deriver == build.drvPath and registered.ultimate
    assert str(registered.ca) == f"fixed:{hashBytes('sha256', b'hello')}"
    assert not os.path.lexists(real(diverted, actual) + ".lock")
    assert not os.path.lexists(build.place("out"))


def test_wrongHashAlreadyThere(diverted):
    """What has the actual hash may be valid already; it stays as it is."""
    for _ in range(2):
        build = Build(diverted, output=fixed(diverted, b"wanted")).write(out=b"hello")
        assert build.refused().startswith("hash mismatch")
        deletePath(build.root)


def test_wrongHashWhileLocked(diverted):
    """Waiting for the lock of a path that nobody asked for could be for ever: the mismatch is reported at once."""
    actual = real(diverted, fixed(diverted, b"hello").path)
    with open(actual + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = Build(diverted, output=fixed(diverted, b"wanted")).write(out=b"hello")
        assert build.refused().startswith("hash mismatch")
    assert not os.path.lexists(actual) and not os.path.lexists(build.place("out"))


@pytest.mark.parametrize("hashAlgo", ["sha256", "r:sha256"])
def test_fixedOutputsReferToNothing(diverted, hashAlgo):
    """What is identified by its hash alone cannot depend on anything; itself included."""
    dependency = add(diverted, "dependency")
    contents = dependency.encode()
    output = fixed(diverted, contents if hashAlgo == "sha256" else makeNar(contents), hashAlgo)
    build = Build(diverted, output=output, inputs=[dependency]).write(out=contents)
    assert build.refused() == (
        f"fixed-output derivations must not reference store paths: '{build.drvPath}' references 1 distinct paths, "
        f"e.g. '{dependency}'"
    )


# Floating outputs.


def test_floating(diverted):
    """Without references to itself, the path is that of the plain hash."""
    dependency = add(diverted, "dependency")
    build = Build(diverted, output=FLOATING, inputs=[dependency]).write(out={"f": dependency.encode()})
    [path] = build.register().values()
    registered = info(diverted, path)
    assert registered.ca == ContentAddress.parse(f"fixed:r:{registered.narHash}")
    assert registered.isContentAddressed(diverted.storeDir)
    assert registered.references == {dependency}


def test_floatingSelfReference(diverted):
    """The lent path is replaced in contents, names and targets; hash, path and references fit together."""
    build = Build(diverted, output=FLOATING)
    scratch = build.scratch["out"]
    build.write(out={"f": scratch.encode() * 2, "l": scratch, "d": {scratch.hashPart: Executable(b"x")}})
    [path] = build.register().values()
    assert path != scratch and path.name == "x"
    registered = info(diverted, path)
    assert registered.references == {path} and registered.isContentAddressed(diverted.storeDir)
    nar = b"".join(dumpPath(real(diverted, path)))
    assert scratch.hashPart.encode() not in nar and nar.count(path.hashPart.encode()) == 4
    assert registered.narHash == hashBytes("sha256", nar) and registered.narSize == len(nar)


def test_floatingNamesInAnotherOrder(diverted):
    """A NAR lists names in order, so not every name can be rewritten."""
    build = Build(diverted, output=FLOATING)
    scratch = build.scratch["out"]
    build.write(out={f"{digit}{scratch.hashPart[1:]}": b"" for digit in "0z"} | {scratch.hashPart: b""})
    # Whichever digit the final hash part begins with, a neighbour is on the other side.
    names = [scratch.hashPart[:8] + chr(n) for n in range(33, 127) if chr(n) != "/"]
    for name in names:
        writeTree(f"{build.place('out')}/{name}", b"")
    assert build.refused().startswith(f"cannot rewrite references in output 'out' of '{build.drvPath}': bad archive:")


def test_floatingLikeNix(diverted):
    """The result of a derivation that writes its own path, as Nix 2.8 has it."""
    build = Build(diverted, output=FLOATING)
    scratch = StorePath("/nix/store/xqr6myj1kkrqmhj80xxzmri5q19fan1l-ca")
    build.scratch["out"] = scratch
    build.drv = BasicDerivation("ca", build.drv.outputs, frozenset(), "", "", (), {})
    build.write(out=scratch.encode() + b"\n")
    assert build.register() == {"out": "/nix/store/4lpn6n89gb8h315mxm7pw99m1l1srpqj-ca"}


def test_floatingOutputsOfOneBuild(diverted):
    """They get their paths one after the other: each knows the final paths of those that it refers to."""
    build = Build(diverted, ("a", "b", "c"), output=FLOATING)
    a, b = build.scratch["a"], build.scratch["b"]
    build.write(a=a.encode(), b=a.encode() + b.encode(), c=a.encode() + b.encode())
    made = build.register()
    assert info(diverted, made["b"]).references == {made["a"], made["b"]}
    assert info(diverted, made["c"]).references == {made["a"], made["b"]}
    text = contents(diverted, made["c"])
    assert made["a"].hashPart.encode() in text and made["b"].hashPart.encode() in text
    assert all(info(diverted, path).isContentAddressed(diverted.storeDir) for path in made.values())
    assert os.listdir(build.root) == ["root"] and os.listdir(f"{build.root}/root") == []


def test_floatingTwice(diverted):
    """The same contents again: what is valid stays, the copy goes."""
    paths = []
    for _ in range(2):
        build = Build(diverted, output=FLOATING).write(out=b"same")
        paths += build.register().values()
        deletePath(build.root)
    assert paths[0] == paths[1]


@pytest.mark.parametrize(("hashAlgo", "prefix"), [("sha256", "fixed:sha256:"), ("text:sha256", "text:sha256:")])
def test_floatingFile(diverted, hashAlgo, prefix):
    """A file may be addressed by its bytes."""
    build = Build(diverted, output=DerivationOutput(None, hashAlgo, "")).write(out=b"hello")
    [path] = build.register().values()
    assert str(info(diverted, path).ca) == prefix + hashBytes("sha256", b"hello").nix32


def test_flatFloatingRefersToNothing(diverted):
    """There is no path for such an object."""
    build = Build(diverted, output=DerivationOutput(None, "sha256", ""))
    build.write(out=build.scratch["out"].encode())
    assert "not allowed to refer to other store paths" in build.refused(BuildStatus.MISC_FAILURE)


def test_gitHashing(diverted):
    """An experiment of Nix's that is not supported."""
    build = Build(diverted, output=DerivationOutput(None, "git:sha1", "")).write(out=b"")
    message = build.refused(BuildStatus.MISC_FAILURE)
    assert message == f"cannot build '{build.drvPath}': git hashing is not supported"


def test_floatingWaits(diverted):
    """If somebody else is adding the same object, this one waits, by the rules of whoever called."""
    build = Build(diverted, output=FLOATING).write(out=b"same")
    final = diverted.storeDir.makeContentAddressedPath(
        ContentAddress.parse(f"fixed:r:{hashBytes('sha256', makeNar(b'same'))}"), "x"
    )
    waits = []
    with open(real(diverted, final) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def patience(attempt):
            while True:
                try:
                    return attempt()
                except Busy as error:
                    waits.append(error.what)
                    fcntl.flock(lock, fcntl.LOCK_UN)

        assert build.register(patience=patience) == {"out": final}
    assert waits == [f"the lock on '{real(diverted, final)}'"]


def test_discardedReferences(diverted):
    """Outputs may be declared to refer to nothing; lent paths in them are replaced all the same."""
    env = {"__json": '{"unsafeDiscardReferences": {"out": true}}'}
    build = Build(diverted, output=FLOATING, env=env)
    build.write(out=build.scratch["out"].encode())
    [path] = build.register().values()
    assert info(diverted, path).references == frozenset()
    assert contents(diverted, path) == path.encode()


# Demands of the derivation.


@pytest.fixture
def check(diverted):
    """
    Builds an output that refers to itself and to C{low} through C{middle}; gives the message if it is refused.
    """
    low = add(diverted, "low", b"low")
    middle = add(diverted, "middle", low.encode(), [low])

    def run(**env):
        build = Build(diverted, env={name: text.format(low=low, middle=middle) for name, text in env.items()})
        build.inputs = [low, middle]
        build.write(out=build.scratch["out"].encode() + middle.encode())
        try:
            build.register()
        except BuildError as error:
            assert error.status == BuildStatus.OUTPUT_REJECTED
            assert not diverted.validPaths.isAnyValid([build.known["out"]])
            text = str(error)
            for path, name in ((build.known["out"], "SELF"), (low, "LOW"), (middle, "MIDDLE")):
                text = text.replace(path, name)
            return text
        diverted.validPaths.invalidatePath(build.known["out"])
        return ""

    def again(**env):
        try:
            return run(**env)
        finally:
            for entry in os.scandir(diverted.layout.realStoreDir):
                if entry.name.endswith(".chroot"):
                    subprocess.run(["rm", "-rf", entry.path], check=True)

    return again


REFUSED = "output 'SELF' is not allowed to refer to the following paths:"


@pytest.mark.parametrize(
    ("env", "bad"),
    [
        ({"allowedReferences": "out {middle}"}, []),
        ({"allowedReferences": "{middle}"}, ["SELF"]),
        ({"allowedReferences": "out {low}"}, ["MIDDLE"]),
        ({"allowedRequisites": "{middle} {low}"}, []),
        ({"allowedRequisites": "{middle}"}, ["LOW"]),
        ({"disallowedReferences": "{low}"}, []),
        ({"disallowedReferences": "{middle}"}, ["MIDDLE"]),
        ({"disallowedReferences": "out"}, ["SELF"]),
        ({"disallowedRequisites": "{low}"}, ["LOW"]),
        ({"disallowedRequisites": "out"}, []),
        ({"disallowedRequisites": ""}, []),
    ],
)
def test_referenceChecks(check, env, bad):
    """A reference to itself counts among references, not among requisites; outputs may be named."""
    assert check(**env) == (REFUSED + "".join(f"\n  {path}" for path in bad) if bad else "")


def test_listedInOrder(check):
    """All that is wrong is listed, sorted by path."""
    lines = check(allowedReferences="").split("\n")
    assert lines[0] == REFUSED and sorted(lines[1:]) == ["  MIDDLE", "  SELF"]


def test_illegalSpecifier(check):
    """A check that names nothing is an error."""
    assert check(allowedReferences="nope") == "derivation contains an illegal reference specifier 'nope'"


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ('"allowedReferences": ["out", "{middle}"]', ""),
        ('"allowedRequisites": ["{middle}", "{low}"]', f"{REFUSED}\n  SELF"),
        ('"maxSize": 1000', ""),
        ('"maxSize": 100', "path 'SELF' is too large at {size} bytes; limit is 100 bytes"),
        ('"maxClosureSize": 10000', ""),
        ('"maxClosureSize": 300', "closure of path 'SELF' is too large at {closure} bytes; limit is 300 bytes"),
    ],
)
def test_structuredChecks(check, checks, message):
    """Structured attributes have checks for each output; there a reference to itself always counts."""
    text = '{{"outputChecks": {{"out": {{' + checks + "}}}}}}"
    sizes = [len(makeNar(b"x" * size)) for size in (len("low"), 11 + 32 + 1 + 3, 2 * (11 + 32) + 2 + 1 + 6)]
    assert check(__json=text) == message.format(size=sizes[2], closure=sum(sizes))


@pytest.fixture
def synced(monkeypatch):
    """The paths of files that are written out, in order."""
    paths = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: paths.append(os.readlink(f"/proc/self/fd/{fd}")))
    return paths


def test_databaseIsSynced(diverted, synced):
    """What is known of outputs is on the disk when the build is over, once for all of them."""
    build = Build(diverted, ("out", "dev")).write(out=b"x", dev=b"y")
    build.register()
    assert synced == [f"{diverted.layout.dbPath}-wal"]


@pytest.mark.parametrize("known", [True, False])
def test_outputsAreSynced(diverted, synced, known):
    """With fsync-store-paths so are the outputs themselves, under their own names, before they are valid."""
    store = LocalStore(replace(diverted.layout, durability=Durability(fsyncStorePaths=True)), reservedSize=0)
    output = INPUT_ADDRESSED if known else DerivationOutput(None, "r:sha256")
    path = Build(store, output=output).write(out={"a": b"x"}).register()["out"]
    real = store.layout.realPath(path)
    assert synced[:3] == [f"{real}/a", real, store.layout.realStoreDir]
    assert synced[-1] == f"{store.layout.dbPath}-wal"
    store.close()
