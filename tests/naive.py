"""One slow, obvious NumPy reference for every kernel. The kernels are compared with these.

The first half is the parts of the model as the paper has them, in float32; the second half is the arithmetic of the kernels:
int8 activations, packed weights, KV caches of 8 and 4 bits. The whole model in float32 is `edgemistral.measure.reference`.
T counts tokens, S cached positions, H query heads, K key/value heads, D the dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files import layout
from edgemistral.files.bf16 import to_bf16, widen
from edgemistral.files.blob import Blob
from edgemistral.measure.reference import BlobWeights, Reference

Array = NDArray[Any]
F32 = np.float32


# The model in float32 -----------------------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """(..., n) scaled to unit root mean square, then by `weight` (n,)."""
    mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + eps) * weight).astype(F32)


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate the pairs (i, i + D / 2) of x (T, heads, D) by position * theta ** (-2 i / D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(F32)


def silu(x: Array) -> Array:
    return (x / (1 + np.exp(-x.astype(np.float64)))).astype(F32)


def swiglu(gate: Array, up: Array) -> Array:
    return silu(gate) * up


def softmax(x: Array) -> Array:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def first_visible(position: int, sliding_window: int | None) -> int:
    """The first position that the query at `position` attends to; the last is itself."""
    return 0 if sliding_window is None else max(0, position - sliding_window + 1)


def attention(q: Array, k: Array, v: Array, sliding_window: int | None = None) -> Array:
    """Grouped-query attention of q (T, H, D), the last T of S positions, over k and v (S, K, D) -> (T, H, D)."""
    n_tokens, n_heads, head_dim = q.shape
    n_past, group = len(k) - n_tokens, n_heads // k.shape[1]
    out = np.empty_like(q)
    for t in range(n_tokens):
        low, high = first_visible(n_past + t, sliding_window), n_past + t + 1
        for h in range(n_heads):
            scores = k[low:high, h // group] @ q[t, h] / np.sqrt(head_dim)
            out[t, h] = softmax(scores) @ v[low:high, h // group]
    return out


class Unfused:
    """Tensors by their own names as a checkpoint in the order of a blob, which fuses some of them.

    float32: tok_embeddings, norm, output, and after "layers.N." attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3; the rows
    of wq and wk have rotary pairs as (i, i + D / 2).
    """

    def __init__(self, weights: Mapping[str, Array], config: ModelConfig) -> None:
        self.config, self._weights = config, weights

    def strips(self, name: str, strip_bytes: int) -> Iterator[Array]:
        at, _, part = name.rpartition(".")
        parts = [self._weights[f"{at}.{each}"] for each in {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}.get(part, ())]
        if part == "wqkv":
            yield from parts
        elif part == "w13":
            yield layout.interleave_gate_up(*parts)
        else:
            yield self._weights[name]


def forward(
    weights: Mapping[str, Array], config: ModelConfig, ids: Sequence[int] | Array, at: Sequence[int] | Array | None = None
) -> Array:
    """Logits (len(ids), vocab_size) of the float reference, or only the rows of the positions in `at`; weights of `Unfused`."""
    return _logits(Reference(Unfused(weights, config)), ids, at)


def forward_of_blob(blob: Blob, ids: Sequence[int] | Array) -> Array:
    """The same with the dequantized weights of an open blob."""
    return _logits(Reference(BlobWeights(blob)), ids, None)


def _logits(reference: Reference, ids: Sequence[int] | Array, at: Sequence[int] | Array | None) -> Array:
    states = reference.hidden_states([np.asarray(ids, np.int32)], at=None if at is None else [np.asarray(at)])
    return reference.logits(states[0])


def mean_kl(reference: Array, logits: Array) -> float:
    """Mean over the rows of KL(reference || logits), in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def top1_agreement(reference: Array, logits: Array) -> float:
    """Share of the rows where both have their highest logit at the same token."""
    return float((reference.argmax(axis=-1) == logits.argmax(axis=-1)).mean())


