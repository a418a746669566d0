"""URLs of remote stores: what they mean, and what is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nixserve.codec.storepath import StoreDir
from nixserve.errors import UsageError
from nixserve.remote.address import RemoteAddress, Via
from tests.remote.hostkeys import KEY, encoded


@pytest.mark.parametrize(
    ("url", "fields", "name"),
    [
        ("ssh://host", {"via": Via.OPENSSH, "host": "host", "user": "", "port": None}, "ssh://host"),
        ("host", {"via": Via.OPENSSH, "host": "host"}, "ssh://host"),
        ("me@host.example", {"user": "me", "host": "host.example"}, "ssh://me@host.example"),
        ("ssh://me@host:2222", {"user": "me", "host": "host", "port": 2222}, "ssh://me@host:2222"),
        ("ssh://me@example.org@host", {"user": "me@example.org", "host": "host"}, "ssh://me@example.org@host"),
        ("ssh://[::1]", {"host": "::1", "port": None}, "ssh://[::1]"),
        ("ssh://me@[::1]:22", {"user": "me", "host": "::1", "port": 22}, "ssh://me@[::1]:22"),
        ("ssh://::1", {"host": "::1", "port": None}, "ssh://[::1]"),
        ("ssh://me@fe80::1%eth0", {"user": "me", "host": "fe80::1%eth0"}, "ssh://me@[fe80::1%eth0]"),
        ("ssh://[fe80::1%25eth0]:7", {"host": "fe80::1%eth0", "port": 7}, "ssh://[fe80::1%eth0]:7"),
        ("ssh://localhost", {"via": Via.CHILD, "host": "localhost"}, "ssh://localhost"),
        ("localhost", {"via": Via.CHILD}, "ssh://localhost"),
        ("ssh://me@localhost", {"via": Via.OPENSSH, "user": "me"}, "ssh://me@localhost"),
        ("ssh://localhost:22", {"via": Via.OPENSSH, "port": 22}, "ssh://localhost:22"),
        ("ssh://h?ssh-client=conch", {"via": Via.CONCH}, "ssh://h"),
        ("ssh://h?ssh-client=openssh", {"via": Via.OPENSSH}, "ssh://h"),
        ("unix:///run/a%20b/s.sock", {"via": Via.SOCKET, "socket": "/run/a b/s.sock"}, "unix:///run/a b/s.sock"),
    ],
)  # fmt: skip
def test_places(url, fields, name):
    """Where it is."""
    address = RemoteAddress.parse(url)
    assert {field: getattr(address, field) for field in fields} == fields
    assert address.name == name


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("", {"remoteProgram": "nix-store", "remoteStore": "", "compress": False, "maxConnections": 1}),
        ("remote-program=env%20X=1%20nix-store", {"remoteProgram": "env X=1 nix-store"}),
        ("remote-store=local?root=/x%26a%3Db", {"remoteStore": "local?root=/x&a=b"}),
        ("ssh-key=/home/me/a+b", {"sshKey": "/home/me/a+b"}),
        (f"base64-ssh-public-host-key={encoded(KEY)}", {"hostKey": KEY}),
        (f"base64-ssh-public-host-key={encoded(KEY + ' root@host' + chr(10))}", {"hostKey": KEY}),
        ("compress=true&max-connections=7", {"compress": True, "maxConnections": 7}),
        ("compress=no", {"compress": False}),
        ("store=/gnu/store", {"storeDir": StoreDir("/gnu/store")}),
        ("system-features=kvm%20big-parallel", {"systemFeatures": frozenset({"kvm", "big-parallel"})}),
        ("trusted=true&priority=10&want-mass-query=true&path-info-cache-size=5", {}),
    ],
)
def test_parameters(query, fields):
    """What is said about it."""
    address = RemoteAddress.parse(f"ssh://host?{query}")
    assert {field: getattr(address, field) for field in fields} == fields


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "names no host"),
        ("ssh://", "names no host"),
        ("ssh://@host", "names no user before the @"),
        ("ssh://-oProxyCommand=x", "does not begin with '-'"),
        ("-oProxyCommand=x", "does not begin with '-'"),
        ("ssh://-l@host", "does not begin with '-'"),
        ("ssh://[-x]", "is no IPv6 address"),
        ("ssh://me:secret@host", "no password belongs into a URL"),
        ("ssh://me:se/secret@host", "no password belongs into a URL"),
        ("ssh://me:se@secret@host", "no password belongs into a URL"),
        ("http://me:secret/secret@host", "is no remote store"),
        ("ssh://host/some/path", "write 'ssh://host?remote-store=/some/path'"),
        ("ssh://me@host/", "write 'ssh://me@host'"),
        ("/some/path", "nothing may follow the host"),
        ("ssh://ho st", "'ho st' is no name of a host"),
        ("ssh://host$(x)", "is no name of a host"),
        ("ssh://a;b@host", "'a;b' is no name of a user"),
        ("ssh://host\n", "is no name of a host"),
        ("ssh://host:", "'' is no port"),
        ("ssh://host:0", "'0' is no port"),
        ("ssh://host:65536", "'65536' is no port"),
        ("ssh://host:x", "'x' is no port"),
        ("ssh://1:2:3", "is no IPv6 address; write ssh://[ADDRESS]:PORT"),
        ("ssh-ng://host", "write it with ssh:// in front"),
        ("https://host", "is no remote store"),
        ("unix://host/x", "names no socket"),
        ("unix://", "names no socket"),
        ("unix:///" + "x" * 107, "has at most 107 bytes"),
        ("ssh://host?root=/x", "unknown parameter 'root'; known are base64-ssh-public-host-key, compress, "),
        ("ssh://host?log-fd=4", "'log-fd' is between Nix and its own build hook"),
        ("ssh://host?compress", "parameter 'compress' has no value"),
        ("ssh://host?compress=maybe", "'maybe', the value of 'compress', is neither"),
        ("ssh://host?compress=true&compress=true", "is given twice"),
        ("ssh://host?max-connections=0", "is no number from 1 on"),
        ("ssh://host?remote-program=", "is no command"),
        ("ssh://host?remote-program=%27x", "no closing quotation"),
        ("ssh://host?remote-program=--help", "is no command"),
        ("ssh://host?remote-program=a%0Ab", "has control characters"),
        ("ssh://host?ssh-key=%zz", "is not percent-encoded"),
        ("ssh://host?ssh-client=putty", "it must be openssh or conch"),
        ("ssh://host?store=nix", "nix"),
        ("ssh://host?base64-ssh-public-host-key=%%%", "is not percent-encoded"),
        ("ssh://host?base64-ssh-public-host-key=AAAA", "is no host key; write what"),
        (f"ssh://host?base64-ssh-public-host-key={encoded(KEY.replace('ed25519', 'rsa'))}", "is no host key"),
        (f"ssh://host?base64-ssh-public-host-key={encoded(KEY + chr(10) + KEY)}", "is no host key"),
        ("unix:///x?compress=true", "unknown parameter 'compress'"),
    ],
)
def test_refused(url, complaint):
    """What cannot be meant is refused in one line, without any password in it."""
    with pytest.raises(UsageError) as caught:
        RemoteAddress.parse(url)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value).replace("host\n", "") and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "write", "command"),
    [
        ("", True, "nix-store --serve --write"),
        ("", False, "nix-store --serve"),
        ("remote-program=env%20X=1%20nix-store", True, "env X=1 nix-store --serve --write"),
        ("remote-store=local?root=/x%26a%3Db", True, "nix-store --serve --write --store 'local?root=/x&a=b'"),
        ("remote-store=/it%27s", True, "nix-store --serve --write --store '/it'\"'\"'s'"),
    ],
)
def test_command(query, write, command):
    """The command line there; a store's URI is quoted for the shell."""
    assert RemoteAddress.parse(f"ssh://host?{query}").command(write) == command


