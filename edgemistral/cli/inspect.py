"""edgemistral inspect, verify, plan: what a model file holds, whether it is whole, and what it will take."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import (
    context_option,
    json_flag,
    kv_bits_option,
    max_ram_option,
    model_argument,
    open_blob,
    threads_option,
)
from edgemistral.errors import BadInput
from edgemistral.terminal import human_bytes
from edgemistral.text.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from edgemistral.files.blob import Blob
    from edgemistral.runtime.plan import Threads


@click.command(cls=Command)
@model_argument
@json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show what MODEL holds: config, tensors, bits per weight, size, provenance.

    \b
    Example:
      edgemistral inspect mistral-q4.safetensors
    """
    with open_blob(model) as blob:
        facts = describe(blob)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{facts['path']}: {human_bytes(facts['file_bytes'])}, {facts['weights']:,} weights\n")
    bits = facts["bits_per_weight"]
    click.echo(f"bits per weight     {bits['layers']:.3f} in the layers, {bits['file']:.3f} in the whole file")
    recipe = facts["recipe"]
    click.echo(f"recipe              {recipe['bits']} bits in the layers, {recipe['output_bits']} in the output head")
    click.echo(f"format version      {facts['format_version']}")
    click.echo(f"source fingerprint  {facts['source_sha256']}\n")
    for name, value in facts["config"].items():
        click.echo(f"{name:20}{'-' if value is None else _listed(value) if isinstance(value, tuple) else value}")
    text = facts["text"]
    click.echo(f"\n{'tokenizer':20}{text['tokenizer']}, {text['added_tokens']} added tokens")
    click.echo(f"{'chat template':20}{text['chat_template']}{', with tools' if text['takes_tools'] else ''}")
    defaults = ", ".join(f"{name} {value:g}" for name, value in text["defaults"].items())
    click.echo(f"{'sampling defaults':20}{defaults or '-'}")
    click.echo(f"\n{'tensors':32}{'number':>8}{'size':>12}{'bits per weight':>18}")
    for kind in facts["tensors"]:
        per_weight = f"{kind['bits_per_weight']:.3f}" if kind["bits_per_weight"] else ""
        click.echo(f"{kind['name']:32}{kind['count']:8}{human_bytes(kind['bytes']):>12}{per_weight:>18}")


@click.command(cls=Command)
@model_argument
def verify(model: str) -> None:
    """Recompute every checksum of MODEL. Exit code 1 names the tensor that is damaged.

    \b
    Example:
      edgemistral verify mistral-q4.safetensors
    """
    from tqdm import tqdm

    with open_blob(model) as blob:
        total = sum(spec.n_bytes for spec in blob.tensors.values())
        with tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True, leave=False, disable=None
        ) as bar:
            blob.verify(progress=bar.update)
        click.echo(f"{blob.path}: all {len(blob.tensors)} tensors are whole ({human_bytes(total)})")


@click.command(cls=Command)
@model_argument
@context_option
@kv_bits_option
@threads_option
@max_ram_option
@json_flag
def plan(
    model: str, context: int | None, kv_bits: str, threads: Threads, max_ram: int | None, as_json: bool
) -> None:
    """Show the exact memory that MODEL takes, before any of it is taken.

    \b
    Example:
      edgemistral plan mistral-q4.safetensors --context 8192
    """
    from edgemistral.runtime.plan import plan as make_plan

    with open_blob(model) as blob:
        planned = make_plan(blob, context, int(kv_bits), threads)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(planned), "total_bytes": planned.total_bytes}, indent=2))
    else:
        for label, size, remark in (
            ("weights", planned.weights_bytes, "mapped from the file"),
            ("keys and values", planned.kv_bytes, f"{planned.context} tokens in {planned.kv_bits} bits, as they come"),
            ("work space", planned.work_bytes, f"{planned.threads} threads"),
            ("in all", planned.total_bytes, ""),
        ):
            click.echo(f"{label:16}{size:>16,} bytes{human_bytes(size):>12}   {remark}".rstrip())
    planned.check(max_ram)


def _listed(values: tuple[Any, ...]) -> str:
    """The values in one line, for people."""
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"{shown}, ... ({len(values)})" if len(values) > 8 else shown


def _describe_text(blob: Blob) -> dict[str, Any]:
    """How a blob reads and writes text."""
    try:
        tokenizer = open_tokenizer(blob.array("tokenizer").tobytes(), blob.text, blob.config.vocab_size, "its tokenizer")
        template, takes_tools = tokenizer.chat.name, tokenizer.chat.takes_tools
    except BadInput as problem:   # the rest is worth showing all the same
        template, takes_tools = f"cannot be read: {problem}", False
    return {
        "tokenizer": blob.text.kind,
        "added_tokens": len(blob.text.added),
        "chat_template": template,
        "takes_tools": takes_tools,
        "template": blob.text.chat_template,
        "end_ids": list(blob.config.end_ids),
        "defaults": dict(blob.text.defaults),
    }


def describe(blob: Blob) -> dict[str, Any]:
    """Everything about a blob that its header tells, as JSON values; sizes in bytes, counts without padding."""
    config = blob.config
    per_layer = {
        "wqkv": (config.q_dim + 2 * config.kv_dim) * config.dim,
        "wo": config.dim * config.q_dim,
        "w13": 2 * config.hidden_dim * config.dim,
        "w2": config.dim * config.hidden_dim,
        "attention_norm": config.dim,
        "ffn_norm": config.dim,
    }
    weights = {f"layers.*.{name}": config.n_layers * n for name, n in per_layer.items()}
    weights |= {"tok_embeddings": config.vocab_size * config.dim, "output": config.vocab_size * config.dim}
    weights |= {"norm": config.dim, "tokenizer": 0}
    count, size, sources = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0), hashlib.sha256()
    for name, spec in blob.tensors.items():
        kind = re.sub(r"^layers\.\d+\.", "layers.*.", name).removesuffix(".row_scales").removesuffix(".levels")
        size[kind] += spec.n_bytes
        if name.endswith(kind.removeprefix("layers.*.")):   # not the scales and levels, which belong to a matrix
            count[kind] += 1
            sources.update(f"{name} {blob.metadata['source_sha256:' + name]}\n".encode())
    layers = [kind for kind in weights if kind.startswith("layers.")]
    return {
        "path": str(blob.path),
        "file_bytes": blob.data.nbytes,
        "weights": sum(weights.values()),
        "bits_per_weight": {
            "layers": 8 * sum(size[kind] for kind in layers) / sum(weights[kind] for kind in layers),
            "file": 8 * blob.data.nbytes / sum(weights.values()),
        },
        "format_version": blob.metadata["format_version"],
        "recipe": dataclasses.asdict(blob.recipe),
        "config": config.to_dict(),
        "text": _describe_text(blob),
        # Equal for two files that were made of the same weights, whatever the recipes and the checkpoint's layout.
        "source_sha256": sources.hexdigest(),
        "tensors": [
            {
                "name": kind,
                "count": count[kind],
                "bytes": size[kind],
                "weights": weights[kind],
                "bits_per_weight": 8 * size[kind] / weights[kind] if weights[kind] else None,
            }
            for kind in weights
        ],
    }
