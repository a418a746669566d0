"""
The service that C{twistd nixserve} runs: a store, here or elsewhere, an SSH endpoint and a unix socket.

Loading this module does nothing, and neither does making the service: files are opened and ports listened on when
it starts.
"""

from __future__ import annotations

import gc
import ipaddress
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.endpoints import UNIXServerEndpoint, serverFromString
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.failure import Failure

from nixserve import __version__
from nixserve.app.ownsocket import OwnSocket
from nixserve.app.settings import CONFIG_KEYS, ServiceSettings, readConfig
from nixserve.app.storechoice import homeDir, parseStore
from nixserve.builder.local import LocalBuilder, removeAbandoned
from nixserve.builder.openfiles import raiseOpenFiles
from nixserve.builder.sandbox import sandboxProblem
from nixserve.builder.settings import SandboxMode
from nixserve.errors import FormatError, NixServeError, UsageError
from nixserve.protocol.building import IBuilds
from nixserve.protocol.builds import LocalBuilds
from nixserve.protocol.descriptors import Descriptors
from nixserve.protocol.monotonic import useMonotonicTime
from nixserve.protocol.policy import Policy
from nixserve.protocol.reactors import IServiceReactor
from nixserve.protocol.relay import RelayFactory
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.workers import DEFAULT_THREADS, Workers
from nixserve.remote.address import RemoteAddress
from nixserve.remote.builds import RemoteBuilds
from nixserve.remote.store import MAX_THREADS, RemoteStore
from nixserve.ssh.authorizedkeys import fingerprint, parseAuthorizedKey
from nixserve.ssh.keys import AuthorizedKeysChecker, AuthorizedKeysFile, loadHostKey
from nixserve.ssh.server import ServeFactory, ServeRealm
from nixserve.store.api import Store
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.ownpaths import UnsafePath, makeOwnDirectory, requireOwn
from twisted import __version__ as twistedVersion

__all__ = ["FORCED_COMMAND", "CommandService", "Options", "ServeService", "makeService"]

FORCED_COMMAND = "nix-store --serve --write"
"""What the invoking user's own keys may run when C{authorized_keys} is made at the first start."""


FEW_SESSIONS = 64
"""Room for fewer is worth a line in the log: one connection of a client may have so many."""


