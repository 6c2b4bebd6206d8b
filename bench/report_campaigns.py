"""The sections of the reports about hostile inputs and crashes: counts of all runs in the records, tree by tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench import summary

Results = dict[str, Any]


def _fuzz(r: Results) -> Iterable[str]:
    yield "An input is answered, or refused with an error of ours. A fault is a crash, a hang, a traceback, or too much time or"
    yield "memory; those of a tree were mended in a later one. Each harness also runs with one check taken away. The latest"
    yield "tree comes first."
    for run in reversed(r["runs"]):
        found, planted = run["harnesses"], run["planted"]
        total, faults = (sum(one[name] for one in found.values()) for name in ("inputs", "faults"))
        yield f"\nTree {run['commit']}, {run['machine']}: {total:,} inputs, {faults} faults.\n"
        yield from summary.table(("border", "inputs", "faults", "check taken away", "found after, s"), [
            (name, f"{found[name]['inputs']:,}" if name in found else "", str(found[name]["faults"]) if name in found else "",
             planted.get(name, {}).get("fault", ""), _seconds(planted.get(name)))
            for name in sorted({*found, *planted})
        ])


def _seconds(planted: Results | None) -> str:
    if planted is None:
        return ""
    return f"{planted['seconds']:.1f}" if planted["found"] else "not found"


def _crash(r: Results) -> Iterable[str]:
    for run in reversed(r["runs"]):
        kinds, sums = run["kinds"], Counter[str]()
        for one in kinds.values():
            sums.update(one)
        yield f"\nTree {run['commit']}, {run['machine']}: {sums['kills']:,} kills, {sums['lost']} lost.\n"
        yield from summary.table(("kind", "kills", "lost"), [
            (name, f"{one['kills']:,}", str(one["lost"])) for name, one in kinds.items()])


def _soak(r: Results) -> Iterable[str]:
    yield "Growth: medians of the last tenth over those after the first quarter. Two hours are asked; this is what was run."
    yield ""
    names = ("anonymous_bytes", "threads", "files")
    yield from summary.table(("tree", "hours", "requests", "mixed answers", "tracebacks", "memory", "threads", "files"), [
        (run["commit"], f"{run['hours']:.2f}", f"{sum(run['requests'].values()):,}", str(run["mixed"]), str(run["tracebacks"]),
         *(f"{100 * run['grown'][name]:+.1f} %" for name in names)) for run in r["runs"]])


def _server_fuzz(r: Results) -> Iterable[str]:
    health = r["health"]
    yield f"{r['requests']:,} requests of {r['clients']} clients, each with one to three faults, in {r['seconds']:.0f} s."
    yield ""
    yield from summary.table(("", ""), [
        ("answers that must never be given: 5xx, tracebacks, no answer", str(len(r["wrong"]))),
        ("`/health` meanwhile: median, 99 %, longest of all", f"{1e3 * health['median_seconds']:.1f}, "
         f"{1e3 * health['p99_seconds']:.1f}, {1e3 * health['max_seconds']:.1f} ms of {health['asked']:,}"),
        ("statuses", ", ".join(f"{status}: {count:,}" for status, count in r["statuses"].items())),
        ("threads", f"{r['held_before']['threads']} to {r['held_after']['threads']}"),
    ])


SECTIONS = [
    ("Malformed requests", "server_fuzz", "python bench/server_fuzz.py", _server_fuzz),
    ("Hostile inputs", "fuzz", "python bench/fuzz.py", _fuzz),
    ("Kills, power cuts and full disks", "crash", "python bench/crash.py", _crash),
    ("Hours of mixed load", "soak", "python bench/soak.py 0.1", _soak),
]
