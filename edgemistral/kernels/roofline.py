"""The limits of this machine, measured with the same instructions as the kernels: bytes read and products per second."""

from __future__ import annotations

from edgemistral.kernels.activations import LONG
from edgemistral.kernels.jit import entry
from edgemistral.kernels.matmul import READING, STREAMS
from edgemistral.kernels.simd import (
    add_i32,
    broadcast4,
    dot4,
    dot4_7bit,
    load_bytes,
    prefetch_tile_early,
    store_f32,
    to_f32,
    zero_i32,
)
from edgemistral.kernels.sync import barrier, take
from edgemistral.kernels.unroll import registers, static, unroll, unrolled

PIECE = 1 << 16      # bytes that a thread reads before it takes the next share
WEIGHTS, TOKENS = 2, LONG      # independent sums, as many as the kernels have
PRODUCTS = WEIGHTS * TOKENS * 64     # of bytes, in one round


def _make_read(LINES, STREAMS, AHEAD):
    PREFETCHED = LINES if AHEAD else 0

    @entry
    @unrolled(LINES=LINES, PREFETCHED=PREFETCHED, STREAMS=STREAMS, AHEAD=AHEAD)
    def read(member, data, result):
        """Only loads of `data` (whole pieces of it), in streams and shares like the kernels' panels."""
        i = registers()
        apart = data.size // PIECE // STREAMS * PIECE
        for line in unroll(LINES):
            i[line] = zero_i32()
        while True:
            first, last = take(member, apart // PIECE, 1)
            if first >= last:
                break
            for at in range(first * PIECE, last * PIECE, 64 * LINES):
                for s in unroll(STREAMS):
                    if static(PREFETCHED > 0):
                        prefetch_tile_early(data, at + s * apart + AHEAD, 1, PREFETCHED, 0, 64)
                    for line in unroll(LINES):
                        v = load_bytes(data, at + s * apart + 64 * line)
                        i[line] = dot4(i[line], v, v)
        for line in unroll(LINES):
            store_f32(result, 16 * line, to_f32(i[line]))      # a result: without it the compiler would remove the loads
        barrier(member)
    return read


def _make_multiply(WEIGHTS, TOKENS):
    @entry
    @unrolled(WEIGHTS=WEIGHTS, TOKENS=TOKENS)
    def multiply(member, data, rounds, result):
        """`rounds` x WEIGHTS x TOKENS dot products of 64 bytes on every thread, all different and in registers."""
        i = registers()
        s = registers()
        for t in unroll(TOKENS):
            s[t] = broadcast4(data, 4 * t)
        for w in unroll(WEIGHTS):
            for t in unroll(TOKENS):
                i[w, t] = zero_i32()
        for n in range(rounds):
            for w in unroll(WEIGHTS):
                u = load_bytes(data, 64 * ((WEIGHTS * n + w) & 15))
                for t in unroll(TOKENS):
                    i[w, t] = dot4_7bit(i[w, t], u, s[t])
        total = zero_i32()
        for w in unroll(WEIGHTS):
            for t in unroll(TOKENS):
                total = add_i32(total, i[w, t])
        store_f32(result, 0, to_f32(total))
        barrier(member)
    return multiply


READS = _make_read(4, STREAMS, READING.ahead_of_one), _make_read(4, 1, READING.ahead_of_many)
"""The ways in which the kernels read. Which one is quicker depends on the processor: on Zen 4 the second, by half."""
multiply = _make_multiply(WEIGHTS, TOKENS)
