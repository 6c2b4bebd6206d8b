"""edgemistral inspect, verify, plan: the content of a model file, its checksums, and the memory that it needs."""

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
    kv_budget_option,
    max_ram_option,
    model_argument,
    open_blob,
    threads_option,
)
from edgemistral.terminal import human_bytes

if TYPE_CHECKING:
    from edgemistral.files.blob import Blob
    from edgemistral.runtime.plan import Threads


@click.command(cls=Command)
@model_argument
@json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show the content of MODEL: config, tensors, bits per weight, size, provenance.

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
    if eight := recipe.get("eight"):
        click.echo(f"in 8 bits           {', '.join(eight)}")
    if calibration := facts["calibration"]:
        about = f"{calibration['method']}, {calibration['tokens']:,} tokens of text {calibration['text_sha256'][:16]}"
    click.echo(f"calibration         {about if calibration else 'none'}")
    text = facts["text"]
    click.echo(f"chat template       {text['chat_template']}")
    click.echo(f"tokenizer           {text['tokenizer']}, {text['added_tokens']} added tokens")
    click.echo(f"ends of turn        {', '.join(f'{token_id} {spelled}'.strip() for token_id, spelled in text['ends'])}")
    click.echo(f"sampling defaults   {', '.join(f'{k} {v:g}' for k, v in text['defaults'].items()) or '-'}")
    click.echo(f"format version      {facts['format_version']}")
    click.echo(f"source fingerprint  {facts['source_sha256']}\n")
    for name, value in facts["config"].items():
        click.echo(f"{name:20}{'-' if value is None else value}")
    click.echo(f"\n{'tensors':32}{'number':>8}{'size':>12}{'bits per weight':>18}")
    for kind in facts["tensors"]:
        per_weight = f"{kind['bits_per_weight']:.3f}" if kind["bits_per_weight"] else ""
        click.echo(f"{kind['name']:32}{kind['count']:8}{human_bytes(kind['bytes']):>12}{per_weight:>18}")


@click.command(cls=Command)
@model_argument
def verify(model: str) -> None:
    """Recompute every checksum of MODEL. If a tensor is damaged, name it and exit with code 1.

    \b
    Example:
      edgemistral verify mistral-q4.safetensors
    """
    from tqdm import tqdm

    with open_blob(model) as blob:
        total = sum(spec.n_bytes for spec in blob.tensors.values())
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:
            blob.verify(progress=bar.update)
        click.echo(f"{blob.path}: all {len(blob.tensors)} tensors are whole ({human_bytes(total)})")


@click.command(cls=Command)
@model_argument
@context_option
@kv_bits_option
@threads_option
@kv_budget_option
@max_ram_option
@json_flag
def plan(
    model: str, context: int | None, kv_bits: str, threads: Threads, kv_budget: int | None, max_ram: int | None, as_json: bool
) -> None:
    """Show how much memory MODEL will need.

    \b
    Example:
      edgemistral plan mistral-q4.safetensors --context 8192
    """
    from edgemistral.runtime.plan import plan as make_plan

    with open_blob(model) as blob:
        planned = make_plan(blob, context, int(kv_bits), threads, kv_budget, max_ram)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(planned), "total_bytes": planned.total_bytes}, indent=2))
    else:
        for label, size, remark in (
            ("weights", planned.weights_bytes, "mapped from the file"),
            ("keys and values", planned.kv_bytes, f"{planned.context} tokens in {planned.kv_bits} bits, grows with them"),
            ("work space", planned.work_bytes, f"{planned.threads} threads"),
            ("the program", planned.program_bytes, "about, for Python, the kernels and the tokenizer"),
            ("in all", planned.total_bytes, ""),
            ("kept at most", planned.kv_budget, "limit for the keys and values of all conversations"),
        ):
            click.echo(f"{label:16}{size:>16,} bytes{human_bytes(size):>12}   {remark}".rstrip())
    planned.check(max_ram)


def _describe_text(blob: Blob) -> dict[str, Any]:
    """The blob's facts about text."""
    from edgemistral.model import tokenizer_of

    tokenizer = tokenizer_of(blob)
    kinds = {"sentencepiece": "SentencePiece", "tokenizers": "tokenizer.json"}
    return {
        "tokenizer": kinds[blob.text.kind],
        "added_tokens": len(blob.text.added),
        "chat_template": tokenizer.chat.name,
        "chat_template_text": tokenizer.chat.text,
        "bos_id": tokenizer.bos_id,
        "ends": [[token_id, tokenizer.markup.get(token_id, "")] for token_id in sorted(tokenizer.end_ids)],
        "defaults": dict(tokenizer.defaults),
    }


def describe(blob: Blob) -> dict[str, Any]:
    """All facts in a blob's header, as JSON values; sizes in bytes, counts without padding."""
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
        "recipe": blob.recipe.to_dict(),
        "text": _describe_text(blob),
        "calibration": _calibration(blob),
        "config": config.to_dict(),
        # Equal for two files made of the same weights, with any recipe and any layout of the checkpoint.
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


def _calibration(blob: Blob) -> dict[str, Any] | None:
    """The calibration of the weights: method, text_sha256, tokens. None: none, or a description that is not understood."""
    try:
        found = json.loads(blob.metadata.get("calibration", "null"))
        return {"method": str(found["method"]), "text_sha256": str(found["text_sha256"]), "tokens": int(found["tokens"])}
    except (ValueError, KeyError, TypeError):
        return None
