"""edgemistral run: a chat, one answer, or the sample JSON."""

from __future__ import annotations

import json
from contextlib import nullcontext
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
    options,
    read_text,
    threads_option,
)
from edgemistral.errors import BadRequest
from edgemistral.files import strict_json
from edgemistral.terminal import StatusLine, compile_notice, print_answer

if TYPE_CHECKING:
    from edgemistral.model import Model
    from edgemistral.runtime.plan import Threads
    from edgemistral.session import Session
    from edgemistral.text.overflow import OnOverflow

answer_options = options(
    click.option("--max-new-tokens", type=int, metavar="N", help="Length limit of an answer.  [default: the context's end]"),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own distribution.  [default: 0.7]"),
    click.option("--top-p", type=float, metavar="P", help="Only the likeliest tokens with total probability P.  [default: 1]"),
    click.option("--top-k", type=int, metavar="K", help="Only the K likeliest tokens; 0 is all.  [default: 0]"),
    click.option("--min-p", type=float, metavar="P", help="Only tokens at least P times as likely as the best.  [default: 0]"),
    click.option("--repetition-penalty", type=float, metavar="R", help="Over 1: repeat less.  [default: 1]"),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer.  [default: a new one]"),
    click.option("--greedy", is_flag=True, help="Always take the likeliest token: --temperature 0."),
    click.option("--system", metavar="TEXT", help="A system text, put before the conversation."),
)


@click.command(cls=Command)
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--json", "json_source", metavar="FILE|-", help="Answer the sample JSON of a model card with its output.")
@click.option("--session", metavar="FILE", help="Keep the conversation in FILE, and continue it if FILE exists.")
@click.option("--raw", is_flag=True, help="Continue the text PROMPT, without the chat template.")
@answer_options
@context_option
@kv_bits_option
@kv_budget_option
@kv_store_options
@no_lookup_option
@on_overflow_option
@threads_option
@max_ram_option
def run(
    model: str | None,
    prompt: str | None,
    json_source: str | None,
    session: str | None,
    raw: bool,
    greedy: bool,
    system: str | None,
    max_new_tokens: int | None,
    context: int | None,
    kv_bits: str,
    threads: Threads,
    max_ram: int | None,
    kv_budget: int | None,
    no_lookup: bool,
    on_overflow: OnOverflow,
    kv_store: Path | None,
    kv_store_quota: int,
    **sampling: Any,
) -> None:
    """Chat with MODEL, or answer PROMPT and exit.

    MODEL is the path of a quantized model, or the word demo (the default). PROMPT may be - for standard input. Without
    PROMPT this is a chat: /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves. If the input is not a
    terminal, every line is a turn. With --session the conversation is kept in a file. A later run continues it, even
    after a crash, without reading it again.

    \b
    Example:
      edgemistral run mistral-q4.safetensors
      edgemistral run mistral-q4.safetensors "What should I see in Paris?" --greedy
      edgemistral run mistral-q4.safetensors - --system "Summarize." < report.txt
      edgemistral run mistral-q4.safetensors --session paris.session
      edgemistral run mistral-q4.safetensors --json sample-request.json
    """
    sampling = {name: value for name, value in sampling.items() if value is not None}
    _check_usage(sampling, prompt, json_source, raw, greedy, system, max_new_tokens)
    if session is not None and (raw or json_source is not None):
        raise click.UsageError("--session keeps a conversation: it cannot be used with --raw or --json")
    path = model_path(model, runs=True)
    if greedy:
        sampling["temperature"] = 0.0
    text = read_text("-").removesuffix("\n") if prompt == "-" else prompt
    request = None if json_source is None else strict_json.parse(read_text(json_source), json_source, BadRequest)
    from edgemistral.model import load

    with compile_notice(), load(
        path, context, int(kv_bits), threads, max_ram, kv_budget=kv_budget, lookup=not no_lookup, on_overflow=on_overflow,
        kv_store=kv_store, kv_store_quota=kv_store_quota,
    ) as loaded, nullcontext() if session is None else loaded.session(session) as kept:
        about_demo(model)
        if kept is not None and kept.notice:
            click.echo(f"note: {kept.notice}", err=True)
        if json_source is not None:
            _answer_json(loaded, request)
        elif text is not None:
            _answer(loaded, text, raw, system, max_new_tokens, sampling, kept)
        else:
            from edgemistral.cli.repl import chat

            chat(loaded, system=system, max_new_tokens=max_new_tokens, session=kept, **sampling)


def _check_usage(
    sampling: dict[str, Any], prompt: str | None, json_source: str | None, raw: bool, greedy: bool, system: str | None,
    max_new_tokens: int | None,
) -> None:
    """Refuse options that would be ignored."""
    if greedy and "temperature" in sampling:
        raise click.UsageError("--greedy and --temperature exclude each other")
    if raw and (prompt is None or system is not None):
        raise click.UsageError("--raw needs a PROMPT and takes no --system: it uses no chat template")
    if json_source is not None and (
        sampling or greedy or raw or prompt is not None or system is not None or max_new_tokens is not None
    ):
        raise click.UsageError("--json takes prompt and parameters from the request, not from the command line")


def _answer(
    model: Model, prompt: str, raw: bool, system: str | None, max_new_tokens: int | None, sampling: dict[str, Any],
    session: Session | None,
) -> None:
    """Stream one answer to standard output. A session continues its conversation."""
    with StatusLine() as status:
        arguments: dict[str, Any] = {**sampling, "progress": status.prompt_progress}
        status.show("thinking ...")
        if raw:
            reply = model.complete(prompt, max_new_tokens, **arguments)
        else:
            messages = session.messages if session is not None else []
            if system is not None:
                messages = [one for one in messages if one["role"] != "system"]
                messages = [{"role": "system", "content": system}, *messages] if system else messages
            messages.append({"role": "user", "content": prompt})
            reply = model.chat(messages, max_new_tokens, session=session, **arguments)
        print_answer(reply, status)
        if not reply.text:
            print()
    if reply.dropped:
        click.echo(f"(left out: the {len(reply.dropped)} oldest messages, because the conversation is too long)", err=True)
    if reply.finish_reason == "context":
        click.echo(f"(the context of {model.context} tokens is full)", err=True)


def _answer_json(model: Model, data: object) -> None:
    """Print the sample output for a sample request."""
    from edgemistral import sample_json

    request = sample_json.parse(data)
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)
    print(json.dumps(sample_json.answer(model, request), ensure_ascii=False, indent=2))