def log_softmax(x: Array) -> Array:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# Weights as llama.cpp's Q4_0 rounds them, to compare with -------------------------------------------------------------


def q4_0(w: Array) -> Array:
    """w (rows, cols) as Q4_0 keeps it: groups of 32, float16 scale = (value of largest magnitude) / -8, codes 0..15.

    Source: quantize_row_q4_0_ref of ggml. Columns that do not fill a group are padded with zeros, as this project does.
    """
    rows, cols = w.shape
    x = np.pad(w, ((0, 0), (0, -cols % 32))).reshape(rows, -1, 32).astype(F32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    scale = extreme / F32(-8)
    inverse = np.divide(F32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.minimum(np.trunc(x * inverse + F32(8.5)), 15) - 8
    return (codes * scale.astype(np.float16)).astype(F32).reshape(rows, -1)[:, :cols]


# The arithmetic of the kernels --------------------------------------------------------------------------------------


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c with one rounding (the product of two float32 is exact in float64)."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F32)


def quantize_int8(x: Array) -> tuple[Array, Array]:
    """x float32 (..., n) -> int8 codes (..., n) and float32 scales (...,), one for all n: absmax / 127, never zero."""
    highest = np.maximum(np.abs(x).max(axis=-1).astype(F32), F32(1e-30))
    codes = np.rint(x.astype(F32) * (F32(127) / highest)[..., None])
    return codes.astype(np.int8), highest / F32(127)


def hadamard(x: Array) -> Array:
    """x (..., D) times a Hadamard matrix (Sylvester's, of 1 and -1), in blocks of the largest power of two that divides D."""
    size, matrix = x.shape[-1] & -x.shape[-1], np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, size).astype(np.float64) @ matrix).reshape(x.shape)


def quantize_int4(x: Array, half: float) -> tuple[Array, Array]:
    """x float32 (..., n) -> codes float32 (..., n), -8 ... 7 and `half` more, and float32 scales (...,), one for all n.

    The best of seven trials: the largest magnitude becomes 7, 7.5, ... 10 (with `half` 0 the scale has the sign that makes
    it negative), the codes are clipped, and the scale is refitted by least squares. Sums are those of 16 lanes, added up in
    a tree, bit for bit what the kernel has.
    """
    def total(terms: list[tuple[Array, Array]]) -> Array:
        lanes = np.zeros_like(x[..., :16])
        for a, b in terms:
            lanes = fma(a, b, lanes)
        for width in (8, 4, 2, 1):
            lanes = lanes[..., :width] + lanes[..., width:]
        return lanes[..., 0]

    high, low = np.maximum(x.max(axis=-1), 0), np.maximum((-x).max(axis=-1), 0)
    top = np.maximum(np.maximum(high, low), F32(1e-30))
    if half == 0:
        top = np.where(high >= low, -top, top)
    best, scales, most = np.zeros_like(x), np.zeros_like(top), np.full_like(top, -1)
    for largest in np.arange(7, 10.5, 0.5, dtype=F32):
        factor = largest / top
        scaled = x * factor[..., None]
        codes = np.clip(np.rint(scaled - F32(half)), F32(-8), F32(7)) + F32(half)
        parts = [slice(i, i + 16) for i in range(0, x.shape[-1], 16)]
        product = total([(codes[..., i], scaled[..., i]) for i in parts])
        norm = np.maximum(total([(codes[..., i], codes[..., i]) for i in parts]), F32(1))
        explained = product / largest * (product / largest) / norm
        better = explained > most
        best, most = np.where(better[..., None], codes, best), np.where(better, explained, most)
        scales = np.where(better, product / norm / factor, scales)
    return best, scales


def f32_to_bf16(x: Array) -> Array:
    """float32 -> the nearest bfloat16 as float32, ties to even."""
    return widen(to_bf16(x.astype(F32)))


def quantize_activations(x: Array) -> tuple[Array, Array]:
    """x float32 (m, n) -> int8 codes (m, n padded to whole blocks of 128) and float32 scales (m, blocks)."""
    m, n = x.shape
    padded = np.pad(x, ((0, 0), (0, -n % layout.BLOCK)))
    codes, scales = quantize_int8(padded.reshape(m, -1, layout.BLOCK))
    return codes.reshape(m, -1), scales


