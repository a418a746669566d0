"""
Text of others that commands print: of errors, and of what strange stores have registered.
"""

import json

import pytest
from click.testing import CliRunner

from nixserve.app import cli
from nixserve.app.cmd_pathinfo import pathInfo
from nixserve.errors import StoreError
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.testing import addObject, makeInfo, makeNar

EVIL = "k:\x1b]0;t\x07\x1b[>4;2m\x9b2J\u202ex\r\ny"


def test_errors(capsys):
    """What ends a command is one line, whomever it quotes, between others in which nothing is obeyed either."""
    error = StoreError(f"it said {EVIL}")
    error.add_note(f"note {EVIL}")
    error.hint = f"hint {EVIL}"
    with pytest.raises(SystemExit):
        cli._fail(str(error), 1, error)
    assert capsys.readouterr().err == "note k:2Jx\ny\nerror: it said k:2Jx y\nhint k:2Jx\ny\n"


def test_pathInfo(tmp_path):
    """What a store has registered is shown without what a terminal would obey, in a line for each path."""
    store = LocalStore(StoreLayout.underRoot(str(tmp_path)), reservedSize=0)
    session, nar = store.openSession(), makeNar(b"x")
    info = makeInfo("x", nar)
    addObject(session, info, nar)
    with store.database.writing() as connection:
        connection.execute("update ValidPaths set sigs = ?", (EVIL.replace(" ", ""),))
    session.close()
    store.close()
    run = CliRunner().invoke(pathInfo, ["--sigs", "--store", str(tmp_path), info.path])
    assert run.exit_code == 0 and run.output == f"{info.path}\tk:2Jx y\n"
    run = CliRunner().invoke(pathInfo, ["--json", "--store", str(tmp_path), info.path])
    assert run.output.removesuffix("\n").isprintable() and json.loads(run.output)["signatures"]
