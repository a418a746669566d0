"""
L{nixserve.hook.machines}: machines files.
"""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.errors import FormatError
from nixserve.hook.machines import parseMachines
from tests.hook.machinelist import machine, machines

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2EmzdKxpXEIfLHtBC3NDsvcrR7HUMPqMOK3oJqKg0n"
ENCODED_KEY = base64.b64encode(HOST_KEY.encode()).decode()


def parse(text, files=(), system="x86_64-linux"):
    """What a text comes to, if these files are there."""
    return parseMachines(text, dict(files).get, system)


def uris(text, files=()):
    """The machines that a text names."""
    return [each.uri for each in parse(text, files).usable]


def test_allColumns():
    """Each column is what Nix takes it for."""
    made = machine(f"ssh://u@h:2222 a-linux,b-linux /my/key 4 2.5 x,y z {ENCODED_KEY} further words")
    assert (made.uri, made.maxJobs, made.speedFactor) == ("ssh://u@h:2222", 4, 2.5)
    assert made.systems == {"a-linux", "b-linux"}
    assert (made.supportedFeatures, made.mandatoryFeatures) == ({"x", "y"}, {"z"})
    assert (made.address.sshKey, made.address.hostKey) == ("/my/key", HOST_KEY)
    assert (made.address.user, made.address.host, made.address.port) == ("u", "h", 2222)
    assert made.address.systemFeatures == {"x", "y", "z"}


@pytest.mark.parametrize("line", ["h", "h\t", " h - - - - - - -", "h - - 1 1 - - - -", "h x86_64-linux - 1 1.0"])
def test_defaults(line):
    """A dash and nothing at all are the same."""
    made = machine(line)
    assert (made.uri, made.systems, made.maxJobs, made.speedFactor) == ("ssh://h", {"x86_64-linux"}, 1, 1.0)
    assert made.supportedFeatures == made.mandatoryFeatures == frozenset()
    assert made.address.sshKey == made.address.hostKey == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n;;\t\r\n", []),
        ("a;b\nc", ["ssh://a", "ssh://b", "ssh://c"]),
        ("a # b; c\nd", ["ssh://a", "ssh://d"]),
        ("# a\n  #b\na#b", ["ssh://a"]),
        ("a\r\nb\r\n", ["ssh://a", "ssh://b"]),
        ("@/one", ["ssh://1"]),
        ("a; @/two ;b", ["ssh://a", "ssh://2", "ssh://1", "ssh://b"]),
        ("@/missing\na", ["ssh://a"]),
        ("@/one @two\n@/one # comment", ["ssh://1"]),
        ("@/with blank", ["ssh://blank"]),
        ("@/one;@/one", ["ssh://1", "ssh://1"]),
        ("a ssh://@/one", ["ssh://a"]),
    ],
)
def test_entries(text, expected):
    """Entries end at lines and semicolons; comments hold neither; files stand for what is in them."""
    files = {"/one": "1", "/two": "2;@/one", "/with blank": "blank"}
    assert uris(text, files) == expected


@pytest.mark.parametrize(
    ("first", "uri"),
    [("h", "ssh://h"), ("u@h", "ssh://u@h"), ("h:22", "ssh://h:22"), ("h?compress=true", "ssh://h?compress=true")],
)
def test_hosts(first, uri):
    """What is only a host becomes a URL; the URL is the machine's name, parameters included."""
    assert machine(first).uri == uri


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a - - x", "the setting 'builders', line 1, column 4 (number of jobs): 'x'"),
        ("a\n\nb;c - - -1", "the setting 'builders', line 3, column 4 (number of jobs): '-1'"),
        ("a - - 4294967296", "line 1, column 4"),
        ("a - - 1.5", "line 1, column 4"),
        ("a - - 1 -2", "line 1, column 5 (speed factor): '-2' is negative"),
        ("a - - 1 -.5", "line 1, column 5 (speed factor): '-.5' is negative"),
        ("a - - 1 fast", "line 1, column 5 (speed factor): 'fast' is no number"),
        ("a - - 1 nan", "column 5"),
        ("a - - 1 1e999", "column 5"),
        ("a - - 1 1 - - a.b", "line 1, column 8 (host key): it is no base64"),
        ("- x86_64-linux", "line 1, column 1 (store URI): it is missing"),
        ("@/bad", "'/bad', line 2, column 4"),
        ("@/around", "'/bad', line 2, column 4"),
        ("@/self", "'/self', line 2, column 1: '/self' is included by itself"),
        ("a\n@/ping", "'/pong', line 1, column 1: '/ping' is included by itself"),
    ],
)
def test_errors(text, place):
    """Where Nix does not read on, neither do we, and the error says where that is."""
    files = {"/bad": "a\nb - - x", "/around": "@/bad", "/self": "a\n@/self", "/ping": "@/pong", "/pong": "@/ping"}
    with pytest.raises(FormatError) as caught:
        parse(text, files)
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("factor", "value"), [("0", 1), ("0.0", 1), ("-0", 1), ("0.5", 0.5), (".5", 0.5), ("3.", 3), ("1e1", 10), ("+2", 2)]
)
def test_speedFactors(factor, value):
    """Fractions are accepted; nothing is as slow as 0."""
    assert machine(f"h - - 1 {factor}").speedFactor == value


