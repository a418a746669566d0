"""Our client against real C{nix-store --serve --write}: as a child, through ssh, and in-process to OpenSSH's sshd."""

import pytest
import pytest_twisted
from twisted.conch.ssh.keys import Key
from twisted.internet import reactor
from twisted.internet.protocol import Factory

from nixserve.codec.storepath import StoreDir
from nixserve.errors import RemoteError
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.workers import Door, Workers
from nixserve.ssh.client import SSHCommandEndpoint
from nixserve.testing import makeNar
from tests.interop.nix import requireProgram
from tests.interop.stores import add, addSmallFiles, assertSame, assertVerified, named, opened

WAYS = ["child", "ssh", "conch"]
STORE_DIR = StoreDir()


@pytest.fixture
def door():
    """A way to workers."""
    workers = Workers(reactor)
    workers.start()
    yield Door(workers)
    workers.stop()


@pytest.fixture(params=WAYS)
def connect(request, nix, directory):
    """Connects a client to real C{nix-store --serve} on a store below the test's directory; waits until it is ready."""
    command = [requireProgram("nix-store"), "--serve", "--write", "--store", str(directory / "remote")]

    async def ready():
        client = ServeClient(STORE_DIR)
        if request.param == "child":
            ProcessTransport.spawn(client, reactor, command, nix.environment)
        else:
            sshd = request.getfixturevalue("sshd")
            sshd.force(" ".join(command))
            if request.param == "ssh":
                ProcessTransport.spawn(client, reactor, sshd.ssh(), nix.environment)
            else:
                user, host = sshd.login.split("@")
                keys = [Key.fromFile(str(sshd.keys.user))]
                hostKeys = [Key.fromFile(str(sshd.keys.host)).public()]
                endpoint = SSHCommandEndpoint(reactor, host, sshd.port, user, "x", keys=keys, hostKeys=hostKeys)
                await endpoint.connect(Factory.forProtocol(lambda: client))
        # Real Nix 2.8 announces 2.7.
        assert await client.ready == 0x207
        return client

    return ready


@pytest_twisted.ensureDeferred
async def test_closures(nix, directory, connect, door):
    """A closure goes there and comes back in one session, and real Nix finds the same in all three stores."""
    source, back = directory / "source", directory / "back"
    files = addSmallFiles(source, 500, "files")
    with opened(source) as session:
        chain = [files]
        for number in range(30):
            chain.append(add(session, f"chain-{number}", makeNar({"number": b"%d" % number}), chain[-1:]))
        client = await connect()
        copied = await copyClosure(DeferredSession(door, session), client, [chain[-1]])
        assert len(copied.infos) == len(chain)
        again = await copyClosure(DeferredSession(door, session), client, [chain[-1]])
        assert (len(again.infos), again.present) == (0, len(chain))
    missing = STORE_DIR.parse(named("missing"))
    assert await client.queryValidPaths([*chain, missing], lock=True) == set(chain)
    assert (await client.queryPathInfos([files, missing])).keys() == {files}
    assert await client.queryClosure([chain[3]]) == set(chain[:4])
    with opened(back) as session:
        assert len((await copyClosure(client, DeferredSession(door, session), [chain[-1]])).infos) == len(chain)
    await client.close()
    for store in (directory / "remote", back):
        assertVerified(nix, store)
        assertSame(nix, source, store, chain, one=chain[:2])


@pytest_twisted.ensureDeferred
async def test_refusal(connect):
    """What real Nix says on its standard error is what the error says, and the session is dead."""
    client = await connect()
    with pytest.raises(RemoteError, match="is not valid"):
        await client.queryClosure([STORE_DIR.parse(named("missing"))])
    with pytest.raises(RemoteError, match="is not valid"):
        await client.queryValidPaths([])
    await client.close()
