"""edgemistral serve."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import (
    about_demo,
    context_option,
    kv_bits_option,
    kv_budget_option,
    kv_store_options,
    max_ram_option,
    model_path,
    no_lookup_option,
    on_overflow_option,
    size,
    threads_option,
)
from edgemistral.terminal import compile_notice

if TYPE_CHECKING:
    from edgemistral.runtime.plan import Threads
    from edgemistral.text.overflow import OnOverflow


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="EDGEMISTRAL_API_KEY", metavar="KEY",
              help="Answer only requests with this key.  [default: EDGEMISTRAL_API_KEY]")
@click.option("--insecure", is_flag=True, help="Listen for other computers without a key.")
@click.option("--allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
              help="Let pages of this origin call the server.")
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="NAME",
              help="Also accept this host name (of a proxy, or in a network).")
@click.option("--queue", type=click.IntRange(1, 100_000), default=128, show_default=True, help="Requests that may wait.")
@click.option("--max-body", type=size, metavar="SIZE", default="4MiB", show_default=True, help="Largest request.")
@click.option("--parallel", type=click.IntRange(1, 64), default=4, show_default=True,
              help="Answers written at the same time; each step computes a token of each.")
@click.option("--session-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Keep the conversations of requests with a session here.")
@click.option("--announce", is_flag=True,
              help="Print one line of JSON when ready: url, key (random without --api-key), pid, protocol.")
@click.option("--parent-watch", is_flag=True, help="Stop when the parent process dies or closes standard input.")
@context_option
@kv_bits_option
@kv_budget_option
@kv_store_options
@no_lookup_option
@on_overflow_option
@threads_option
@max_ram_option
def serve(
    model: str | None, host: str, port: int, context: int | None, kv_bits: str, threads: Threads,
    max_ram: int | None, kv_budget: int | None, no_lookup: bool, on_overflow: OnOverflow, kv_store: Path | None,
    kv_store_quota: int, announce: bool, parent_watch: bool, api_key: str | None, **settings: Any,
) -> None:
    """Serve MODEL over HTTP on this computer: a chat page, the OpenAI interface, and the model card's sample JSON.

    MODEL is the path of a quantized model, or the word demo (the default). The URL is printed on standard output once
    the port is open; /health says when the model is loaded. Ctrl-C stops within five seconds.

    To run it as a child process, use --port 0 --announce --parent-watch and keep its standard input open:
    docs/embedding.md.

    \b
    Example:
      edgemistral serve mistral-q4.safetensors
      edgemistral serve mistral-q4.safetensors --host 0.0.0.0 --api-key "$(openssl rand -hex 16)"
    """
    from edgemistral.child import ParentWatch, announcement

    parent = ParentWatch() if parent_watch else None     # first, because the rest may take a while
    key = secrets.token_hex(16) if announce and api_key is None else api_key
    from edgemistral.files.blob import Blob
    from edgemistral.model import load
    from edgemistral.runtime.plan import plan
    from edgemistral.server.runner import serve as run

    def listening(url: str) -> None:
        about_demo(model)
        if not announce:
            print(url, flush=True)

    def ready(url: str) -> None:
        if announce:
            print(announcement(url, key or ""), flush=True)

    path = model_path(model, runs=True)
    with compile_notice():
        with Blob.open(path) as blob:   # errors are reported before the port opens
            planned = plan(blob, context, int(kv_bits), threads, kv_budget, max_ram)
        planned.check(max_ram)
        run(
            lambda: load(
                path, planned.context, planned.kv_bits, planned.threads, kv_budget=planned.kv_budget, lookup=not no_lookup,
                on_overflow=on_overflow, kv_store=kv_store, kv_store_quota=kv_store_quota,
            ),
            host, port,
            listening=listening, ready=ready, parent=parent, api_key=key, **settings,
        )
