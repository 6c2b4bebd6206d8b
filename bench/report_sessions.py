"""The sections of the reports on long conversations: restarts, little memory, lookup, and answers whose text comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from bench.harness import in_gb
from bench.summary import table

Results = dict[str, Any]


def _quartiles(of: list[float]) -> str:
    """The median, and in brackets the middle half of the samples."""
    return f"{of[1]:.2f} ({of[0]:.2f} to {of[2]:.2f})"


def _by_depth(r: Results) -> list[str]:
    prompt = r.get("prompt")
    lines = [
        f"{r['n_layers']} layers of 7B shapes, 4-bit weights, {r['threads']} threads. Shares are of the bandwidth that was "
        "measured beside each sample.",
        "",
        *table(("tokens before", "8-bit KV, tokens/s", "share", "4-bit KV", "share", "4 to 8 bits"), [
            (f"{row['depth']:,}", f"{row['kv8']:.2f}", f"{row['share8']:.0%}", f"{row['kv4']:.2f}", f"{row['share4']:.0%}",
             f"{row['ratio']:.2f}") for row in r["rows"]
        ]),
        "",
        f"Behind {r['tokens']:,} tokens, in turns with none: bytes a second are {_quartiles(r['pairs']['kv8'])} of those "
        f"behind none with 8-bit KV, {_quartiles(r['pairs']['kv4'])} with 4 bits; tokens a second with 4 bits are "
        f"{_quartiles(r['pairs']['ratio'])} of those with 8.",
    ]
    if prompt is not None and "theirs" in prompt:
        kind, batch = prompt["setting"].split()
        lines += [f"A prompt of {r['tokens']:,} tokens takes {prompt['ours']:.0f} s, llama.cpp {prompt['theirs']:.0f} s "
                  f"(flash attention, {kind} keys and values, batches of {batch}): {prompt['ratio']:.2f} of the time. "
                  f"Behind it, llama.cpp decodes {prompt['llama_cpp_decode']:.2f} tokens/s."]
    elif prompt is not None:
        lines += [f"A prompt of {r['tokens']:,} tokens takes {prompt['ours']:.0f} s."]
    if prompt is not None and prompt["commit"] != r["decode_commit"]:
        lines += [f"The prompt was measured on commit {prompt['commit']}."]
    name = f"long_context-{r['n_layers']}-layers.png"
    return [*lines, "", f"![tokens a second over the tokens before]({r['folder']}/{name})"]


def _lookup(r: Results) -> list[str]:
    return [
        f"SmolLM2-135M-Instruct answers; each step is computed by a 7B of 32 layers too, {r['threads']} threads. The tokens "
        "are the same with and without.",
        "",
        *table(("", "tokens", "without, tokens/s", "with", "ratio", "guesses", "right"), [
            (row["name"], str(row["tokens"]), f"{row['without']:.2f}", f"{row['with']:.2f}", f"{row['ratio']:.2f}",
             str(row["guessed"]), str(row["accepted"]))
            for row in r["rows"]
        ]),
    ]


def _restart(r: Results) -> list[str]:
    return table((f"{r['n_layers']} layers of 7B shapes, 8-bit KV, {r['tokens']:,} tokens in a session", "seconds"), [
        ("start of `edgemistral run` to the first new token", f"{r['first_token_seconds']:.2f}"),
        ("the same question without a session", f"{r['without_session_seconds']:.2f}"),
        ("one decoded token at that depth", f"{r['decoded_token_seconds']:.3f}"),
        ("the session's file", in_gb(r["session_bytes"])),
    ])


def _small_memory(r: Results) -> list[str]:
    def cells(row: Results) -> tuple[str, ...]:
        title = f"within {row['gib']} GiB" if row["gib"] else "all of the machine's"
        if "failed" in row:
            return (title, f"ended with code {row['failed']}", *[""] * 6)
        took = median(row["seconds"])
        return (title, f"{took:.2f}", f"{1 / took:.2f}", in_gb(int(median(row["read_bytes"]))), str(row["major_faults"]),
                in_gb(row["peak_resident_bytes"]), in_gb(row["anonymous_bytes"]),
                f"{row['open_seconds'] + row['first_seconds']:.1f} s")

    return [
        f"The whole 7B, 4-bit weights ({in_gb(r['weights_bytes'])}), {r['tokens']:,} tokens with {r['kv_bits']}-bit "
        f"KV ({in_gb(r['kv_bytes'])}), {r['threads']} threads; nothing of it in memory at the start, no swap.",
        "",
        *table(("memory", "s a token", "tokens/s", "read from the disk a token", "major faults", "peak resident", "anonymous",
                "opened and first token"), [cells(row) for row in r["rows"]]),
    ]


def _written(r: Results) -> list[str]:
    return table((f"answers of up to {r['tokens']} tokens", "answers", "spelled otherwise", "tokens behind", "found again"), [
        (f"{row['model']}, temperature {row['temperature']}", str(row["answers"]), str(row["differ"]),
         str(row["tokens_behind"]), f"{row['found_again']:.1%}")
        for row in r["rows"]
    ])


def _against(r: Results) -> list[str]:
    units = {"prefill": "tokens/s", "decode": "tokens/s", "first compile": "s"}
    return [
        f"Four layers of 7B shapes, 4 bits, {r['threads']} threads; this tree and {r['revision']}, which held one conversation;"
        " in turns. Medians, and the median of the ratios.",
        "",
        *table(("", "now", "before", "ratio"), [
            (f"{name}, {units[name]}", f"{row['now']:.1f}", f"{row['before']:.1f}", f"{row['ratio']:.3f}")
            for name, row in r["rows"].items()
        ]),
    ]


SECTIONS: list[tuple[str, str, str, Callable[[Results], Iterable[str]]]] = [
    ("One sequence, beside the tree before many", "against", "python bench/against.py WORK --revision c7b2ec9", _against),
    ("32,000 tokens through four layers of a 7B, beside llama.cpp", "long_context-4-layers",
     "python bench/long_context.py WORK --n-layers 4", _by_depth),
    ("32,000 tokens through a whole 7B", "long_context-32-layers", "python bench/long_context.py WORK --n-layers 32",
     _by_depth),
    ("Prompt lookup", "lookup", "python bench/lookup.py WORK", _lookup),
    ("Restart with a long session", "restart", "python bench/restart.py WORK --n-layers 4", _restart),
    ("32,000 tokens and little memory", "small_memory", "python bench/small_memory.py WORK", _small_memory),
    ("32,000 tokens and little memory, 4-bit KV", "small_memory-kv4", "python bench/small_memory.py WORK --kv-bits 4",
     _small_memory),
    ("Answers whose text comes back", "written", "python bench/written.py WORK", _written),
]