def test_noJobs():
    """A machine may be closed for builds."""
    assert machine("h - - 0").maxJobs == 0


@pytest.mark.parametrize(
    "first",
    [
        *("ssh-ng://h", "auto", "local", "daemon", "auto?root=/x", "/some/root", "h/path", "https://cache"),
        *("ssh://-option", "ssh://h:0", "ssh://h?unknown=1", "ssh://u:pw@h", "h?remote-store=/x", "ssh://"),
    ],
)
def test_unusable(first):
    """A machine that nobody here can reach does not keep the others from being used; what is wrong is told."""
    parsed = parse(f"a\n{first}; b")
    assert [each.uri for each in parsed.usable] == ["ssh://a", "ssh://b"]
    (explanation,) = parsed.unusable
    assert explanation.startswith("the setting 'builders', line 2, column 1: '")
    assert "pw" not in explanation


def test_noHostKey():
    """What is base64 of anything else than a key is no more than a machine that cannot be reached."""
    parsed = parse("h - - 1 1 - - aGVsbG8=")
    assert parsed.usable == () and "host key" in parsed.unusable[0]


def test_columnsTakePrecedence():
    """What columns say counts more than the same parameter of the URI; other parameters stay."""
    address = machine("ssh://h?ssh-key=/uri&compress=true&system-features=u /x /column%20 1 1 f m").address
    assert (address.sshKey, address.compress, address.systemFeatures) == ("/column%20", True, {"f", "m"})
    assert machine("ssh://h?ssh-key=/uri&system-features=u").address.sshKey == "/uri"


def test_socket():
    """A service on this machine takes builds too; keys are not for it."""
    made = machine("unix:///run/serve.sock - /key 2 1 f")
    assert made.address.socket == "/run/serve.sock" and made.address.systemFeatures == {"f"}


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("ssh://h", "ssh:__h-1"),
        ("ssh://h?remote-store=/a/b", "ssh:__h?remote-store=_a_b-1"),
        ("ssh://" + "h" * 247, "ssh:__" + "h" * 247 + "-1"),
        ("ssh://" + "h" * 248, "pT5YTBboMsC4U_EwCEo6iA==-1"),
    ],
)
def test_fileNames(uri, name):
    """Names of files are Nix's as long as they are names of files."""
    assert machine(uri).fileName("-1") == name
    assert len(name) <= 255


words = st.text("abc-_.19", min_size=1, max_size=6).filter(lambda word: word != "-")
sets = st.frozensets(words, max_size=3)


@given(
    st.lists(
        st.tuples(
            *(st.sampled_from(["ssh://h", "h2"]), sets, st.integers(0, 2**32 - 1), st.floats(0.001, 1e6), sets, sets),
            st.sampled_from(["", "/key", "/k%y+&=ü"]),
        )
    ),
    st.sampled_from(["\n", ";", " ; ", "\n# a comment\n\n"]),
    st.sampled_from([" ", "\t", "  \t"]),
)
def test_roundTrip(rows, separator, blank):
    """What is written by the rules is read as it was meant."""
    lines = []
    for uri, systems, jobs, speed, supported, mandatory, key in rows:
        columns = [",".join(systems), key, str(jobs), repr(speed), ",".join(supported), ",".join(mandatory)]
        lines.append(blank.join([uri, *(column or "-" for column in columns)]))
    read = machines(separator.join(lines))
    for made, (uri, systems, jobs, speed, supported, mandatory, key) in zip(read, rows, strict=True):
        assert made.uri.endswith(uri)
        assert (made.systems, made.maxJobs, made.speedFactor) == (systems or {"x86_64-linux"}, jobs, speed)
        assert (made.supportedFeatures, made.mandatoryFeatures) == (supported, mandatory)
        assert made.address.sshKey == key and made.address.systemFeatures == supported | mandatory


@given(st.text("ab@/ ;\n#-,?=&%1.\u00a0\udcff\0", max_size=60))
def test_anyText(text):
    """Whatever the text, there is a value or an error of format."""
    files = {"/": "a @/", "a": "@b", "b": text}
    try:
        parsed = parse(text, files)
    except FormatError:
        return
    for each in parsed.usable:
        assert each.uri and each.speedFactor > 0 and each.systems
