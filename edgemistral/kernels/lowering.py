"""What differs between instruction sets, and nothing else: three operations on 64-byte vectors.

    dot4(acc, u, s)         acc[lane] += sum of the lane's 4 products of unsigned bytes u and signed bytes s; exact
    dot4_7bit(acc, u, s)    the same, where u is known to be at most 127
    look_up(table, codes)   byte i -> table[i rounded down to 16 + codes[i]], codes within 0..15, the table repeated 4 times

All lowerings give the same bits: these operations are exact, and everything else in `simd` is one sequence that LLVM splits
into whatever width the machine has. To add an instruction set: write a class and name it in `_BEST_FIRST`.
`EDGEMISTRAL_SIMD` (one of the names) overrides the choice by the host's features.
"""

from __future__ import annotations

import os
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils
from numba.core import config as numba_config

config: Any = numba_config    # its names are made at run time
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its mangled name."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value | None, lanes: list[int]) -> ir.Value:
    mask = ir.Constant(vector(I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, mask)


def split(builder: ir.IRBuilder, value: ir.Value, parts: int) -> list[ir.Value]:
    n = value.type.count // parts
    return [shuffle(builder, value, None, list(range(n * i, n * i + n))) for i in range(parts)]


def join(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    while len(values) > 1:
        lanes = list(range(2 * values[0].type.count))
        values = [shuffle(builder, a, b, lanes) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class Plain:
    """LLVM IR that any CPU runs; the compiler finds what the machine has (pmaddwd, smlal, ...)."""

    features: tuple[str, ...] = ()

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        wide = vector(I32, 16)
        for byte in range(4):
            lanes = list(range(byte, 64, 4))
            a = builder.zext(shuffle(builder, u, None, lanes), wide)
            b = builder.sext(shuffle(builder, s, None, lanes), wide)
            acc = builder.add(acc, builder.mul(a, b))
        return acc

    def dot4_7bit(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return self.dot4(builder, acc, u, s)

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        values = [shuffle(builder, table, None, [level] * 64) for level in range(16)]
        for bit in range(4):                      # a tree of selects, one bit of the code a level
            is_set = builder.icmp_unsigned("!=", builder.and_(codes, ir.Constant(codes.type, [1 << bit] * 64)),
                                           ir.Constant(codes.type, [0] * 64))
            values = [builder.select(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]


class AVX2(Plain):
    """256-bit vectors; pmaddubsw for 7-bit operands, exact 16-bit products where it would saturate."""

    features: tuple[str, ...] = ("avx2", "fma", "f16c")

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        # Even and odd bytes as 16-bit numbers, each pair of products summed in 32 bits by pmaddwd: 255 * 127 * 2 fits.
        words, eight = vector(I16, 32), ir.Constant(vector(I16, 32), [8] * 32)
        u16, s16 = builder.bitcast(u, words), builder.bitcast(s, words)
        low = builder.and_(u16, ir.Constant(words, [255] * 32)), builder.ashr(builder.shl(s16, eight), eight)
        high = builder.lshr(u16, eight), builder.ashr(s16, eight)
        for a, b in (low, high):
            acc = builder.add(acc, self._pairs(builder, a, b))
        return acc

    def dot4_7bit(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        halves = [call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), a, b)
                  for a, b in zip(split(builder, u, 2), split(builder, s, 2), strict=True)]
        return builder.add(acc, self._pairs(builder, join(builder, halves), ir.Constant(vector(I16, 32), [1] * 32)))

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        half = split(builder, table, 2)[0]
        return join(builder, [call(builder, "llvm.x86.avx2.pshuf.b", half.type, half, c) for c in split(builder, codes, 2)])

    def _pairs(self, builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        return join(builder, [call(builder, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), x, y)
                              for x, y in zip(split(builder, a, 2), split(builder, b, 2), strict=True)])


class AVXVNNI(AVX2):
    """256-bit vectors with vpdpbusd (client CPUs since Alder Lake)."""

    features = ("avx2", "fma", "f16c", "avxvnni")

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        parts = zip(split(builder, acc, 2), split(builder, u, 2), split(builder, s, 2), strict=True)
        return join(builder, [_vpdpbusd(builder, 256, *part) for part in parts])

    dot4_7bit = dot4


class AVX512VNNI(Plain):
    """512-bit vectors with vpdpbusd."""

    features = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return _vpdpbusd(builder, 512, acc, u, s)

    dot4_7bit = dot4

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        return call(builder, "llvm.x86.avx512.pshuf.b.512", table.type, table, codes)


def _vpdpbusd(builder: ir.IRBuilder, bits: int, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    if llvmlite.binding.llvm_version_info < (21,):          # older LLVM takes the bytes as 32-bit lanes
        u, s = (builder.bitcast(value, acc.type) for value in (u, s))
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, acc, u, s)


_BEST_FIRST = {"avx512vnni": AVX512VNNI, "avxvnni": AVXVNNI, "avx2": AVX2, "plain": Plain}


def host_features() -> set[str]:
    """The CPU features that numba compiles for: the host's, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise."""
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if config.CPU_NAME not in (None, "host"):
        return set()
    return {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}


def choose() -> Plain:
    """The best lowering for this host, or the one that EDGEMISTRAL_SIMD names."""
    if name := os.environ.get("EDGEMISTRAL_SIMD"):
        if name not in _BEST_FIRST:
            raise ValueError(f"EDGEMISTRAL_SIMD is {name!r}; known are {', '.join(_BEST_FIRST)}")
        return _BEST_FIRST[name]()
    features = host_features()
    return next(kind for kind in _BEST_FIRST.values() if features.issuperset(kind.features))()
