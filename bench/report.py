"""bench/RESULTS.md and bench/results/tables.md from the JSON files in bench/results: no figure in their tables is typed.

Over 400 lines: one function a section, in the order of the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench import plots, report_campaigns, report_sessions, summary
from bench.harness import RESULTS, in_gb
from edgemistral.config import ModelConfig
from edgemistral.measure.benchmark import products

REPORT, TABLES = Path(__file__).parent / "RESULTS.md", RESULTS / "tables.md"
LIMITS = Path(__file__).parent / "limits.md"
HEAD = """# Results

Written by `python -m bench.run_all --report` from the JSON files in `bench/results`; [README.md](README.md) says what each
benchmark does. Shares are of what the same machine did in the same run with the same instructions: compare them between
machines and hours. Compare other figures only within one run. All tables: [results/tables.md](results/tables.md).
"""
PEERS = """
## Beside llama.cpp

`python bench/peers.py WORK [--bits 8] [--avx2 PYTHON]`: a 7B of 32 layers, both programs in turns, tokens/s. "Undisturbed" are
the samples around which the bandwidth was at least 0.9 of the highest in the run. The commit is the one that was measured; in
brackets, the one that recorded a result from before that was kept.
"""
PLOTS = """
![tokens a second beside llama.cpp](results/peers.png)

`python bench/speed.py WORK`: shares of the machine's limits over prompt size and depth, four layers of a 7B.

![share of the limits over prompt size and depth](results/znver5/speed.png)
"""
TABLES_HEAD = """# All tables

Written by `python -m bench.run_all --report`. [RESULTS.md](../RESULTS.md) has the summary.
"""
# Sections that RESULTS.md repeats once they are measured.
ESSENTIAL = (
    "parallel", "against", "lookup", "restart", "small_memory", "real_model", "calibration_cost", "full_calibration", "quality",
    "kv_accuracy_demo", "kv_accuracy_SmolLM2-135M", "server_fuzz", "fuzz", "crash", "soak",
)
Results = dict[str, Any]


def write() -> None:
    """Write both reports and the plot; a section whose benchmark has not run says so."""
    plots.peers()
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8", newline="\n")


def texts() -> dict[Path, str]:
    """What `write` writes."""
    essential = [section for section in SECTIONS if section[1] in ESSENTIAL and any(RESULTS.rglob(f"{section[1]}.json"))]
    parts = [HEAD, *summary.summary(), PEERS, *summary.peers(), PLOTS, *(_section(*section) for section in essential)]
    tables = [TABLES_HEAD, *(_section(*section, at=TABLES) for section in SECTIONS)]
    return {REPORT: "\n".join([*parts, LIMITS.read_text("utf-8")]), TABLES: "\n".join(tables)}


def _section(title: str, name: str, command: str, body: Callable[[Results], Iterable[str]], at: Path = REPORT) -> str:
    lines = [f"## {title}", "", f"    {command}", ""]
    paths = sorted(RESULTS.rglob(f"{name}.json"))   # of every processor that it was measured on
    for path in paths:
        results = json.loads(path.read_text("utf-8"))
        commit = f"Commit {summary.origin(results)}."
        for known in ("commit", "recorded_in", "command"):
            results.pop(known, None)
        machine = results.pop("machine", None)
        lines += [f"{_machine(machine)} {commit}" if machine else commit, ""]
        lines += [*body({**results, "folder": path.parent.relative_to(at.parent).as_posix()}), ""]
    return "\n".join(lines if paths else [*lines, "Not measured yet.", ""])


def _machine(m: Results) -> str:
    return (
        f"**{m['cpu']}**, {m['date']}: {m['cores']} cores, {m['instructions']}, {in_gb(m['memory_bytes'])} of memory, "
        f"{m['os']}, Python {m['python']}, NumPy {m['numpy']}, numba {m['numba']}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; the first column is text, all others are figures."""
    return summary.table(head, list(rows))


