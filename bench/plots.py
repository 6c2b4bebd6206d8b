"""Plots that combine the results of several benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

PEERS = {"peers_q4": "4 bits", "peers_q8": "8 bits", "peers_q4_avx2": "4 bits,\nAVX2 only"}
PROCESSORS = {"znver3": "Zen 3", "znver4": "Zen 4", "znver5": "Zen 5"}   # as LLVM and as people call them


def peers(path: Path = RESULTS / "peers.png") -> None:
    """Bars of tokens per second, ours and llama.cpp's, with the ratio above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summaries: dict[str, Any] = {
        f"{PROCESSORS.get(path.parent.name, path.parent.name)}\n{label}": json.loads(path.read_text("utf-8"))["summary"]
        for name, label in PEERS.items() for path in sorted(RESULTS.rglob(f"{name}.json"))
    }
    figure, both = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axes, task in zip(both, ("decode", "prefill"), strict=True):
        for offset, side, color, label in ((-0.2, "ours", "tab:blue", "edgemistral"), (0.2, "theirs", "tab:gray", "llama.cpp")):
            values = [summary[task][side] for summary in summaries.values()]
            bars = axes.bar([n + offset for n in range(len(values))], values, 0.4, color=color, label=label)
            ratios = [f"{s[task]['ratio']:.2f} x" if side == "ours" else "" for s in summaries.values()]
            axes.bar_label(bars, ratios, padding=2)
        axes.set(title={"decode": "decoding", "prefill": "reading a prompt of 512"}[task], ylabel="tokens a second, median")
        axes.set_xticks(range(len(summaries)), list(summaries), fontsize=8)
        axes.margins(y=0.12)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
