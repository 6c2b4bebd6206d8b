"""Run harnesses for a while, say what came of it, keep what failed, and add to the record."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import harness as bench
from tests.fuzz.all import HARNESSES
from tests.fuzz.harness import BATCH, FAULTS, Harness, Tally

FOUND = Path(__file__).parent / "found"
RECORD = bench.RESULTS / "fuzz.json"
MOST_KEPT = 5           # files of one harness in one run
PLANT_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all harnesses together")
    parser.add_argument("--inputs", type=int, help="of each harness, in place of a time")
    parser.add_argument("--harness", action="append", choices=sorted(HARNESSES))
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--plant", action="store_true",
        help="take a check away, and see that each harness finds it in a minute")
    parser.add_argument("--record", action="store_true", help=f"add to {RECORD.name}")
    parser.add_argument("--found", action="store_true", help="run what is kept in found/")
    parser.add_argument("--repeat", type=Path, help="one kept input, in this process")
    arguments = parser.parse_args()
    if arguments.found:
        return _found()
    if arguments.repeat:
        return _repeat(arguments.repeat)
    names = arguments.harness or list(HARNESSES)
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    failed = False
    for name in names:
        harness = HARNESSES[name]()
        with prepared(harness) as why:
            if why:
                print(f"{name:12} skipped: {why}")
                continue
            seconds = PLANT_SECONDS if arguments.plant else 60 * arguments.minutes / len(names)
            tally = _campaign(harness, seed, seconds, arguments.inputs, arguments.plant)
            failed |= bool(tally.faults) != arguments.plant
            show(harness, tally, arguments.plant)
            for fault in [] if arguments.plant else tally.faults[:MOST_KEPT]:
                given = harness.nth(fault["seed"], fault["number"])
                kept = keep(harness, fault["outcome"], given)
                print(f"    {fault['outcome']}: {kept}\n        {fault['details'].strip()[-1200:]}")
        if arguments.record:
            record(harness, tally, arguments.plant)
    return int(failed)


@contextlib.contextmanager
def prepared(harness: Harness) -> Any:
    """Why it cannot run here, or ""."""
    try:
        harness.prepare()
    except ModuleNotFoundError as error:
        yield f"{error.name} is not installed"
        return
    except NotImplementedError as error:
        yield str(error)
        return
    try:
        yield ""
    finally:
        getattr(harness, "close", lambda: None)()


def _campaign(harness: Harness, seed: int, seconds: float, inputs: int | None, plant: bool) -> Tally:
    tally, begun = Tally(), time.monotonic()
    while (tally.inputs < inputs) if inputs else (time.monotonic() - begun < seconds):
        count = min(BATCH, inputs - tally.inputs) if inputs else BATCH
        for number, outcome, details in harness.run_batch(seed, tally.inputs, count, plant):
            tally.inputs += 1
            tally.outcomes[outcome] += 1
            if outcome in FAULTS:
                tally.faults.append({"number": number, "outcome": outcome, "details": details, "seed": seed})
                if plant:
                    tally.seconds = time.monotonic() - begun
                    return tally
            if not inputs and time.monotonic() - begun > seconds:
                break
    tally.seconds = time.monotonic() - begun
    return tally


def show(harness: Harness, tally: Tally, plant: bool) -> None:
    rate = tally.inputs / max(tally.seconds, 1e-9)
    outcomes = ", ".join(f"{name} {count}" for name, count in tally.outcomes.most_common())
    if plant:
        found = f"found after {tally.inputs} inputs, {tally.seconds:.1f} s" if tally.faults else "NOT FOUND"
        outcomes = f"{harness.planted}: {found}"
    print(f"{harness.name:12} {tally.inputs:8} inputs  {rate:6.0f}/s  {outcomes}", flush=True)


def keep(harness: Harness, outcome: str, given: Any) -> Path:
    """The input as a file, which runs again in every test from then on."""
    text = json.dumps({"harness": harness.name, "found": outcome, "input": given})      # one line: deep ones are long
    path = FOUND / f"{harness.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    FOUND.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="ascii")
    return path


def _found() -> int:
    """Every input that was a fault once."""
    kept = [(path, json.loads(path.read_text("ascii"))) for path in sorted(FOUND.glob("*.json"))]
    failed = False
    for name in sorted({one["harness"] for _, one in kept}):
        harness = HARNESSES[name]()
        with prepared(harness) as why:
            for path, one in kept:
                if one["harness"] == name and not why:
                    outcome, details = harness.run_kept(one["input"])
                    print(f"{path.name}: {outcome} {details}")
                    failed |= outcome in FAULTS
    return int(failed)


def _repeat(path: Path) -> int:
    kept = json.loads(path.read_text("ascii"))
    harness = HARNESSES[kept["harness"]]()
    harness.prepare()
    harness.start()
    print(harness.outcome(kept["input"]))
    return 0


def record(harness: Harness, tally: Tally, plant: bool) -> None:
    """Add to the counts of this tree on this machine."""
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"runs": []}
    key = {"commit": bench.commit(), "machine": bench.machine()["cpu"]}
    run = next((one for one in record["runs"] if all(one[k] == v for k, v in key.items())), None)
    if run is None:
        record["runs"].append(run := {**key, "harnesses": {}, "planted": {}})
    if plant:
        run["planted"][harness.name] = {
            "fault": harness.planted, "found": bool(tally.faults), "inputs": tally.inputs, "seconds": round(tally.seconds, 1),
        }
    else:
        old = run["harnesses"].get(harness.name, {"inputs": 0, "outcomes": {}, "faults": 0, "seconds": 0})
        run["harnesses"][harness.name] = {
            "inputs": old["inputs"] + tally.inputs,
            "outcomes": dict(sorted((Counter(old["outcomes"]) + tally.outcomes).items())),
            "faults": old["faults"] + len(tally.faults),
            "seconds": round(old["seconds"] + tally.seconds, 1),
        }
    record |= {"commit": key["commit"], "command": "python bench/fuzz.py"}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