def _startup(r: Results) -> list[str]:
    return _table(("from the start of a new process", "seconds"), [
        ("`import edgemistral` alone (without Python's own start)", f"{r['import_seconds']:.3f}"),
        ("Python's own start", f"{r['interpreter_seconds']:.3f}"),
        ("`edgemistral run demo`: first token, kernels in the cache", f"{r['first_token_seconds']:.2f}"),
        ("first run ever of a blob: kernels are compiled", f"{r['first_run_seconds']:.1f}"),
        ("first run ever of the demo model, the same",
         f"{r['first_demo_seconds']:.1f}"),
        *([("`edgemistral warmup` with an empty cache: everything is compiled", f"{r['warm_up_seconds']:.1f}")]
          if "warm_up_seconds" in r else []),
    ])


def _first_token(r: Results) -> list[str]:
    return _table((f"in the process, warm caches, blob of {r['blob_bytes'] / 1e9:.1f} GB", "seconds"), [
        ("`import edgemistral`", f"{r['import_seconds']:.3f}"),
        ("`load`", f"{r['load_seconds']:.2f}"),
        (f"first token of a prompt of {r['prompt_tokens']:.0f} tokens", f"{r['first_token_after_load_seconds']:.2f}"),
        ("all of it (target: 1.2)", f"{r['total_seconds']:.2f}"),
    ])


def _quantize(r: Results) -> list[str]:
    n_bytes, bits = r["checkpoint_bytes"], r["bits_per_weight"]
    source = "from the disk" if r["checkpoint_from_disk"] else "from the disk or the system's memory of it"

    def took(seconds: float) -> str:
        return f"{seconds:.0f} s ({n_bytes / seconds / 1e6:.0f} MB/s)"

    return _table(("", ""), [
        ("checkpoint, bfloat16", in_gb(n_bytes)),
        (f"quantize, {source}", took(r["seconds"])),
        ("only reading the checkpoint, the same way", took(r["read_seconds"])),
        ("quantizing / only reading", f"{r['seconds'] / r['read_seconds']:.2f}"),
        ("peak anonymous memory", in_gb(r["peak_anonymous_bytes"])),
        ("blob", in_gb(r["blob_bytes"])),
        ("bits per weight: layers, whole file", f"{bits['layers']:.3f}, {bits['file']:.3f}"),
    ])


def _run(r: Results) -> list[str]:
    cold = r["first_token_from_disk_seconds"]
    bench = r["bench"]
    return [
        *_table(("", ""), [
            ("`Blob.open`", f"{1000 * r['open_seconds']:.1f} ms"),
            ("`edgemistral.load`", f"{1000 * r['load_seconds']:.1f} ms"),
            ("first token of `edgemistral run`, from process start, blob in memory", f"{r['first_token_seconds']:.2f} s"),
            ("the same, blob on the disk", "not known on this system" if cold is None else f"{cold:.2f} s"),
            ("peak anonymous memory of `edgemistral bench`", in_gb(r["peak_anonymous_bytes"])),
        ]),
        "",
        f"{bench['threads']} threads, {bench['kv_bits']}-bit KV:",
        "",
        *_table(("", "tokens", "depth", "tokens/s", "lowest", "highest", "rate", "limit", "share of it"), (
            (
                row["task"], str(row["tokens"]), str(row["depth"]), f"{row['tokens_per_second']:.2f}", f"{row['lowest']:.2f}",
                f"{row['highest']:.2f}", _rate(row, "rate"), _rate(row, "ceiling"), f"{row['share']:.0%}",
            )
            for row in bench["rows"]
        )),
    ]


def _rate(row: Results, name: str) -> str:
    return f"{row[name] / 1e9:.1f} {'GB/s' if row['task'] == 'decode' else 'GMAC/s'}"


def _peers(r: Results) -> list[str]:
    instructions = "AVX2 only" if r["avx2_only"] else "the best instructions of each"
    return [
        f"{r['n_layers']} layers, {r['threads']} threads, {instructions}, prompts of {r['prompt']} tokens; the ratio is taken "
        f"sample by sample. llama.cpp runs {r['type']}: llama-cpp-python {r['llama_cpp']}",
        "",
        *_table(("medians, tokens/s", "ours", "llama.cpp", "ratio", "lowest", "highest", "ours, of the limit", "samples"), (
            (
                task, f"{s['ours']:.2f}", f"{s['theirs']:.2f}", f"{s['ratio']:.2f}", f"{s['lowest']:.2f}",
                f"{s['highest']:.2f}", f"{s['share']:.0%}", str(s["samples"]),
            )
            for task, s in r["summary"].items()
        )),
        "",
        "Undisturbed are the samples around which the bandwidth of memory was at least 0.9 of the highest in the run.",
    ]


