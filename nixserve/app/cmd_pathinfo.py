"""
C{nixserve path-info}: what a local store has registered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import click

from nixserve.app.arguments import toStorePath
from nixserve.app.storechoice import chooseStore
from nixserve.codec.pathinfo import ValidPathInfo, topoSort
from nixserve.codec.storepath import StorePath
from nixserve.codec.terminal import onOneLine
from nixserve.store.api import InvalidPath, StoreSession
from nixserve.store.local import LocalStore

__all__ = ["pathInfo"]


@click.command("path-info")
@click.option("--store", metavar="URI", help="The store, as Nix spells it: auto, /absolute/root, local?root=...")
@click.option("-r", "--recursive", is_flag=True, help="The closures of the paths too.")
@click.option("-s", "--size", is_flag=True, help="Print the size of each NAR.")
@click.option("-S", "--closure-size", "closureSize", is_flag=True, help="Print the size of each closure.")
@click.option("--sigs", is_flag=True, help="Print signatures and content addresses.")
@click.option("--json", "asJSON", is_flag=True, help="Print one JSON object a line, with everything known.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def pathInfo(
    store: str | None, recursive: bool, size: bool, closureSize: bool, sigs: bool, asJSON: bool, paths: tuple[str, ...]
) -> None:
    """Show what is registered about store paths.

    A PATH is in the store, or a symbolic link that leads there. Columns are separated by tabs, references come
    before what refers to them. Needs no right to write.
    """
    opened = LocalStore(replace(chooseStore(store, os.environ), readOnly=True))
    try:
        session = opened.openSession()
        asked = [toStorePath(opened.storeDir, path) for path in paths]
        wanted: Iterable[StorePath] = session.queryClosure(asked) if recursive else asked
        infos = session.queryPathInfos(list(wanted))
        for path in asked:
            if path not in infos:
                raise InvalidPath(path)
        for path in topoSort({path: info.references for path, info in infos.items()}):
            closure = _closureSize(session, path) if closureSize else None
            if asJSON:
                click.echo(json.dumps(_facts(infos[path], closure), sort_keys=True))
            else:
                click.echo("\t".join(map(onOneLine, _columns(infos[path], size, closure, sigs))))
    finally:
        opened.close()


def _closureSize(session: StoreSession, path: StorePath) -> int:
    """Bytes of all NARs of a closure."""
    return sum(info.narSize for info in session.queryPathInfos(session.queryClosure([path])).values())


def _columns(info: ValidPathInfo, size: bool, closureSize: int | None, sigs: bool) -> list[str]:
    columns: list[str] = [info.path]
    if size:
        columns.append(str(info.narSize))
    if closureSize is not None:
        columns.append(str(closureSize))
    if sigs:
        known = [f"ca:{info.ca}"] if info.ca else []
        columns.append(" ".join(known + sorted(info.sigs)))
    return columns


def _facts(info: ValidPathInfo, closureSize: int | None) -> dict[str, Any]:
    """With the names that C{nix path-info --json} uses."""
    facts: dict[str, Any] = {
        "path": info.path,
        "narHash": info.narHash.sri,
        "narSize": info.narSize,
        "references": sorted(info.references),
        "registrationTime": info.registrationTime,
    }
    if closureSize is not None:
        facts["closureSize"] = closureSize
    if info.ultimate:
        facts["ultimate"] = True
    if info.deriver:
        facts["deriver"] = info.deriver
    if info.sigs:
        facts["signatures"] = sorted(info.sigs)
    if info.ca:
        facts["ca"] = str(info.ca)
    return facts
