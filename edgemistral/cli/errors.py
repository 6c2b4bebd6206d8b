"""Errors of the command line: one line on standard error, exit code 2 for bad usage or input, 1 for run-time errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from edgemistral.errors import BadInput, EdgeMistralError
from edgemistral.extras import missing
from edgemistral.paths import cache_dir

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class Command(click.Command):
    """A command with --debug, which `Cli.main` looks for."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        help_text = "Show the traceback of an error."
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=help_text))


class Cli(click.Group):
    """A group whose errors are one line each."""

    command_class = Command

    def main(self, args: Sequence[str] | None = None, *ignored: Any, **options: Any) -> NoReturn:
        """Run the command line and exit with its code."""
        args = sys.argv[1:] if args is None else list(args)
        _open_closed_streams()
        _use_utf8()
        try:
            code = super().main(args, **{**options, "standalone_mode": False}) or 0
            sys.stdout.flush()
        except BrokenPipeError:   # the reader has closed the pipe: exit without a message or a flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAILED
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:
            if "--debug" in args:
                traceback.print_exc()
            message, code = describe(error)
            click.echo(f"error: {message}", err=True)
        sys.exit(code)


def describe(error: Exception) -> tuple[str, int]:
    """An error as (one line, exit code)."""
    if isinstance(error, click.ClickException):
        message, code = error.format_message(), error.exit_code
        if isinstance(error, click.NoSuchOption):
            message = f"{message.rstrip('.')} (before a text that begins with a dash, write -- )"
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message = f"{message.rstrip('.')} ({error.ctx.command_path} --help shows the usage)"
    elif isinstance(error, EdgeMistralError):
        message, code = str(error), BAD_INPUT if isinstance(error, BadInput) else FAILED
    elif isinstance(error, ModuleNotFoundError) and (hint := missing(error)):
        message, code = hint, FAILED
    elif isinstance(error, MemoryError):
        message, code = "out of memory (edgemistral plan shows what a model needs)", FAILED
    elif isinstance(error, OSError):
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED
        with contextlib.suppress(ValueError, TypeError):
            if error.filename and Path(error.filename).is_relative_to(cache_dir()):
                message += " (EDGEMISTRAL_CACHE sets another cache folder)"
    else:
        message, code = f"{type(error).__name__}: {error} (a bug here: --debug shows where)", FAILED
    return " ".join(message.split()), code


def _open_closed_streams() -> None:
    """Open the standard streams that are missing: reading gives nothing, and output is lost."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _use_utf8() -> None:
    """Use UTF-8: pipes on Windows and the C locale would refuse many characters."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):     # for example, a debugger has read from it
                stream.reconfigure(encoding="utf-8", errors="replace")