def _speed(r: Results) -> list[str]:
    return [
        f"{r['n_layers']} layers of 7B shapes.",
        "",
        f"![speed over size, depth and threads]({r['folder']}/speed.png)",
        "",
        *_table(("", "bits", "threads", "tokens", "depth", "tokens/s", "rate", "share of the limit"), (
            (row["task"], str(row["bits"]), str(row["threads"]), str(row["tokens"]), f"{row['depth']:,}",
             f"{row['tokens_per_second']:.1f}", _rate(row, "rate"), f"{row['share']:.0%}")
            for row in r["rows"]
        )),
    ]


def _batches(r: Results) -> list[str]:
    return _table(("tokens at once", "ms", "times one token", "lowest", "highest"), (
        (str(row["tokens"]), f"{1000 * row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['min']:.2f}", f"{row['max']:.2f}")
        for row in r["rows"]
    ))


def _parallel(r: Results) -> list[str]:
    reader, fork = r["reader"], r["fork"]
    return [
        f"{r['n_layers']} layers of 7B shapes, {r['threads']} threads; a step computes one token of each sequence.",
        "",
        *_table(("sequences", "ours, tokens/s in all", "llama.cpp", "ratio", "our step, times one sequence's"), (
            (str(row["sequences"]), f"{row['ours']:.1f}", f"{row['theirs']:.1f}", f"{row['ratio']:.2f}", f"{row['cost']:.2f}")
            for row in r["rows"]
        )),
        "",
        *_through_server(r.get("through_server")),
        f"Through {reader.get('n_layers', r['n_layers'])} layers, while another client's prompt of {reader['prompt']:,} tokens "
        f"is read, a generating client keeps {reader['keeps']:.0%} of its tokens/s. "
        f"The prompt takes {reader['prompt_slower']:.2f} times its time alone. "
        f"A fork of a 7B conversation of {fork['positions']:,} tokens takes {1000 * fork['seconds']:.1f} ms at most.",
    ]


def _through_server(r: Results | None) -> list[str]:
    if r is None:
        return []
    return [f"{r['clients']} clients that stream answers from one server receive {r['several']:.1f} tokens/s in all, one alone "
            f"{r['one']:.1f}: {r['of_possible']:.2f} of what the costs of the steps above allow.", ""]


def _long_context(r: Results) -> list[str]:
    def speeds(task: str, limit: str) -> list[str]:
        return _table((task, "tokens", "tokens/s", f"of the {limit}"), (
            (f"from depth {s['depth']:,}", f"{s['tokens']:,}", f"{s['tokens_per_second']:.1f}", f"{share:.0%}")
            for s, share in zip(r[task], shares[task], strict=True)
        ))

    shares = {"prefill": _of_the_highest_peak(r), "decode": [s["share"] for s in r["decode"]]}
    return [
        "The int8 peak is measured beside every piece of the prompt, for some 20 ms, in which others may use the machine. "
        "Shares are of the highest peak of the run.",
        "",
        *speeds("prefill", "highest int8 peak"), "", *speeds("decode", "bandwidth"), "",
        *_table(("", ""), [
            (f"prefill of {r['tokens']:,} tokens", f"{r['prefill_seconds']:.1f} s"),
            ("KV file, 8 bits", in_gb(r["kv_file_bytes"])),
            ("peak anonymous memory", in_gb(r["peak_anonymous_bytes"])),
            (f"mean KL from float32 at {len(r['kl'])} positions", f"{r['mean_kl']:.2e}"),
            (f"largest, at position {r['positions'][r['kl'].index(max(r['kl']))]:,}", f"{max(r['kl']):.2e}"),
            ("top-1 agreement there", f"{r['top1_agreement']:.0%}"),
            ("for comparison: KL at the last, had attention seen half of the prompt", f"{r['kl_of_half_the_context']:.2e}"),
            ("a prompt one token too long", f"{r['overflow']}; the conversation goes on with the same bits"),
        ]),
    ]


