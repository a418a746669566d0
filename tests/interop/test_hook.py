"""
Real Nix with our build hook, and with its own, on the same machines.
"""

import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import threading
import time

import pytest

from tests.interop.building import DERIVATIONS, TREE
from tests.interop.hooking import FEATURES, GRAPH, MANY, Farm, hookProcesses, processes
from tests.interop.nix import ourProgram
from tests.interop.stores import assertVerified, infos, isLocked, physical
from tests.interop.watching import until

#: The names in L{TREE} of what fails, and of one that does not.
FAILING = ["failing", "afterFailing", "slow", "mismatch", "multi"]

#: Bytes of a path that takes a while to send.
SIZE = 48 * 1024 * 1024

#: What our service writes into its log for each connection.
LOGGED_IN = "logged in"


@pytest.fixture
def farm(nix, keys, directory):
    """A client and no machines yet."""
    with Farm(nix, keys, directory) as made:
        yield made


def write(farm, name, text):
    """An expression in a file."""
    path = farm.directory / name
    path.write_text(text)
    return path


def builtHere(root):
    """The names of the outputs that a store has built itself."""
    with contextlib.closing(sqlite3.connect(f"file:{root}/nix/var/nix/db/db.sqlite?mode=ro", uri=True)) as database:
        query = "select path from ValidPaths where ultimate = 1 and deriver is not null"
        return {path.partition("-")[2] for (path,) in database.execute(query)}


def withoutOrigin(known):
    """What is the same wherever it was built."""
    return {path: info for path, info in known.items() if not path.endswith(".drv")}


def assertNothingLeft(farm):
    """No process, no slot, no lock, no temporary root of a run is left."""
    until(lambda: not [line for line in processes(str(farm.directory)).values() if "--serve" in line], 10)
    until(lambda: not hookProcesses(farm.state), 10)
    # Nix has ended, and with it what was loaded for it.
    assert not list(farm.state.glob("preloaded/*"))
    assert not any(map(isLocked, (farm.root / "nix/var/nix/current-load").glob("*")))
    assert not any(map(isLocked, physical(farm.root, "/nix/store").glob("*.lock")))
    for machine in farm.machines:
        if machine.root is not None:
            until(lambda root=machine.root: not any(map(isLocked, root.glob("nix/var/nix/temproots/*"))), 10)


def realisations(root):
    """What a database has about outputs whose paths were not known before."""
    with contextlib.closing(sqlite3.connect(f"file:{root}/nix/var/nix/db/db.sqlite?mode=ro", uri=True)) as database:
        query = "select drvPath, outputName, path from Realisations join ValidPaths on ValidPaths.id = outputPath"
        return sorted(database.execute(query))


def arguments(**values):
    """Arguments for an expression that is a function."""
    return [word for name, value in values.items() for word in ("--argstr", name, str(value))]


def test_graph(nix, farm, directory):
    """
    Sixty derivations over three machines of both kinds come out as when real Nix builds them alone, each where its
    system and features allow it; and nothing is left.
    """
    ours = farm.endpoint("x86_64-linux,i686-linux - 2 1 foo,big")
    stock = farm.stock("x86_64-linux,riscv64-linux - 2 2 foo,big")
    special = farm.stock("i686-linux,riscv64-linux,x86_64-linux - 2 1 big,foo special")
    expression = write(farm, "graph.nix", GRAPH)
    done = farm.build(expression)
    print(done.said, done.seconds)
    assert done.status == 0
    alone = directory / "alone"
    assert farm.alone(expression, alone) == done.outputs
    outputs = builtHere(alone)
    assert len(outputs) > 60
    assert withoutOrigin(infos(nix, farm.root)) == withoutOrigin(infos(nix, alone))
    places = {machine: builtHere(machine.root) for machine in (ours, stock, special)}
    assert sorted(name for built in places.values() for name in built) == sorted(outputs)
    for machine, built in places.items():
        assert built, f"nothing was built on {machine.line}"
        for name in built:
            number = int(re.match(r"node-(\d+)", name)[1])
            system = ["x86_64-linux", "riscv64-linux", "i686-linux"][number % 3]
            assert system in machine.columns.split()[0]
            assert (number % 5 == 3) == (machine is special)
    assertNothingLeft(farm)
    for root in (farm.root, *(machine.root for machine in farm.machines)):
        assertVerified(nix, root)


