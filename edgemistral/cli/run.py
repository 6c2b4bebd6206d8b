"""edgemistral run: a chat, one answer, or the sample JSON."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import (
    STANDARD_INPUT,
    about_demo,
    clean_text,
    context_option,
    kv_bits_option,
    max_ram_option,
    model_path,
    options,
    read_text,
    standard_input,
    threads_option,
)
from edgemistral.errors import BadRequest
from edgemistral.files import strict_json
from edgemistral.terminal import StatusLine, compile_notice, printable

if TYPE_CHECKING:
    from edgemistral.model import Model
    from edgemistral.runtime.plan import Threads

OPTION = r"-[A-Za-z]|--[A-Za-z][A-Za-z0-9-]*(=.*)?"   # what any option looks like

answer_options = options(
    click.option("--max-new-tokens", type=int, metavar="N", help="End an answer here.  [default: the context's end]"),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own.  [default: MODEL's, or 0.7]"),
    click.option("--top-p", type=float, metavar="P", help="The likeliest tokens that make up P.  [default: MODEL's, or 1]"),
    click.option("--top-k", type=int, metavar="K", help="Only the K likeliest tokens; 0 is all.  [default: MODEL's, or 0]"),
    click.option("--min-p", type=float, metavar="P", help="Tokens P times as likely as the best.  [default: MODEL's, or 0]"),
    click.option("--repetition-penalty", type=float, metavar="R", help="Over 1: repeat less.  [default: MODEL's, or 1]"),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer.  [default: a new one]"),
    click.option("--greedy", is_flag=True, help="Always the likeliest token: --temperature 0."),
    click.option("--system", metavar="TEXT", help="A system text, put before the conversation."),
)


class _Run(Command):
    """A command whose last argument is a text, which may begin with a dash as long as it looks like no option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        taking = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
        options: list[str] = []
        texts: list[str] = []
        end = args.index("--") if "--" in args else len(args)
        for i, arg in enumerate(args[:end]):
            is_value = i > 0 and args[i - 1] in taking
            is_text = len(arg) > 1 and arg.startswith("-") and not re.fullmatch(OPTION, arg, re.DOTALL)
            (texts if is_text and not is_value else options).append(arg)
        rest = [*texts, *args[end + 1 :]]
        try:
            return super().parse_args(context, [*options, "--", *rest] if rest else options)
        except click.NoSuchOption as error:
            message = f"{error.format_message()} A PROMPT that begins with a dash goes behind -- (as in: -- -x)"
            raise click.UsageError(message, context) from None


@click.command(cls=_Run)
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--json", "json_source", metavar="FILE|-", help="Answer the sample JSON of a model card with its output.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@answer_options
@context_option
@kv_bits_option
@threads_option
@max_ram_option
def run(
    model: str | None,
    prompt: str | None,
    json_source: str | None,
    raw: bool,
    greedy: bool,
    system: str | None,
    max_new_tokens: int | None,
    context: int | None,
    kv_bits: str,
    threads: Threads,
    max_ram: int | None,
    **sampling: Any,
) -> None:
    """Chat with MODEL, or answer PROMPT and exit.

    MODEL is the path of a quantized model, or the word demo (also what no MODEL means). PROMPT may be - for standard
    input. Without PROMPT this is a chat: /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves. When its
    input is no terminal, every line is a turn.

    \b
    Example:
      edgemistral run mistral-q4.safetensors
      edgemistral run mistral-q4.safetensors "What should I see in Paris?" --greedy
      edgemistral run mistral-q4.safetensors - --system "Summarize." < report.txt
      edgemistral run mistral-q4.safetensors --json sample-request.json
    """
    sampling = {name: value for name, value in sampling.items() if value is not None}
    _check_usage(sampling, prompt, json_source, raw, greedy, system, max_new_tokens)
    path = model_path(model)
    if greedy:
        sampling["temperature"] = 0.0
    system = None if system is None else clean_text(system, "--system")
    if prompt == "-":
        text: str | None = read_text("-").removesuffix("\n")
    else:
        text = None if prompt is None else clean_text(prompt, "PROMPT")
    source = STANDARD_INPUT if json_source == "-" else json_source
    request = None if json_source is None else strict_json.parse(read_text(json_source), str(source), BadRequest)
    if text is None and json_source is None:
        standard_input()   # of which a chat reads
    from edgemistral.model import load

    with compile_notice(), load(path, context, int(kv_bits), threads, max_ram) as loaded:
        about_demo(model)
        if json_source is not None:
            _answer_json(loaded, request)
        elif text is not None:
            _answer(loaded, text, raw, system, max_new_tokens, sampling)
        else:
            from edgemistral.cli.repl import chat

            chat(loaded, system=system, max_new_tokens=max_new_tokens, **sampling)


def _check_usage(
    sampling: dict[str, Any], prompt: str | None, json_source: str | None, raw: bool, greedy: bool, system: str | None,
    max_new_tokens: int | None,
) -> None:
    """Refuse options that would silently be ignored."""
    if greedy and "temperature" in sampling:
        raise click.UsageError("--greedy and --temperature exclude each other")
    if raw and (prompt is None or system is not None):
        raise click.UsageError("--raw needs a PROMPT and takes no --system: it uses no chat template")
    if json_source is not None and (
        sampling or greedy or raw or prompt is not None or system is not None or max_new_tokens is not None
    ):
        raise click.UsageError("--json takes prompt and parameters from the request, not from the command line")


def _answer(
    model: Model, prompt: str, raw: bool, system: str | None, max_new_tokens: int | None, sampling: dict[str, Any]
) -> None:
    """Stream one answer to standard output."""
    with StatusLine() as status:
        arguments: dict[str, Any] = {**sampling, "progress": status.prompt_progress}
        if raw:
            reply = model.complete(prompt, max_new_tokens, **arguments)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            reply = model.chat([*messages, {"role": "user", "content": prompt}], max_new_tokens, **arguments)
        shown = printable if sys.stdout.isatty() else str
        for piece in reply:
            print(shown(piece), end="", flush=True)
        print()
    if reply.finish_reason == "context":
        click.echo(f"(the context of {model.context} tokens is full)", err=True)


def _answer_json(model: Model, data: object) -> None:
    """Print the sample output for a sample request."""
    from edgemistral import sample_json

    request = sample_json.parse(data)
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)
    print(json.dumps(sample_json.answer(model, request), ensure_ascii=False, indent=2))
