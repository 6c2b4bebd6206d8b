"""docs/help.md: the output of `--help` for every command. `python -m docs.make_help` writes it; a test compares."""

from __future__ import annotations

from pathlib import Path

import click

from edgemistral.cli import main

PATH = Path(__file__).parent / "help.md"
HEAD = """# Commands

The output of `edgemistral COMMAND --help`. Made by `python -m docs.make_help`; a test checks that it is current.
"""


def reference() -> str:
    """The whole page."""
    top = _context(main, "edgemistral", None)
    contexts = [top, *(_context(command, name, top) for name, command in main.commands.items())]
    return "\n".join([HEAD, *map(_section, contexts)])


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    wide = {"terminal_width": 100, "max_content_width": 100}
    return command.make_context(name, [], parent, resilient_parsing=True, **wide)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n{context.get_help().rstrip()}\n```\n"


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8", newline="\n")
