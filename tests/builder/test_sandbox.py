"""The sandbox: what a builder sees, and what a hostile one does not get at."""

import contextlib
import ctypes
import os
import platform
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest

from nixserve.builder import sandbox as sandboxModule
from nixserve.builder.process import CancelToken, Ending, ProcessLimits
from nixserve.builder.sandbox import SandboxPath, findShell, parseSandboxPath, sandboxProblem
from nixserve.errors import BuildError, FormatError
from nixserve.store.copying import TreeCopier
from tests.builder.workplace import OUT, needsSandbox, processesOf, workplace

needsRoot = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def place():
    """A L{Workplace} for one test."""
    with workplace() as made:
        yield made


def attack(place, name, env=None, **options):
    """
    Run a function of L{tests.builder.attacks} in a sandbox.

    @return: its findings.
    """
    env = {"ATTACK": name, **(env or {})}
    outcome = place.run(
        "", place.sandbox(**options), builder="attack", args=[], env=env, module="tests.builder.attacks"
    )
    assert outcome.success, place.text
    return dict(line.split(": ", 1) for line in place.text.splitlines())


def scopes():
    """The version of Landlock, LANDLOCK_CREATE_RULESET_VERSION; scopes are in the sixth."""
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)


def keyctl(*arguments):
    """keyctl(2)"""
    return ctypes.CDLL(None).syscall(ctypes.c_long({"x86_64": 250}.get(platform.machine(), 219)), *arguments)


def addKey(*arguments):
    """add_key(2)"""
    return ctypes.CDLL(None).syscall(ctypes.c_long({"x86_64": 248}.get(platform.machine(), 217)), *arguments)


def look(place, script, **options):
    """
    Run a shell script in a sandbox.

    @return: the words that it prints.
    """
    outcome = place.run(script, place.sandbox(**options))
    assert outcome.success, place.text
    return place.text.split()