def _of_the_highest_peak(r: Results) -> list[float]:
    """Shares of the pieces of a prompt: products a second over the highest peak that was measured beside any of them."""
    config = ModelConfig(**r["config"])
    # Results without `products` are from when all tokens went through the whole last layer.
    work = [s.get("products") or products(config, s["tokens"], s["depth"], whole=True) for s in r["prefill"]]
    rates = [n * s["tokens_per_second"] / s["tokens"] for n, s in zip(work, r["prefill"], strict=True)]
    highest = max(rate / s["share"] for rate, s in zip(rates, r["prefill"], strict=True))
    return [rate / highest for rate in rates]


def _quality(r: Results) -> list[str]:
    head = ("", "layers", "file", *(f"{text}: {what}" for text in r["tokens"] for what in ("perplexity", "KL", "top-1")))
    tokens = ", ".join(f"{n:,} of {text}" for text, n in r["tokens"].items())
    return [
        f"Bits per weight of the layers and of the whole file; {tokens}.",
        "",
        *_table(head, (
            (
                row["name"], *(f"{row['bits'][part]:.2f}" if row["bits"] else "" for part in ("layers", "file")),
                *(cell for text in r["tokens"] for cell in (
                    f"{row[text]['perplexity']:.3f}", f"{row[text]['mean_kl']:.1e}", f"{row[text]['top1_agreement']:.1%}",
                )),
            )
            for row in r["rows"]
        )),
        "",
        f"![mean KL over bits per weight]({r['folder']}/quality.png)",
    ]


def _real_model(r: Results) -> list[str]:
    lines = ["Bits per weight of the layers. KL in nats from the float32 model, on texts that no calibration saw."]
    for name, model in r["models"].items():
        tokens = ", ".join(f"{n:,} of {text}" for text, n in model["tokens"].items())
        lines += ["", f"{name}: {tokens}.", ""]
        lines += _table(("", "layers", *(f"{text}: KL" for text in model["tokens"]), "prose: top-1", "perplexity"), (
            (row["name"], f"{row['bits']['layers']:.2f}", *(f"{row[text]['mean_kl']:.5f}" for text in model["tokens"]),
             f"{row['prose']['top1_agreement']:.1%}", f"{row['prose']['perplexity']:.2f}")
            for row in model["rows"]
        ))
        if model["missing"]:
            lines += ["", f"Not measured yet: {'; '.join(model['missing'])}."]
    return [*lines, "", f"![mean KL over bits per weight]({r['folder']}/real_model.png)"]


def _calibration_cost(r: Results) -> list[str]:
    return [
        "True 7B shapes, random weights, 1 and 2 layers (full: 1). The time of 32 layers is extrapolated from these.",
        "",
        *_table(("`--calibrate`", "a layer", "32 layers", "peak anonymous memory"), (
            (method, f"{m['seconds_of_a_layer']:.1f} s", f"{m['seconds_of_32_layers_extrapolated'] / 60:.1f} min",
             in_gb(max((run["peak_anonymous_bytes"] or 0 for run in m["runs"]), default=None)))
            for method, m in r["methods"].items()
        )),
    ]


def _full_calibration(r: Results) -> list[str]:
    killed, resumed = r["killed"], r["resumed"]
    peak = max((run["peak_anonymous_bytes"] or 0 for run in (killed, resumed)), default=None)
    return _table(("random weights, `--calibrate full`", ""), [
        (f"killed (SIGKILL) in layer {r['layers_before_the_kill'] + 1} of {r['layers']}, after",
         f"{killed['seconds'] / 60:.1f} min"),
        ("resumed: that layer finished after", f"{resumed['layers_at'][0] / 60:.1f} min"),
        ("resumed: the blob finished after", f"{resumed['seconds'] / 60:.1f} min"),
        ("both runs together", f"{r['seconds'] / 60:.1f} min"),
        ("a layer, median", f"{median(b - a for a, b in pairwise(resumed['layers_at'])):.0f} s"),
        ("tensors that were finished at the kill, and have the same bytes in the blob", str(r["tensors_kept"])),
        ("peak anonymous memory", in_gb(peak)),
    ])


