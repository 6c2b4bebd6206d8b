"""Rotations of a head's dimensions: rotary embedding, and the Hadamard transform that evens them out for few bits."""

from __future__ import annotations

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.simd import add, fma, load_f32, mul, store_f32, sub, walsh_hadamard, zero_f32


@inlined
def rotate(x, at, head_dim, cos, sin, angle_at):
    """RoPE (Su et al. 2021) in place on the head at x[at]; pairs are (i, i + head_dim / 2)."""
    half = head_dim // 2
    for i in range(0, half, 16):
        a, b = load_f32(x, at + i), load_f32(x, at + half + i)
        c, s = load_f32(cos, angle_at + i), load_f32(sin, angle_at + i)
        store_f32(x, at + i, fma(a, c, sub(zero_f32(), mul(b, s))))
        store_f32(x, at + half + i, fma(a, s, mul(b, c)))


@inlined
def hadamard_size(head_dim):
    """Dimensions that one transform mixes: the largest power of two that divides head_dim, at least 32."""
    return head_dim & -head_dim


@inlined
def hadamard(x, at, head_dim):
    """The head at x[at] times a Hadamard matrix, in place. Applied twice, it gives `hadamard_size` times the input.

    Each output is a sum of all inputs with signs, so an outlier is spread over all dimensions. A product of two heads
    grows by `hadamard_size`, which is a power of two: dividing by it is exact.
    """
    for i in range(0, head_dim, 16):
        store_f32(x, at + i, walsh_hadamard(load_f32(x, at + i)))
    step = 16
    while step < hadamard_size(head_dim):
        for first in range(0, head_dim, 2 * step):
            for i in range(first, first + step, 16):
                a, b = load_f32(x, at + i), load_f32(x, at + i + step)
                store_f32(x, at + i, add(a, b))
                store_f32(x, at + i + step, sub(a, b))
        step *= 2
