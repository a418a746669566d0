"""
C{nixserve copy} and C{nixserve build} beside C{nix copy} and C{nix-store --realise}: against real C{nix-store --serve
--write}, as a child and through sshd, what comes of them is the same.
"""

import contextlib
import os
import subprocess

import pytest

from tests.interop.building import requireSandbox, withoutEscapes
from tests.interop.nix import ourProgram, requireProgram, unavailable
from tests.interop.stores import addChain, addSmallFiles, assertSame, assertVerified, infos, opened, physical

EXPRESSION = """
let
  make = name: script: more: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-ec" script ];
  } // more);
in rec {
  library = make "library" "mkdir $out; echo text > $dev; ln -s $dev $out/dev; echo a library" {
    outputs = [ "out" "dev" ];
  };
  program = make "program" "echo ${library.dev} > $out; echo a program" { };
  failing = make "failing" "echo trouble >&2; exit 3" { };
  slow = make "slow" "while :; do :; done" { };
  wrong = make "wrong" "echo text > $out" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000000000000000";
  };
  fixedFailing = make "fixed-failing" "exit 3" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000000000000000";
  };
  needsFailing = make "needs-failing" "echo ${failing} > $out" { };
}
"""


def child(root):
    """The URL of a real server that runs as a child."""
    return f"ssh://localhost?remote-store={root}"


@pytest.fixture
def command(nix, directory):
    """Runs C{nixserve}; where Nix runs, on stores that are named."""

    def run(*arguments, **options):
        return nix.run(ourProgram("nixserve"), *arguments, **options)

    return run