def _kv_accuracy(r: Results) -> list[str]:
    return [
        f"Heads of {r['head_dim']}, {r['tokens']:,} tokens of prose. Both programs with float32 weights: each cache against the"
        " same program's 16 bits. With 8-bit weights, whose activations are rounded too: against the float32 model.",
        "",
        *_table(("keys and values", "bits", "perplexity", "change", "mean KL", "top-1"), (
            (f"{row['program']}, {row['kv']}", f"{row['bits']:.2f}", f"{row['perplexity']:.3f}", f"{row['change']:+.2%}",
             f"{row['mean_kl']:.1e}", f"{row['top1_agreement']:.1%}")
            for row in r["rows"]
        )),
        "",
        *(f"{each['same']} of {each['questions']} greedy answers with {each['kv_bits']} bits are those with 16, "
          f"{each['same_beginning']} in their first 16 tokens.  " for each in r["answers"]),
    ]


def _quality_random(r: Results) -> list[str]:
    return [line for name, methods in r.items() if name != "folder" for line in (
        *_table((name, "mean KL", "of Q4_0's", "top-1"), (
            (method, f"{m['mean_kl']:.2e}", f"{m['mean_kl'] / methods['Q4_0']['mean_kl']:.2f}", f"{m['top1_agreement']:.1%}")
            for method, m in methods.items()
        )), "",
    )][:-1]


def _quantization_error(r: Results) -> list[str]:
    errors = r["relative_squared_error"]
    kinds = list(next(iter(errors.values())))
    rates = ", ".join(f"{bits}: {rate:.0f}" for bits, rate in r["million_weights_per_second"].items())
    return [
        *_table(("relative squared error", *kinds), (
            (method, *(f"{of[kind]:.3g}" for kind in kinds)) for method, of in errors.items()
        )),
        "",
        f"Millions of weights a second that one thread quantizes: {rates}.",
    ]


def _server_overhead(r: Results) -> list[str]:
    health, loop = r["health_seconds"], r.get("loop_seconds_of_a_token")

    def ms(spread: Results) -> str:
        return (f"{1000 * spread['median']:+.2f} ms ({1000 * spread['lower_quartile']:+.2f} to "
                f"{1000 * spread['upper_quartile']:+.2f})")

    def percent(spread: Results) -> str:
        return f"{spread['median'] - 1:+.2%} ({spread['lower_quartile'] - 1:+.2%} to {spread['upper_quartile'] - 1:+.2%})"

    def row(title: str, what: str, spread: Callable[[Results], str], ratio: str) -> Sequence[str]:
        return (title, *(f"{1000 * r[name][what]:.2f} ms" for name in ("api", "control", "server")),
                *(spread(r[f"{name}_added"][ratio]) for name in ("control", "server")))

    return [
        *_table(("medians", "Python API", "control", "server", "control, pairs", "server, pairs"), [
            row("first text", "first_text_seconds", ms, "first_text_seconds"),
            row("of it, not the engine's: the road", "road_seconds", ms, "road_seconds"),
            row("a piece of text", "token_seconds", percent, "decode_ratio"),
            *([("the same, fastest tenth", "", "", "", *(
                f"{r[f'{name}_added']['undisturbed_decode_ratio'] - 1:+.2%}" for name in ("control", "server")
            ))] if "undisturbed_decode_ratio" in r["server_added"] else []),
        ]),
        "",
        f"{r['rounds']} rounds; pairs: medians and quartiles of the difference to the Python API, round by round. The control "
        "is the Python API in another process: what it seems to cost is noise.",
        "",
        *([f"The event loop takes {1000 * loop:.2f} ms of processor time for a token, the request's head included: "
           f"{loop / r['api']['token_seconds']:.2%} of the token's time, the most that decoding can lose to it.", ""]
          if loop else []),
        f"`/health`, asked {health['asked']} times while a long prompt is read: median {1000 * health['median']:.1f} ms, "
        f"longest {1000 * health['max']:.1f} ms.",
    ]


