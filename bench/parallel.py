"""Several sequences at once, compared with llama.cpp's parallel decoding in turns; a reader during another's long prompt.

    python bench/parallel.py WORK [--n-layers 32]

Models of 7B shapes with random weights: ours a blob (with all 32 layers the one that seven_b.py leaves in WORK), theirs a GGUF
(Q4_0, head Q6_K) made from it. With fewer layers less disk is needed, but the head is a larger part than in a 7B. Each has its
own process, which computes only on request. A step of n sequences computes one token of each, at a depth of about 64 positions.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from bench import clients_at_once
from bench.harness import save, work_argument
from bench.peers import TYPES, Peer, facts_of, write_gguf
from bench.synthetic import V2, synthetic_blob
from edgemistral.files.blob import Blob
from edgemistral.runtime.threads import performance_cores

SEQUENCES = (1, 2, 4, 8)
DEPTH, STEPS = 64, 16
PROMPT = 4000           # tokens of the prompt that is read while another answer is decoded
FORKED = 8000           # positions of the forked conversation
ROUNDS = 7


# ---- ours --------------------------------------------------------------------------------------------------------------

def ours(model: str, threads: int) -> dict[str, Any]:
    from edgemistral.measure.benchmark import append
    from edgemistral.runtime.segments import Row, Sequence
    from edgemistral.runtime.transformer import Transformer

    transformer = Transformer(Blob.open(model), threads=threads)
    sequences = [Sequence(transformer.pool) for _ in range(max(SEQUENCES))]
    for n, sequence in enumerate(sequences):
        append(transformer, sequence, np.arange(DEPTH, dtype=np.int32) + 3 + n)

    def decode(n: int) -> float:
        start = time.perf_counter()
        for step in range(STEPS):
            transformer.step([Row(sequence, np.array([step + 3], np.int32), 1) for sequence in sequences[:n]])
        took = time.perf_counter() - start
        for sequence in sequences[:n]:
            sequence.cut(DEPTH)
        return n * STEPS / took

    return {f"decode {n}": lambda n=n: decode(n) for n in SEQUENCES} | {"decode": lambda: decode(1)}


def reader(blob: Path, threads: int, rounds: int) -> list[dict[str, float]]:
    """A reader's tokens per second alone and during a prompt, and the prompt's seconds alone and with the reader."""
    from edgemistral.generate.engine import Engine
    from edgemistral.generate.sampler import SamplingParams
    from edgemistral.runtime.transformer import Transformer

    engine = Engine(Transformer(Blob.open(blob), threads=threads), lookup=False)
    ban = SamplingParams(temperature=0.0, logit_bias={engine.config.eos_id: -100})
    rng, samples = np.random.default_rng(0), []

    def prompt() -> np.ndarray:
        return rng.integers(3, engine.config.vocab_size, PROMPT, dtype=np.int32)

    reading = engine.generate(rng.integers(3, 1000, DEPTH), ban)
    def alone(tokens: int = 24) -> float:
        """Tokens per second of the reader."""
        start = time.perf_counter()
        for _ in range(tokens):
            next(reading)
        return tokens / (time.perf_counter() - start)

    for _ in range(8):
        next(reading)
    for _ in range(rounds):
        before_it = alone()
        start = time.perf_counter()
        next(engine.generate(prompt(), ban, 1))
        prompt_alone = time.perf_counter() - start
        other, start, before = engine.generate(prompt(), ban, 1), time.perf_counter(), reading.length
        while not other.ready:
            engine.step([reading, other])
        seconds = time.perf_counter() - start
        tokens = reading.length - before
        for _ in range(tokens):      # computed already
            next(reading)
        rate = (before_it + alone()) / 2      # before and after: the machine's speed drifts
        samples.append({"reader": tokens / seconds / rate, "prompt": seconds / prompt_alone, "tokens_per_second": rate,
                        "prompt_seconds": prompt_alone})
    engine.close()
    return samples


def fork_seconds(rounds: int = 5) -> float:
    """Seconds of a fork of a 7B conversation, 32 layers, at a position where its last segment must be copied."""
    from edgemistral.runtime.segments import SegmentPool, Sequence

    pool = SegmentPool(V2)
    sequence = Sequence(pool)
    sequence.reserve(FORKED)
    for segment in sequence._segments:
        segment.data[:] = 1
    sequence.append(np.zeros(FORKED, np.int32))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        fork = sequence.fork(FORKED - 10)
        times.append(time.perf_counter() - start)
        fork.close()
    sequence.close()
    pool.close()
    return max(times)


# ---- theirs ------------------------------------------------------------------------------------------------------------

def theirs(model: str, threads: int) -> dict[str, Any]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    most = max(SEQUENCES)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256 * most, 512, 512, most
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)
    memory, batch = llama_cpp.llama_get_memory(context), llama_cpp.llama_batch_init(512, 0, 1)

    def run(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    for n in range(most):
        run([(3 + n + i, i, n, i == DEPTH - 1) for i in range(DEPTH)])

    def decode(n: int) -> float:
        start = time.perf_counter()
        for step in range(STEPS):
            run([(step + 3, DEPTH + step, sequence, True) for sequence in range(n)])
        llama_cpp.llama_synchronize(context)
        took = time.perf_counter() - start
        for sequence in range(n):
            llama_cpp.llama_memory_seq_rm(memory, sequence, DEPTH, -1)
        return n * STEPS / took

    return {f"decode {n}": lambda n=n: decode(n) for n in SEQUENCES} | {"decode": lambda: decode(1)}


def work(kind: str, model: str, threads: str) -> None:
    """The main function of a worker process."""
    tasks = (ours if kind == "edgemistral" else theirs)(model, int(threads))
    for line in sys.stdin:
        print("RESULT", tasks[line.strip()](), flush=True)


# ---- the comparison ----------------------------------------------------------------------------------------------------

@click.command(help=__doc__.split("\n")[0])
@work_argument
@click.option("--n-layers", default=V2.n_layers, show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--reader-rounds", default=3, show_default=True)
def main(work: Path, n_layers: int, rounds: int, reader_rounds: int) -> None:
    blob, threads = synthetic_blob(work, n_layers), performance_cores()
    gguf = work / f"{blob.stem}-{TYPES[4]}.gguf"
    if not gguf.exists():
        with Blob.open(blob) as opened:
            write_gguf(gguf, opened, 4)
    mine = Peer(sys.executable, "edgemistral", blob, threads, module="bench.parallel")
    other = Peer(sys.executable, "llama.cpp", gguf, threads, module="bench.parallel")
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in SEQUENCES}
    for _ in range(rounds):
        for n in SEQUENCES:
            a, b, again = mine.ask(f"decode {n}"), other.ask(f"decode {n}"), mine.ask(f"decode {n}")
            samples[n].append({"ours": (a + again) / 2, "theirs": b, "ratio": (a + again) / 2 / b})
    mine.close()
    other.close()
    rows = [{"sequences": n, **{key: median(s[key] for s in samples[n]) for key in ("ours", "theirs", "ratio")},
             "cost": median(n * samples[1][i]["ours"] / s["ours"] for i, s in enumerate(samples[n]))} for n in SEQUENCES]
    for row in rows:
        click.echo(f"{row['sequences']} sequences: {row['ours']:.1f} and {row['theirs']:.1f} tokens/s, "
                   f"ratio {row['ratio']:.2f}; our step costs {row['cost']:.2f} of one token's")
    through = clients_at_once.measure(blob, 4, max(3, rounds // 2))
    cost = next(row["cost"] for row in rows if row["sequences"] == 4)
    through["of_possible"] = through["gain"] / (4 / cost)
    click.echo(f"4 clients of one server: {through['gain']:.2f} times one client's tokens/s, "
               f"{through['of_possible']:.2f} of what the steps allow")
    beside = reader(blob, threads, reader_rounds)
    kept, slower = median(s["reader"] for s in beside), median(s["prompt"] for s in beside)
    click.echo(f"a reader keeps {kept:.2f} of its tokens/s beside a prompt of {PROMPT}, which takes {slower:.2f} x as long")
    fork = fork_seconds()
    click.echo(f"a fork of a 7B conversation of {FORKED} tokens takes {1000 * fork:.1f} ms at most")
    command = "python bench/parallel.py WORK" + (f" --n-layers {n_layers}" if n_layers < V2.n_layers else "")
    save("parallel", command, {
        "n_layers": n_layers, "threads": threads, "rows": rows, "samples": samples, "llama_cpp": facts_of(sys.executable),
        "through_server": through,
        "reader": {
            "keeps": kept, "prompt_slower": slower, "prompt": PROMPT,
            "samples": beside,
        },
        "fork": {"positions": FORKED, "seconds": fork},
    })


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(*sys.argv[2:])
    else:
        main()
