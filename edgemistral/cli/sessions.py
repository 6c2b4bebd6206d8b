"""edgemistral sessions: list, verify and delete session files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import json_flag
from edgemistral.errors import BadInput, BadSession
from edgemistral.files.records import KV_VERSION
from edgemistral.files.session import SessionFile, delete, summary
from edgemistral.files.session_header import DIFFERENT, is_session


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="DIR_OR_FILES...")
@click.option("--verify", is_flag=True, help="Check all of each file; exit code 1 if one is damaged.")
@click.option("--delete", "deletes", is_flag=True, help="Delete the sessions instead of listing them.")
@json_flag
@click.pass_context
def sessions(context: click.Context, paths: tuple[str, ...], verify: bool, deletes: bool, as_json: bool) -> None:
    """List the sessions in a folder, or the given session files: tokens, size, age and model.

    --verify compares every segment with its checksum. --delete deletes the files; files in use and other files are refused.

    \b
    Example:
      edgemistral sessions ~/chats
      edgemistral sessions ~/chats --verify
      edgemistral sessions ~/chats/paris.session --delete
    """
    if verify and deletes:
        raise click.UsageError("--verify and --delete exclude each other")
    files = [file for path in paths for file in session_files(Path(path))]
    if deletes:
        for file in files:
            delete(file)
            click.echo(f"deleted {file}", err=True)
        return
    lines = [describe_session(file, verify) for file in files]
    if as_json:
        click.echo(json.dumps(lines, indent=2))
    elif lines:
        click.echo(f"{'tokens':>8}  {'size':>10}  {'last used':16}  {'model':24}  file")
        for line in lines:
            show_session(line)
    else:
        click.echo("no sessions", err=True)
    if any(line["state"] == "damaged" for line in lines):
        context.exit(1)


def session_files(path: Path) -> list[Path]:
    """The session files in a folder, or the file itself. BadInput: neither exists."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and is_session(file))
    if not path.exists():
        raise BadInput(f"there is no file or folder {path}")
    return [path]


def describe_session(file: Path, verify: bool) -> dict[str, Any]:
    """The facts about a session; `state`: "ok" (within the checks made), "damaged", "in use" or "unusable"."""
    line: dict[str, Any] = {"file": str(file), "tokens": None, "model": "", "kv_bits": None, "note": "", "state": "ok"}
    stat = file.stat()
    line |= {"bytes": stat.st_size, "modified": int(stat.st_mtime)}
    try:
        if verify:
            found = SessionFile.inspect(file)
            found.close()
            line |= {"tokens": len(found.ids), "note": found.cut_back, "state": "damaged" if found.cut_back else "ok"}
            header = found.header
        else:
            header, line["tokens"] = summary(file)
        line |= {"model": header.model, "kv_bits": header.binding.get("kv_bits")}
        version = header.binding.get("kv_version")
        if version != KV_VERSION and line["state"] == "ok":
            note = DIFFERENT["kv_version"].format(theirs=version, ours=KV_VERSION)
            line |= {"note": note, "state": "unusable"}
    except BadSession as problem:
        line |= {"note": str(problem), "state": "in use" if "in use" in str(problem) else "damaged"}
    return line


def show_session(line: dict[str, Any]) -> None:
    tokens = "?" if line["tokens"] is None else line["tokens"]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(line["modified"]))
    click.echo(f"{tokens:>8}  {line['bytes'] / 2**20:>6.1f} MiB  {when:16}  {line['model']:24.24}  {line['file']}")
    if line["note"]:
        click.echo(f"{'':10}{line['note']}")