class Options(usage.Options):
    """The command line of C{twistd nixserve}."""

    synopsis = "[options]"
    longdesc = (
        "Serve a Nix store over SSH to unmodified Nix clients (nix copy --to ssh://...). Without options: a store "
        "of its own under the state directory, on port 2222 of the loopback interface. Every option may also stand "
        "in a TOML file given with --config; the command line wins."
    )
    optParameters: ClassVar[list[list[Any]]] = [
        ["config", "c", None, "TOML file with any of the other options as its keys"],
        ["store", None, None, "store to serve: /absolute/root, local?root=..., auto, ssh://HOST [STATE/store]"],
        ["state", None, None, "directory of host key, authorized_keys, socket and embedded store"],
        ["authorized-keys", None, None, "who is let in, in OpenSSH's format; re-read when it changes"],
        ["host-key", None, None, "private host key, made if missing"],
        ["default-rights", None, None, "rights of keys without a forced command: read, or read,write,build,trust"],
        ["socket", None, None, "unix socket for 'nixserve-store --connect'"],
        ["max-jobs", None, None, "how many builds may run at once, 0 to refuse to build [the number of processors]"],
        ["extra-jobs", None, None, "how many more, for keys that all others keep from building for a minute [1]"],
        ["timeout", None, None, "seconds that a build may take, whatever the client allows, 0 for no limit [0]"],
        ["max-silent-time", None, None, "seconds that a build may say nothing, likewise [0]"],
        ["max-build-log-size", None, None, "bytes of output of a build, likewise [0]"],
        ["max-output-size", None, None, "bytes of an output of a build, 0 for no limit [0]"],
        ["cores", None, None, "processors that each build is told to use, 0 for all [0]"],
        ["sandbox", None, None, "confine builds: auto (where the machine can), on, or off [auto]"],
        ["build-network", None, None, "what downloads get: the host's network, or their own by slirp4netns [host]"],
        ["system-features", None, None, "what builds may require of this machine, separated by commas [Nix's]"],
        ["fsync-metadata", None, None, "have what a session added in the database on disk at its end [nix.conf's]"],
        ["fsync-store-paths", None, None, "have the files of a path on disk before it is registered [nix.conf's]"],
        ["sync-before-registering", None, None, "write out everything before a path is registered [nix.conf's]"],
        ["max-key-memory", None, None, "MiB of memory that the sessions of one key may use [256]"],
        ["max-untrusted-memory", None, None, "MiB for all keys without the right trust, a quarter for one [192]"],
        ["max-key-requests", None, None, "requests of one key at work at once, half without the right trust [4]"],
    ]
    compData = usage.Completions(
        optActions={
            "config": usage.CompleteFiles("*.toml"),
            "state": usage.CompleteDirs(),
            "authorized-keys": usage.CompleteFiles(),
            "host-key": usage.CompleteFiles(),
            "socket": usage.CompleteFiles(),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []
        self._isWrong = False

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """As L{usage.Options.parseOptions}."""
        try:
            super().parseOptions(options)
        except usage.UsageError:
            self._isWrong = True
            raise

    def getUsage(self, width: int | None = None) -> str:
        """
        The help. twistd prints it in front of each complaint about the options, of which it would fill the screen: a
        pointer to it is enough there.
        """
        return "See twistd nixserve --help." if self._isWrong else str(super().getUsage(width))

    def opt_version(self) -> None:
        """Print the version of nixserve and exit."""
        print(f"nixserve {__version__}, with Twisted {twistedVersion}")
        raise SystemExit(0)

    def opt_listen(self, endpoint: str) -> None:
        """Endpoint of the SSH port, may be repeated [tcp:2222:interface=127.0.0.1]"""
        self["listen"].append(endpoint)

    opt_l = opt_listen

    def postOptions(self) -> None:
        """
        Check what can be checked without touching anything.

        In the foreground twistd shall leave no file with a process number where it was started, unless it is told a
        name: after a kill that number may be anybody's, in a container our own, and twistd would not start again. Two
        services on one state directory are kept apart by L{nixserve.app.ownsocket}.
        """
        if self.parent is not None and self.parent.get("nodaemon") and self.parent.get("pidfile") == "twistd.pid":
            self.parent["pidfile"] = ""
        try:
            self.settings = self._complete()
            Policy.parse(self.settings.defaultRights)
            parseStore(self.settings.store, os.environ)
        except UsageError as e:
            raise usage.UsageError(str(e)) from e

    def _complete(self) -> ServiceSettings:
        config = readConfig(self["config"]) if self["config"] else {}
        given = {key: self[key] or None for key in CONFIG_KEYS}
        return ServiceSettings.complete(
            {**config, **{key: value for key, value in given.items() if value is not None}}, os.environ
        )


def makeService(options: Options) -> IService:
    """
    For C{twistd}.

    @param options: parsed.
    """
    from twisted.internet import reactor

    ours = cast(IServiceReactor, reactor)
    useMonotonicTime(ours)
    return CommandService(options.settings, ours, os.environ)


class ServeService(Service):
    """
    The whole service, for any program that has a reactor.

    @ivar settings: what it was told.
    @ivar sessions: those that are running, once it has started.
    @ivar ports: what it listens on, once it has started.
    """

    log = Logger()

    def __init__(self, settings: ServiceSettings, reactor: IServiceReactor, environ: Mapping[str, str]) -> None:
        self.setName("nixserve")
        self.settings = settings
        self.ports: list[IListeningPort] = []
        self._reactor = reactor
        self._environ = environ
        self._workers: Workers | None = None
        self._store: Store | None = None
        self._builds: LocalBuilds | None = None
        self._socket: OwnSocket | None = None

    def startService(self) -> None:
        """
        Open the store, then listen.

        @raise NixServeError: the operator has to mend something. Nothing has been started then.
        """
        super().startService()
        try:
            self._start()
        except BaseException as e:
            self._abandon()
            if isinstance(e, OSError):
                raise UsageError(f"{e.filename or self.settings.state}: {e.strerror or e}") from e
            raise
        # A worker that restores thousands of small files gives the reactor its turn after at most so many seconds.
        # Measured beside such an upload, the slowest answers to another session come in 9 ms instead of 16 to 44.
        sys.setswitchinterval(0.001)
        gc.freeze()

    def _start(self) -> None:
        settings = self.settings
        makeOwnDirectory(settings.state)
        self._socket = OwnSocket(settings.socket)
        place = parseStore(settings.store, self._environ)
        hostKey = loadHostKey(settings.hostKey)
        policy = Policy.parse(settings.defaultRights)
        self._prepareAuthorizedKeys()
        if isinstance(place, RemoteAddress):
            builds = self._openRemote(place)
        else:
            builds = self._openLocal(place)
        assert self._store is not None and self._workers is not None, "they have just been made"
        descriptors = self._shareDescriptors(isinstance(place, RemoteAddress))
        limits = settings.limits
        if isinstance(place, RemoteAddress):
            # A call that waits for a lock there must not keep back the one that frees it.
            limits = replace(limits, keyRequests=2 * MAX_THREADS)
        self.sessions = ServeSessions(
            *(self._store, self._workers, self._reactor, self._isServed(place)),
            builds=builds,
            descriptors=descriptors,
            limits=limits,
        )
        numbers = itertools.count(1)
        realm = ServeRealm(self.sessions, self._reactor, policy, numbers, descriptors)
        checker = AuthorizedKeysChecker(AuthorizedKeysFile(settings.authorizedKeys))
        self._ssh = ServeFactory(realm, checker, [hostKey], self._reactor)
        for text in settings.listen:
            self._listen(text, _endpoint(self._reactor, text), self._ssh)
        # Owner only: whoever may connect gets what the credentials of the socket give.
        relays = UNIXServerEndpoint(self._reactor, settings.socket, mode=0o600)
        self._listen(f"unix:{settings.socket}", relays, RelayFactory(self.sessions, policy, numbers))
        self.log.info("serving {store}; the host key is {key}", store=settings.store, key=fingerprint(hostKey.public()))

    def _shareDescriptors(self, isRemote: bool) -> Descriptors:
        settings = self.settings
        local = (0, 0) if isRemote else (self._threads, settings.maxJobs + settings.extraJobs)
        limit = raiseOpenFiles()
        descriptors = Descriptors(limit, *local)
        if descriptors.sessions < FEW_SESSIONS:
            self.log.warn(
                "{limit} open files are enough for {count} sessions; a higher hard limit on them lets in more",
                limit=limit,
                count=descriptors.sessions,
            )
        return descriptors

    @property
    def _threads(self) -> int:
        """Of workers for a local store: more than one client may be in, so that others find one free."""
        return max(DEFAULT_THREADS, 2 * self.settings.limits.keyRequests)

    def _openLocal(self, layout: StoreLayout) -> IBuilds | None:
        """@return: who builds."""
        if layout.stateDir.startswith(f"{self.settings.state}/"):
            # Made by us, or by whoever was before us.
            requireOwn(layout.stateDir)
        store = self._store = LocalStore(replace(layout, durability=self.settings.durability))
        workers = self._workers = Workers(self._reactor, self._threads)
        workers.start()
        self._builds = self._startBuilds(store, workers)
        removing = workers.call(removeAbandoned, store)
        removing.addErrback(lambda failure: self.log.failure("removing what killed builds have left", failure))
        return self._builds

    def _openRemote(self, address: RemoteAddress) -> IBuilds | None:
        """@return: who builds. Nothing is connected to before a client asks for something."""
        self._store = RemoteStore.at(self._reactor, address, self._environ)
        self._workers = Workers(self._reactor, MAX_THREADS)
        self._workers.start()
        return RemoteBuilds() if self.settings.maxJobs else None

    def _startBuilds(self, store: LocalStore, workers: Workers) -> LocalBuilds | None:
        """
        @raise UsageError: builds are to be confined, and cannot be.
        """
        settings = self.settings
        if not settings.maxJobs:
            return None
        problem = "" if settings.builds.sandbox is SandboxMode.OFF else sandboxProblem()
        if problem and settings.builds.sandbox is SandboxMode.ON:
            raise UsageError(f"builds cannot be confined, as --sandbox on demands: {problem}")
        if problem:
            self.log.warn("builds run without a sandbox, for trusted keys only: {problem}", problem=problem)
        helper = settings.builds.networkHelper
        if helper and not problem and (problem := sandboxProblem(helper)):
            raise UsageError(f"builds cannot have a network of their own, as --build-network own demands: {problem}")
        builder = LocalBuilder(store, settings.builds)
        builds = LocalBuilds(store, builder, workers, self._reactor, settings.maxJobs, settings.extraJobs)
        builds.start()
        return builds

    def _abandon(self) -> None:
        """Undo what was started: starting has failed half way."""
        self.running = False
        for port in self.ports:
            maybeDeferred(port.stopListening)
        self.ports.clear()
        if self._builds is not None:
            self._builds.stop()
        if self._workers is not None:
            self._workers.stop()
        if self._store is not None:
            self._store.close()
        self._workers = self._store = self._builds = None
        self._letGoOfSocket()

    def _letGoOfSocket(self) -> None:
        if self._socket is not None:
            self._socket.release()

    def stopService(self) -> Deferred[None]:
        """Stop listening, end the sessions, then let go of the store."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        workers, self._workers = self._workers, None
        store, self._store = self._store, None
        if workers is None or store is None:
            # It did not start, or has been stopped already.
            return
        await gatherResults([maybeDeferred(port.stopListening) for port in self.ports], consumeErrors=True)
        self.ports.clear()
        self._letGoOfSocket()
        await self.sessions.stop()
        if self._builds is not None:
            await self._builds.stop()
        self._ssh.loseConnections()
        workers.stop()
        store.close()

    def _listen(self, text: str, endpoint: IStreamServerEndpoint, factory: Factory) -> None:
        """
        @raise UsageError: it cannot be listened on.
        """
        # Endpoints of sockets of any kind answer before listen() returns.
        failures: list[Failure] = []

        def listening(port: IListeningPort) -> None:
            self.ports.append(port)
            self.log.info("listening on {endpoint}: {address}", endpoint=text, address=port.getHost())

        maybeDeferred(endpoint.listen, factory).addCallback(listening).addErrback(failures.append)
        if failures:
            error = failures[0].value
            reason = getattr(error, "socketError", error)
            raise UsageError(f"cannot listen on '{text}': {getattr(reason, 'strerror', None) or reason}") from error

    def _isServed(self, place: StoreLayout | RemoteAddress) -> Callable[[str], bool]:
        """Does a URI lead to the store that is open?"""

        def isServed(uri: str) -> bool:
            try:
                return parseStore(uri, self._environ) == place
            except UsageError:
                return False

        return isServed

    def _prepareAuthorizedKeys(self) -> None:
        """
        At the first start nobody is let in yet. On loopback the one who starts the service is: with the keys that
        lie in C{~/.ssh}. Anywhere else that would open the store to the network unasked.
        """
        path = self.settings.authorizedKeys
        if os.path.lexists(path):
            return
        example = f'command="{FORCED_COMMAND}" ssh-ed25519 AAAA... somebody'
        try:
            keys = list(_ownKeys(homeDir(self._environ) / ".ssh"))
        except UnsafePath as e:
            self.log.warn("no key is taken from ~/.ssh: {reason}", reason=e.reason)
            keys = []
        if not all(map(_isLoopback, self.settings.listen)) or not keys:
            self.log.warn("nobody is let in: write lines such as {example} to {path}", example=example, path=path)
            return
        _writeNew(path, "".join(f'command="{FORCED_COMMAND}" {key}\n' for key in keys))
        self.log.warn(
            "made {path} from {count} public keys in ~/.ssh, each with the forced command {command}",
            path=path,
            count=len(keys),
            command=FORCED_COMMAND,
        )


class CannotStart(SystemExit, Exception):
    """
    Ends the process with one line.

    It is an L{Exception} too because twistd, when it has gone into the background, waits for ever for a child that
    ended with anything else (Twisted 26.10, _twistd_unix.py: postApplication, daemonize).
    """


class CommandService(ServeService):
    """
    The service as the whole of a process: what keeps it from starting ends the process with one line.
    """

    def startService(self) -> None:
        """
        As L{ServeService.startService}.

        @raise CannotStart: as it says.
        """
        try:
            super().startService()
        except NixServeError as e:
            # In the log too: a daemon's standard error leads nowhere.
            self.log.critical("cannot start: {error}", error=e)
            raise CannotStart(f"nixserve: error: {e}") from None


def _endpoint(reactor: IServiceReactor, text: str) -> IStreamServerEndpoint:
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, text)
        return endpoint
    except (ValueError, TypeError, LookupError) as e:
        raise UsageError(f"'{text}' is no endpoint ({e}); write for example tcp:2222:interface=127.0.0.1") from e


def _isLoopback(endpoint: str) -> bool:
    """Does an endpoint string listen on this machine only? What is not understood does not."""
    kind, *arguments = endpoint.replace("\\:", "\0").split(":")
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    interface = named.get("interface", "").replace("\0", ":").strip("[]")
    try:
        return kind in ("tcp", "tcp6") and ipaddress.ip_address(interface).is_loopback
    except ValueError:
        return kind == "unix" or interface == "localhost"


def _ownKeys(directory: Path) -> Iterator[str]:
    """
    The public keys of a user, each as one line of authorized_keys without options.

    @raise UnsafePath: others could have put one there.
    """
    for path in sorted(directory.glob("*.pub")):
        try:
            requireOwn(str(path))
            if not path.is_file():
                continue
            line = path.read_text(encoding="utf-8").strip()
            if parseAuthorizedKey(line) is not None:
                yield line
        except (OSError, UnicodeDecodeError, FormatError):
            # Not ours to judge: certificates and kinds of keys that we do not take lie there too.
            continue


def _writeNew(path: str, text: str) -> None:
    """A file that only its owner may read, complete or not at all."""
    # Not named after this process: what one that was killed has left would be in the way of the next with its number.
    temporary = f"{path}.tmp-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, path)
