"""Arguments and options that several commands share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from edgemistral.errors import BadInput
from edgemistral.files import regular

if TYPE_CHECKING:
    from edgemistral.files.blob import Blob

F = TypeVar("F", bound=Callable[..., Any])
DEMO = "demo"


def size(text: str) -> int:
    """A number of bytes: 2GiB, 2G (the same), 2GB (10 ** 9 each), 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I?B)?|B)?", text.strip().upper())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 2GiB or 512M")
    base = 1000 if match[3] == "B" else 1024
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def threads(text: str) -> int | Literal["auto"]:
    """A whole number, or auto."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a whole number or auto") from None


def kv_store(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """The folder of the KV store: DIR, or one in the cache."""
    if value == "":
        from edgemistral.paths import cache_dir

        return cache_dir() / "kv-store"
    if value is not None and (Path(value).is_file() or value == DEMO):
        raise click.BadParameter(f"{value} is not a folder; use --kv-store=DIR, or --kv-store after MODEL", context, parameter)
    return None if value is None else Path(value)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of the help page."""
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return decorate


model_argument = click.argument("model")
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
context_option = click.option(
    "--context", type=int, metavar="N", help="Tokens to make room for.  [default: the model's own]"
)
kv_bits_option = click.option(
    "--kv-bits", type=click.Choice(["4", "8", "16"]), default="8", show_default=True, help="Bits of a stored key or value."
)
threads_option = click.option(
    "--threads", type=threads, metavar="N", help="Threads, or auto: measured once.  [default: performance cores]"
)
max_ram_option = click.option(
    "--max-ram", type=size, metavar="SIZE", help="Refuse to start if the plan needs more memory."
)
no_lookup_option = click.option(
    "--no-lookup", is_flag=True, help="Do not guess tokens from earlier text (answers are the same)."
)
kv_store_options = options(
    click.option("--kv-store", is_flag=False, flag_value="", metavar="[=DIR]", callback=kv_store,
                 help="Keep prompts and answers on disk: later runs do not read the same beginning again."),
    click.option("--kv-store-quota", type=size, default="8GiB", show_default=True, metavar="SIZE",
                 help="Size limit of that folder; the files unused for longest are deleted."),
)
on_overflow_option = click.option(
    "--on-overflow", type=click.Choice(["error", "drop-oldest"]), default="error", show_default=True,
    help="If a conversation is longer than the context: refuse it, or leave out its oldest turns.",
)
kv_budget_option = click.option(
    "--kv-budget", type=size, metavar="SIZE",
    help="Memory for conversations that are kept.  [default: a quarter of the memory, at most half of the free disk]",
)


def model_path(name: str | None, runs: bool = False) -> Path:
    """The path of MODEL. None or the word demo means the demo model.

    runs: the model will compute, so compile its kernels meanwhile.
    """
    is_demo = name is None or name == DEMO
    path = Path(name or DEMO)
    if not is_demo and not path.exists():
        raise BadInput(f"there is no file {name} (MODEL is a path, or the word demo)")
    if runs:
        compile_ahead()
    if is_demo:
        from edgemistral.demo import demo_model

        return demo_model()
    return path


def compile_ahead(*kv_bits: int) -> None:
    """Compile on all cores what is not in the cache, for these KV formats or the chosen one, until the current command ends."""
    from edgemistral.runtime.compiling import helpers
    from edgemistral.runtime.transformer import example_call

    context = click.get_current_context()
    context.with_resource(helpers(*map(example_call, kv_bits or [int(context.params.get("kv_bits", 8))])))


def about_demo(name: str | None) -> None:
    """If MODEL means the demo model, say so on standard error."""
    if name is None or name == DEMO:
        from edgemistral.demo import ABOUT

        click.echo(ABOUT, err=True)


def open_blob(name: str) -> Blob:
    """The blob that MODEL names."""
    from edgemistral.files.blob import Blob

    return Blob.open(model_path(name))


def read_text(source: str) -> str:
    """The text of a file, or of standard input for "-", with line feeds as line ends and no byte-order mark.

    Raises BadInput if it cannot be read or is not UTF-8.
    """
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else regular.read(Path(source), BadInput, pipes=True)
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}") from None
