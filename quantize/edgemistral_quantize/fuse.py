"""Joins a source's tensors to the rows of a blob's: q, k and v one after another, gate and up in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgemistral.config import ModelConfig
from edgemistral.files import layout
from edgemistral.files.bf16 import widen
from edgemistral_quantize.sources.tensor import Strip, Tensor

MIN_ROWS = 2 * layout.PANEL   # of a strip


def min_strip_bytes(tensors: Mapping[str, Tensor], config: ModelConfig) -> int:
    """Bytes of the largest indivisible strip as float32: a head of wqkv, or 32 rows of another matrix."""
    c = config
    held = max(tensor.held_bytes for tensor in tensors.values())
    return held + 4 * max(c.head_dim * c.dim, MIN_ROWS * max(2 * c.dim, c.q_dim, c.hidden_dim))


def strips(tensors: Mapping[str, Tensor], config: ModelConfig, name: str, strip_bytes: int) -> Iterator[Strip]:
    """The rows of blob tensor `name`, from the source's tensors by our names (layers.0.wq, ...).

    Strips are at most `strip_bytes` large when widened to float32, unless `min_strip_bytes` is more. All but the last
    have a multiple of 32 rows; a norm is one row.
    """
    layer, _, part = name.rpartition(".")
    at = layer + "." if layer else ""
    if part == "wqkv":
        for source in ("wq", "wk", "wv"):
            yield from _in_steps(tensors[at + source], strip_bytes, config.head_dim)
    elif part == "w13":
        gate, up = (_in_steps(tensors[at + source], strip_bytes // 2, MIN_ROWS) for source in ("w1", "w3"))
        for gate_strip, up_strip in zip(gate, up, strict=True):
            if gate_strip.dtype != up_strip.dtype:
                gate_strip, up_strip = widen(gate_strip), widen(up_strip)
            yield layout.interleave_gate_up(gate_strip, up_strip)
    else:
        yield from _in_steps(tensors[name], strip_bytes, MIN_ROWS)


def fused_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all strips of all tensors."""
    total = 0
    for name, tensor in tensors.items():
        dtypes = [tensor.dtype]
        if name.endswith((".w1", ".w3")):
            dtypes.append(tensors[name[:-1] + ("3" if name.endswith("1") else "1")].dtype)
        item = dtypes[0].itemsize if len(set(dtypes)) == 1 else 4
        size = 1
        for length in tensor.shape:
            size *= length
        total += size * item
    return total


def _in_steps(tensor: Tensor, strip_bytes: int, step: int) -> Iterator[Strip]:
    """All rows in order, a multiple of `step` at a time."""
    rows, cols = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    at_once = max(step, strip_bytes // (4 * cols) // step * step)
    for begin in range(0, rows, at_once):
        yield tensor.read(begin, min(begin + at_once, rows))
