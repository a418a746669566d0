"""Who builds when, who hears of it, and that nothing is left behind whoever leaves and whenever."""

import dataclasses
import random

import pytest
from twisted.internet.defer import CancelledError

from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.messages import BuildOptions
from nixserve.errors import StoreError
from nixserve.protocol.builds import EXTRA_SECONDS
from nixserve.protocol.turns import Turns
from nixserve.store.api import Busy
from nixserve.testing import ManualWorkers
from tests.protocol.buildworld import World, built, feed, outputOf, pathOf


def bugs(events):
    """What was logged as one."""
    return [event for event in events if "bug" in str(event.get("log_format"))]


# --- slots and turns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("maxJobs", [1, 3])
def test_maxJobs(maxJobs):
    """No more than so many run at once, over all clients; each that ends makes room for one."""
    world = World(maxJobs)
    clients = [world.client(f"client{number}").build(*(f"{number}-{job}" for job in range(3))) for number in range(3)]
    for left in range(9, 0, -1):
        world.settle()
        assert len(world.running) == min(maxJobs, left)
        assert world.builds.counts == (min(maxJobs, left), max(0, left - maxJobs))
        world.threads.finish()
    world.settle().clean()
    assert all(len(client.results) == 3 for client in clients)
    assert {result for client in clients for result in client.results} == {
        f"{a}-{b}" for a in range(3) for b in range(3)
    }


def test_turns():
    """Clients take turns whatever their numbers of builds; each one's own come in order."""
    world = World()
    world.client("many").build("m1", "m2", "m3", "m4")
    world.client("few").build("f1")
    world.client("two").build("t1", "t2")
    order = []
    while world.settle().running:
        order += world.running
        world.threads.finish()
    assert order == ["m1", "m2", "f1", "t1", "m3", "t2", "m4"]
    world.clean()


def test_endlessBuildsOfOneKey():
    """
    Builds that never end keep no other key from building for more than a minute: one more runs then, and when that ends
    the next of those who are kept out, each in turn. The key that has them gets none.
    """
    world = World(2, extraJobs=1)
    world.client("hog").build("h1", "h2", "h3")
    world.settle()
    world.client("a").build("a1", "a2")
    world.settle()
    world.reactor.advance(EXTRA_SECONDS - 1)
    world.client("b").build("b1")
    assert world.settle().running == ["h1", "h2"]
    world.reactor.advance(1)
    assert world.settle().running == ["h1", "h2", "a1"]
    world.reactor.advance(EXTRA_SECONDS * 3)
    assert world.settle().running == ["h1", "h2", "a1"]
    assert world.finish("a1").running == ["h1", "h2", "b1"]
    assert world.finish("b1").running == ["h1", "h2"]
    world.reactor.advance(EXTRA_SECONDS)
    assert world.settle().running == ["h1", "h2", "a2"]
    # The extra one counts: what ends makes room only when no more than two are left.
    assert world.finish("h1").running == ["h2", "a2"]
    assert world.finish("a2").running == ["h2", "h3"]
    world.finish("h2", "h3").clean()


def test_noExtraForThoseInTurn():
    """Who waits for a turn like everybody else gets no more than that, however long the queues are."""
    world = World(1, extraJobs=1)
    for name in ("a", "b"):
        world.client(name).build(*(f"{name}{number}" for number in range(20)))
    for _ in range(40):
        world.settle()
        world.reactor.advance(EXTRA_SECONDS / 3)
        assert len(world.settle().running) == 1
        world.threads.finish()
    world.settle().clean()


def test_leavingWhatOthersWant():
    """
    A build that its first client has left runs for who still waits: it counts as that one's, not as that of who left,
    who may be given an extra one.
    """
    world = World(1, extraJobs=1)
    first = world.client("a").build("shared")
    world.settle()
    world.client("hog").build("shared")
    first.leave("shared")
    first.build("a1")
    assert world.settle().running == ["shared"]
    world.reactor.advance(EXTRA_SECONDS)
    assert world.settle().running == ["shared", "a1"]
    world.finish("shared", "a1").clean()


