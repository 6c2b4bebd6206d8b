"""How much memory a model will take, exactly and before any of it is taken: known from the blob's header alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemistral.errors import BadRequest, OutOfMemoryBudget
from edgemistral.files.blob import Blob
from edgemistral.runtime.threads import measured_threads, performance_cores

MAX_THREADS = 1024
Threads = int | Literal["auto"] | None


@dataclass(frozen=True)
class Plan:
    """What running a model takes. Sizes in bytes."""

    context: int         # positions
    kv_bits: int
    threads: int
    weights_bytes: int   # the blob, mapped: shared between processes, and the system may drop and read it again
    kv_bytes: int        # the KV file when the context is full: it grows as the context fills
    work_bytes: int      # activations and logits: ordinary memory

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.work_bytes

    def check(self, max_ram: int | None) -> None:
        """Raises OutOfMemoryBudget if the total is larger than `max_ram` bytes; None is no limit."""
        if max_ram is not None and self.total_bytes > max_ram:
            raise OutOfMemoryBudget(self.total_bytes, max_ram)


def plan(blob: Blob, context: int | None = None, kv_bits: int = 8, threads: Threads = None) -> Plan:
    """The plan for a blob.

    context: positions, None for the model's longest. threads: None for the performance cores that this process may use,
    "auto" for the best number measured with this model.
    Raises BadRequest, whose `field` names the argument, for a value that the model cannot run with.
    """
    from edgemistral.runtime.kv_cache import KV_BITS, kv_file_bytes  # imports numba
    from edgemistral.runtime.transformer import workspace_bytes

    longest = blob.config.context
    context = _whole_number("context", longest if context is None else context, longest)
    if threads is None:
        threads = performance_cores()
    elif threads == "auto":
        threads = measured_threads(blob)
    threads = _whole_number("threads", threads, MAX_THREADS)
    if kv_bits not in KV_BITS:
        raise BadRequest(f"kv_bits is {kv_bits!r}: it must be {' or '.join(map(str, KV_BITS))}", "kv_bits")
    return Plan(
        context=context,
        kv_bits=kv_bits,
        threads=threads,
        weights_bytes=blob.data.nbytes,
        kv_bytes=kv_file_bytes(blob.config, context, kv_bits),
        work_bytes=workspace_bytes(blob.config, context, threads),
    )


def _whole_number(field: str, value: object, high: int) -> int:
    if type(value) is not int or not 1 <= value <= high:
        raise BadRequest(f"{field} is {value!r}: it must be a whole number from 1 to {high}", field)
    return value
