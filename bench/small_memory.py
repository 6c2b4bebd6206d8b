"""The whole 7B with a conversation of 32,000 tokens in less memory than both need: peak memory, tokens/s, bytes read again.

    python bench/small_memory.py WORK [--gib 6 --gib 4] [--kv-bits 8] [--tokens 8]

Linux only: each run is a process in its own control group, which limits its memory, including file pages, without swap. The
script makes the group, as root or in a delegated group, or says why it cannot. The blob is the one that seven_b.py leaves in
WORK. The conversation is a session file whose segments all hold the keys and values of the first 256 tokens
(`bench/filled_session.py`): reading 32,000 tokens would take most of an hour, and their content does not change the cost.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from bench import harness, memory_cgroup
from bench.filled_session import write_filled
from edgemistral.files.blob import Blob
from edgemistral.files.records import KV_VERSION
from edgemistral.runtime.plan import plan

CONVERSATION = 32_000
LIMITS = (0, 6, 4)           # GiB; 0: no limit
TOKENS = 8                   # decoded, after a first one that pages everything in


# ---- the process that is measured ------------------------------------------------------------------------------------

def work(blob: str, session: str, kv_bits: str, tokens: str) -> None:
    """Open the session, decode, and print the figures."""
    import edgemistral

    started = time.perf_counter()
    with edgemistral.load(blob, kv_bits=int(kv_bits), lookup=False) as model, model.session(session) as opened:
        ready = time.perf_counter() - started
        no_end = {model.config.eos_id: -100.0}
        generation = model.generate([*opened.ids, 5], int(tokens) + 1, temperature=0, logit_bias=no_end, session=opened)
        times, read, start = [], [_bytes_read()], time.perf_counter()
        for _ in generation:
            times.append(time.perf_counter() - start)
            read.append(_bytes_read())
            start = time.perf_counter()
        result = {
            "open_seconds": ready, "first_seconds": times[0], "seconds": times[1:], "cached": generation.usage.cached_tokens,
            "read_bytes": np.diff(read)[1:].tolist(), "major_faults": _major_faults(),
            "peak_resident_bytes": _status("VmHWM"), "anonymous_bytes": _status("RssAnon"),
        }
    print(json.dumps(result), flush=True)


def _bytes_read() -> int:
    """Bytes read from the disk since the start."""
    return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[0])


def _major_faults() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


def _status(name: str) -> int:
    return 1024 * int(re.findall(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[0])


# ---- the comparison --------------------------------------------------------------------------------------------------

def measure(blob: Path, session: Path, kv_bits: int, tokens: int, gib: int) -> dict[str, Any]:
    """One run within `gib` GiB, with its files not in memory at the start."""
    if not harness.drop_from_cache([blob, session]):
        raise click.ClickException("this system cannot drop a file from its cache")
    if not gib:
        return {"gib": 0, **_run(None, blob, session, kv_bits, tokens)}
    with memory_cgroup.limited(gib << 30) as group:
        done = _run(group.folder, blob, session, kv_bits, tokens)
        return {"gib": gib, **done, "peak_group_bytes": group.peak, "killed": group.killed}


def _run(group: Path | None, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.small_memory", "--worker", str(group or ""), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    head = ("s a token", "tokens/s", "read a token", "resident", "anonymous", "first token")
    click.echo(f"{'GiB':>5}" + "".join(f"{name:>14}" for name in head))
    for row in rows:
        if "failed" in row:
            click.echo(f"{row['gib'] or 'all':>5}  ended with code {row['failed']}")
            continue
        took = median(row["seconds"])
        cells = (f"{took:.2f}", f"{1 / took:.2f}", harness.in_gb(int(median(row["read_bytes"]))),
                 harness.in_gb(row["peak_resident_bytes"]), harness.in_gb(row["anonymous_bytes"]),
                 f"{row['open_seconds'] + row['first_seconds']:.1f} s")
        click.echo(f"{row['gib'] or 'all':>5}" + "".join(f"{cell:>14}" for cell in cells))


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--gib", "limits", type=int, multiple=True, default=LIMITS, show_default=True, help="0: no limit.")
@click.option("--kv-bits", type=click.Choice(["4", "8"]), default="8", show_default=True)
@click.option("--tokens", default=TOKENS, show_default=True)
def main(work: Path, limits: tuple[int, ...], kv_bits: str, tokens: int) -> None:
    blob, session = work / "7b-q4.safetensors", work / f"32000-kv{kv_bits}-v{KV_VERSION}.session"
    if not blob.exists():
        raise click.ClickException(f"{blob} is missing: python bench/seven_b.py {work} --only quantize makes it")
    try:
        with memory_cgroup.limited(1 << 30):
            pass
    except memory_cgroup.NoCgroup as problem:
        raise click.ClickException(f"cannot limit memory: {problem}") from None
    with Blob.open(blob) as opened:
        planned = plan(opened, kv_bits=int(kv_bits))
        ids = np.random.default_rng(0).integers(3, opened.config.vocab_size, CONVERSATION).astype(np.int32)
    if not session.exists():
        harness.prepare(work, 2 * planned.kv_bytes)
        write_filled(session, blob, ids, int(kv_bits))
    rows = [measure(blob, session, int(kv_bits), tokens, gib) for gib in limits]
    print_table(rows)
    harness.save("small_memory" if kv_bits == "8" else f"small_memory-kv{kv_bits}",
                 f"python bench/small_memory.py WORK --kv-bits {kv_bits}",
                 {"tokens": CONVERSATION, "kv_bits": int(kv_bits), "threads": planned.threads,
                  "weights_bytes": planned.weights_bytes, "kv_bytes": planned.kv_bytes, "work_bytes": planned.work_bytes,
                  "rows": rows})


if __name__ == "__main__":
    if "--worker" in sys.argv:
        if sys.argv[2]:
            memory_cgroup.join(Path(sys.argv[2]))
        work(*sys.argv[3:])
    else:
        main()
