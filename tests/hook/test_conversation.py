"""
L{nixserve.hook.conversation}: what Nix and its build hook say to each other. Recordings of real Nix and its own hook
are in C{tests/vectors/hook}.
"""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.wire import Writer
from nixserve.errors import FormatError, LocalProtocolError, RemoteProtocolError
from nixserve.hook import conversation as conversationModule
from nixserve.hook.conversation import (
    BuildQuestion,
    BuildTask,
    Ended,
    HookConversation,
    HookLog,
    HookSettings,
    ResultType,
    Verbosity,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "hook"
CASES = sorted(path.stem for path in VECTORS.glob("*.in"))
ANSWERS = {
    "accept": lambda conversation: conversation.accept("ssh://h"),
    "decline": HookConversation.decline,
    "postpone": HookConversation.postpone,
    "declinePermanently": HookConversation.declinePermanently,
}

NO_SETTINGS = bytes(Writer().u64(0))


def encodeQuestion(question):
    """As Nix writes it."""
    writer = Writer().text("try").u64(question.amWilling).text(question.system).text(question.drvPath)
    return bytes(writer.textSet(question.requiredFeatures))


def encodeSettings(values):
    """As Nix writes them."""
    writer = Writer()
    for name, value in sorted(values.items()):
        writer.u64(1).text(name).text(value)
    return bytes(writer.u64(0))


def encodeTask(task):
    """As Nix writes it."""
    return bytes(Writer().textSet(task.inputs).textSet(task.wantedOutputs))


QUESTION = encodeQuestion(BuildQuestion(False, "builtin", "/nix/store/x.drv", frozenset({"kvm"})))
TASK = encodeTask(BuildTask(frozenset({"/nix/store/y"}), frozenset({"out"})))


def talk(data, answers=(), size=None, eof=True):
    """
    All events of a conversation.

    @param answers: to the questions, one after the other: names of L{ANSWERS}.
    @param size: of the pieces that the data comes in.
    @param eof: does an end follow?
    """
    conversation = HookConversation()
    waiting = iter(answers)
    pieces = [data[at : at + (size or len(data))] for at in range(0, len(data), size or max(len(data), 1))]
    events = []
    for piece in [*pieces, *([b""] if eof else [])]:
        conversation.receiveData(piece)
        while (event := conversation.nextEvent()) is not None:
            events.append(event)
            if isinstance(event, BuildQuestion):
                ANSWERS[next(waiting)](conversation)
    return events


def test_recordingsAreThere():
    """Otherwise some tests test nothing."""
    assert set(CASES) >= {"built", "failing", "foreign", "busy", "unreachable", "nothing"}


@pytest.mark.parametrize("size", [None, 1, 7, 4096])
def test_recordedAcceptance(size):
    """All that real Nix sends for a build that is accepted is understood, in whatever pieces it comes."""
    settings, question, task = talk((VECTORS / "built.in").read_bytes(), ["accept"], size, eof=False)
    assert len(settings.values) == 91
    assert settings.store == "/tmp/nixserve-hook-vectors/here"
    assert settings.builders.endswith("remote-store=/tmp/nixserve-hook-vectors/there x86_64-linux - 2 1 foo,big")
    assert settings.system == "x86_64-linux" and "i686-linux" in settings.localSystems
    assert settings.words("system-features") == {"foo", "big"}
    assert not settings.flag("builders-use-substitutes") and settings.flag("substitute")
    assert settings.number("gc-reserved-space") == 8388608 and settings.number("timeout") == 0
    assert question == BuildQuestion(
        False,
        "x86_64-linux",
        "/nix/store/rl5b135ihd2iz6f3l1f2fwql6a7zm4ja-built.drv",
        frozenset({"big", "foo"}),
    )
    assert task == BuildTask(
        frozenset({"/nix/store/kfjmsx5jybmshsivzr2h7c25msm50nmm-input"}), frozenset({"dev", "out"})
    )


@pytest.mark.parametrize("case", CASES)
def test_recordedQuestions(case):
    """The answers that real Nix's hook gave lead on to where its conversations went on."""
    said = (VECTORS / f"{case}.out").read_bytes()
    answer = {b"# accept": "accept", b"# decline": "decline", b"# postpone": "postpone"}
    answer[b"# decline-permanently"] = "declinePermanently"
    (given,) = (answer[line] for line in said.splitlines() if line.startswith(b"# "))
    kinds = [type(event) for event in talk((VECTORS / f"{case}.in").read_bytes(), [given], eof=given != "accept")]
    last = {"accept": [BuildTask], "decline": [Ended], "postpone": [Ended], "declinePermanently": []}[given]
    assert kinds == [HookSettings, BuildQuestion, *last]


@pytest.mark.parametrize("case", CASES)
def test_recordedLines(case):
    """What real Nix's hook writes, ours would write byte by byte; but for the colours of its errors."""
    conversation, log, written = None, None, []
    for line in (VECTORS / f"{case}.out").read_bytes().splitlines(keepends=True):
        if line.startswith(b"@nix "):
            value = json.loads(line.removeprefix(b"@nix "))
            if log is None:
                log = HookLog(Verbosity.INFO, value.get("id", 0) >> 32)
            written.append((line, replay(log, value)))
        elif line.startswith(b"# "):
            conversation = HookConversation()
            conversation.receiveData((VECTORS / f"{case}.in").read_bytes())
            assert conversation.nextEvent() and conversation.nextEvent()
            if line != b"# accept\n":
                answer = line[2:].decode().strip().replace("-p", "P")
                written.append((line, getattr(conversation, answer)()))
        else:
            written.append((b"# accept\n" + line, conversation.accept(line.decode().strip())))
    assert all(expected == ours for expected, ours in written if b"raw_msg" not in expected)
    for expected, ours in written:
        if b"raw_msg" in expected:
            assert keys(expected) == keys(ours) and ours.startswith(b'@nix {"action":"msg","column":null,')


def keys(line):
    """Of a log line."""
    return list(json.loads(line.removeprefix(b"@nix ")))


def replay(log, value):
    """Say what a recorded line says."""
    if value["action"] == "start":
        number, line = log.start(value["level"], value["text"], value["type"], value.get("fields", ()))
        assert number == value["id"]
        return line
    if value["action"] == "stop":
        return log.stop(value["id"])
    return log.error(value["raw_msg"]) if "raw_msg" in value else log.message(value["level"], value["msg"])


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.just("\udcff\udc80")
questions = st.builds(BuildQuestion, st.booleans(), texts, texts, st.frozensets(texts, max_size=3))
tasks = st.builds(BuildTask, st.frozensets(texts, max_size=3), st.frozensets(texts, max_size=3))


@given(
    st.dictionaries(texts, texts, max_size=4),
    st.lists(st.tuples(questions, st.sampled_from(["decline", "postpone"])), max_size=3),
    questions,
    tasks,
    st.integers(1, 40),
)
def test_roundTrip(values, refused, accepted, task, size):
    """Whatever Nix says, in whatever pieces, comes out as it was meant."""
    asked = [question for question, _ in refused] + [accepted]
    data = encodeSettings(values) + b"".join(map(encodeQuestion, asked)) + encodeTask(task)
    events = talk(data, [*(answer for _, answer in refused), "accept"], size)
    assert events == [HookSettings(values), *asked, task]


@given(st.binary(max_size=80))
def test_anyBytes(data):
    """Whatever comes, there are events or the error that says Nix does not talk like this."""
    for prefix in (b"", NO_SETTINGS, NO_SETTINGS + QUESTION):
        with contextlib.suppress(RemoteProtocolError):
            talk(prefix + data, ["accept"] * 9)


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (NO_SETTINGS, []),
        (NO_SETTINGS + QUESTION, ["decline"]),
        (NO_SETTINGS + QUESTION, ["postpone"]),
        (NO_SETTINGS + bytes(Writer().text("other")), []),
        (NO_SETTINGS + QUESTION + bytes(Writer().text("")) + b"and so on", ["decline"]),
    ],
)
def test_ends(data, answers):
    """An end between questions, and any other word, are a regular end."""
    assert talk(data, answers)[-1] == Ended()


