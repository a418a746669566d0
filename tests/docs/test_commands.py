"""
Every block of commands in the documentation is run, page by page, in a sandbox: a home, a store and a state directory
of its own. What is changed on the way is in L{Page.adapt}; the few blocks that cannot be run are listed here.
"""

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from nixserve.app.settings import CONFIG_KEYS, readConfig
from tests.app.box import TIMEOUT, waitUntil
from tests.builder.workplace import needsSandbox
from tests.interop.nix import requireProgram

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    ("README.md", "installs from the network, as tests/run does"),
    ("README.md", "would run itself"),
    ("deployment.md", "installs from the network, into /opt"),
    ("deployment.md", "needs systemd"),
}
"""All exceptions. A new one needs a reason as good as these."""

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?:sh|console)\n(?P<text>.*?)^```$", re.M | re.S)
PROGRAM = re.compile(r"^```python\n(?P<text># (?P<name>\w+\.py)\n.*?)^```$", re.M | re.S)
TWISTD = re.compile(r"^(twistd -n|twist)\b.* nixserve\b")
SERVICE = re.compile(rf"{TWISTD.pattern}|^python serve_")


def blocks(page):
    """Pairs of the reason not to run a block, or None, and its commands."""
    for match in BLOCK.finditer(page.read_text()):
        lines = match["text"].splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        yield match["reason"], "\n".join(lines)


class Page:
    """
    One page's sandbox.

    Nix's environment variables lead to a chroot store in it, and a service of C{auto} to another place in it; C{ssh},
    which takes the home directory from the system's list of users, is told about the one here.
    """

    def __init__(self, box):
        self.box = box
        self.ports = {"2222": freePort(), "2223": freePort()}
        self.service = None
        tools = box.path / "tools"
        tools.mkdir()
        key = box.makeKey()
        ssh = shutil.which("ssh")
        script = tools / "ssh"
        known = box.home / ".ssh/known_hosts"
        script.write_text(f'#!/bin/sh\nexec {ssh} -F none -i {key} -o UserKnownHostsFile={known} "$@"\n')
        script.chmod(0o755)
        # A link would not find its virtual environment.
        python = tools / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        nix = box.path / "nix"
        self.auto = {f"NIX_{name}_DIR": str(box.path / "auto" / name.lower()) for name in ("STORE", "STATE", "LOG")}
        box.environ.update(
            PATH=f"{tools}:{box.environ['PATH']}",
            NIX_REMOTE=str(nix),
            NIXSERVE_HOOK_STATE=str(box.path / "hook"),
            NIX_CONFIG="substituters =\nbuild-users-group =",
            # For python -m tests.…
            PYTHONPATH=str(ROOT),
        )
        # What nix-build leaves.
        (box.path / "file").write_text("contents\n")
        path = box.run("nix-store", "--add", "file").stdout.strip()
        assert path, "nix-store --add has failed"
        (box.path / "result").symlink_to(path)
        (box.path / "nixserve.toml").write_text(f'state = "{box.path}/state"\n')

    def adapt(self, commands):
        """Other ports; no state directory and no process number outside the sandbox."""
        for port, free in self.ports.items():
            commands = commands.replace(port, str(free))
        commands = re.sub(r"^twistd -n nixserve", "twistd -n --pidfile= nixserve", commands, flags=re.M)
        if TWISTD.match(commands):
            if "--config" not in commands:
                commands += f" --state {self.box.path}/state"
            if "--listen" not in commands:
                commands += f" --listen tcp:{self.ports['2222']}:interface=127.0.0.1"
        return commands

    def run(self, commands):
        """Run one block; a service goes on until the next one, or the end of the page."""
        if SERVICE.match(commands):
            self.serve(self.adapt(commands))
            return
        done = self.box.run("bash", "-euo", "pipefail", "-c", self.adapt(commands))
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr

    def serve(self, commands):
        """Start a service in place of the one before it."""
        self.stop()
        log = self.box.path / "log"
        with open(log, "wb") as stream:
            env = self.auto if "--store auto" in commands else None
            self.service = self.box.spawn("bash", "-c", f"exec {commands}", env=env, stdout=stream, stderr=stream)
        waitUntil(lambda: re.search("host key is|serving", log.read_text()) or self.service.poll() is not None)
        assert self.service.poll() is None, log.read_text()

    def stop(self):
        """End it."""
        if self.service is not None:
            self.service.terminate()
            self.service.wait(TIMEOUT)


def freePort():
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def marked(page):
    """A page as a parameter: with what its commands need."""
    builds = any("--builders" in commands or "buildRemotely" in page.read_text() for _, commands in blocks(page))
    return pytest.param(page, id=page.name, marks=[needsSandbox] if builds else [])


@pytest.mark.interop
@pytest.mark.parametrize("page", [marked(page) for page in PAGES if list(blocks(page))])
def test_blocksRun(page, box):
    """What a page says to type works, in the order in which it says so."""
    for program in ("nix", "nix-store", "ssh", "ssh-keygen", "bash"):
        requireProgram(program)
    sandbox = Page(box)
    for match in PROGRAM.finditer(page.read_text()):
        (box.path / match["name"]).write_text(match["text"])
    for reason, commands in blocks(page):
        if reason is None:
            sandbox.run(commands)
    sandbox.stop()


def test_exceptionsAreListed():
    """A block that is not run says why, and is listed here; so the list stays short."""
    found = {(page.name, reason) for page in PAGES for reason, _ in blocks(page) if reason is not None}
    assert found == NOT_RUN


def test_everyBlockIsSeen():
    """No fence escapes by its form: each says what it holds, or holds nothing to be run."""
    for page in PAGES:
        found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(), re.M)
        assert page.read_text().count("\n```") == 2 * len(found), page
        for language, text in found:
            assert language in {"", "sh", "console", "toml", "ini", "python"}, page
            isCommand = re.search(r"^(twistd|nix|nixserve|pip|ssh|apt)\b(?!:)", text, re.M)
            assert language or not isCommand, f"{page}: {text}"