@needsSandbox
class TestView:
    """What an honest builder sees is what Nix shows it."""

    def test_root(self, place):
        """The root holds what Nix has there, and no directory of the host."""
        assert look(place, "ls -a /") == [".", "..", "bin", "build", "dev", "etc", "nix", "proc", "tmp"]
        assert sorted(os.listdir("/")) != place.text.split()[2:]

    def test_inputs(self, place):
        """The store holds the inputs, of each kind, and no other path."""
        script = "ls /nix /nix/store; cat /nix/store/*/text /nix/store/in-file; readlink /nix/store/in-link"
        words = look(place, script)
        assert words == [
            "/nix:", "store", "/nix/store:", "in-directory", "in-file", "in-link",
            "input", "input", "file", "in-directory",
        ]  # fmt: skip

    def test_ids(self, place):
        """The builder is user 1000, group 100, in no other group, and both have names."""
        assert look(place, "id; umask; pwd; hostname") == [
            "uid=1000(nixbld)",
            "gid=100(nixbld)",
            "0022",
            "/build",
            "localhost",
        ]

    def test_files(self, place):
        """The files in /etc are Nix's, to the byte."""
        place.run("cat /etc/passwd /etc/group /etc/hosts; ls -1 /etc", place.sandbox())
        assert place.text == (
            "root:x:0:0:Nix build user:/build:/noshell\nnixbld:x:1000:100:Nix build user:/build:/noshell\n"
            "nobody:x:65534:65534:Nobody:/:/noshell\nroot:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n"
            "127.0.0.1 localhost\n::1 localhost\ngroup\nhosts\npasswd\n"
        )

    def test_modes(self, place):
        """Directories have Nix's modes."""
        words = look(place, "stat -c %a / /nix/store /tmp /build /etc /dev/shm")
        assert words == ["750", "1775", "1777", "700", "555", "1777"]

    def test_devices(self, place):
        """The devices are Nix's; pseudoterminals are the builder's own."""
        words = look(
            place, "ls -1 /dev; echo x >/dev/null; head -c 3 /dev/zero | wc -c; ls /dev/pts; echo y >/dev/stderr"
        )
        names = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
        assert words == [*names.split(), "3", "ptmx", "y"]

    def test_process(self, place):
        """The builder is process 1 of a session of its own, with addresses not randomised."""
        words = look(place, "cut -d' ' -f1,5,6,7 /proc/$$/stat; cat /proc/self/personality; ulimit -c")
        assert words == ["1", "1", "1", "0", "00040000", "0"]

    def test_network(self, place):
        """A builder without network has a loopback device that is up."""
        words = look(place, "ip -o addr")
        assert words.count("lo") and "127.0.0.1/8" in words and "::1/128" in words

    def test_networkFiles(self, place):
        """With network there is what a resolver needs."""
        words = look(place, "ls /etc; cat /etc/nsswitch.conf", network=True)
        assert "hosts:" in words and "nsswitch.conf" in words
        assert ("resolv.conf" in words) == os.path.exists("/etc/resolv.conf")

    def test_output(self, place):
        """An output is made in the root directory, from where it can be renamed into the store."""
        sandbox = place.sandbox()
        place.run("echo made > $out", sandbox)
        with open(sandbox.realPath(OUT)) as file:
            assert file.read() == "made\n"
        assert os.stat(sandbox.realPath(OUT)).st_uid == place.user.uid
        os.rename(sandbox.realPath(OUT), place.store / "moved")

    def test_paths(self, place):
        """Paths of the host are where the settings say, writable if their modes permit, also below /dev."""
        cache = place.directory / "cache"
        cache.mkdir()
        cache.chmod(0o777)
        paths = [
            findShell(), SandboxPath("/var/cache/x", str(cache)), SandboxPath("/dev/own", "/dev/null"),
            SandboxPath("/missing", "/does/not/exist", True),
        ]  # fmt: skip
        assert look(place, "echo y > /var/cache/x/z; cat /dev/own; ls /; ls /var", paths=paths)[-1] == "cache"
        assert (cache / "z").read_text() == "y\n"

    def test_manyInputs(self, place):
        """A closure may be larger than a command line for bubblewrap."""
        for number in range(3200):
            (place.store / f"in-{number}").symlink_to("x") if number % 8 else (place.store / f"in-{number}").mkdir()
        place.inputs = [(str(path), f"/nix/store/{path.name}") for path in place.store.glob("in-*")]
        assert look(place, "ls /nix/store | wc -l") == ["3203"]

    def test_module(self, place):
        """A module of ours runs as a builder, with its environment and standard input."""
        place.run("", place.sandbox(), module="tests.builder.echo", env={"a": "b"}, stdin=b"given")
        assert place.text == "{'a': 'b'} given /build 1\n"


def ownAddress():
    """An address of this machine that is not of its loopback device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        try:
            client.connect(("192.0.2.1", 53))
        except OSError:
            pytest.skip("no way out of this machine")
        return client.getsockname()[0]


@pytest.fixture
def helper(tmp_path):
    """slirp4netns, under a name that nobody else uses."""
    found = shutil.which("slirp4netns")
    if not found or sandboxProblem(found):
        pytest.skip(f"needs slirp4netns; {found and sandboxProblem(found)}")
    path = tmp_path / "helper"
    path.symlink_to(found)
    return str(path)


def running(path):
    """Whether a program runs."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline") as file:
            if file.read().startswith(path):
                return True
    return False


class Listening:
    """A builder with network that listens on an abstract socket, for as long as this is a context."""

    def __init__(self, place, **options):
        self.name = f"nixserve-test-{os.getpid()}"
        self.sandbox = place.sandbox(network=True, **options)
        self._cancel = CancelToken()
        self._listens = threading.Event()
        env = {"ATTACK": "listener", "ABSTRACT": self.name, "OUTPUT": OUT}
        options = {"builder": "x", "args": [], "env": env, "module": "tests.builder.attacks"}
        self._thread = threading.Thread(
            target=place.run, args=("", self.sandbox, self._cancel, self._log), kwargs=options
        )

    def _log(self, lines):
        if b"listening" in lines:
            self._listens.set()

    def __enter__(self):
        self._thread.start()
        assert self._listens.wait(30)
        return self

    def __exit__(self, *_):
        self._cancel.cancel()
        self._thread.join()


