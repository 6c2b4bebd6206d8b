"""edgemistral and llama.cpp on the same shapes, in turns: A B A B within one run, with a ratio for each round.

    python bench/peers.py WORK [--bits 8]
    python bench/peers.py WORK --avx2 PYTHON     # both without AVX-512, see README.md

Both run models of true Mistral-7B shapes with random weights: ours a blob (made by `seven_b.py`, or --blob), theirs a GGUF made
here, Q4_0 (or Q8_0) with a Q6_K head, as llama.cpp's own quantizer makes it. Each has its own process, which computes only on
request, so that their threads do not disturb each other. Needs the `bench` extra.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from bench.harness import prepare, save, work_argument
from edgemistral.files.blob import Blob
from edgemistral.measure.benchmark import bytes_of_a_token, products
from edgemistral.runtime.threads import performance_cores

PROMPT, DECODED = 512, 16
DECODES_A_ROUND = 4     # decoding takes a tenth of a prompt's time
AVX2_ONLY = {"EDGEMISTRAL_SIMD": "avx2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
QUIET = 0.9             # of the highest bandwidth seen: below this, another program uses the memory
Sample = dict[str, float]
TYPES = {4: "Q4_0", 8: "Q8_0"}


# ---- their model -----------------------------------------------------------------------------------------------------

def write_gguf(path: Path, blob: Blob, bits: int) -> None:
    """A GGUF of the blob's shapes with random codes and small scales."""
    import gguf

    from bench.llama_cpp_models import finish, new_writer

    c, kind = blob.config, gguf.GGMLQuantizationType
    writer = new_writer(path, c)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, cols: int, type_: Any) -> None:
        block, size = gguf.GGML_QUANT_SIZES[type_]
        data = np.resize(rng.integers(0, 256, 1 << 22, dtype=np.uint8), (rows * cols // block, size))
        scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        at = size - 2 if type_ == kind.Q6_K else 0
        data[:, at : at + 2] = scale
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=type_)

    weights = getattr(kind, TYPES[bits])
    add("token_embd.weight", c.vocab_size, c.dim, weights)
    for layer in range(c.n_layers):
        at = f"blk.{layer}."
        for name, rows, cols in (
            ("attn_q", c.q_dim, c.dim), ("attn_k", c.kv_dim, c.dim), ("attn_v", c.kv_dim, c.dim),
            ("attn_output", c.dim, c.q_dim), ("ffn_gate", c.hidden_dim, c.dim), ("ffn_up", c.hidden_dim, c.dim),
            ("ffn_down", c.dim, c.hidden_dim),
        ):
            add(f"{at}{name}.weight", rows, cols, weights)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{at}{name}.weight", np.ones(c.dim, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(c.dim, np.float32))
    add("output.weight", c.vocab_size, c.dim, kind.Q6_K if bits == 4 else weights)
    finish(writer)


# ---- one process each ------------------------------------------------------------------------------------------------

class Peer:
    """A process that measures on request. A request is a line: "prefill" or "decode" (for ours also "bandwidth", "peak")."""

    def __init__(
        self, python: str, kind: str, model: Path, threads: int, environment: Mapping[str, str] | None = None,
        module: str = "bench.peers",
    ) -> None:
        """module: the module whose `--worker` it runs; the lines name the module's tasks."""
        command = [python, "-m", module, "--worker", kind, str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         text=True, env={**os.environ, **(environment or {})}, cwd=Path(__file__).parents[1])
        self.ask("decode")     # warms up, and waits for the model to be loaded

    def ask(self, task: str) -> float:
        """Tokens per second, or bytes or multiplications per second."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(task + "\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("RESULT "):
            if not line:
                raise click.ClickException(f"a worker ended; run {' '.join(map(str, self._process.args))} to see why")
        return float(line.split()[1])

    def close(self) -> None:
        self._process.communicate()


def work(kind: str, model: str, threads: str) -> None:
    """The main function of a worker process."""
    tasks = (ours if kind == "edgemistral" else theirs)(model, int(threads))
    for line in sys.stdin:
        print("RESULT", tasks[line.strip()](), flush=True)


def ours(model: str, threads: int) -> dict[str, Any]:
    from edgemistral.measure.benchmark import Roofline, append
    from edgemistral.runtime.segments import Row, Sequence
    from edgemistral.runtime.transformer import Transformer

    transformer = Transformer(Blob.open(model), threads=threads)
    roofline, sequence = Roofline(threads, transformer.blob.data), Sequence(transformer.pool)
    ids = np.arange(PROMPT, dtype=np.int32) + 3

    def prefill() -> float:
        start = time.perf_counter()
        append(transformer, sequence, ids)
        took = time.perf_counter() - start
        sequence.cut(0)
        return PROMPT / took

    def decode() -> float:
        start = time.perf_counter()
        for n in range(DECODED):
            transformer.step([Row(sequence, ids[n : n + 1], 1)])
        took = time.perf_counter() - start
        sequence.cut(0)
        return DECODED / took

    return {"prefill": prefill, "decode": decode, "bandwidth": roofline.bandwidth, "peak": roofline.int8_peak,
            "bytes": lambda: bytes_of_a_token(transformer, DECODED // 2)}


def theirs(model: str, threads: int) -> dict[str, Any]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = PROMPT + 64, PROMPT, PROMPT
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)
    memory = llama_cpp.llama_get_memory(context)

    def evaluate(sizes: list[int]) -> float:
        llama_cpp.llama_memory_clear(memory, True)
        batches = [(llama_cpp.llama_token * size)(*range(3, 3 + size)) for size in sizes]
        start = time.perf_counter()
        for batch in batches:
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, len(batch))):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)
        return sum(sizes) / (time.perf_counter() - start)

    return {"prefill": lambda: evaluate([PROMPT]), "decode": lambda: evaluate([1] * DECODED)}


def facts_of(python: str) -> str:
    """The version of llama-cpp-python, and the instructions that its llama.cpp was built for."""
    code = ("import importlib.metadata, llama_cpp; "
            "print(importlib.metadata.version('llama-cpp-python'), llama_cpp.llama_print_system_info().decode())")
    return subprocess.check_output([python, "-c", code], text=True, stderr=subprocess.DEVNULL).strip()


# ---- the comparison --------------------------------------------------------------------------------------------------

@click.command(help=__doc__.split("\n")[0])
@work_argument
@click.option("--blob", type=click.Path(exists=True, dir_okay=False), help="Our model.  [default: WORK/7b-q4.safetensors]")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", type=int, help="[default: all cores]")
@click.option("--avx2", metavar="PYTHON", help="Both with AVX2 only; an interpreter whose llama-cpp-python is built so.")
def main(work: Path, blob: str | None, bits: str, rounds: int, threads: int | None, avx2: str | None) -> None:
    """Measure edgemistral and llama.cpp in turns; llama.cpp's GGUF is made in WORK."""
    threads = threads or performance_cores()
    path = Path(blob) if blob else work / f"7b-q{bits}.safetensors"
    with Blob.open(path) as opened:
        config = opened.config
        gguf_path = work / f"{path.stem}-{TYPES[int(bits)]}.gguf"
        if not gguf_path.exists():
            prepare(work, 2 * opened.data.nbytes)
            write_gguf(gguf_path, opened, int(bits))
    ours = Peer(sys.executable, "edgemistral", path, threads, AVX2_ONLY if avx2 else {})
    theirs = Peer(avx2 or sys.executable, "llama.cpp", gguf_path, threads)
    work_of = {"decode": ours.ask("bytes"), "prefill": products(config, PROMPT, 0) / PROMPT}     # a token's
    samples: dict[str, list[Sample]] = {"decode": [], "prefill": []}
    for _ in range(rounds):
        for task in ("decode",) * DECODES_A_ROUND + ("prefill",):
            sample = measure(ours, theirs, task)
            samples[task].append(sample)
            click.echo(f"{task}: {sample['ours']:.2f} and {sample['theirs']:.2f} tokens/s, ratio {sample['ratio']:.2f}, "
                       f"limit {sample['ceiling'] / 1e9:.1f} G/s")
    ours.close()
    theirs.close()
    summary = {task: summarize(samples[task], work_of[task]) for task in samples}
    enough = QUIET * max(sample["ceiling"] for sample in samples["decode"])
    quiet = [sample for sample in samples["decode"] if sample["ceiling"] >= enough]
    summary["decode, memory undisturbed"] = summarize(quiet, work_of["decode"])
    for task, row in summary.items():
        click.echo(f"{task}: {row['ours']:.2f} and {row['theirs']:.2f} tokens/s, ratio {row['ratio']:.2f} "
                   f"({row['lowest']:.2f} to {row['highest']:.2f}), {row['share']:.0%} of the limit, {row['samples']} samples")
    command = f"python bench/peers.py WORK --bits {bits}"
    name, command = (f"peers_q{bits}_avx2", f"{command} --avx2 PYTHON") if avx2 else (f"peers_q{bits}", command)
    save(name, command, {
        "n_layers": config.n_layers, "bits": int(bits), "threads": threads, "prompt": PROMPT, "type": TYPES[int(bits)],
        "avx2_only": bool(avx2), "llama_cpp": facts_of(avx2 or sys.executable), "samples": samples, "summary": summary,
    })


def measure(ours: Peer, theirs: Peer, task: str) -> Sample:
    """Both in turn, the machine's limit measured before, between and after."""
    limit = "bandwidth" if task == "decode" else "peak"
    before, mine, between, other, after = (
        ours.ask(limit), ours.ask(task), ours.ask(limit), theirs.ask(task), ours.ask(limit)
    )
    return {"ours": mine, "theirs": other, "ratio": mine / other, "limit_of_ours": (before + between) / 2,
            "ceiling": min(before, between, after)}


def summarize(samples: list[Sample], work: float) -> Sample:
    """Medians, the ratio's extremes, and our share of the limit; `work` is the bytes or products of a token."""
    return {
        "ours": median(s["ours"] for s in samples),
        "theirs": median(s["theirs"] for s in samples),
        "ratio": median(s["ratio"] for s in samples),
        "lowest": min(s["ratio"] for s in samples),
        "highest": max(s["ratio"] for s in samples),
        "share": median(s["ours"] * work / s["limit_of_ours"] for s in samples),
        "samples": len(samples),
    }


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(*sys.argv[2:])
    else:
        main()
