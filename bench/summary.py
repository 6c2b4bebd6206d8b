"""The first page of bench/RESULTS.md: what matters to a user, one column for each processor, from the JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness import RESULTS
from bench.plots import PROCESSORS

Results = dict[str, Any]
Cell = Callable[[Results], str]


def processors() -> list[str]:
    """Folders of results, one for each processor, the one with most results first."""
    return sorted((p.name for p in RESULTS.iterdir() if p.is_dir()), key=lambda name: (-len(load(name)), name))


def load(processor: str) -> dict[str, Results]:
    """Benchmark -> its results on this processor."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / processor).glob("*.json"))}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column is text, all others are figures."""
    line = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, line, *rows)]


def summary() -> list[str]:
    """The table; a figure that was not measured on a processor is left empty, a row without any is left out."""
    found = {name: load(name) for name in processors()}
    rows = []
    for title, benchmark, cell in ROWS:
        cells = [cell(results[benchmark]) if benchmark in results else "" for results in found.values()]
        if any(cells):
            rows.append((title, *cells))
    return table(("two cores; in brackets tokens/s, ours and theirs", *(PROCESSORS.get(name, name) for name in found)), rows)


def peers() -> list[str]:
    """Ours beside llama.cpp: one line for each processor, model and task."""
    rows = []
    for processor in processors():
        results = load(processor)
        for name, label in PEERS.items():
            if r := results.get(name):
                rows += [
                    (f"{PROCESSORS.get(processor, processor)}, {label}, {task}", f"{s['ours']:.2f}", f"{s['theirs']:.2f}",
                     f"{s['ratio']:.2f} ({s['lowest']:.2f} to {s['highest']:.2f})", f"{s['share']:.0%}", str(s["samples"]),
                     origin(r))
                    for task, s in r["summary"].items()
                ]
    return table(("medians", "ours", "llama.cpp", "ratio", "ours, of the limit", "samples", "commit"), rows)


def origin(results: Results) -> str:
    """The commit that was measured; in brackets, of results from before that was kept, the commit that recorded them."""
    return results.get("commit") or f"({results['recorded_in']})"


def _of_peers(task: str) -> Cell:
    def cell(r: Results) -> str:
        s = r["summary"][task]
        return f"{s['ratio']:.2f} x ({s['ours']:.1f}, {s['theirs']:.1f})"
    return cell


def _share(task: str) -> Cell:
    return lambda r: f"{r['summary'][task]['share']:.0%}"


def _batch(tokens: int) -> Cell:
    return lambda r: next(f"{row['ratio']:.2f}" for row in r["rows"] if row["tokens"] == tokens)


def _quality(name: str) -> Cell:
    def cell(r: Results) -> str:
        row = next(row for row in r["rows"] if row["name"] == name)
        return f"{row['prose']['mean_kl']:.4f}, {row['prose']['top1_agreement']:.1%}"
    return cell


PEERS = {"peers_q4": "4 bits to Q4_0", "peers_q8": "8 bits to Q8_0", "peers_q4_avx2": "4 bits, AVX2 only"}
ROWS: list[tuple[str, str, Cell]] = [
    ("7B 4 bits, decode, beside llama.cpp's Q4_0", "peers_q4", _of_peers("decode")),
    ("the same while the memory is undisturbed", "peers_q4", _of_peers("decode, memory undisturbed")),
    ("7B 4 bits, prompt of 512", "peers_q4", _of_peers("prefill")),
    ("7B 8 bits, decode, beside llama.cpp's Q8_0", "peers_q8", _of_peers("decode")),
    ("7B 8 bits, prompt of 512", "peers_q8", _of_peers("prefill")),
    ("7B 4 bits, AVX2 only in both, decode", "peers_q4_avx2", _of_peers("decode")),
    ("7B 4 bits, AVX2 only in both, prompt of 512", "peers_q4_avx2", _of_peers("prefill")),
    ("decode, share of the read bandwidth", "peers_q4", _share("decode")),
    ("prompt of 512, share of the int8 peak", "peers_q4", _share("prefill")),
    ("8 tokens at once cost, times one token", "batches_q4", _batch(8)),
    ("4 sequences at once, 7B shapes, beside llama.cpp", "parallel", lambda r: next(
        f"{row['ratio']:.2f} x ({row['ours']:.1f}, {row['theirs']:.1f})" for row in r["rows"] if row["sequences"] == 4)),
    ("first token of `edgemistral run demo`", "startup", lambda r: f"{r['first_token_seconds']:.2f} s"),
    ("first run ever: kernels are compiled", "startup", lambda r: f"{r['first_run_seconds']:.0f} s"),
    ("quantize a 7B to 4 bits", "seven_b_quantize", lambda r: f"{r['seconds']:.0f} s"),
    ("the blob, bits per weight of its layers", "seven_b_quantize",
     lambda r: f"{r['blob_bytes'] / 1e9:.2f} GB, {r['bits_per_weight']['layers']:.2f}"),
    ("30,000 tokens: KL from float32", "long_context-4bit", lambda r: f"{r['mean_kl']:.5f}"),
    ("demo model, 8 bits: KL from float32, top-1", "quality", _quality("edgemistral 8 bits, 8-bit KV")),
    ("demo model, 4 bits: KL from float32, top-1", "quality", _quality("edgemistral 4 bits, 8-bit KV")),
    ("HTTP adds to the first text", "server_overhead",
     lambda r: f"{1000 * r['server_added']['road_seconds']['median']:.1f} ms"),
    ("1000 requests of 50 clients: wrong answers", "server_load", lambda r: str(len(r["wrong"]))),
]