@needsSandbox
class TestOwnNetwork:
    """What a builder with network has where the host has slirp4netns."""

    def test_reaches(self, place, helper):
        """It reaches what the host reaches, but not the host's 127.0.0.1 and abstract sockets."""
        name = f"nixserve-test-{os.getpid()}"
        address = ownAddress()
        with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0" + name)
            abstract.listen()
            env = {"PORT": str(server.getsockname()[1]), "ABSTRACT": name, "ADDRESS": address}
            found = attack(place, "network", env, network=True, networkHelper=helper)
        assert found["outside"] == "ok" and found["interfaces"] == "lo tap0"
        assert found["tcp"] == "ECONNREFUSED" and found["gateway"] != "ok"
        # EPERM: of Landlock, where it is first.
        assert found["abstract"] in ("ECONNREFUSED", "EPERM")

    def test_abstractSockets(self, place, helper):
        """No local user reaches an abstract socket that the builder listens on."""
        with (
            Listening(place, networkHelper=helper) as builder,
            socket.socket(socket.AF_UNIX) as client,
            pytest.raises(ConnectionRefusedError),
        ):
            client.connect("\0" + builder.name)

    def test_resolver(self, place, helper):
        """Names are asked for where the helper listens, with the host's other settings."""
        words = look(place, "cat /etc/resolv.conf; ls /etc", network=True, networkHelper=helper)
        assert words[:2] == ["nameserver", "10.0.2.3"] and words.count("nameserver") == 1
        assert "nsswitch.conf" in words

    def test_ends(self, place, helper):
        """The helper does not outlive the build, however that ends; a builder without network has none."""
        assert look(place, "ls /sys 2>/dev/null; echo done", networkHelper=helper) == ["done"]
        assert place.run("echo", place.sandbox(network=True, networkHelper=helper)).success
        assert not running(helper)
        limits = ProcessLimits(timeout=1)
        outcome = place.run("sleep 60", place.sandbox(network=True, networkHelper=helper), limits=limits)
        assert outcome.ending is Ending.TIMEOUT
        assert not running(helper)

    def test_notOfTheBuilders(self, place, helper):
        """The builder does not see the process of the helper."""
        script = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done; ls -d /proc/[0-9]* | wc -l"
        words = look(place, script, network=True, networkHelper=helper)
        assert helper not in words and int(words[-1]) <= 3

    def test_fails(self, place):
        """Without a connection there is no build: the network of the host is no substitute."""
        with pytest.raises(BuildError, match="'/bin/false' does not connect the build to the network"):
            place.run("echo built", place.sandbox(network=True, networkHelper="/bin/false"))
        assert "built" not in place.text

    def test_hangs(self, place, tmp_path):
        """A helper that says nothing keeps nobody from stopping the build."""
        hanging = tmp_path / "hanging"
        hanging.write_text("#!/bin/sh\nexec sleep 60\n")
        hanging.chmod(0o755)
        started = time.monotonic()
        outcome = place.run(
            "echo", place.sandbox(network=True, networkHelper=str(hanging)), limits=ProcessLimits(timeout=1)
        )
        assert outcome.ending is Ending.TIMEOUT
        assert time.monotonic() - started < 8