def _server_load(r: Results) -> list[str]:
    growth = "not known on this system" if r["growth"] is None else f"{r['growth']:+.2%}"
    return [
        f"{r['clients']} clients at once, {r['requests']} requests in {r['seconds']:.0f} s. Wrong, lost or mixed answers: "
        f"{len(r['wrong'])}.",
        "",
        *_table(("clients that", "requests", "median", "longest"), (
            (name.replace("_", " "), str(row["requests"]), f"{row['median_seconds']:.2f} s", f"{row['max_seconds']:.2f} s")
            for name, row in r["behaviours"].items()
        )),
        "",
        f"Memory after {r['warm_up']} requests: {in_gb(r['resident_bytes_warm'])}; growth from there to the end: {growth}. "
        f"Stopped within {r['stop_seconds']:.1f} s.",
    ]


SECTIONS: list[tuple[str, str, str, Callable[[Results], Iterable[str]]]] = [
    ("Start", "startup", "python bench/startup.py", _startup),
    ("7B: from load to the first token", "first_token", "python bench/first_token.py WORK/7b-q4.safetensors", _first_token),
    ("7B: quantizing to 4 bits", "seven_b_quantize", "python bench/seven_b.py WORK", _quantize),
    ("7B: quantizing to 8 bits", "seven_b_quantize_q8", "python bench/seven_b.py WORK --only quantize --bits 8", _quantize),
    ("7B: running", "seven_b_run", "python bench/seven_b.py WORK", _run),
    ("7B beside llama.cpp, 4 bits", "peers_q4", "python bench/peers.py WORK", _peers),
    ("7B beside llama.cpp, 8 bits", "peers_q8", "python bench/peers.py WORK --bits 8", _peers),
    ("7B beside llama.cpp, 4 bits, both with AVX2 only", "peers_q4_avx2",
     "python bench/peers.py WORK --avx2 PYTHON", _peers),
    ("Speed by size, depth, threads and bits", "speed", "python bench/speed.py WORK", _speed),
    ("7B, short batches, 4 bits", "batches_q4", "python bench/batches.py WORK", _batches),
    ("7B, short batches, 8 bits", "batches_q8", "python bench/batches.py WORK --bits 8", _batches),
    ("Several sequences at once", "parallel", "python bench/parallel.py WORK", _parallel),
    ("30,000 tokens through two layers of a 7B, 4-bit weights", "long_context-4bit",
     "python bench/long_context.py WORK --bits 4", _long_context),
    ("30,000 tokens through two layers of a 7B, 8-bit weights", "long_context-8bit",
     "python bench/long_context.py WORK --bits 8", _long_context),
    *report_sessions.SECTIONS,
    ("What HTTP costs, with the 7B", "server_overhead", "python bench/server_overhead.py WORK", _server_overhead),
    ("What HTTP costs, with the demo model", "server_overhead_demo", "python bench/server_overhead.py WORK --model demo",
     _server_overhead),
    ("Server under load", "server_load", "python bench/server_load.py", _server_load),
    ("Quality: a trained model, beside llama.cpp's types", "quality", "python bench/quality.py", _quality),
    ("Quality: a real pretrained model, beside llama.cpp's types", "real_model",
     "python bench/real_model.py WORK", _real_model),
    ("What calibration costs on 7B shapes", "calibration_cost", "python bench/calibration_cost.py WORK", _calibration_cost),
    ("All of a 7B with full calibration, killed and resumed", "full_calibration",
     "python bench/full_calibration.py WORK", _full_calibration),
    *(
        (f"Quality: few bits of keys and values of {model}, beside llama.cpp", f"kv_accuracy_{model}",
         f"python bench/kv_accuracy.py WORK --model {model}", _kv_accuracy)
        for model in ("demo", "SmolLM2-135M")
    ),
    ("Quality: random models, beside Q4_0", "quality_random", "python bench/quality_random.py", _quality_random),
    ("Error of the quantizers", "quantization_error", "python bench/quantization_error.py", _quantization_error),
    *report_campaigns.SECTIONS,
]