def test_fastest(farm):
    """An idle machine that is faster than others takes the build; with half of them, its slots taken, others do."""
    slow, fast = farm.stock("x86_64-linux - 1 1"), farm.stock("x86_64-linux - 1 3")
    expression = write(farm, "many.nix", MANY)
    assert farm.build(expression, *arguments(count=1)).status == 0
    assert builtHere(fast.root) == {"small-0"} and not slow.root.exists()
    assert farm.build(expression, *arguments(count=2, salt="x", sleep=1)).status == 0
    assert len(builtHere(slow.root)) == 1


@pytest.mark.parametrize("kind", ["stock", "endpoint"])
def test_failures(nix, farm, kind):
    """
    What fails, fails as with the original hook: status, messages, what is built all the same, and what is kept.
    """
    getattr(farm, kind)("x86_64-linux,builtin - 4 1 foo")
    causes = {}
    for hook in ("real", "ours"):
        root = farm.directory / hook
        chosen = [word for name in FAILING for word in ("-A", name)]
        options = [*chosen, "--keep-going", "--keep-failed", "--timeout", "2"]
        done = farm.build(TREE, *options, *arguments(salt=hook), hook=hook, root=root)
        print(done.said)
        lines = [re.sub(r"/[a-z0-9]{32}-|sha256-\S+", "/", line) for line in done.said.splitlines()]
        causes[hook] = (
            done.status,
            # But for the line that has them all, in the order of their hashes.
            sorted(
                line
                for line in lines
                if "', '" not in line and line.startswith(("error: ", "         specified", "            got"))
            ),
            sorted(re.sub("^.{32}", "", path.rpartition("/")[2]) for path in infos(nix, root)),
            done.said.count("keeping build directory"),
        )
    assert causes["ours"] == causes["real"]
    assert causes["ours"][3] == 3
    assertNothingLeft(farm)


def test_firstFailure(farm):
    """Without C{--keep-going} the first failure ends everything, at once and everywhere."""
    farm.stock("x86_64-linux - 4 1 foo")
    done = farm.build(TREE, "-A", "failing", "-A", "slow")
    assert done.status == 1 and done.seconds < 10
    assert re.search(r"build of '.*-failing.drv' on 'ssh://m0' failed: ", done.said)
    assertNothingLeft(farm)


