"""
What Nix and its build hook say to each other, on the hook's side: L{HookConversation} for requests and replies,
L{HookLog} for the lines that may precede a reply. Pure: bytes in, values out; values in, bytes out.

Theory of operation. Nix starts the hook, sends all of its settings, and then asks, one at a time, who is to build a
derivation. Each question has one answer, and nothing follows a question before its answer. An acceptance ends the
questions: Nix sends what the build needs, and the rest is between its descriptors 2 and 4 and the exit status::

    state       Nix sends           the hook answers                    next state
    SETTINGS    settings                                                ASKABLE
    ASKABLE     a question                                              ASKED
                another word, EOF                                       ENDED
    ASKED                           decline, postpone                   ASKABLE
                                    declinePermanently                  ENDED
                                    accept                              ACCEPTED
    ACCEPTED    inputs, outputs                                         ENDED

Source: Nix 2.8 to 2.36, src/build-remote/build-remote.cc and src/libstore/build/hook-instance.cc.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nixserve.codec.terminal import printableLines
from nixserve.codec.wire import MAX_REQUEST_SIZE, Parse, Reader, encodeString
from nixserve.errors import FormatError, LocalProtocolError, RemoteProtocolError

__all__ = [
    "ActivityType",
    "BuildQuestion",
    "BuildTask",
    "Ended",
    "Event",
    "HookConversation",
    "HookLog",
    "HookSettings",
    "ResultType",
    "Verbosity",
]


class Verbosity(enum.IntEnum):
    """How much is said, and from which level on something is: the hook's argument, and C{level} in log lines."""

    ERROR = 0
    WARN = 1
    NOTICE = 2
    INFO = 3
    TALKATIVE = 4
    CHATTY = 5
    DEBUG = 6
    VOMIT = 7


class ActivityType(enum.IntEnum):
    """What an activity is, for progress displays."""

    UNKNOWN = 0
    COPY_PATH = 100
    """Fields: the path, from where, to where."""
    COPY_PATHS = 103


class ResultType(enum.IntEnum):
    """What is said of an activity that goes on."""

    PROGRESS = 105
    """Fields: done, expected, running, failed."""
    SET_EXPECTED = 106
    """Fields: type of the activities meant, how many or how many bytes."""


@dataclass(frozen=True, slots=True)
class HookSettings:
    """
    All settings of the Nix that asks, as nix.conf would have them. One that is missing has Nix's default.

    @ivar values: the text of each setting, by its name.
    """

    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """URI of the store that the inputs are in and the outputs go to."""
        return self.values.get("store", "auto")

    @property
    def builders(self) -> str:
        """The setting C{builders}: the text for L{nixserve.hook.machines.parseMachines}."""
        return self.values.get("builders", "")

    @property
    def system(self) -> str:
        """The platform of this machine, such as C{x86_64-linux}."""
        return self.values.get("system", "")

    @property
    def localSystems(self) -> frozenset[str]:
        """The platforms that this machine builds for without help."""
        return self.words("extra-platforms") | {self.system}

    def words(self, name: str) -> frozenset[str]:
        """A setting that is a list, such as C{system-features}."""
        return frozenset(self.values.get(name, "").split())

    def flag(self, name: str, default: bool = False) -> bool:
        """A setting that is true or false, such as C{builders-use-substitutes}."""
        return self.values[name] == "true" if name in self.values else default

    def number(self, name: str) -> int:
        """
        A setting that is a whole number, such as C{timeout}.

        @raise FormatError: it is none.
        """
        text = self.values.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,20}", text):
            raise FormatError(f"the setting '{name}' of the Nix that asks is '{text}', which is no whole number")
        return int(text)


