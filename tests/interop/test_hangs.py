"""
Clients of builds that do not behave, and several at once: nobody waits for ever, and nothing stays behind.

Real C{nix-store --serve} of Nix 2.8 hangs in two of these cases: where a client does not read the log, and where a lock
file has something in it.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from nixserve.testing import makeInfo, makeNar
from tests.interop.building import (
    FEATURE,
    Talk,
    buildDerivation,
    readResult,
    recipe,
    requireSandbox,
    serverCommand,
)
from tests.interop.conversations import addHeader
from tests.interop.endpoint import Endpoint, Keys
from tests.interop.stores import assertVerified, isLocked, isSent, opened, physical
from tests.interop.watching import until

#: Seconds after which nothing of a client that is gone may be left.
FREE = 5
LOG_SIZE = 10 * 1024 * 1024


@pytest.fixture(scope="module")
def sandbox():
    """Environment for real Nix. It looks every second whether a lock is free."""
    environment = requireSandbox()
    return {"NIX_CONFIG": environment["NIX_CONFIG"] + "build-poll-interval = 1\n"}


@pytest.fixture(scope="module")
def service(scratch, nix, keys, sandbox):
    """A service that builds."""
    place = scratch / "hangs"
    place.mkdir()
    running = Endpoint(place / "endpoint", nix, keys, place / "root", options=["--system-features", FEATURE])
    yield running
    running.stop()


class Way:
    """
    How clients reach us.

    @ivar command: that leads to a server.
    @ivar root: of its store.
    """

    def __init__(self, nix, command, root, environment):
        self.command, self.root = command, root
        self._nix, self._environment = nix, environment

    def talk(self, **options):
        """A new conversation."""
        return Talk.withServer(self._nix, self.command, 7, self._environment, **options)

    def abandon(self, talk):
        """Do to a conversation what the sudden death of the client does."""
        if self.command[0] == "ssh":
            talk.process.kill()
        else:
            talk.process.stdin.close()
            talk.process.stdout.close()


@pytest.fixture(params=["conch", "stdio"])
def way(request, nix, sandbox, directory):
    """To the service over SSH, and to a C{nixserve-store} of one's own."""
    if request.param == "conch":
        server = request.getfixturevalue("service")
        return Way(nix, server.ssh(), server.root, sandbox)
    return Way(nix, serverCommand("ours", directory / "root"), directory / "root", sandbox)


def fresh(script, **fields):
    """A recipe that nobody has built yet. C{@} in the script is a word that occurs nowhere else."""
    word = uuid.uuid4().hex
    made = recipe(f"build-{word[:12]}", script.replace("@", word), **fields)
    return made, word


def isRunning(word):
    """Has any process this word in its command line?"""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                return True
    return False


def assertFree(root, made, word):
    """Soon neither processes nor locks nor roots nor directories are left of a build."""
    begun = time.monotonic()
    left = FREE
    until(lambda: not isRunning(word), left, "processes of the builder go on")
    until(lambda: not any(isLocked(f"{physical(root, path)}.lock") for path in made.paths), left, "it is still locked")
    until(lambda: not list(Path(f"{root}/nix/store").glob("*-nixserve-build")), left, "the sandbox is still there")
    until(lambda: not list(Path(f"{root}/nix/var/nix/builds").iterdir()), left, "the build directory is still there")
    seconds = time.monotonic() - begun
    print(f"free after {seconds:.2f} s")
    assert seconds < FREE


#: Leaves a process behind that has left the builder's session, and waits.
FORKING = "(setsid sh -c 'sleep 1000; :' @ &) ; echo begun; sleep 1000; echo never > $out"


@contextlib.contextmanager
def building(way, made):
    """A conversation in which a build has begun."""
    with way.talk() as talk:
        talk.write(buildDerivation(made))
        until(lambda: "begun\n" in talk.stderr(), 20, "the build does not begin")
        yield talk


