"""How the command line fails: one line on standard error, exit code 2 for bad usage or input, 1 at run time."""

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
        except BrokenPipeError:   # the reader has gone: nothing to say, and nothing more to flush at exit
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
                message += " (EDGEMISTRAL_CACHE names another folder for what can be made again)"
    else:
        message, code = f"{type(error).__name__}: {error} (a bug here: --debug shows where)", FAILED
    return " ".join(message.split()), code


def _open_closed_streams() -> None:
    """A program may be started without them: what is read is empty then, and what is written is lost."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _use_utf8() -> None:
    """Pipes on Windows, and a bare C locale, would otherwise refuse what people ask and models write."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):     # a debugger has read from it already
                stream.reconfigure(encoding="utf-8", errors="replace")
