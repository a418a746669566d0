"""
What an SSH endpoint takes for C{nix-store --serve}.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.errors import PolicyError
from nixserve.protocol.policy import EVERYTHING, READ_ONLY
from nixserve.ssh.command import MAX_COMMAND, ServeCommand, isDaemonCommand, parseCommand, parseForced

ACCEPTED = [
    ("nix-store --serve", READ_ONLY, None),
    ("nix-store --serve --write", EVERYTHING, None),
    ("nix-store --write --serve", EVERYTHING, None),
    ("nixserve-store --serve --write", EVERYTHING, None),
    ("/nix/store/abc-nix-2.8/bin/nix-store --serve --write", EVERYTHING, None),
    ("'/opt/my nix/bin/nix-store' --serve", READ_ONLY, None),
    # Nix 2.8 quotes remote-store, Nix 2.26 does not.
    ("nix-store --serve --write --store 'local?root=/x&a=b'", EVERYTHING, "local?root=/x&a=b"),
    ("nix-store --serve --write --store local?root=/x&a=b", EVERYTHING, "local?root=/x&a=b"),
    ("nix-store --store auto --serve", READ_ONLY, "auto"),
    ("env X=1 nix-store --serve --write", EVERYTHING, None),
    ("/usr/bin/env X='a b' Y= nix-store --serve", READ_ONLY, None),
    ("NIX_REMOTE=daemon nix-store --serve", READ_ONLY, None),
    ("exec nix-store --serve --write 2>&4", EVERYTHING, None),
    ("nix-store --builders '' --serve --write", EVERYTHING, None),
    ('nix-store --builders "" --option cores 4 --serve', READ_ONLY, None),
    ("nixserve-store --serve --rights read", READ_ONLY, None),
    ("nixserve-store --serve --rights read,write,build,trust", EVERYTHING, None),
    ("  nix-store   --serve  ", READ_ONLY, None),
]

REFUSED = [
    "",
    "   ",
    "nix-store",
    "nix-store --write",
    "nix-store --serve; rm -rf /",
    "nix-store --serve && id",
    "nix-store --serve | sh",
    "nix-store --serve --gc",
    "nix-store --serve /nix/store",
    "nix-store --serve --store",
    "nix-store --serve --option cores",
    "nix-store --serve --write --rights read",
    "nix-store --serve --rights write",
    "nix-store --serve --rights sing",
    "nix-store --serve --serve",
    "nix-store --serve --write --write",
    "nix-store --serve --rights read --rights read,write,build,trust",
    "nix-store --serve --store auto --store /other",
    "nix-store --serve 'unclosed",
    "nix-store --gc",
    "nix-store-evil --serve",
    "sh -c 'nix-store --serve'",
    "env -i nix-store --serve",
    "bash",
    "scp -t /",
    "$(nix-store --serve)",
]


@pytest.mark.parametrize(("line", "policy", "store"), ACCEPTED)
def test_accepts(line, policy, store):
    """The command that real clients send, in all its forms, and nothing of its surroundings."""
    assert parseCommand(line) == ServeCommand(policy, store)


@pytest.mark.parametrize("line", REFUSED)
def test_refuses(line):
    """Everything else is refused with one printable line."""
    with pytest.raises(PolicyError) as caught:
        parseCommand(line)
    assert str(caught.value).isprintable()


FORCED = [
    ("nix-store --serve", READ_ONLY, None),
    ("/run/current-system/sw/bin/nix-store --serve --write", EVERYTHING, None),
    ("exec nixserve-store --serve --rights read --store auto", READ_ONLY, "auto"),
    ("nix-store --builders '' --serve --write", EVERYTHING, None),
]

NOT_FORCED = [
    ("nix-store --serve --option restrict-eval true", "'--option' is not obeyed"),
    ("nix-store --serve --write --option", "'--option' is not obeyed"),
    ("nix-store --serve --builders 'ssh://a x86_64-linux'", "'--builders' is not obeyed"),
    ("NIX_REMOTE=daemon nix-store --serve", "'NIX_REMOTE=daemon' before the program is not obeyed"),
    ("env NIX_CONFIG=x nix-store --serve", "'env' before the program is not obeyed"),
    ("env nix-store --serve", "'env' before the program is not obeyed"),
    ("exec X=1 nix-store --serve", "'X=1' before the program is not obeyed"),
    ("exec exec nix-store --serve", "runs only"),
    ("nice -n20 nix-store --serve", "runs only"),
    ("nix-store --serve 2>&4", "runs only"),
    ("nix-store --serve # --write", "runs only"),
    ("nix-store --serve -v", "runs only"),
    ("nix-store --serve --rights read --rights read,write,build,trust", "'--rights' is given twice"),
    ("nix-store --serve --write --write", "'--write' is given twice"),
    ("nix-store --serve --store auto --store auto", "'--store' is given twice"),
    ("nix-store --serve --write --rights read", "exclude each other"),
]


@pytest.mark.parametrize(("line", "policy", "store"), FORCED)
def test_forcedCommands(line, policy, store):
    """What an operator means is obeyed."""
    assert parseForced(line) == ServeCommand(policy, store)


@pytest.mark.parametrize(("line", "reason"), NOT_FORCED)
def test_forcedCommandsThatAreNotObeyed(line, reason):
    """What is not understood to the last word is no forced command, whatever a client may send; the reason is named."""
    with pytest.raises(PolicyError, match=reason) as caught:
        parseForced(line)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("line", REFUSED)
def test_forcedIsNoMoreThanAsked(line):
    """What a client may not ask for nobody can be forced to."""
    with pytest.raises(PolicyError):
        parseForced(line)


def test_saysWhatIsAllowed():
    """A refusal names the command that would be accepted, and the one that was not."""
    with pytest.raises(PolicyError, match=r"only 'nix-store --serve .*, not 'rm -rf /'"):
        parseCommand("rm -rf /")


@pytest.mark.parametrize(
    "line",
    [
        "nix-daemon --stdio",
        "/run/current-system/sw/bin/nix-daemon --stdio --store auto",
        "nix daemon --stdio",
        "nix --extra-experimental-features nix-command daemon --stdio",
        "env A=b nix-daemon --stdio",
    ],
)
def test_daemonClients(line):
    """A client of the other protocol is told which URL to use."""
    assert isDaemonCommand(line)
    with pytest.raises(PolicyError, match=r"ssh:// instead of ssh-ng://"):
        parseCommand(line)


def test_otherCommandsAreNoDaemon():
    """Only the daemon's commands get that advice."""
    assert not any(isDaemonCommand(line) for line in ("nix-store --serve", "nix copy", "", "'"))


def test_refusesControlCharacters():
    """What a client sends never reaches a terminal as it is."""
    with pytest.raises(PolicyError) as caught:
        parseCommand("\x1b]0;evil\x07")
    assert "\x1b" not in str(caught.value)


def test_limitsTheLength():
    """A command longer than the limit is refused before its words are looked at."""
    with pytest.raises(PolicyError, match="longer than"):
        parseCommand("nix-store --serve --store " + "x" * MAX_COMMAND)


@given(st.text())
def test_anyTextIsReadOrRefused(line):
    """Any text gives a command or a PolicyError."""
    try:
        assert isinstance(parseCommand(line), ServeCommand)
    except PolicyError as error:
        assert str(error)