def test_leavingTheQueueToOthers():
    """A build that waits leaves the queue of a client that has gone, and uses up no turn of it."""
    world = World(1)
    world.client("busy").build("b1")
    world.settle()
    first = world.client("a").build("shared", "a1")
    world.client("hog").build("h1", "shared")
    world.settle()
    first.leave("shared")
    assert world.finish("b1").running == ["a1"]
    assert world.finish("a1").running == ["shared"]
    assert world.finish("shared").running == ["h1"]
    world.finish("h1").clean()


def test_noExtraForThoseWhoLeft():
    """A client that has gone while it was kept out leaves nothing to look at; nor does the end of all builds."""
    world = World(1, extraJobs=1)
    world.client("hog").build("h1")
    world.settle()
    client = world.client("a").build("a1")
    world.settle()
    assert world.reactor.getDelayedCalls()
    client.leave("a1")
    world.settle()
    assert not world.reactor.getDelayedCalls()
    world.client("b").build("b1")
    world.settle()
    world.builds.stop()
    world.settle(builds=True).clean()


def test_sameNameIsOneQueue():
    """Two sessions of one key share its turns."""
    world = World()
    for count, name in enumerate(("key", "key", "other")):
        world.client(name).build(f"{count}a", f"{count}b")
        world.settle()
    order = []
    while world.settle().running:
        order += world.running
        world.threads.finish()
    assert order == ["0a", "0b", "2a", "1a", "2b", "1b"]


def test_toldThePlace():
    """Who has to wait is told once how many run and wait before; who has not, nothing."""
    world = World(2)
    first = world.client("a").build("x", "y")
    world.settle()
    second = world.client("b").build("z")
    world.settle()
    third = world.client("c").build("w")
    world.settle()
    line = "waiting for a free build slot: 2 builds are running, {} wait before this\n"
    assert (first.log, second.log, third.log) == (b"", line.format(0).encode(), line.format(1).encode())
    world.finish("x", "y", "z", "w").clean()
    assert second.log == line.format(0).encode()


def test_nothingToBuildWaitsForNoSlot():
    """What is valid already is answered at once, whatever runs."""
    world = World()
    world.builder.early[pathOf("there")] = valid = BuildResult(BuildStatus.ALREADY_VALID)
    world.client("a").build("x")
    client = world.client("b").build("there")
    world.settle()
    assert client.results == {"there": valid}
    world.finish("x").clean()


def test_noLocksInTheQueue():
    """What waits for a slot holds no lock: what runs might need it, and others could build it meanwhile."""
    world = World()
    world.client("a").build("x", "y")
    world.settle()
    assert world.builder.locks == {pathOf("x")}
    world.finish("x")
    assert world.builder.locks == {pathOf("y")}
    world.finish("y").clean()


def test_builtByOthersInTheQueue():
    """What somebody else has built when the turn comes is not built again."""
    world = World()
    client = world.client("a").build("x", "y")
    world.settle()
    world.builder.early[pathOf("y")] = valid = BuildResult(BuildStatus.ALREADY_VALID)
    world.finish("x")
    assert client.results["y"] is valid
    assert world.builder.ran == [pathOf("x")]
    world.clean()


def test_lockedWhenTheTurnComes():
    """A build that somebody else is at when its turn comes gives the slot to the next, and comes back."""
    world = World()
    client = world.client("a").build("x", "y", "z")
    world.settle()
    world.builder.busy[pathOf("y")] = 3
    world.finish("x", "z", "y").clean()
    assert world.builder.ran == [pathOf("x"), pathOf("z"), pathOf("y")]
    assert client.log.count(b"waiting for a free build slot") == 2


