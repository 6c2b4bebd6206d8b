"""The differences between instruction sets: four operations on 64-byte vectors.

    dot4(acc, u, s)               acc[lane] += sum of the lane's 4 products of unsigned bytes u and signed bytes s; exact
    dot4_7bit(acc, u, s)          the same, where u is known to be at most 127
    look_up_low(table, codes)     byte i -> table[codes[i] & 15], where the table's 16 bytes are there four times
    look_up_high(table, codes)    byte i -> table[codes[i] >> 4]

All lowerings give the same bits: these operations are exact, and everything else in `simd` is one sequence that LLVM splits
into the machine's vector width. To add an instruction set: write a class and name it in `LOWERINGS`.
`EDGEMISTRAL_SIMD` (one of the names) overrides the choice; `interpret` means that nothing is compiled (see `simd_numpy`).

How far ahead prefetches go, and where to, is also set here. It depends on the CPU model, not on its instructions.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils
from numba.core import config as numba_config
from numba.core.codegen import get_host_cpu_features

from edgemistral.errors import BadInput

config: Any = numba_config    # Any: its names are made at run time
if config.CPU_NAME is not None and config.CPU_FEATURES is None:
    config.CPU_FEATURES = ""  # only the features of NUMBA_CPU_NAME: numba would add those of the host
ANY = 1 << 30      # number of tokens
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

INTERPRET = os.environ.get("EDGEMISTRAL_SIMD") == "interpret"
"""Whether kernels run as ordinary Python over `simd_numpy`: a thousand times slower, with bounds checked, for debuggers."""


def interpreted(function: Any) -> bool:
    """Whether this function is interpreted. The quantizer's are not: they use no vectors, and a model would take days."""
    return INTERPRET and not function.__module__.startswith("edgemistral_quantize.")


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
    """LLVM IR that any CPU runs; the compiler finds what the machine has."""

    sign = ""      # a pattern in the assembly of samples, found if the CPU runs this lowering
    tile = 6       # tokens of a long batch that are multiplied with two panels of weights in registers
    direct = 8     # most tokens of a batch whose codes are looked up for every 8 of them, not unpacked once for all

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

    def look_up_low(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        return self.look_up(builder, table, builder.and_(codes, ir.Constant(codes.type, [15] * 64)))

    def look_up_high(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        return self.look_up(builder, table, builder.lshr(codes, ir.Constant(codes.type, [4] * 64)))

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        """Of codes within 0 .. 15."""
        values = [shuffle(builder, table, None, [level] * 64) for level in range(16)]
        for bit in range(4):                      # a tree of selects, one bit of the code a level
            is_set = builder.icmp_unsigned("!=", builder.and_(codes, ir.Constant(codes.type, [1 << bit] * 64)),
                                           ir.Constant(codes.type, [0] * 64))
            values = [builder.select(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]


class AVX2(Plain):
    """256-bit vectors; pmaddubsw for 7-bit operands, exact 16-bit products where it would saturate."""

    sign = r"vpmaddwd.*[yz]mm"
    tile = 3       # 16 registers of half the size: 7 % faster than 6

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

    sign = r"vpdpbusd.*[yz]mm"

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        parts = zip(split(builder, acc, 2), split(builder, u, 2), split(builder, s, 2), strict=True)
        return join(builder, [_vpdpbusd(builder, 256, *part) for part in parts])

    dot4_7bit = dot4


class AVX512VNNI(Plain):
    """512-bit vectors with vpdpbusd."""

    sign = r"vpdpbusd.*zmm"
    tile = 7       # 28 sums and two weights fit into 32 registers; 5 % faster than 6, and 8 spill
    direct = 64

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return _vpdpbusd(builder, 512, acc, u, s)

    dot4_7bit = dot4

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        return call(builder, "llvm.x86.avx512.pshuf.b.512", table.type, table, codes)


class AVX512VBMI(AVX512VNNI):
    """The same with vpermb, which ignores the upper bits of a code (since Ice Lake and Zen 4).

    Masks take places of dot products. To shift bytes LLVM would use vgf2p8affineqb, which does too.
    """

    direct = ANY
    sign = r"vpdpbusd.*zmm[\s\S]*vpermb.*zmm"

    def look_up_low(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        return call(builder, "llvm.x86.avx512.permvar.qi.512", table.type, table, codes)

    def look_up_high(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        words = vector(I16, 32)
        shifted = builder.lshr(builder.bitcast(codes, words), ir.Constant(words, [4] * 32))
        return self.look_up_low(builder, table, builder.bitcast(shifted, codes.type))


def _vpdpbusd(builder: ir.IRBuilder, bits: int, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    if llvmlite.binding.llvm_version_info < (21,):          # older LLVM takes the bytes as 32-bit lanes
        u, s = (builder.bitcast(value, acc.type) for value in (u, s))
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, acc, u, s)


class Neon(Plain):
    """ARM without dot products: 16-bit products, added in pairs."""

    sign = r"\baddv\b"

    def dot4(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return self._quarters(builder, self._any_bytes, acc, u, s)

    def dot4_7bit(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return self._quarters(builder, self._seven_bits, acc, u, s)

    def look_up(self, builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        sixteen = split(builder, table, 4)[0]
        return join(builder, [call(builder, "llvm.aarch64.neon.tbl1.v16i8", sixteen.type, sixteen, c)
                              for c in split(builder, codes, 4)])

    def _quarters(self, builder: ir.IRBuilder, dot: Any, *values: ir.Value) -> ir.Value:
        """dot(builder, acc, u, s) of each 128 bits."""
        quarters = zip(*(split(builder, value, 4) for value in values), strict=True)
        return join(builder, [dot(builder, *quarter) for quarter in quarters])

    def _any_bytes(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        # A product fits in 16 bits (255 * -128), the sum of two does not: pairs are added in 32.
        words, pairs = vector(I16, 8), []
        for a, b in zip(split(builder, u, 2), split(builder, s, 2), strict=True):
            products = builder.mul(builder.zext(a, words), builder.sext(b, words))
            pairs.append(call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", acc.type, products))
        return builder.add(acc, call(builder, "llvm.aarch64.neon.addp.v4i32", acc.type, *pairs))

    def _seven_bits(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        # 127 * -128 * 2 fits in 16 bits.
        words = vector(I16, 8)
        products = [call(builder, "llvm.aarch64.neon.smull.v8i16", words, a, b)
                    for a, b in zip(split(builder, u, 2), split(builder, s, 2), strict=True)]
        pairs = call(builder, "llvm.aarch64.neon.addp.v8i16", words, *products)
        return builder.add(acc, call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", acc.type, pairs))


class NeonDotProd(Neon):
    """ARM with sdot, which takes two signed operands (most since 2018, all of Apple's)."""

    sign = r"\bsdot\b"

    def _any_bytes(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        # u = signed + 128; the compiler computes the sum over s once and uses it for every u.
        top = ir.Constant(u.type, [-128] * 16)
        minus = self._seven_bits(builder, ir.Constant(acc.type, [0] * 4), top, s)
        return builder.sub(self._seven_bits(builder, acc, builder.xor(u, top), s), minus)

    def _seven_bits(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, s)


class NeonI8MM(NeonDotProd):
    """ARM with usdot, of unsigned and signed bytes (Apple since M2, servers since 2021)."""

    sign = r"\busdot\b"

    def _any_bytes(self, builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return call(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, acc, u, s)


MOST_AHEAD = 1 << 16

LOWERINGS: dict[str, type[Plain]] = {      # the best first
    "avx512vbmi": AVX512VBMI,
    "avx512vnni": AVX512VNNI,
    "avxvnni": AVXVNNI,
    "avx2": AVX2,
    "i8mm": NeonI8MM,
    "dotprod": NeonDotProd,
    "neon": Neon,
    "plain": Plain,
}

_SAMPLES = """
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
define i32 @unsigned_with_signed(<64 x i8> %u, <64 x i8> %s) {
  %a = zext <64 x i8> %u to <64 x i32>
  %b = sext <64 x i8> %s to <64 x i32>
  %products = mul <64 x i32> %a, %b
  %sum = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %products)
  ret i32 %sum
}
define i32 @signed_with_signed(<64 x i8> %u, <64 x i8> %s) {
  %a = sext <64 x i8> %u to <64 x i32>
  %b = sext <64 x i8> %s to <64 x i32>
  %products = mul <64 x i32> %a, %b
  %sum = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %products)
  ret i32 %sum
}
define <64 x i8> @permuted(<64 x i8> %bytes) {
  %result = shufflevector <64 x i8> %bytes, <64 x i8> poison, <64 x i32> <LANES>
  ret <64 x i8> %result
}
""".replace("LANES", ", ".join(f"i32 {37 * i % 64}" for i in range(64)))


def runs_on(machine: llvmlite.binding.TargetMachine) -> list[str]:
    """Names of the lowerings that a CPU runs, the best first, found by compiling samples for it.

    LLVM knows the features of each CPU but does not list them, and the host's list is empty on macOS.
    """
    assembly = machine.emit_assembly(llvmlite.binding.parse_assembly(_SAMPLES))
    return [name for name, kind in LOWERINGS.items() if re.search(kind.sign, assembly)]


@cache
def available() -> list[str]:
    """Names of the lowerings for the CPU that numba compiles for, the best first.

    That is the host, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise.
    """
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    name = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    target = llvmlite.binding.Target.from_triple(llvmlite.binding.get_process_triple())
    return runs_on(target.create_target_machine(cpu=name, features=features))


class Reading(NamedTuple):
    """How this host reads weights quickest. A step of up to `few` tokens reads two streams at once, a larger one reads one.

    The other numbers are the bytes between a load and its software prefetch (0: none) in a step of one token, of up to `few`
    and of more, and the cache that these and the prefetches of keys and values go to. `direct` is as in a lowering: the smaller
    number counts.
    """

    few: int
    ahead_of_one: int
    ahead_of_few: int
    ahead_of_many: int
    level: int
    direct: int


READING = {"znver4": Reading(2, 0, 4096, 8192, 2, ANY), "znver5": Reading(4, 2720, 2720, 6528, 1, 32)}
"""By the host's name; docs/decisions/2026-11-24-prefetch.md has the measurements."""
READING_ELSEWHERE = Reading(4, 0, 0, 2176, 1, 32)


def choose_reading() -> Reading:
    """The one for this host, whatever CPU numba compiles for; `EDGEMISTRAL_PREFETCH` (bytes) overrides its distances.

    Raises BadInput if that is not such a number.
    """
    chosen = READING.get(llvmlite.binding.get_host_cpu_name(), READING_ELSEWHERE)
    given = os.environ.get("EDGEMISTRAL_PREFETCH")
    if not given:
        return chosen
    if not given.isdecimal() or int(given) > MOST_AHEAD:
        raise BadInput(f"EDGEMISTRAL_PREFETCH is {given!r}: it must be a number of bytes, 0 to {MOST_AHEAD}")
    return chosen._replace(ahead_of_one=int(given), ahead_of_few=int(given), ahead_of_many=int(given))


def choose() -> Plain:
    """The best lowering for this CPU, or the one that EDGEMISTRAL_SIMD names. Raises BadInput if the CPU cannot run that."""
    if INTERPRET:
        return Plain()
    name = os.environ.get("EDGEMISTRAL_SIMD") or available()[0]
    if name not in available():
        raise BadInput(f"EDGEMISTRAL_SIMD is {name!r}: this processor runs {', '.join(available())} (and interpret)")
    return LOWERINGS[name]()