@dataclass(frozen=True, slots=True)
class BuildQuestion:
    """
    May this be built elsewhere?

    @ivar amWilling: Nix has a slot for a build of its own free now.
    @ivar system: the platform of the derivation; C{builtin} for Nix's own builders.
    @ivar drvPath: the derivation, in the store of L{HookSettings.store}.
    @ivar requiredFeatures: what the machine must have.
    """

    amWilling: bool
    system: str
    drvPath: str
    requiredFeatures: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class BuildTask:
    """
    What comes with a build that was accepted.

    @ivar inputs: the closure of all that the build reads, valid in Nix's store.
    @ivar wantedOutputs: names of the outputs to come back with.
    """

    inputs: frozenset[str]
    wantedOutputs: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ended:
    """Nix has no more questions; the hook is to exit with status 0."""


_QUESTION = encodeString(b"try")
"""The first word of a question, as it is sent."""

Event = HookSettings | BuildQuestion | BuildTask | Ended


class _State(enum.Enum):
    SETTINGS = "the settings"
    ASKABLE = "a question"
    ASKED = "nothing before the answer"
    ACCEPTED = "the inputs of the build"
    ENDED = "nothing"


class HookConversation:
    """
    One conversation. Feed it what comes on descriptor 0, ask for L{nextEvent} until that is C{None}, and write what
    the answering methods return to descriptor 2. After L{accept}, ask again: the rest may have come already.

    L{HookSettings} comes first, then L{BuildQuestion} after each answer, at last L{BuildTask} or L{Ended}.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._state = _State.SETTINGS
        self._parse: Parse[Event] | None = None
        self._beginning = 0
        self._eof = False

    def receiveData(self, data: bytes) -> None:
        """Bytes have come; none mean that no more will."""
        if data:
            self._reader.feed(data)
        else:
            self._eof = True

    def nextEvent(self) -> Event | None:
        """
        @return: what Nix said; C{None} if it has to say more, or is to be answered first, or everything is said.
        @raise RemoteProtocolError: it is not what a Nix says here. The hook should exit with status 1.
        """
        if self._state in (_State.ASKED, _State.ENDED):
            return None
        if self._parse is None:
            self._reader.limit(MAX_REQUEST_SIZE)
            self._parse = _PARSERS[self._state](self._reader)
            self._beginning = self._reader.offset
        try:
            next(self._parse)
        except StopIteration as stop:
            event: Event = stop.value
            return self._reached(event)
        except FormatError as error:
            expected, self._state = self._state, _State.ENDED
            raise RemoteProtocolError(
                f"Nix sent no build hook's request where {expected.value} should be: {error}"
            ) from error
        if not self._eof:
            return None
        received = self._reader.offset + self._reader.available - self._beginning
        # In the middle of the first word as well, as in the original.
        if self._state is _State.ASKABLE and received < len(_QUESTION):
            return self._reached(Ended())
        expected, self._state = self._state, _State.ENDED
        raise RemoteProtocolError(f"Nix closed the conversation with its build hook amid {expected.value}")

    def _reached(self, event: Event) -> Event:
        self._parse = None
        self._state = {HookSettings: _State.ASKABLE, BuildQuestion: _State.ASKED}.get(type(event), _State.ENDED)
        return event

    def accept(self, uri: str) -> bytes:
        """
        The build is ours. Descriptor 5 must be closed before this is written, or Nix never sees the log end.

        @param uri: what Nix calls the machine to its user; without line breaks.
        """
        if "\n" in uri:
            raise LocalProtocolError(f"the URI {uri!a} of a machine has a line break")
        return self._answer(_State.ACCEPTED, b"# accept\n" + _printable(uri).encode() + b"\n")

    def decline(self) -> bytes:
        """Nix builds this itself, or fails if it cannot."""
        return self._answer(_State.ASKABLE, b"# decline\n")

    def declinePermanently(self) -> bytes:
        """There are no machines: Nix starts no hook any more in this run. The hook is to exit with status 0."""
        return self._answer(_State.ENDED, b"# decline-permanently\n")

    def postpone(self) -> bytes:
        """All machines for this are busy: Nix asks again when one of its builds ends, or after 5 seconds."""
        return self._answer(_State.ASKABLE, b"# postpone\n")

    def _answer(self, following: _State, line: bytes) -> bytes:
        if self._state is not _State.ASKED:
            raise LocalProtocolError("Nix has not asked its build hook anything")
        self._state = following
        return line


def _parseSettings(reader: Reader) -> Parse[Event]:
    values: dict[str, str] = {}
    while (yield from reader.u64()):
        name = yield from reader.text()
        values[name] = yield from reader.text()
    return HookSettings(values)


def _parseQuestion(reader: Reader) -> Parse[Event]:
    # "Any other word" ends the conversation; there is none in use.
    if (yield from reader.string()) != b"try":
        return Ended()
    amWilling = yield from reader.boolean()
    system = yield from reader.text()
    drvPath = yield from reader.text()
    features = yield from reader.strings()
    return BuildQuestion(amWilling, system, drvPath, frozenset(features))


def _parseTask(reader: Reader) -> Parse[Event]:
    inputs = yield from reader.strings()
    wantedOutputs = yield from reader.strings()
    return BuildTask(frozenset(inputs), frozenset(wantedOutputs))


_PARSERS = {_State.SETTINGS: _parseSettings, _State.ASKABLE: _parseQuestion, _State.ACCEPTED: _parseTask}


class HookLog:
    """
    Log lines for Nix, to be written to descriptor 2: each method returns the bytes of whole lines. Nix shows them as
    they are, so nothing is left in them that a terminal would obey but colours, whomever they quote.

    Messages that the user did not ask to see are nothing; activities are always told, as the original does, for
    Nix decides what its display shows.
    """

    def __init__(self, verbosity: int, pid: int) -> None:
        """
        @param verbosity: the hook's argument.
        @param pid: of this process: Nix wants numbers of activities that no other process uses.
        """
        self._verbosity = verbosity
        self._nextActivity = pid << 32

    def message(self, level: int, text: str) -> bytes:
        """A message for the user of Nix; nothing if it is above the verbosity."""
        if level > self._verbosity:
            return b""
        return _line({"action": "msg", "level": level, "msg": _shown(text)})

    def error(self, text: str) -> bytes:
        """Why the build or the hook failed. Further lines are indented, as in Nix's own errors."""
        position = {"column": None, "file": None, "line": None}
        text = _shown(text)
        shown = "error: " + text.replace("\n", "\n       ")
        return _line({"action": "msg", "level": Verbosity.ERROR, "msg": shown, "raw_msg": text, **position})

    def start(
        self, level: int, text: str, kind: ActivityType = ActivityType.UNKNOWN, fields: Sequence[str | int] = ()
    ) -> tuple[int, bytes]:
        """
        Something begins that takes a while.

        @param fields: see L{ActivityType}.
        @return: its number, and the line.
        """
        number = self._nextActivity
        self._nextActivity += 1
        text = _shown(text)
        more = {"fields": list(fields)} if fields else {}
        return number, _line({"action": "start", "id": number, "level": level, "text": text, "type": kind, **more})

    def stop(self, number: int) -> bytes:
        """Tell Nix that the activity has ended, well or not."""
        return _line({"action": "stop", "id": number})

    def result(self, number: int, kind: ResultType, fields: Sequence[str | int]) -> bytes:
        """
        Tell Nix how far the activity is.

        @param fields: see L{ResultType}.
        """
        return _line({"action": "result", "fields": list(fields), "id": number, "type": kind})


def _line(value: Mapping[str, object]) -> bytes:
    """With the blanks, order and escapes of Nix's own lines."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return f"@nix {_printable(text)}\n".encode()


def _shown(text: str) -> str:
    return printableLines(_printable(text), colours=True)


def _printable(text: str) -> str:
    """What stood for bytes that are no UTF-8 is replaced: neither JSON nor Nix has room for it."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