def test_commandWords():
    """Without a shell the same words."""
    address = RemoteAddress.parse("ssh://localhost?remote-program=env%20X=1%20nix-store&remote-store=/a%20b%26c")
    assert address.commandWords() == ["env", "X=1", "nix-store", "--serve", "--write", "--store", "/a b&c"]


@pytest.mark.parametrize(
    ("url", "name"),
    [("ssh://Host", "host"), ("ssh://h:22", "h"), ("ssh://h:2222", "[h]:2222"), ("ssh://[::1]:7", "[::1]:7")],
)
def test_knownHostsName(url, name):
    """The name that known_hosts files have."""
    assert RemoteAddress.parse(url).knownHostsName == name


@given(st.text(alphabet=st.sampled_from("ssh://unix:@[]%?&=-.a1 \n\0\x1bé$remote-programcompress"), max_size=40))
@example("ssh://a@-b")
def test_neverAnOption(url):
    """Whatever the URL, there is an address or a usage error, and no name that ssh would take for an option."""
    try:
        address = RemoteAddress.parse(url)
    except UsageError:
        return
    for text in (address.host, address.user):
        assert not text.startswith("-") and text.isprintable() and " " not in text
    assert address.host or address.socket.startswith("/")


HOSTS = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True)
USERS = st.from_regex(r"[a-z_][a-z0-9_.-]{0,10}", fullmatch=True)


@given(HOSTS, st.one_of(st.just(""), USERS), st.one_of(st.none(), st.integers(1, 65535)))
def test_nameIsAURL(host, user, port):
    """The name of an address is a URL of the same place."""
    url = "ssh://" + (f"{user}@" if user else "") + host + (f":{port}" if port else "")
    address = RemoteAddress.parse(url)
    assert (address.name, RemoteAddress.parse(address.name)) == (url, address)