def test_busyHoldsNoSlot():
    """A build whose outputs somebody else has locked waits without a slot, and says so once."""
    world = World()
    world.builder.busy[pathOf("x")] = 20
    client = world.client("a").build("x")
    for _ in range(20):
        world.step()
    other = world.client("b").build("y")
    while not world.running:
        world.step(False)
    assert world.running == ["y"]
    world.settle()
    assert client.log.count(b"waiting for the lock on it...\n") == 1
    world.finish("y", "x").clean()
    assert other.results["y"] == built("y")


# --- joining ------------------------------------------------------------------------------------------------


def test_join():
    """The second client gets the log from its start, the rest with the first, and the same result; one build runs."""
    world = World(4)
    first = world.client("a").build("x")
    world.settle()
    feed(world, b"one\n")
    second = world.client("b").build("x")
    assert second.log == b"one\n"
    feed(world, b"two\n")
    world.finish("x").clean()
    assert first.log == second.log == b"one\ntwo\n"
    assert first.results["x"] is second.results["x"]
    assert world.builder.ran == [pathOf("x")]


def test_lastLinesBeforeTheResult():
    """What the builder wrote last is there when the result is."""
    world = World()
    client = world.client("a").build("x")
    world.settle()
    build = world.threads.running[0]
    seen = []
    client.waiting["x"].addBoth(lambda _: seen.append(client.log))
    build.log.feed(b"bye\n")
    world.reactor.turns.clear()
    world.finish("x")
    assert seen == [b"bye\n"]


@pytest.mark.parametrize("difference", ["options", "sandbox"])
def test_notTheSame(difference):
    """Other limits or another sandbox are another build. They do not run at once: the outputs are locked."""
    world = World(4)
    world.client("a").build("x")
    world.settle()
    other = world.client("b", mustSandbox=difference == "sandbox")
    other.build("x", options=BuildOptions(maxSilentTime=5) if difference == "options" else BuildOptions())
    for _ in range(10):
        world.step(False)
    assert world.running == ["x"]
    world.threads.finish()
    world.settle(builds=True).clean()
    assert len(world.builder.ran) == 2
    assert world.builder.mustSandbox[pathOf("x")] is (difference == "sandbox")


def test_joinedInTheQueue():
    """Who joins a build at the end of somebody's long queue waits for their own turn only."""
    world = World()
    world.client("many").build("m1", "m2", "m3", "m4", "shared")
    world.settle()
    client = world.client("few").build("shared")
    world.settle()
    assert world.builds.counts == (1, 4)
    world.finish("m1", "m2", "shared")
    assert client.results["shared"] == built("shared")
    world.finish("m3", "m4").clean()


# --- leaving ------------------------------------------------------------------------------------------------


def test_leaveRunning():
    """A running build that nobody waits for is told to stop; when it has, the next one begins."""
    world = World()
    client = world.client("a").build("x")
    other = world.client("b").build("y")
    world.settle()
    build = world.threads.running[0]
    client.leave()
    assert client.results["x"].check(CancelledError)
    assert build.token.cancelled and world.running == ["x"]
    world.finish("x", "y").clean()
    assert other.results["y"] == built("y")


def test_leaveQueued():
    """One that waits for its turn is out of the queue at once, and frees what it held."""
    world = World()
    world.client("a").build("x")
    client = world.client("b").build("y")
    world.settle()
    client.leave()
    assert world.builds.counts == (1, 0)
    world.settle()
    world.finish("x").clean()
    assert world.builder.ran == [pathOf("x")]


def test_leaveBusy():
    """One that waits for somebody else's lock gives up."""
    world = World()
    world.builder.busy[pathOf("x")] = 1 << 60
    client = world.client("a").build("x")
    for _ in range(20):
        world.step()
    client.leave()
    world.settle().clean()


def test_leaveWhilePreparing():
    """What is prepared for nobody is given back, though it was ready only afterwards."""
    world = World()
    client = world.client("a").build("x")
    deliver = world.workers.run()
    assert world.builder.locks
    client.leave()
    deliver()
    world.settle().clean()