@contextlib.contextmanager
def smallDisk(place, megabytes):
    """A file system with little room, for root only."""
    if os.geteuid() != 0:
        unavailable("a file system has to be mounted by root")
    place.mkdir()
    mount = [requireProgram("mount"), "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        unavailable("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run([requireProgram("umount"), str(place)], check=True, timeout=20)


class TestCopy:
    """C{nixserve copy} beside C{nix copy}."""

    @pytest.mark.parametrize("way", ["to", "from"])
    def test_sameAsNix(self, nix, oddStore, directory, command, way):
        """The same closure of odd objects arrives, with all that is known about it."""
        ours, theirs, both = directory / "ours", directory / "theirs", oddStore.root
        top = oddStore.top
        if way == "to":
            done = command("copy", "--store", both, "--to", child(ours), top)
            nix.run("nix", "copy", "--no-check-sigs", "--store", both, "--to", child(theirs), top)
        else:
            done = command("copy", "--store", ours, "--from", child(both), top)
            nix.run("nix", "copy", "--no-check-sigs", "--store", theirs, "--from", child(both), top)
        assert (done.stdout, done.stderr) == (b"", b"")
        assert infos(nix, ours) == infos(nix, theirs)
        assertSame(nix, both, ours, sorted(infos(nix, ours)))
        assertVerified(nix, ours)

    @pytest.mark.parametrize("way", ["to", "from"])
    @pytest.mark.parametrize("client", ["openssh", "conch"])
    def test_jobs(self, nix, sshd, keys, directory, command, way, client):
        """Several sessions through sshd, over one connection of ssh or some of our own."""
        here, there = directory / "here", directory / "there"
        chain = addChain(here if way == "to" else there, 40, f"jobs-{way}-{client}")
        with opened(here), opened(there):
            pass
        sshd.force(f"nix-store --serve --write --store {there}")
        login = f"ssh-client={client}&ssh-key={keys.user}&base64-ssh-public-host-key={hostKey(keys)}"
        address = f"{sshd.url}:{sshd.port}?{login}"
        words = ["copy", "--store", here, f"--{way}", address, "--jobs", "3", chain[-1]]
        command(*words, environment=sshd.environment())
        assertSame(nix, here, there, chain)
        assertVerified(nix, here)
        assertVerified(nix, there)

    @pytest.mark.parametrize("way", ["to", "from"])
    def test_fullDisk(self, nix, directory, command, way):
        """A full disk is one error, of the right side; the store verifies, and room is all that it takes."""
        source = directory / "source"
        first = addSmallFiles(source, 50, "first")
        with opened(source):
            pass
        big = bigObject(nix, source, directory, 30)
        with smallDisk(directory / "small", 24) as target:
            ends = ["--store", source, "--to", child(target)]
            if way == "from":
                ends = ["--store", target, "--from", child(source)]
            command("copy", *ends, first)
            done = command("copy", *ends, big, check=False)
            assert done.returncode == 1
            [error] = done.stderr.decode().splitlines()
            assert "No space left on device" in error
            if way == "to":
                assert error.startswith("error: ssh://localhost: ")
            else:
                assert error.startswith(f"error: the store here ({target}/nix/store): ")
                assert error.endswith("; make room there, as by collecting garbage")
            assertVerified(nix, target)
            assert set(infos(nix, target)) == {first}
            remount = [requireProgram("mount"), "-o", "remount,size=100m", str(target)]
            subprocess.run(remount, check=True, timeout=20)
            command("copy", *ends, big)
            assertSame(nix, source, target, [first, big])


def hostKey(keys):
    """As the URL parameter has it."""
    return subprocess.run(
        ["base64", "-w0", f"{keys.host}.pub"], capture_output=True, check=True, timeout=20, text=True
    ).stdout.replace("=", "%3D")


def bigObject(nix, root, directory, megabytes):
    """An object of random bytes."""
    (directory / "big").write_bytes(os.urandom(megabytes * 1024 * 1024))
    return nix.lines("nix-store", "--add", directory / "big", store=root)[0]


@pytest.fixture
def derivations(nix, directory):
    """Paths of .drv files of L{EXPRESSION}, in the store C{here}, by name."""
    (directory / "e.nix").write_text(EXPRESSION)

    def instantiate(name, store="here"):
        root = directory / store
        return nix.lines("nix-instantiate", directory / "e.nix", "-A", name, store=root)[0]

    return instantiate


class TestBuild:
    """C{nixserve build} beside C{nix-store --realise}."""

    def test_sameAsNix(self, nix, directory, command, derivations):
        """The outputs are the same, and real Nix's collector takes their links for roots until they are removed."""
        environment = requireSandbox()
        here, theirs = directory / "here", directory / "theirs"
        drvPath = derivations("program")
        there = child(directory / "there")
        link = directory / "link"
        done = command("build", "--store", here, "--on", there, "-o", link, drvPath, environment=environment)
        outputs = done.stdout.decode().splitlines()
        derivations("program", "theirs")
        assert outputs == nix.lines("nix-store", "--realise", drvPath, store=theirs, environment=environment)
        assert physical(here, outputs[0]).read_text() == physical(theirs, outputs[0]).read_text()
        assertVerified(nix, here)
        assert os.readlink(link) == outputs[0]
        nix.run("nix-store", "--gc", store=here)
        assert outputs[0] in infos(nix, here)
        link.unlink()
        nix.run("nix-store", "--gc", store=here)
        assert infos(nix, here) == {}

    @pytest.mark.parametrize("name", ["failing", "slow", "wrong", "fixedFailing", "needsFailing"])
    @pytest.mark.parametrize("who", ["real", "ours"])
    def test_exitStatus(self, nix, directory, command, derivations, name, who):
        """It exits as real Nix does for each kind of failure, whoever builds."""
        environment = requireSandbox()
        drvPath = derivations(name)
        expected = nix.run(
            "nix-store", "--realise", drvPath, "--timeout", "1", store=directory / "here", environment=environment,
            check=False,
        )  # fmt: skip
        there = child(directory / "there")
        if who == "ours":
            there += f"&remote-program={ourProgram('nixserve-store')}"
        words = ["build", "--store", directory / "here", "--on", there, "--timeout", "1", drvPath]
        done = command(*words, environment=environment, check=False)
        assert done.returncode == expected.returncode, (done.stderr, expected.stderr)
        assert f"error: build of '{drvPath}' on 'ssh://localhost' failed: " in done.stderr.decode()
        assert withoutEscapes(done.stderr.decode()) == done.stderr.decode()