@pytest.mark.parametrize("share", ["0", "60"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupt(nix, farm, number, share):
    """Ctrl-C ends all builds on all machines; so does the sudden death of Nix."""
    farm.endpoint("x86_64-linux - 2 1"), farm.stock("x86_64-linux - 2 1")
    expression = write(farm, "many.nix", MANY)
    command = farm.command(expression, *arguments(count=8, sleep=ours("61.25")))
    environment = farm.environment(NIXSERVE_HOOK_SHARE=share)
    process = nix.start(*command, store=farm.root, environment=environment, stderr=-3)
    until(lambda: len(sleeping("61.25")) == 4, 20)
    process.send_signal(number)
    process.wait(20)
    until(lambda: not sleeping("61.25"), 10)
    assertNothingLeft(farm)


@pytest.mark.parametrize("share", ["0", "60"])
def test_interruptWhileConnecting(nix, farm, share):
    """Ctrl-C ends what waits for a machine that says nothing, too."""
    farm.silent("x86_64-linux - 1 1"), farm.silent("x86_64-linux - 1 1")
    command = farm.command(write(farm, "many.nix", MANY), *arguments(count=2), "--option", "connect-timeout", "60")
    environment = farm.environment(NIXSERVE_HOOK_SHARE=share)
    process = nix.start(*command, store=farm.root, environment=environment, stderr=-3)
    connecting = f"{farm.directory}/ssh_config"
    until(lambda: len([line for line in processes(connecting).values() if line.split()[0].endswith("ssh")]) >= 2, 20)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    until(lambda: not [line for line in processes(connecting).values() if line.split()[0].endswith("ssh")], 10)
    assertNothingLeft(farm)


@pytest.mark.soak
def test_interruptAnywhere(nix, farm):
    """Ctrl-C or sudden death at any moment leaves nothing behind, and the next run does what is left."""
    farm.endpoint("x86_64-linux - 2 1"), farm.stock("x86_64-linux - 2 1")
    nix.run("nix-store", "--init", store=farm.root)
    expression = write(farm, "many.nix", MANY)
    rng = random.Random(1)
    for number in range(100):
        command = farm.command(expression, *arguments(count=12, sleep=ours("0.0625"), salt=number))
        process = nix.start(*command, store=farm.root, environment=farm.environment(), stderr=-3, stdout=-3)
        time.sleep(rng.uniform(0, 1.2))
        process.send_signal(rng.choice([signal.SIGINT, signal.SIGKILL, signal.SIGTERM]))
        process.wait(20)
        until(lambda: not sleeping("0.0625"), 10)
        assertNothingLeft(farm)
        if number % 10 == 0:
            done = farm.build(expression, *arguments(count=12, sleep=ours("0.0625"), salt=number))
            assert done.status == 0, done.said
            assertVerified(nix, farm.root)


@pytest.fixture
def daemon(nix, farm):
    """
    A nix-daemon with our hook on the farm's store.

    @return: what its clients have as C{NIX_REMOTE}.
    """
    socket = farm.directory / "socket"
    config = f"{farm.environment()['NIX_CONFIG']}store = {farm.root}\nbuild-hook = {ourProgram('nixserve-hook')}\n"
    environment = farm.environment(NIX_DAEMON_SOCKET_PATH=str(socket), NIX_REMOTE="", NIX_CONFIG=config)
    process = nix.start("nix-daemon", environment=environment, stderr=-3)
    until(socket.exists, 10)
    yield f"unix://{socket}?root={farm.root}"
    process.kill()
    process.wait()


def test_daemon(nix, farm, daemon):
    """A nix-daemon builds through the hook for its clients, who need no keys; and when they are gone, no more."""
    farm.endpoint("x86_64-linux - 2 1"), farm.stock("x86_64-linux - 2 1")
    command = farm.command(write(farm, "many.nix", MANY), hook="the daemon's")
    done = nix.run(*command, *arguments(count=8, sleep="1.5"), store=daemon)
    assert len(done.stdout.split()) == 8
    assert all(len(builtHere(machine.root)) >= 2 for machine in farm.machines)
    client = nix.start(*command, *arguments(count=8, sleep=ours("61.75")), store=daemon, stderr=-3)
    until(lambda: len(sleeping("61.75")) == 4, 20)
    client.kill()
    client.wait()
    until(lambda: not sleeping("61.75"), 10)
    assertNothingLeft(farm)
    assertVerified(nix, farm.root)


def ours(seconds):
    """A time to sleep that no other run of these tests has on this machine."""
    return f"{seconds}{os.getpid():07}"


def sleeping(seconds):
    """The builds of ours that sleep for so long."""
    return [line for line in processes(ours(seconds)).values() if line.startswith("sleep ")]


def test_brokenMachines(farm):
    """
    One machine refuses connections, one accepts them and is silent, one dies in each build: all is built on the one
    that is left, in its time and at most one time limit for each; and each is spoken of once.
    """
    farm.refusing("x86_64-linux - 4 9")
    farm.silent("x86_64-linux - 4 8")
    dying = farm.stock("x86_64-linux - 4 7", "timeout -s KILL 1")
    farm.stock("x86_64-linux - 4 1")
    expression = write(farm, "many.nix", MANY)
    done = farm.build(expression, *arguments(count=12, sleep="1.5"), "--option", "connect-timeout", "4")
    print(done.said, done.seconds)
    assert done.status == 0 and len(done.outputs) == 12
    for number in range(3):
        assert done.said.count(f"build machine ssh://m{number} is put aside") == 1
    assert builtHere(dying.root) == set()
    assert done.seconds < 3 * 2 + 4 * 2 + 10
    assertNothingLeft(farm)


def test_allBroken(farm):
    """If no machine is left, builds fail at once and with the reason."""
    farm.refusing("x86_64-linux - 4 9")
    done = farm.build(write(farm, "many.nix", MANY), *arguments(count=3), "--keep-going")
    print(done.said, done.seconds)
    assert done.status == 1
    assert "the connection was refused" in done.said
    assert done.said.count("is put aside") == 1
    assert done.seconds < 5


def test_localInstead(farm):
    """What Nix can build itself it does when no machine can be reached."""
    farm.refusing("x86_64-linux - 4 9")
    done = farm.build(write(farm, "many.nix", MANY), *arguments(count=3), maxJobs=1)
    assert done.status == 0
    assert len(builtHere(farm.root)) == 3


def test_bothHooks(nix, farm):
    """The original and ours at once on one machines file never exceed a machine's slots."""
    farm.stock("x86_64-linux - 3 1")
    expression = write(farm, "many.nix", MANY)
    # Two Nixes that make the same store at once disturb each other.
    nix.run("nix-store", "--init", store=farm.root)
    most = []
    ending = threading.Event()

    def watch():
        while not ending.wait(0.02):
            most.append(len(sleeping("1.973")))

    watching = threading.Thread(target=watch)
    watching.start()
    results = {}

    def build(hook):
        results[hook] = farm.build(expression, *arguments(count=5, sleep=ours("1.973"), salt=hook), hook=hook)

    builds = [threading.Thread(target=build, args=(hook,)) for hook in ("real", "ours")]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join()
    ending.set()
    watching.join()
    assert [done.status for done in results.values()] == [0, 0], results
    assert max(most) == 3


def test_collectors(nix, farm, directory):
    """While real Nix's collector runs over and over on all sides, no path is lost that a build needs."""
    farm.endpoint("x86_64-linux,i686-linux,riscv64-linux - 2 1 foo,big,special")
    farm.stock("x86_64-linux,riscv64-linux,i686-linux - 2 1 foo,big,special")
    roots = [farm.root, *(machine.root for machine in farm.machines)]
    ending, collections = threading.Event(), []

    def collect():
        while not ending.wait(0.2):
            for root in roots:
                if (root / "nix/var/nix/db/db.sqlite").exists():
                    collections.append(nix.run("nix-store", "--gc", store=root, check=False))

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        done = farm.build(write(farm, "graph.nix", GRAPH.replace("riscv64", "x86_64")), "--out-link", directory / "r")
    finally:
        ending.set()
        thread.join()
    print(done.said[-2000:], len(collections))
    assert done.status == 0
    assert len(collections) > 10 and all(each.returncode == 0 for each in collections)
    assert len(done.outputs) == 60 and all(physical(farm.root, path).exists() for path in done.outputs)
    assertVerified(nix, farm.root)


def test_sentOnce(farm):
    """A path that several builds need, begun at once, travels once."""
    machine = farm.endpoint("x86_64-linux - 4 1")
    meter = farm.metered(machine)
    source = farm.directory / "source"
    source.write_bytes(random.Random(1).randbytes(SIZE))
    expression = write(farm, "many.nix", MANY)
    done = farm.build(expression, *arguments(count=4, source=source))
    print(done.said, meter.sent)
    assert done.status == 0
    assert SIZE < meter.sent < 1.2 * SIZE
    assert len(re.findall("copying path '.*-source' to", done.said)) == 1


@pytest.mark.parametrize("share", ["0", "60"])
def test_oneConnection(farm, share):
    """The builds of a run share one connection to each machine, unless they are told not to."""
    farm.endpoint("x86_64-linux - 4 1")
    expression = write(farm, "many.nix", MANY)
    done = farm.build(expression, *arguments(count=6), environment={"NIXSERVE_HOOK_SHARE": share})
    assert done.status == 0
    logins = (farm.directory / "m0" / "log").read_text().count(LOGGED_IN)
    assert logins == (1 if share == "60" else 6)


def test_masterDies(farm):
    """A shared connection that was killed is replaced."""
    farm.endpoint("x86_64-linux - 4 1")
    expression = write(farm, "many.nix", MANY)
    assert farm.build(expression, *arguments(count=2)).status == 0
    (pid,) = (pid for pid, line in processes(str(farm.state)).items() if "ControlPersist" in line or "[mux]" in line)
    os.kill(pid, signal.SIGKILL)
    assert farm.build(expression, *arguments(count=2, salt="again")).status == 0


def check(farm, *options, **environment):
    """
    What C{nixserve hook --check} says.

    @return: exit status, and what it says about each machine, by URI.
    """
    machines = farm.directory / "machines"
    machines.write_text(farm.file)
    done = farm.nix.run(
        *(ourProgram("nixserve"), "hook", "--check", "--json", f"@{machines}", *options),
        store=farm.root,
        environment=farm.environment(**environment),
        check=False,
    )
    print(done.stdout.decode(), done.stderr.decode())
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_check(nix, farm, keys):
    """What is well is told as such, with what was found out."""
    farm.endpoint("x86_64-linux,i686-linux - 3 1 foo")
    farm.stock("x86_64-linux,riscv64-linux - 2 2 foo special")
    status, machines = check(farm)
    assert status == 0
    fingerprint = nix.lines("ssh-keygen", "-l", "-f", keys.host)[0].split()[1]
    for machine, systems, version in zip(
        machines, [["i686-linux", "x86_64-linux"], ["riscv64-linux", "x86_64-linux"]], ["2.8", "2.7"], strict=True
    ):
        assert machine["well"] and machine["problems"] == []
        assert machine["hostKey"] == f"ssh-ed25519 {fingerprint}"
        assert machine["takesUnsigned"] is True
        assert machine["builds"] == dict.fromkeys(systems, True)
        assert machine["freeSlots"] == machine["maxJobs"]
        assert abs(machine["clockSkew"]) < 3
        assert machine["version"] == version


def test_checkFinds(farm):
    """What is wrong is told, each with what to change."""
    farm.refusing("x86_64-linux")
    farm.endpoint("x86_64-linux,riscv64-linux - 1 1 foo")
    farm.stock("x86_64-linux - 1 1 kvm2")
    readOnly = farm.endpoint("x86_64-linux")
    authorized = farm.directory / readOnly.name / "authorized_keys"
    authorized.write_text(farm.keys.userLine('restrict,command="nix-store --serve"'))
    status, machines = check(farm)
    assert status == 1
    refusing, wrongSystem, wrongFeature, unwritable = (" ".join(machine["problems"]) for machine in machines)
    assert "the connection was refused" in refusing and "start its SSH server" in refusing
    assert machines[1]["builds"] == {"x86_64-linux": True, "riscv64-linux": False}
    assert "does not build for riscv64-linux" in wrongSystem and "correct its line" in wrongSystem
    assert "does not build for x86_64-linux with features kvm2" in wrongFeature
    assert machines[3]["takesUnsigned"] is False and "right to write" in unwritable and "right to build" in unwritable


def test_checkConfigured(farm):
    """Without an argument, the machines that Nix has in its settings are looked at."""
    farm.refusing("x86_64-linux")
    config = farm.environment()["NIX_CONFIG"] + f"builders = {farm.file}\n"
    words = ourProgram("nixserve"), "hook", "--check", "--json"
    done = farm.nix.run(*words, store=farm.root, environment=farm.environment(NIX_CONFIG=config), check=False)
    assert [json.loads(line)["uri"] for line in done.stdout.splitlines()] == ["ssh://m0"]


def test_checkNothing(farm):
    """If it has none, that is said, with what would help; so it is without any Nix."""
    for environment in ({}, {"PATH": str(farm.directory)}):
        done = farm.nix.run(
            *(ourProgram("nixserve"), "hook", "--check"),
            store=farm.root,
            environment=farm.environment(NIX_CONF_DIR=str(farm.directory), **environment),
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.decode() == (
            f"error: there are no machines in '@{farm.directory}/machines'; name some in the setting 'builders' of "
            "nix.conf, in its machines file, or behind --check\n"
        )


@pytest.mark.parametrize("kind", ["stock", "endpoint"])
def test_contentAddressed(nix, farm, kind):
    """Outputs whose paths follow from their contents come where they come with the original, and Nix knows of them."""
    getattr(farm, kind)("x86_64-linux,builtin - 4 1 foo,ca-derivations")
    known = {}
    for hook in ("real", "ours"):
        root = farm.directory / hook
        features = f"{FEATURES} ca-derivations"
        config = f"{farm.sandbox}experimental-features = nix-command ca-derivations\nsystem-features = {features}\n"
        done = farm.build(DERIVATIONS / "floating.nix", hook=hook, root=root, environment={"NIX_CONFIG": config})
        assert done.status == 0, done.said
        known[hook] = done.outputs, infos(nix, root), realisations(root)
    assert known["ours"] == known["real"]
    assert len(known["ours"][2]) >= 3
    assertVerified(nix, farm.directory / "ours")