def test_oneOfTwoLeaves():
    """A build goes on for the other one, whoever began it, and the one who left hears nothing more."""
    for leaver in (0, 1):
        world = World()
        clients = [world.client("a").build("x"), world.client("b").build("x")]
        world.settle()
        clients[leaver].leave()
        feed(world, b"line\n")
        assert not world.threads.running[0].token.cancelled
        world.finish("x").clean()
        assert clients[leaver].log == b"" and clients[1 - leaver].log == b"line\n"
        assert clients[1 - leaver].results["x"] == built("x")


def test_comeBackToACancelledBuild():
    """Who asks for what is just being killed does not get its end: it is built again, afterwards."""
    world = World(2)
    world.client("a").build("x").leave()
    world.settle()
    first = world.client("a").build("x")
    world.settle()
    first.leave()
    second = world.client("a").build("x")
    world.threads.finish()
    world.settle(builds=True).clean()
    assert second.results["x"] == built("x")


def test_leaveBecauseOfTheResult():
    """Somebody's result may make others leave."""
    world = World()
    first, second = world.client("a").build("x"), world.client("b").build("x")
    world.builder.outcomes[pathOf("x")] = BuildResult(BuildStatus.PERMANENT_FAILURE, "no")
    first.waiting["x"].addBoth(lambda _: second.leave())
    world.settle().finish("x").clean()
    assert second.results["x"].check(CancelledError)


def test_leaveWhenTold():
    """Somebody may leave because of what it is told, before the queue is waited for."""
    world = World()
    world.client("a").build("x")
    world.settle()
    client = world.client("b")
    client.client = dataclasses.replace(client.client, listener=lambda _: client.leave())
    client.build("y")
    world.settle()
    assert world.builds.counts == (1, 0)
    world.finish("x").clean()
    assert world.builder.ran == [pathOf("x")]


# --- roots --------------------------------------------------------------------------------------------------


def test_outputsAreKept():
    """Everybody who waits has the outputs as roots before the build's own session lets go of them."""
    world = World()
    clients = [world.client("a").build("x"), world.client("b").build("x")]
    world.settle().finish("x")
    assert all(client.session.roots == {outputOf("x")} for client in clients)
    assert world.store.lost == []
    world.clean()


def test_joinTooLate():
    """Who asks while the outputs are being handed over is not given them unkept."""
    world = World()
    world.client("a").build("x")
    world.settle()
    world.threads.finish()
    late = None
    while world.step(False):
        if late is None and not world.builds.counts[0]:
            late = world.client("b").build("x")
    world.settle(builds=True).clean()
    assert late.results["x"].success
    assert late.session.roots == {outputOf("x")}


def test_keepingFails():
    """One client's trouble is not another's: both get the result, the build ends."""
    world = World()
    clients = [world.client("a").build("x"), world.client("b").build("x")]
    world.settle()
    world.threads.finish()
    world.step(False)
    world.store.refusals = [StoreError("no room")]
    world.settle().clean()
    assert all(client.results["x"] == built("x") for client in clients)


def test_busyClientKeepsNobodyWaiting():
    """A client whose session waits for a lock gets the result later, the others at once."""
    world = World()
    slow, quick = world.client("a").build("x"), world.client("b").build("x")
    world.settle()
    held = [True]

    def busy():
        if held:
            raise Busy("something")

    slow.door.call(busy)
    for _ in range(5):
        world.step(False)
    world.threads.finish()
    for _ in range(30):
        world.step(False)
    assert quick.results and not slow.results
    held.clear()
    world.settle().clean()
    assert slow.results["x"] == built("x")


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["early", "outcomes"])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StoreError("the disk is full"), "the disk is full"),
        (OSError(13, "Permission denied", "/secret/place"), "Permission denied"),
        (ZeroDivisionError("at /secret/place"), "internal error; the log of the server has more"),
    ],
)
def test_errors(where, error, text, logged):
    """What goes wrong around a build is a result that tells nothing of the server's insides, and the next one runs."""
    world = World()
    getattr(world.builder, where)[pathOf("x")] = error
    clients = [world.client("a").build("x"), world.client("b").build("x", "y")]
    world.settle(builds=True).clean()
    assert [client.results["x"] for client in clients] == [BuildResult(BuildStatus.MISC_FAILURE, text)] * 2
    assert clients[1].results["y"] == built("y")
    assert len(bugs(logged)) == isinstance(error, ZeroDivisionError)


