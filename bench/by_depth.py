"""Decoding behind up to 32,000 tokens with 8- and 4-bit KV, and a whole prompt of that length beside llama.cpp, in turns.

Used by `python bench/long_context.py WORK --n-layers N`. Both run 7B shapes with random weights, each in its own process. To
decode at a depth, all segments hold the keys and values of the first 256 tokens: that costs the same as after a real prompt.
llama.cpp runs with flash attention, in the quickest of SETTINGS, which a shorter prompt chooses. Both compute only a
part of the last layer for tokens without logits, we less; with four layers that shows more than with 32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np

from bench import harness
from bench.peers import TYPES, Peer, facts_of, write_gguf
from edgemistral.files.blob import Blob
from edgemistral.runtime.threads import performance_cores

TOKENS = 32_000
DEPTHS = (0, 8_192, 16_384, 24_576, TOKENS)      # whole blocks: any KV format can go on from there
DECODED, ROUNDS, PROMPT_ROUNDS = 16, 7, 2
BRIEF, PAIRS = 5, 31                             # tokens, and rounds of the comparison of TOKENS with 0
TRIED = 8_192                                    # tokens of the prompt that chooses the setting
SETTINGS = ("F16 512", "F16 2048", "Q8_0 512")   # type of keys and values, tokens of a batch
MODULE = "bench.by_depth"


# ---- one process each ----------------------------------------------------------------------------------------------------

def ours(model: str, threads: int, kv_bits: int) -> dict[str, Callable[[], float]]:
    from edgemistral.kernels.kv_layout import SEGMENT
    from edgemistral.measure.benchmark import Roofline, append, bytes_of_a_token
    from edgemistral.runtime.segments import Row, Sequence
    from edgemistral.runtime.transformer import Transformer

    transformer = Transformer(Blob.open(model), kv_bits=kv_bits, threads=threads)
    roofline, filled = Roofline(threads, transformer.blob.data), Sequence(transformer.pool)
    ids = np.random.default_rng(0).integers(3, transformer.config.vocab_size, TOKENS, dtype=np.int32)
    append(transformer, filled, ids[:SEGMENT])
    filled.reserve(TOKENS)
    for segment in filled.segments[1:]:
        segment.data[:] = filled.segments[0].data
    filled.append(ids[SEGMENT:])

    def decode(depth: int, tokens: int = DECODED) -> float:
        fork = filled.fork(depth)
        transformer.step([Row(fork, ids[:1], 1)])         # not counted: threads wake up, pages are met
        start = time.perf_counter()
        for n in range(tokens):
            transformer.step([Row(fork, ids[n : n + 1], 1)])
        took = time.perf_counter() - start
        fork.close()
        return tokens / took

    def prompt() -> float:
        sequence = Sequence(transformer.pool)
        start = time.perf_counter()
        append(transformer, sequence, ids)
        took = time.perf_counter() - start
        sequence.close()
        return took

    tasks: dict[str, Callable[[], float]] = {"decode": lambda: decode(0), "prompt": prompt, "bandwidth": roofline.bandwidth}
    for depth in DEPTHS:
        tasks[f"decode {depth}"] = lambda depth=depth: decode(depth)                                   # type: ignore[misc]
        tasks[f"brief {depth}"] = lambda depth=depth: decode(depth, BRIEF)                             # type: ignore[misc]
        tasks[f"bytes {depth}"] = lambda depth=depth: bytes_of_a_token(transformer, depth + DECODED // 2)   # type: ignore[misc]
    return tasks


def theirs(model: str, threads: int, setting: str) -> dict[str, Callable[[], float]]:
    import gguf
    import llama_cpp

    kind, batch_size = setting.split()
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params: Any = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = TOKENS + 256, int(batch_size), int(batch_size)
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = int(getattr(gguf.GGMLQuantizationType, kind))
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(loaded, params)
    ids = np.random.default_rng(0).integers(3, 32_000, TOKENS + DECODED, dtype=np.int32)

    def compute(first: int, last: int, size: int) -> float:
        start = time.perf_counter()
        for at in range(first, last, size):
            chunk = ids[at : min(at + size, last)]
            batch = (llama_cpp.llama_token * len(chunk))(*chunk)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, len(chunk))):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - start

    def prompt(tokens: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return compute(0, tokens, int(batch_size))

    def decode(tokens: int) -> float:
        took = compute(tokens, tokens + DECODED, 1)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, tokens, -1)
        return DECODED / took

    return {"decode": lambda: DECODED / prompt(DECODED), "try": lambda: prompt(TRIED), "prompt": lambda: prompt(TOKENS),
            f"decode {TOKENS}": lambda: decode(TOKENS)}      # after a prompt


def work(kind: str, model: str, threads: str) -> None:
    """The main function of a worker process."""
    bits = kind.removeprefix("kv")
    tasks = ours(model, int(threads), int(bits)) if bits != kind else theirs(model, int(threads), kind)
    for line in sys.stdin:
        print("RESULT", tasks[line.strip()](), flush=True)


# ---- the comparison --------------------------------------------------------------------------------------------------------

def decode_rows(blob: Path, threads: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """For each depth: tokens/s with 8- and 4-bit KV in turns, their ratio, and shares of the bandwidth measured beside each.
    Then `compare`."""
    peers = {bits: Peer(sys.executable, f"kv{bits}", blob, threads, module=MODULE) for bits in (8, 4)}
    samples: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
    for _ in range(ROUNDS):
        for depth in DEPTHS:
            sample: dict[str, float] = {}
            for bits, peer in peers.items():
                before, rate, after = peer.ask("bandwidth"), peer.ask(f"decode {depth}"), peer.ask("bandwidth")
                sample |= {f"kv{bits}": rate,
                           f"share{bits}": rate * peer.ask(f"bytes {depth}") / ((before + after) / 2)}
            samples[depth].append(sample | {"ratio": sample["kv4"] / sample["kv8"]})
    pairs = compare(peers)
    for peer in peers.values():
        peer.close()
    rows = [{"depth": depth, **{key: median(one[key] for one in of) for key in of[0]}} for depth, of in samples.items()]
    for row in rows:
        click.echo(f"depth {row['depth']:6}: {row['kv8']:.2f} tokens/s with 8-bit KV ({row['share8']:.0%} of the bandwidth), "
                   f"{row['kv4']:.2f} with 4 bits ({row['share4']:.0%}), ratio {row['ratio']:.2f}")
    return rows, pairs


def compare(peers: dict[int, Peer]) -> dict[str, list[float]]:
    """Few tokens behind TOKENS between few behind none, in turns: the machine's speed changes within minutes.

    kv8, kv4: bytes a second in relation to those behind none. ratio: tokens/s of 4 bits to 8. Of each the quartiles.
    """
    samples: dict[str, list[float]] = {"kv8": [], "kv4": [], "ratio": []}
    more = {bits: peer.ask(f"bytes {TOKENS}") / peer.ask("bytes 0") for bits, peer in peers.items()}
    for n in range(PAIRS):
        behind = {}
        for bits, peer in sorted(peers.items(), reverse=n % 2 == 0):
            before, behind[bits], after = peer.ask("brief 0"), peer.ask(f"brief {TOKENS}"), peer.ask("brief 0")
            samples[f"kv{bits}"].append(2 * behind[bits] * more[bits] / (before + after))
        samples["ratio"].append(behind[4] / behind[8])
    found = {key: quantiles(of, n=4) for key, of in samples.items()}
    click.echo(f"bytes a second behind {TOKENS}, in relation to those behind none: {found['kv8'][1]:.3f} with 8-bit KV, "
               f"{found['kv4'][1]:.3f} with 4 bits; tokens/s of 4 bits to 8: {found['ratio'][1]:.3f}")
    return found


def prompts(blob: Path, gguf: Path, threads: int) -> dict[str, Any]:
    """Seconds of a prompt of TOKENS, ours and llama.cpp's in turns, and llama.cpp's tokens/s behind it."""
    tried = {}
    for setting in SETTINGS:
        peer = Peer(sys.executable, setting, gguf, threads, module=MODULE)
        tried[setting] = peer.ask("try")
        peer.close()
        click.echo(f"llama.cpp, {setting}: {tried[setting]:.1f} s for {TRIED} tokens")
    best = min(tried, key=lambda setting: tried[setting])
    mine = Peer(sys.executable, "kv8", blob, threads, module=MODULE)
    other = Peer(sys.executable, best, gguf, threads, module=MODULE)
    samples, decoded = [], []
    for _ in range(PROMPT_ROUNDS):
        a, b = mine.ask("prompt"), other.ask("prompt")
        decoded.append(other.ask(f"decode {TOKENS}"))
        samples.append({"ours": a, "theirs": b, "ratio": a / b})
        click.echo(f"a prompt of {TOKENS}: {a:.0f} and {b:.0f} s, {a / b:.3f} of the time; "
                   f"llama.cpp then decodes {decoded[-1]:.2f} tokens/s")
    mine.close()
    other.close()
    return {"tried": tried, "setting": best, "samples": samples, "llama_cpp_decode": median(decoded),
            **{key: median(one[key] for one in samples) for key in ("ours", "theirs", "ratio")}}


def measure(work: Path, blob: Path, parts: Sequence[str], beside_llama_cpp: bool) -> None:
    """Measure "decode", "prompt" or both, and save as long_context-N-layers; the other part is kept as it was."""
    threads = performance_cores()
    with Blob.open(blob) as opened:
        n_layers = opened.config.n_layers
        gguf = work / f"{blob.stem}-{TYPES[4]}.gguf"
        if beside_llama_cpp and "prompt" in parts and not gguf.exists():
            harness.prepare(work, 2 * opened.data.nbytes)
            write_gguf(gguf, opened, 4)
    path = harness.OF_MACHINE / f"long_context-{n_layers}-layers.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    results |= {"n_layers": n_layers, "threads": threads, "tokens": TOKENS}
    if "decode" in parts:
        rows, pairs = decode_rows(blob, threads)
        results |= {"rows": rows, "decode_commit": harness.commit(), "pairs": pairs}
    if "prompt" in parts and beside_llama_cpp:
        results |= {"prompt": prompts(blob, gguf, threads), "llama_cpp": facts_of(sys.executable)}
    elif "prompt" in parts:
        peer = Peer(sys.executable, "kv8", blob, threads, module=MODULE)
        results["prompt"] = {"ours": peer.ask("prompt")}
        peer.close()
        click.echo(f"a prompt of {TOKENS}: {results['prompt']['ours']:.0f} s")
    if "prompt" in parts:
        results["prompt"]["commit"] = harness.commit()
    for key in ("command", "commit", "machine", "of_the_empty_share"):     # the last one is from before `compare`
        results.pop(key, None)
    harness.save(path.stem, f"python bench/long_context.py WORK --n-layers {n_layers}", results)
    plot(results, path.with_suffix(".png"))


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens per second over the depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    depths = [row["depth"] for row in results["rows"]]
    for bits, color in ((8, "tab:blue"), (4, "tab:green")):
        axes.plot(depths, [row[f"kv{bits}"] for row in results["rows"]], "o-", color=color, label=f"{bits}-bit keys and values")
    if "llama_cpp_decode" in results.get("prompt", {}):
        setting = results["prompt"]["setting"].split()[0]
        axes.plot([TOKENS], [results["prompt"]["llama_cpp_decode"]], "s", color="tab:gray", label=f"llama.cpp, {setting}")
    axes.set(title=f"decoding, {results['n_layers']} layers of a 7B, 4-bit weights", xlabel="tokens before", ylim=(0, None),
             ylabel="tokens a second, median")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    work(*sys.argv[2:])