@pytest.mark.parametrize("data", [NO_SETTINGS, NO_SETTINGS + QUESTION, NO_SETTINGS + QUESTION + TASK])
def test_cut(data):
    """
    An end anywhere else is an error, except for the first word of a question. When the task is whole, no end is
    waited for.
    """
    whole = talk(data, ["accept"], eof=False)
    for length in range(len(data)):
        if len(NO_SETTINGS) <= length < len(NO_SETTINGS) + 16:
            assert talk(data[:length], ["accept"])[-1] == Ended()
            continue
        try:
            talk(data[:length], ["accept"])
        except RemoteProtocolError as error:
            assert "Nix closed the conversation with its build hook amid" in str(error)
        else:
            pytest.fail(f"{length} of {len(data)} bytes are no conversation, but are taken for one")
    assert not isinstance(whole[-1], Ended)


def test_acceptedAndCut():
    """Nix went away while it was to say what the build needs."""
    with pytest.raises(RemoteProtocolError, match="amid the inputs of the build"):
        talk(NO_SETTINGS + QUESTION, ["accept"])


def test_malformed():
    """The error says what should have been there."""
    with pytest.raises(RemoteProtocolError, match=r"where the settings should be: .*padding"):
        talk(bytes(Writer().u64(1).u64(1)) + b"axxxxxxx")
    with pytest.raises(RemoteProtocolError, match="where the inputs of the build should be: a set of"):
        talk(NO_SETTINGS + QUESTION + b"\xff" * 8, ["accept"])