def test_joinAFailure():
    """Who asks for what has just failed does not get the old failure: it is tried again."""
    world = World()
    world.builder.outcomes[pathOf("x")] = StoreError("the disk is full")
    world.client("a").build("x")
    world.settle()
    world.threads.finish()
    world.reactor.turn()
    assert world.builds.counts == (0, 0) and world.builds._builds
    del world.builder.outcomes[pathOf("x")]
    late = world.client("b").build("x")
    world.settle(builds=True).clean()
    assert late.results["x"] == built("x")


def test_closingFails(logged):
    """Trouble with letting go changes nothing about the result, and is logged."""
    world = World()
    world.builder.outcomes[pathOf("x")] = failure = BuildResult(BuildStatus.PERMANENT_FAILURE, "no")
    client = world.client("a").build("x")
    world.settle()
    world.store.sessions[-1].close = lambda: 1 // 0
    world.finish("x")
    assert client.results["x"] is failure
    assert world.builds.counts == (0, 0) and not world.builds._builds
    assert [event for event in logged if event.get("log_format") == "freeing what {drv} held"]


# --- the end ------------------------------------------------------------------------------------------------


def test_stop(logged):
    """Everything ends, in whatever state it is; then the threads. Whoever still waits is told."""
    world = World()
    world.builder.busy[pathOf("busy")] = 1 << 60
    client = world.client("a").build("running", "queued", "busy")
    for _ in range(40):
        world.step(False)
    assert world.running == ["running"] and world.builds.counts == (1, 1)
    done = []
    world.builds.stop().addCallback(done.append)
    assert world.threads.running[0].token.cancelled
    assert not done
    world.settle(builds=True).clean()
    assert done == [None] and world.threads.stopped
    assert len(client.results) == 3
    assert {result.errorMsg for result in client.results.values()} == {
        "interrupted by the user",
        "the server is being stopped; try again later",
    }
    late = world.client("b").build("late")
    assert late.results["late"].status == BuildStatus.MISC_FAILURE
    assert bugs(logged) == []


def test_stopIdle():
    """Nothing to end."""
    world = World()
    done = []
    world.builds.stop().addCallback(done.append)
    assert done == [None] and world.threads.stopped


# --- races --------------------------------------------------------------------------------------------------

SITUATIONS = ["alone", "queued", "busy", "busyLater", "joined", "failing", "early"]


def prepareSituation(world, situation):
    """
    One client who waits for "x" in some situation.

    @return: it, and others.
    """
    others = []
    if situation in ("queued", "busyLater"):
        others.append(world.client("z").build("other"))
    if situation == "busy":
        world.builder.busy[pathOf("x")] = 2
    if situation == "busyLater":
        world.settle()
        world.builder.busy[pathOf("x")] = 1
    if situation == "failing":
        world.builder.outcomes[pathOf("x")] = ZeroDivisionError()
    if situation == "early":
        world.builder.early[pathOf("x")] = BuildResult(BuildStatus.ALREADY_VALID)
    client = world.client("a").build("x")
    if situation == "joined":
        others.append(world.client("b").build("x"))
    return client, others


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("ending", ["leave", "stop", "leave and stop", "stop and leave"])
def test_cancelledAnywhere(situation, ending):
    """
    Wherever a build is when its client leaves or the server stops: everything is freed once, the others get what they
    wait for, and the slot goes on.
    """
    steps = 0
    while True:
        world = World()
        client, others = prepareSituation(world, situation)
        more = all(world.step() for _ in range(steps))
        for word in ending.split(" and "):
            if word == "leave":
                client.leave()
            else:
                stopped = world.builds.stop()
            if steps % 2:
                world.step()
        after = world.client("c").build("after")
        world.settle(builds=True).clean()
        assert client.results and after.results and all(len(other.results) == 1 for other in others)
        if "stop" not in ending:
            assert after.results["after"] == built("after")
            assert all(result.success for other in others for result in other.results.values())
        else:
            assert stopped.called and world.threads.stopped
        if not more:
            break
        steps += 1
    assert steps >= 5


