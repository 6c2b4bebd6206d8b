"""Computes from the blob's header how much memory a model will need, before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemistral.errors import BadRequest, OutOfMemoryBudget
from edgemistral.files.blob import Blob
from edgemistral.kernels.kv_layout import POSITIONS
from edgemistral.runtime.threads import measured_threads, performance_cores

MAX_THREADS = 1024
PROGRAM = 128 << 20     # bytes: Python, NumPy, numba with the kernels, the tokenizer. Measured: 74 to 131 MiB
Threads = int | Literal["auto"] | None


@dataclass(frozen=True)
class Plan:
    """The memory to run a model. Sizes in bytes."""

    context: int         # positions
    kv_bits: int
    threads: int
    weights_bytes: int   # the mapped blob: shared between processes; the system may drop pages and read them again
    kv_bytes: int        # one sequence that fills the context
    work_bytes: int      # activations, logits, 8-bit copies of the latest keys and values: ordinary memory
    program_bytes: int   # everything else in the process, estimated
    kv_budget: int       # limit for all kept sequences (conversations that continue without reading them again)

    @property
    def total_bytes(self) -> int:
        """The least that the model needs, with one full context."""
        return self.weights_bytes + self.kv_bytes + self.work_bytes + self.program_bytes

    def check(self, max_ram: int | None) -> None:
        """Raises OutOfMemoryBudget if the total with kept sequences is larger than `max_ram` bytes; None: no limit."""
        most = self.total_bytes + max(0, self.kv_budget - self.kv_bytes)
        if max_ram is not None and most > max_ram:
            raise OutOfMemoryBudget(most, max_ram)


def plan(
    blob: Blob,
    context: int | None = None,
    kv_bits: int = 8,
    threads: Threads = None,
    kv_budget: int | None = None,
    max_ram: int | None = None,
) -> Plan:
    """The plan for a blob.

    kv_budget: bytes for kept sequences. None means a quarter of the memory, at most half of the free disk, and with `max_ram`
    (bytes) at most what that leaves. One full context always has room.
    context: positions, None for the model's longest. threads: None for the performance cores that this process may use,
    "auto" for the best number measured with this model.
    Raises BadRequest, whose `field` names the argument, for a value that the model cannot run with.
    """
    from edgemistral.runtime.segments import KV_BITS, default_kv_budget, own_block_bytes, segment_bytes, segments_of
    from edgemistral.runtime.transformer import CHUNK, workspace_bytes  # imports numba

    longest = blob.config.context
    context = _whole_number("context", longest if context is None else context, longest)
    if threads is None:
        threads = performance_cores()
    elif threads == "auto":
        threads = measured_threads(blob)
    threads = _whole_number("threads", threads, MAX_THREADS)
    if kv_bits not in KV_BITS:
        raise BadRequest(f"kv_bits is {kv_bits!r}: it must be {' or '.join(map(str, KV_BITS))}", "kv_bits")
    own_blocks = (CHUNK // POSITIONS + 1) * own_block_bytes(blob.config, kv_bits)
    weights, work = blob.data.nbytes, workspace_bytes(blob.config, threads) + own_blocks
    one_context = segments_of(context) * segment_bytes(blob.config, kv_bits)
    if kv_budget is None:
        kv_budget = default_kv_budget()
        kv_budget = max(one_context, kv_budget if max_ram is None else min(kv_budget, max_ram - weights - work - PROGRAM))
    elif type(kv_budget) is not int or kv_budget < 1:
        raise BadRequest(f"kv_budget is {kv_budget!r}: it must be a number of bytes", "kv_budget")
    return Plan(
        context=context,
        kv_bits=kv_bits,
        threads=threads,
        weights_bytes=weights,
        kv_bytes=one_context,
        work_bytes=work,
        program_bytes=PROGRAM,
        kv_budget=kv_budget,
    )


def _whole_number(field: str, value: object, high: int) -> int:
    if type(value) is not int or not 1 <= value <= high:
        raise BadRequest(f"{field} is {value!r}: it must be a whole number from 1 to {high}", field)
    return value