def test_limit(monkeypatch):
    """Whoever sends without end is stopped."""
    monkeypatch.setattr(conversationModule, "MAX_REQUEST_SIZE", 200)
    assert len(talk(NO_SETTINGS + 3 * QUESTION, 3 * ["decline"])) == 5
    with pytest.raises(RemoteProtocolError, match="a request of more than"):
        talk(encodeSettings({str(number): "" for number in range(10)}))


@pytest.mark.parametrize("answer", ANSWERS.values())
def test_answersToNothing(answer):
    """Nobody answers before there is a question, or twice."""
    conversation = HookConversation()
    with pytest.raises(LocalProtocolError):
        answer(conversation)
    conversation.receiveData(NO_SETTINGS + QUESTION)
    assert conversation.nextEvent() and conversation.nextEvent()
    answer(conversation)
    with pytest.raises(LocalProtocolError):
        answer(conversation)


def test_uriOnOneLine():
    """A URI cannot say more than one line to Nix."""
    conversation = HookConversation()
    conversation.receiveData(NO_SETTINGS + QUESTION)
    assert conversation.nextEvent() and conversation.nextEvent()
    with pytest.raises(LocalProtocolError, match="line break"):
        conversation.accept("ssh://h\n# decline")


def test_nothingFollowsAQuestion():
    """Until a question is answered there is nothing to ask for."""
    conversation = HookConversation()
    conversation.receiveData(NO_SETTINGS + QUESTION + TASK)
    assert conversation.nextEvent() and conversation.nextEvent()
    assert conversation.nextEvent() is None
    conversation.accept("ssh://h")
    assert isinstance(conversation.nextEvent(), BuildTask)
    assert conversation.nextEvent() is None


def test_numbers():
    """A number that is none is the fault of whoever set it."""
    with pytest.raises(FormatError, match="the setting 'timeout' of the Nix that asks is 'soon'"):
        HookSettings({"timeout": "soon"}).number("timeout")


def test_anyTextIsLogged():
    """Bytes that are no UTF-8 are replaced, what a terminal would obey is left out; a line stays a line."""
    line = HookLog(3, 1).message(0, 'a\n"\\\x1b\u00fc\udcff\udc80\ud800')
    assert line == '@nix {"action":"msg","level":0,"msg":"a\\n\\"\\\\\u00fc\ufffd\ufffd\ufffd"}\n'.encode()


def test_verbosity():
    """Messages that the user did not ask for are not sent; errors always are."""
    log = HookLog(Verbosity.WARN, 1)
    assert log.message(Verbosity.WARN, "x") != b""
    assert log.message(Verbosity.NOTICE, "x") == b""
    assert HookLog(Verbosity.ERROR, 1).error("x") != b""


def test_results():
    """How far an activity is."""
    log = HookLog(3, 7)
    number, _ = log.start(3, "x")
    assert number == 7 << 32 and log.start(3, "y")[0] == number + 1
    line = log.result(number, ResultType.PROGRESS, [1, 2, 0, 0])
    assert line == b'@nix {"action":"result","fields":[1,2,0,0],"id":30064771072,"type":105}\n'