@pytest.mark.parametrize("seed", range(150))
def test_anyOrder(seed):
    """Clients come, join and leave in any order: never too many run, all who stay are answered, nothing is left."""
    chance = random.Random(seed)
    world = World(chance.choice([1, 2, 3]))
    for name in "abcdef":
        world.builder.busy[pathOf(name)] = chance.choice([0, 0, 0, 1, 3])
        if chance.random() < 0.15:
            world.builder.outcomes[pathOf(name)] = chance.choice([ZeroDivisionError(), StoreError("x")])
    clients = []
    for _ in range(120):
        action = chance.random()
        if action < 0.12:
            clients.append(world.client(chance.choice("pqr"), chance.random() < 0.1).build(chance.choice("abcdef")))
        elif action < 0.18 and clients:
            chance.choice(clients).leave()
        elif action < 0.22 and world.threads.waiting:
            world.threads.finish(chance.choice(world.running))
        else:
            world.step(builds=chance.random() < 0.1)
    world.settle(builds=True).clean()
    assert all(client.results for client in clients)
    for client in clients:
        (result,) = client.results.values()
        if isinstance(result, BuildResult) and result.success:
            assert {output.outPath for output in result.builtOutputs.values()} <= client.session.roots


@pytest.mark.parametrize("how", ["result", "error"])
def test_ourPathsAreNotTold(how, logged):
    """What failed is told with the logical path of the object; where our files are only the log says."""
    name = pathOf("x").baseName
    text = f"cannot rename '/secret/{name}.chroot/root/nix/store/{name}' in '/secret/y': No space left on device"
    world = World()
    failure = BuildResult(BuildStatus.MISC_FAILURE, text)
    world.builder.outcomes[pathOf("x")] = failure if how == "result" else StoreError(text)
    client = world.client("a").build("x")
    world.settle(builds=True).clean()
    said = f"cannot rename '/nix/store/{name}' in '[a path of the server]': No space left on device"
    assert client.results["x"] == BuildResult(BuildStatus.MISC_FAILURE, said)
    assert any("/secret/y" in str(event.get("error")) for event in logged)


class TurningWorkers(ManualWorkers):
    """One thread, for which clients take turns."""

    def __init__(self):
        super().__init__()
        self._turns = Turns(self.reactor, self.call, 1)

    def of(self, client, atOnce):
        """See L{ISharedWorkers}."""
        return self._turns.of(client, atOnce)


def test_preparingTakesTurns():
    """A client with many builds keeps no other waiting until they are prepared."""
    workers = TurningWorkers()
    world = World(workers=workers)
    prepared = []
    prepare = world.builder.prepare

    def recorded(session, drvPath, *args):
        prepared.append(drvPath.name.removesuffix(".drv"))
        return prepare(session, drvPath, *args)

    world.builder.prepare = recorded
    world.client("attacker").build(*(f"a{n}" for n in range(20)))
    world.client("victim").build("v")
    while workers.waiting and "v" not in prepared:
        workers.run()()
    assert len(prepared) <= 3
    world.settle(builds=True).clean()
