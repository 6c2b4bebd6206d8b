"""Coverage-guided inputs: atheris chooses the bytes from which a harness makes its input.

    pip install atheris
    python -m tests.fuzz.guided --minutes 10 [--harness NAME] [--record]

The harness draws its random numbers from atheris's bytes, so what it makes is as well formed as ever. Bytes that reach new
lines of the package are kept and changed further. Each harness runs in a process of its own, which ends at its first fault: the
input is kept in found/. Only borders in this process take part: the server and the page would be other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from typing import Any

GUIDED = ("blob", "checkpoint", "adapter", "gguf", "session", "store", "tokenizer", "template", "grammar", "sample")
# Kernels are compiled from their bytecode, which must stay as it is.
INCLUDED = ["edgemistral.files", "edgemistral.text", "edgemistral.generate", "edgemistral.sample_json", "edgemistral.config",
            "edgemistral.runtime.session", "edgemistral.runtime.kv_store", "edgemistral_quantize"]
EXCLUDED = ["edgemistral_quantize.scale_search", "edgemistral_quantize.column_search"]
LONGEST, SECONDS, MEGABYTES = 4096, 20, 6000      # of an input's bytes; of one input; of the process
TOLD = 200                                        # inputs between two lines of counts


class FromBytes(random.Random):
    """Random numbers from bytes; behind their end from a generator that they seed."""

    def __new__(cls, data: bytes) -> FromBytes:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(zlib.crc32(data))
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        n = (k + 7) // 8
        taken = self._data[self._at : self._at + n]
        self._at += n
        return int.from_bytes(taken, "little") & ((1 << k) - 1) if len(taken) == n else super().getrandbits(k)

    def random(self) -> float:
        return self.getrandbits(32) / (1 << 32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all harnesses together")
    parser.add_argument("--harness", action="append", choices=GUIDED)
    parser.add_argument("--record", action="store_true", help="add to fuzz.json")
    parser.add_argument("--only", choices=GUIDED, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return _fuzz(arguments.only, arguments.seconds)
    try:
        import atheris  # noqa: F401
    except ModuleNotFoundError:
        print("atheris is not installed")
        return 2
    from tests.fuzz.__main__ import MOST_KEPT, keep, prepared, record, show
    from tests.fuzz.all import HARNESSES
    from tests.fuzz.harness import Tally

    failed = False
    names = arguments.harness or GUIDED
    for name in names:
        harness, tally, seconds = HARNESSES[name](), Tally(), max(1, round(60 * arguments.minutes / len(names)))
        with prepared(harness), tempfile.TemporaryDirectory() as scratch:      # prepared: kernels are compiled and kept
            command = [sys.executable, "-m", "tests.fuzz.guided", "--only", name, "--seconds", str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GUIDED_SCRATCH": scratch})
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                told = json.loads(line)
                tally.outcomes, tally.inputs, tally.faults = Counter(told["outcomes"]), told["inputs"], told["faults"]
        if done.returncode and not tally.faults:       # atheris found it: a crash, a hang, or too much memory
            tally.faults.append({"outcome": "crash", "details": done.stderr[-3000:], "given": None})
        tally.seconds = seconds
        show(harness, tally, False)
        for fault in tally.faults[:MOST_KEPT]:
            kept = keep(harness, fault["outcome"], fault["given"]) if fault["given"] is not None else ""
            print(f"    {fault['outcome']}: {kept}\n        {fault['details'].strip()[-1200:]}")
        failed |= bool(tally.faults)
        if arguments.record:
            record(harness, tally, False)
    return int(failed)


def _fuzz(name: str, seconds: int) -> int:
    """In a process of its own: prints the counts again and again; does not return."""
    import atheris

    with atheris.instrument_imports(include=INCLUDED, exclude=EXCLUDED):
        from tests.fuzz.all import HARNESSES
        from tests.fuzz.harness import FAULTS, attempt

        harness = HARNESSES[name]()
        harness.prepare()
    harness.start()
    outcomes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    out = os.dup(1)

    def tell() -> None:
        os.write(out, json.dumps({"inputs": sum(outcomes.values()), "outcomes": outcomes, "faults": faults}).encode() + b"\n")

    def one(data: bytes) -> None:
        given = harness.make(FromBytes(data))
        outcome, details = attempt(harness, given)
        outcomes[outcome] += 1
        if outcome in FAULTS:
            faults.append({"outcome": outcome, "details": details, "given": given})
        if outcome in FAULTS or sum(outcomes.values()) % TOLD == 0:
            tell()
        if outcome in FAULTS:
            raise AssertionError(details)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    atheris.Setup(["guided", f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={SECONDS}", "-print_final_stats=1",
                   f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={os.environ['GUIDED_SCRATCH']}/"], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