@needsSandbox
class TestAttacks:
    """What a hostile builder tries."""

    def test_hostFiles(self, place):
        """No way leads to files of the host: not through /proc, open directories, or dots."""
        secret = place.directory / "secret"
        secret.write_text("host secret")
        script = f"""
            for way in "" /.. /proc/1/root /proc/self/root /proc/self/cwd/../../.. /proc/self/fd/0/.. /tmp/../..; do
                cat $way{secret} 2>/dev/null; ls $way{place.store} $way/root $way/home $way/usr $way/oldroot 2>/dev/null
            done; ls /proc/self/fd"""
        assert look(place, script) == ["0", "1", "2", "3"]

    def test_otherBuilds(self, place):
        """A store path that is no input is not there, nor is the directory with the store on the host."""
        words = look(place, "cat /nix/store/not-an-input 2>&1 || true; ls -a /nix/store/in-directory/..")
        assert "secret" not in words and "not-an-input" not in words[-6:]

    def test_inputs(self, place):
        """An input cannot be changed, even if the builder owned it."""
        if place.user.own:
            for path in [place.store / "in-file", place.store / "in-directory" / "text", place.store / "in-directory"]:
                os.chown(path, place.user.uid, place.user.gid)
        script = """cd /nix/store; echo evil > in-file; echo evil > in-directory/text; touch in-directory/new
            chmod 777 in-directory in-file; rm -rf in-directory in-file; mv in-directory /tmp; ln in-file /tmp/l; :"""
        place.run(script, place.sandbox())
        assert (place.store / "in-file").read_text() == "file\n"
        assert [path.name for path in (place.store / "in-directory").iterdir()] == ["text"]
        assert (place.store / "in-directory" / "text").read_text() == "input\n"
        assert not stat.S_IMODE((place.store / "in-directory").stat().st_mode) & 0o022

    def test_outside(self, place):
        """Outside its outputs, /build and /tmp nothing can be written."""
        script = """for place in / /etc /etc/passwd /bin /nix /dev /proc /proc/sys/kernel/hostname /bin/sh; do
            (echo evil >> $place) 2>/dev/null; (echo evil > $place/new) 2>/dev/null; (mkdir $place/new2) 2>/dev/null
            done; chmod 777 / /etc 2>/dev/null; mv /etc /tmp 2>/dev/null; echo done"""
        sandbox = place.sandbox()
        before = sorted(os.listdir(sandbox.root))
        assert place.run(script, sandbox).success and place.text == "done\n"
        assert sorted(os.listdir(sandbox.root)) == before
        assert sorted(os.listdir(sandbox.realPath("/etc"))) == ["group", "hosts", "passwd"]
        for path in ("/nix", "/bin", "/dev", "/proc"):
            assert not {"new", "new2"} & {*os.listdir(sandbox.realPath(path))}
        assert stat.S_IMODE(os.stat(sandbox.root).st_mode) == 0o750

    def test_reachability(self, place):
        """Whatever modes the builder sets, other users of the host do not get into its directories."""
        sandbox = place.sandbox()
        place.run("chmod 777 / /build /nix/store; mkdir $out; chmod 777 $out", sandbox)
        for top in (sandbox.chrootDir, place.buildDir.parent):
            assert stat.S_IMODE(os.stat(top).st_mode) == 0o700
            assert os.stat(top).st_uid == os.geteuid()

    def test_environment(self, place, monkeypatch):
        """Nothing of the server's environment, and no process of the host, is to be seen."""
        monkeypatch.setenv("SERVER_SECRET", "hunter2")
        script = "env; cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'; ls -d /proc/[0-9]* | wc -l"
        place.run(script, place.sandbox(), env={"only": "this"})
        assert "only=this" in place.text
        assert "hunter2" not in place.text
        assert "python" not in place.text and "PYTHON" not in place.text
        assert int(place.text.split()[-1]) <= 3

    def test_processes(self, place):
        """Processes of the host cannot be signalled: their numbers are not there."""
        victim = subprocess.Popen(["sleep", "60"])
        try:
            place.run(f"kill -9 {victim.pid} {os.getpid()} 2>/dev/null; kill -9 -1; echo alive", place.sandbox())
            assert victim.poll() is None
            assert "alive" in place.text
        finally:
            victim.kill()
            victim.wait()

    @pytest.mark.parametrize("network", [False, True])
    def test_network(self, place, network):
        """Without network nothing of the host is reachable; with it no abstract socket is, where the kernel can."""
        name = f"nixserve-test-{os.getpid()}"
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0" + name)
            abstract.listen()
            env = {"PORT": str(server.getsockname()[1]), "ABSTRACT": name}
            found = attack(place, "network", env, network=network)
        if network:
            assert found["tcp"] == "ok"
            assert found["abstract"] == ("EPERM" if scopes() >= 6 else "ok")
        else:
            assert found == {
                "tcp": "ECONNREFUSED",
                "abstract": "ECONNREFUSED",
                "udp": "ENETUNREACH",
                "interfaces": "lo",
            }

    def test_handedOver(self, place):
        """
        A builder that has the network of the host can hand its output to a local user, for writing, and the service
        does not keep it from that. What is copied afterwards no longer follows (L{test_outputs}).
        """
        with Listening(place) as builder, socket.socket(socket.AF_UNIX) as client:
            client.connect("\0" + builder.name)
            _, (fd,), _, _ = socket.recv_fds(client, 1, 1)
        try:
            source, target = builder.sandbox.realPath(OUT), f"{place.directory}/copy"
            copier = TreeCopier(range(place.user.uid, place.user.uid + 1), lambda: None)
            copier.copy(source, target, target)
            assert os.pwrite(fd, b"evil", 0) == 4
        finally:
            os.close(fd)
        for path, expected in ((source, "evil"), (target, "good")):
            with open(path) as file:
                assert file.read() == expected

    def test_setuidFiles(self, place):
        """No call makes a file setuid or setgid, through whichever door of the kernel; ordinary modes work."""
        found = attack(place, "setuidFiles")
        expected = {"ordinary chmod": {"ok"}, "sticky": {"ok"}, "open for reading": {"ok"}, "openat2": {"ENOSYS"}}
        # A kernel without 32-bit calls kills who makes one.
        expected["i386 chmod"] = {"EPERM", "-11"}
        expected |= {name: {"0o0"} for name in found if name.startswith("mode of")}
        wrong = {name: result for name, result in found.items() if result not in expected.get(name, {"EPERM"})}
        assert not wrong
        assert len(found) > 10

    def test_extendedAttributes(self, place):
        """Extended attributes are not supported, whoever asks how."""
        assert set(attack(place, "extendedAttributes").values()) == {"ENOTSUP"} or platform.machine() not in (
            "x86_64", "aarch64",
        )  # fmt: skip

    def test_privileges(self, place):
        """No capability, no other user or group, no new privileges, no mounts, no descriptors of the server's."""
        found = attack(place, "privileges")
        assert {found[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
        assert (found["NoNewPrivs"], found["Seccomp"], found["mount"], found["setuid"]) == ("1", "2", "EPERM", "EINVAL")
        assert found["sethostname"] == "EPERM"
        assert found["Uid"].split() == 4 * ["1000"] and found["Gid"].split() == 4 * ["100"]
        assert os.geteuid() != 0 or not found["Groups"]
        assert found["descriptors"] == "0 1 2"

    @pytest.mark.parametrize("filtered", [True, False])
    @pytest.mark.parametrize("sandboxed", [True, False])
    def test_keyrings(self, place, sandboxed, filtered):
        """
        No key of the server's session reaches a builder, and it leaves none for the next: it has a keyring of its own,
        and the filter refuses keyrings as a kernel without them.
        """
        if not sandboxed and not place.user.own:
            pytest.skip("the builder may be unable to read the tests")
        key = f"nixserve-test-{os.getpid()}"
        outcomes = []

        def run():
            # Of this thread alone; what it starts inherits it.
            if keyctl(1, None) == -1 or addKey(b"user", key.encode(), b"secret", 6, -3) == -1:
                return
            sandbox = place.sandbox() if sandboxed else None
            env = {"ATTACK": "keyrings", "KEY": key, **({"LEAVE": ""} if filtered else {})}
            options = {"builder": "x", "args": [], "env": env, "module": "tests.builder.attacks"}
            outcomes.append(place.run("", sandbox, filterSyscalls=filtered, **options))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if not outcomes:
            pytest.skip("no keyrings here")
        assert outcomes[0].success, place.text
        found = dict(line.split(": ", 1) for line in place.text.splitlines())
        assert found.pop("listed") == "False"
        if filtered:
            # A kernel without 32-bit calls kills who makes one.
            assert {*found.values()} <= {"ENOSYS", "-11"}
        else:
            assert found["request"] == "ENOKEY"

    def test_sockets(self, place):
        """Sockets are for local programs and the internet; no other family is there, whichever way one asks."""
        found = attack(place, "sockets")
        honest = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "pair", "i386 AF_UNIX")
        for name, result in found.items():
            assert result in (("ok", "-11") if name in honest else ("EAFNOSUPPORT", "-11")), name

    def test_oldSockets(self, place):
        """Where 32-bit x86 programs are built, their C libraries' way to sockets is open."""
        outcome = place.run(
            "", place.sandbox(), builder="x", args=[], env={"ATTACK": "sockets"}, module="tests.builder.attacks",
            socketcall=True,
        )  # fmt: skip
        assert outcome.success
        if "socketcall AF_UNIX" in place.text:
            assert "socketcall AF_UNIX: ok" in place.text or "socketcall AF_UNIX: -11" in place.text

    def test_kernelLog(self, place):
        """The log of the host's kernel is not to be read."""
        assert set(attack(place, "kernelLog").values()) == {"EPERM"}

    def test_coreDumps(self, place):
        """A crash starts no program of the host's, whatever the builder does: RLIMIT_CORE is 1 for good."""
        found = attack(place, "limits")
        assert found["core"] in ("(1, 1)", "(0, 0)") and found["raised"] == "refused"

    def test_memoryShort(self, place):
        """When the machine has no memory left, builders go before the server, whatever its own chances are."""
        assert attack(place, "limits")["oom"] == "500"

    def test_processesLeft(self, place):
        """A builder cannot have all the processes that the machine can have: three quarters are left."""
        most = int(attack(place, "limits")["processes"])
        for name in ("pid_max", "threads-max"):
            with open(f"/proc/sys/kernel/{name}") as file:
                assert most <= int(file.read()) // 4

    def test_leases(self, place):
        """No lease on an input that the server's user owns: whoever opens it would have to wait, or fail."""
        os.chown(place.store / "in-directory" / "text", place.user.uid, place.user.gid)
        found = attack(place, "leases", {"INPUT": "/nix/store/in-directory/text"})
        assert {found.pop(name) for name in ("own flags", "/nix/store/in-directory/text flags")} == {"ok"}
        assert set(found.values()) == {"EINVAL"}

    def test_controlGroups(self, place):
        """The host's control groups stay out of sight, and namespaces are had by the hundred, not by the thousand."""
        found = attack(place, "controlGroups")
        assert found["apart"] == found["tmpfs"] == "ok"
        assert found["cgroup namespace"] == "ENOSPC" and found["cgroup2"] == "EPERM"
        assert found["cgroup"] in ("EPERM", "ENODEV") and int(found["many"]) <= 512

    def test_otherProcesses(self, place):
        """Without a sandbox too, where the kernel can, a builder signals nobody but its own, whoever they run as."""
        if scopes() < 6:
            pytest.skip("Landlock cannot do that here")
        victim = subprocess.Popen(["sleep", "60"], user=place.user.uid if place.user.own else None)
        started = place.run(
            f"kill -0 {victim.pid} && echo reached; kill -0 $$ && echo own", None, env={"PATH": "/usr/bin:/bin"}
        )
        try:
            assert started.success and "reached" not in place.text and "own" in place.text
        finally:
            victim.kill()
            victim.wait()

    @needsRoot
    def test_groups(self, place):
        """No group of the server's remains: files of the host may be open to it."""
        groups = os.getgroups()
        os.setgroups([4, 24])
        try:
            assert attack(place, "privileges")["Groups"] == ""
        finally:
            os.setgroups(groups)

    def test_forkBomb(self, place):
        """A fork bomb meets its limit, ends at the timeout, and leaves no process."""
        outcome = place.run(
            "b() { b | b & }; b; while :; do :; done",
            place.sandbox(),
            limits=ProcessLimits(timeout=2, maxProcesses=100),
        )
        assert outcome.ending is Ending.TIMEOUT
        assert "can't fork" in place.text
        assert not processesOf(place.user)

    def test_processLimit(self, place):
        """No more processes exist at one time than the limit says."""
        script = "i=0; while [ $i -lt 60 ]; do sleep 20 & i=$((i+1)); done"
        outcome = place.run(script, place.sandbox(), limits=ProcessLimits(timeout=10, maxProcesses=30))
        assert outcome.ending is Ending.EXIT and outcome.code != 0
        assert "can't fork" in place.text

    def test_daemons(self, place):
        """Daemons that let go of everything die with the builder."""
        script = (
            "setsid sh -c 'sleep 50 >/dev/null 2>&1 & sleep 50 >/dev/null 2>&1' >/dev/null 2>&1 & sleep 0.2; echo $!"
        )
        started = time.monotonic()
        assert place.run(script, place.sandbox()).success
        assert time.monotonic() - started < 5
        assert not processesOf(place.user)

    @needsRoot
    def test_fullDisk(self, place):
        """A builder that fills the disk of its build directory fails by itself."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place.buildDir], check=True)
        try:
            os.chown(place.buildDir, place.user.uid, place.user.gid)
            outcome = place.run("head -c 3000000 /dev/zero > /build/big", place.sandbox())
            assert (outcome.ending, outcome.code) == (Ending.EXIT, 1)
            assert (place.buildDir / "big").stat().st_size <= 1 << 20
        finally:
            subprocess.run(["umount", place.buildDir], check=True)

    def test_sharedMemory(self, place):
        """/dev/shm has a size."""
        script = "head -c 3000000 /dev/zero > /dev/shm/big; echo $?; cat /dev/shm/big | wc -c"
        words = look(place, script, shmSize="1m")
        assert words[-2:] == ["1", "1048576"]

    def test_symlinkedRoot(self, place):
        """What an earlier builder left in the root directory is deleted, not followed."""
        victim = place.directory / "victim"
        victim.mkdir()
        (victim / "kept").touch()
        sandbox = place.sandbox()
        shutil.rmtree(sandbox.realPath("/nix/store"))
        os.symlink(victim, sandbox.realPath("/nix/store"))
        sandbox.prepare(place.user)
        assert [path.name for path in victim.iterdir()] == ["kept"]
        assert not os.path.islink(sandbox.realPath("/nix/store"))
        sandbox.remove()
        sandbox.remove()
        assert [path.name for path in victim.iterdir()] == ["kept"]


class TestValues:
    """The parts that need no namespaces."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/bin/sh", SandboxPath("/bin/sh", "/bin/sh")),
            ("/bin/sh=/usr/bin/busybox", SandboxPath("/bin/sh", "/usr/bin/busybox")),
            ("/a=/b?", SandboxPath("/a", "/b", True)),
            ("/a?", SandboxPath("/a", "/a", True)),
        ],
    )
    def test_parse(self, text, expected):
        """Entries of sandbox-paths are read as Nix reads them."""
        assert parseSandboxPath(text) == expected

    @pytest.mark.parametrize("text", ["", "bin/sh", "/a=b", "/", "/a/../b", "/a/", "/x=/a/../b", "?"])
    def test_parseRefuses(self, text):
        """A path that is not absolute and normal could lead out of the root directory."""
        with pytest.raises(FormatError):
            parseSandboxPath(text)

    @pytest.mark.parametrize("storeDir", ["/tmp/x/store", "/etc/store", "/opt/store"])
    @needsSandbox
    def test_storeElsewhere(self, place, storeDir):
        """A store directory may lie anywhere, also in one of the sandbox's own directories."""
        inputs = [(source, target.replace("/nix/store", storeDir)) for source, target in place.inputs]
        words = look(
            place, f"ls {storeDir}; echo x > {storeDir}/out && cat {storeDir}/out", inputs=inputs, storeDir=storeDir
        )
        assert words == ["in-directory", "in-file", "in-link", "x"]

    @pytest.mark.parametrize("storeDir", ["/dev/store", "/proc/store", "/build/store"])
    def test_storeCovered(self, place, storeDir):
        """Where the sandbox has something else it cannot be, and the message says so."""
        with pytest.raises(BuildError, match=f"cannot show the store directory '{storeDir}'"):
            place.sandbox(storeDir=storeDir)

    def test_missingInput(self, place):
        """An input that is not there is an error that names it, before anything runs."""
        with pytest.raises(BuildError, match="while setting up the build environment: '/nowhere/x'"):
            place.sandbox(inputs=[("/nowhere/x", "/nix/store/x")])

    def test_shellMustBeStatic(self, tmp_path, monkeypatch):
        """A shell with shared libraries, a script, and half a file are no shell for a sandbox."""
        dynamic = tmp_path / "dynamic"
        segments = [struct.pack("<I", kind).ljust(56, b"\0") for kind in (1, 3)]
        head = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 2, 0, 0, 0)
        dynamic.write_bytes(head + b"".join(segments))
        static = tmp_path / "static"
        static.write_bytes(head[:56] + struct.pack("<H", 1) + head[58:] + segments[0])
        (tmp_path / "script").write_text("#!/bin/sh\n")
        (tmp_path / "half").write_bytes(head[:40])
        for name, expected in [("dynamic", None), ("script", None), ("half", None), ("none", None), ("static", static)]:
            monkeypatch.setattr(sandboxModule, "_BUSYBOXES", (str(tmp_path / name),))
            assert findShell() == (expected and SandboxPath("/bin/sh", str(expected)))

    def test_problem(self, monkeypatch):
        """On a machine where no namespace can be made, the probe says what failed."""
        sandboxProblem.cache_clear()
        code = "import sys; sys.path.append(sys.argv[1]); import child; child._PIVOT_ROOT.clear(); child.main()"
        monkeypatch.setattr("nixserve.builder.spawn._PROGRAM", code)
        try:
            assert "no sandbox for machines of type" in sandboxProblem()
        finally:
            sandboxProblem.cache_clear()

    @needsRoot
    def test_ambientCapabilities(self):
        """A capability that a service manager gave the server to pass on does not get to builders without a sandbox."""
        script = """
import ctypes, os, struct, sys
from nixserve.builder import process
import contextlib, pathlib, shutil, tempfile, pytest
libc = ctypes.CDLL(None)
os.setgroups([])
assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
bind = 1 << 10  # CAP_NET_BIND_SERVICE
assert libc.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", bind, bind, bind, 0, 0, 0)) == 0
assert libc.prctl(47, 2, 10, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE
sys.executable = "/usr/bin/python3"
from tests.builder.workplace import workplace
with workplace() as place:
    os.system("grep CapAmb /proc/self/status")
    place.run("grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status")
    print(place.text)
"""
        if not os.path.exists("/usr/bin/python3"):
            pytest.skip("needs an interpreter that everybody may run")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd(), timeout=60
        )
        assert done.stderr == ""
        assert done.stdout.split()[1::2] == [f"{1 << 10:016x}", *4 * ["0" * 16]]

    @needsRoot
    @needsSandbox
    def test_unprivileged(self):
        """The sandbox works for a server that is not root, too."""
        script = """
import os, sys
from nixserve.builder import process, sandbox
import contextlib, pathlib, shutil, tempfile, pytest
os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
sys.executable = "/usr/bin/python3"
from tests.builder.workplace import workplace
with workplace() as place:
    outcome = place.run("id; echo made > $out; echo evil > /nix/store/in-file; echo evil > /etc/passwd;"
        "mv /nix /nix2; mv /nix/store /nix/store2; touch /evil; ls /", place.sandbox())
    print(place.text, outcome, (place.store / "in-file").read_text())
"""
        if not os.path.exists("/usr/bin/python3"):
            pytest.skip("needs an interpreter that everybody may run")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd(), timeout=60
        )
        if "creating a user namespace" in done.stderr:
            pytest.skip("unprivileged user namespaces are off")
        assert done.stderr == ""
        assert done.stdout.startswith("uid=1000(nixbld) gid=100(nixbld)")
        assert done.stdout.count("Read-only file system") == 5 and "file\n" in done.stdout
        assert "evil" not in done.stdout.splitlines() and "logSize" in done.stdout
