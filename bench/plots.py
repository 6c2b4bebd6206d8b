"""Plots of results that several benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import RESULTS

PEERS = {"peers_q4": "4 bits, Q4_0", "peers_q8": "8 bits, Q8_0", "peers_q4_avx2": "4 bits, Q4_0,\nboth AVX2 only"}


def peers(path: Path = RESULTS / "peers.png") -> None:
    """Tokens a second of ours and llama.cpp's, in bars, the ratio above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summaries: dict[str, Any] = {
        label: json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["summary"]
        for name, label in PEERS.items() if (RESULTS / f"{name}.json").exists()
    }
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, task in zip(both, ("decode", "prefill"), strict=True):
        for offset, side, color, label in ((-0.2, "ours", "tab:blue", "edgemistral"), (0.2, "theirs", "tab:gray", "llama.cpp")):
            values = [summary[task][side] for summary in summaries.values()]
            bars = axes.bar([n + offset for n in range(len(values))], values, 0.4, color=color, label=label)
            ratios = [f"{s[task]['ratio']:.2f} x" if side == "ours" else "" for s in summaries.values()]
            axes.bar_label(bars, ratios, padding=2)
        axes.set(title={"decode": "decoding", "prefill": "reading a prompt of 512"}[task], ylabel="tokens a second, median")
        axes.set_xticks(range(len(summaries)), list(summaries))
        axes.margins(y=0.12)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