def test_programsAreRun():
    """Each program in the documentation says what file it is, and a block of commands runs it."""
    for page in PAGES:
        names = [match["name"] for match in PROGRAM.finditer(page.read_text())]
        assert page.read_text().count("```python") == len(names) == len(set(names)), page
        for name in names:
            assert any(f"python {name}" in commands for reason, commands in blocks(page) if reason is None), name


def test_setUp():
    """The README has exactly two commands to set up, each one line."""
    section = (ROOT / "README.md").read_text().split("## Set up")[1].split("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert commands[0].strip().endswith("nixserve demo")
    assert commands[1].strip() == "tests/run"


def test_tables():
    """Each line of a table has the cells of its head, and no other line comes between."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for block in re.split(r"\n{2,}", text):
            lines = block.strip().splitlines()
            if any(line.startswith("|") for line in lines):
                cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
                assert len(cells) == 1 and re.fullmatch(r"\|(-+\|)+", lines[1]), f"{page.name}: {lines[0]}"


def test_links():
    """Every link to a file leads to one."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_configurationExample(tmp_path):
    """The TOML example in docs/deployment.md is one that the service reads, and names every key but two."""
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.S)
    (tmp_path / "config.toml").write_text(text)
    assert set(CONFIG_KEYS) - set(readConfig(str(tmp_path / "config.toml"))) <= {"host-key", "socket"}


def test_testsThatAreNamed():
    """What docs/security.md promises by the name of a test has that test."""
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    source += "\n".join(path.read_text() for path in (ROOT / "nixserve/testing").glob("*.py"))
    modules = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"`((?:test_|Test)\w+(?:\.py)?)`", (ROOT / "docs/security.md").read_text())
    assert len(names) > 50
    for name in names:
        found = name in modules if name.endswith(".py") else re.search(rf"(?:def|class) {name}\b", source)
        assert found, name
