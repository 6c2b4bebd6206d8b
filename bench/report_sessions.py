"""The sections of the reports on long conversations: restarts, little memory, lookup, and answers whose text comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from bench.harness import in_gb
from bench.summary import table

Results = dict[str, Any]


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


SECTIONS: list[tuple[str, str, str, Callable[[Results], Iterable[str]]]] = [
    ("Prompt lookup", "lookup", "python bench/lookup.py WORK", _lookup),
    ("Restart with a long session", "restart", "python bench/restart.py WORK --n-layers 4", _restart),
    ("32,000 tokens and little memory", "small_memory", "python bench/small_memory.py WORK", _small_memory),
    ("32,000 tokens and little memory, 4-bit KV", "small_memory-kv4", "python bench/small_memory.py WORK --kv-bits 4",
     _small_memory),
    ("Answers whose text comes back", "written", "python bench/written.py WORK", _written),
]