def matmul(packed: Array, row_scales: Array, levels: Array | None, codes: Array, scales: Array) -> Array:
    """x W^T: packed (panels, blocks, block bytes) by quantized activations (m, cols) -> float32 (m, panels * 16).

    The sequence of the kernels, bit for bit: exact integer dots of 32 columns; a block's 4 times their group scales;
    the blocks times their activation scales; the row scale last. `levels` None means 8 bits.
    """
    stored, group_scales = layout.unpack(packed, 8 if levels is None else 4)
    if levels is None:
        values = stored.astype(np.int64) - layout.CODE_ZERO
    else:
        values = levels[:16].astype(np.int64)[stored] - layout.LEVEL_ZERO
    y = np.zeros((len(codes), len(values)), F32)
    for block in range(codes.shape[1] // layout.BLOCK):
        f = np.zeros_like(y)
        for group in range(layout.GROUPS * block, layout.GROUPS * (block + 1)):
            at = slice(layout.GROUP * group, layout.GROUP * (group + 1))
            dots = codes[:, at].astype(np.int64) @ values[:, at].T
            f = fma(dots.astype(F32), group_scales[:, group].astype(F32), f)
        y = fma(f, scales[:, block, None], y)
    return y * row_scales


def attention_8bit(
    q: Array, k: Array, k_scales: Array, v: Array, v_scales: Array, sliding_window: int | None = None, block: int = 64,
    own: Sequence[Array] | None = None,
) -> Array:
    """`attention` over an 8-bit KV cache: k, v int8 (S, K, D), scales float32 (S, K); q float32 (T, H, D) -> (T, H, D).

    Over a 4-bit one too, whose keys have a scale for each part of a head: k_scales (S, K, parts). own: the same four arrays
    in the format in which a token sees the block that it lies in.
    Queries are rounded to int8, one scale per token and head. Aligned blocks of 64 positions are merged in order with a
    running maximum. In a block, the probabilities times their V scales are rounded to codes 0..255, and the unit of the
    codes is chosen such that they keep the sum of what was rounded. (Summing the denominator from the codes instead
    would divide by V scales, which trained models make tiny exactly where most of the attention goes.)
    """
    n_tokens, n_heads, head_dim = q.shape
    n_past, group = len(k) - n_tokens, n_heads // k.shape[1]
    q_codes, q_scales = quantize_int8(q)

    def scaled(k: Array, k_scales: Array) -> Array:
        parts = k_scales.reshape(*k.shape[:2], -1).astype(np.float64)
        return k * np.repeat(parts, head_dim // parts.shape[-1], axis=-1)

    cache = scaled(k, k_scales), v, v_scales
    recent = cache if own is None else (scaled(own[0], own[1]), own[2], own[3])
    out = np.empty((n_tokens, n_heads, head_dim), F32)
    for t in range(n_tokens):
        low, high = first_visible(n_past + t, sliding_window), n_past + t + 1
        for h in range(n_heads):
            highest, total, acc = -np.inf, 0.0, np.zeros(head_dim)
            for begin in range(low // block * block, high, block):
                at = (slice(max(begin, low), min(begin + block, high)), h // group)
                keys, values, scales = recent if high <= begin + block else cache
                scores = keys[at] @ q_codes[t, h].astype(np.float64) * q_scales[t, h] / np.sqrt(head_dim)
                raised = max(highest, scores.max())
                shrink, p = np.exp(highest - raised), np.exp(scores - raised)
                weighted = p * scales[at]
                codes = np.rint(weighted * (255 / max(weighted.max(), 1e-30))).astype(np.int64)
                unit = weighted.sum() / max(codes.sum(), 1)
                acc = acc * shrink + unit * (codes @ values[at].astype(np.float64))
                total = total * shrink + p.sum()
                highest = raised
            out[t, h] = acc / total
    return out