def test_logNotRead(nix, way, directory):
    """A client that never reads its standard error gets its reply, and the log on disk is complete."""
    made, _ = fresh(f"yes 0123456789abcde | head -c {LOG_SIZE}; echo done > $out")
    reading, writing = os.pipe()
    process = nix.start(*way.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    try:
        talk = Talk.ofProcess(process)
        talk.greet(0x207)
        begun = time.monotonic()
        talk.write(buildDerivation(made))
        assert readResult(talk, 7).status == 0
        print(f"{time.monotonic() - begun:.1f} s")
        assert talk.askValid(made.paths) == made.paths
    finally:
        process.kill()
        process.wait(20)
        process.stdin.close()
        process.stdout.close()
        os.close(reading)
    log = nix.run("nix-store", "--read-log", made.drvPath, store=way.root).stdout
    assert len(log) == LOG_SIZE and set(log.split(b"\n")[:-1]) == {b"0123456789abcde"}


def test_lockFileNotEmpty(way):
    """A lock file that somebody has written to, and left, keeps nobody from building."""
    with opened(way.root):
        pass
    made, _ = fresh("echo @ > $out")
    lock = Path(f"{physical(way.root, made.paths[0])}.lock")
    lock.write_text("left behind")
    with way.talk(timeout=20) as talk:
        assert talk.build(made).status == 0
    assert not lock.exists()


def test_uploadAbandoned(way):
    """A client that vanishes while it sends an object is in nobody's way who sends the same."""
    nar = makeNar(b"0123456789abcdef" * 100_000)
    info = makeInfo(f"upload-{uuid.uuid4().hex[:8]}", nar)
    with way.talk() as talk:
        talk.write(addHeader(info.path, info.narHash.hex, len(nar)) + nar[: len(nar) // 2])
        until(lambda: isSent(way.root, info.path), 10, "the upload does not begin")
        talk.process.kill()
        begun = time.monotonic()
        with way.talk(timeout=20) as other:
            other.add(info, nar)
            assert time.monotonic() - begun < FREE
            assert other.askValid([info.path]) == [info.path]
    assert not Path(f"{physical(way.root, info.path)}.lock").exists()


def test_clientGone(way):
    """When the client is gone, so is all of the builder, whatever it has started; and the next one can build."""
    made, word = fresh(FORKING)
    with building(way, made) as talk:
        assert isRunning(word)
        way.abandon(talk)
        assertFree(way.root, made, word)
    with way.talk() as talk:
        assert talk.askValid(made.paths) == []
        assert talk.build(made, timeout=1).status == 8


def test_halfClosed(way):
    """The end of a client's input ends its build, as with real Nix: no reply, one line, exit status 1."""
    made, word = fresh(FORKING)
    with building(way, made) as talk:
        begun = time.monotonic()
        talk.process.stdin.close()
        assert talk.process.wait(FREE) == 1
        assert time.monotonic() - begun < FREE
        assert talk.process.stdout.read() == b""
        assert talk.stderr() == "begun\nerror: interrupted by the user\n"
        assertFree(way.root, made, word)


def test_serverKilled(nix, sandbox, directory):
    """Even if the server is killed there is nothing left that runs or is locked."""
    way = Way(nix, serverCommand("ours", directory / "root"), directory / "root", sandbox)
    made, word = fresh(FORKING)
    with building(way, made) as talk:
        talk.process.send_signal(signal.SIGKILL)
        until(lambda: not isRunning(word), FREE, "processes of the builder go on")
        locks = [f"{physical(way.root, path)}.lock" for path in made.paths]
        until(lambda: not any(map(isLocked, locks)), FREE, "it is still locked")
    again, _ = fresh("echo again > $out")
    with way.talk() as talk:
        assert talk.build(again).status == 0
        # The same derivation, in whose way the remains of the first attempt must not be.
        assert talk.build(made, timeout=1).status == 8


def test_twoClients(service, nix, sandbox):
    """Two clients that ask the service for the same build get one, and each of them its whole log."""
    way = Way(nix, service.ssh(), service.root, sandbox)
    made, _ = fresh("read id < /proc/sys/kernel/random/uuid; echo begun; echo built as $id; sleep 1; echo $id > $out")
    with building(way, made) as first, building(way, made) as second:
        results = [readResult(talk, 7) for talk in (first, second)]
        assert results[0].status == 0 and results[0] == results[1]
    assert first.stderr() == second.stderr()
    assert re.fullmatch("begun\nbuilt as ([0-9a-f-]{36})\n", first.stderr())
    assert physical(service.root, made.paths[0]).read_text().strip() in first.stderr()


def test_oneOfTwoLeaves(service, nix, sandbox):
    """A build goes on as long as one of those who asked for it is there."""
    way = Way(nix, service.ssh(), service.root, sandbox)
    made, _ = fresh("echo begun; sleep 2; echo @ > $out")
    with building(way, made) as first, building(way, made) as second:
        first.process.kill()
        assert readResult(second, 7).status == 0
        assert second.askValid(made.paths) == made.paths


@pytest.mark.parametrize(("first", "second"), [("ours", "real"), ("real", "ours"), ("ours", "ours")])
def test_sameStore(nix, sandbox, directory, first, second):
    """
    Two servers that share a store, one of them real Nix perhaps, do not build the same twice: the second waits, and
    then finds it valid.
    """
    root = directory / "root"
    ways = [Way(nix, serverCommand(who, root), root, sandbox) for who in (first, second)]
    made, _ = fresh("echo begun; sleep 1; read id < /proc/sys/kernel/random/uuid; echo $id > $out")
    with building(ways[0], made) as one, ways[1].talk() as other:
        other.write(buildDerivation(made))
        assert readResult(one, 7).status == 0
        contents = physical(root, made.paths[0]).read_text()
        result = readResult(other, 7)
    assert (result.status, result.times) == (2, (0, 0, 0, 0))
    assert "begun" not in other.stderr()
    assert physical(root, made.paths[0]).read_text() == contents
    assertVerified(nix, root)


def test_turns(nix, makeEndpoint, directory, sandbox):
    """Where one build runs at a time, keys take turns: who asks for one does not wait for all of another's."""
    server = makeEndpoint(directory / "root", options=["--max-jobs", "1"])
    other = Keys(directory / "keys")
    other.host = server.keys.host
    with server.authorized.open("a") as authorized:
        authorized.write(other.userLine('restrict,command="nix-store --serve --write"'))
    commands = {
        "busy": server.ssh(),
        "other": ["ssh", "-x", "-T", *other.sshOptions(server.port), server.login, "--", "nix-store --serve --write"],
    }
    script = "echo begun; read uptime rest < /proc/uptime; echo at $uptime; sleep 0.5; echo @ > $out"
    with contextlib.ExitStack() as stack:

        def ask(who, script=script):
            talk = stack.enter_context(Talk.withServer(nix, commands[who], 7, sandbox))
            talk.write(buildDerivation(fresh(script)[0]))
            until(lambda: talk.stderr(), 20, "nothing is said")
            return talk

        # However long the logins take, all have asked before any has its turn.
        first = ask("busy", "echo begun; sleep 600; echo @ > $out")
        talks = [ask(who) for who in ("busy", "busy", "busy", "busy", "other")]
        first.process.stdin.close()
        assert [readResult(talk, 7).status for talk in talks] == [0] * 5
        said = [talk.stderr() for talk in talks]
    assert all("waiting for a free build slot" in text for text in said)
    moments = [float(re.search(r"^at ([\d.]+)$", text, re.M)[1]) for text in said]
    # One of the busy key's builds may have been next.
    order = sorted(range(5), key=moments.__getitem__)
    assert order.index(4) <= 1, order
    assert [each for each in order if each != 4] == [0, 1, 2, 3]
    gaps = [later - earlier for earlier, later in zip(sorted(moments), sorted(moments)[1:], strict=False)]
    assert min(gaps) > 0.45, "two builds ran at once"
