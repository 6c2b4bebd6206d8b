"""The vector vocabulary as LLVM intrinsics for jitted code; kernels import it from `simd`.

Every operation is one explicit sequence, so results are the same bits on every instruction set; only the operations of
`lowering` differ. Loads and stores check nothing. They take a one-dimensional array and an index in its elements (bytes in an
array of bytes, for every loaded type), or an address (int64) and an offset in bytes: the KV cache lies in many mappings.

Over 400 lines: one short function for each word of the vocabulary.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgemistral.kernels.lowering import I8, I16, I32, call, choose, shuffle, vector
from edgemistral.kernels.tiles import (
    constant_tile,
    fold,
    fold_rows,
    load_of,
    operation,
    prefetch_tile,
    prefetch_tile_early,
    spread_of,
    store_of,
    store_tile,
    sum_rows,
    tile,
    to_rows,
    words,
)
from edgemistral.kernels.vector_types import (
    F32,
    bf16_to_f32,
    constant,
    f16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    f32x16,
    i8x64,
    i32x16,
    splat,
    to_all_lanes,
)

LOWERING = choose()

__all__ = [
    "LOWERING", "absolute", "add", "add_i32", "any_above", "atomic_add", "atomic_load", "broadcast4", "broadcast_f32",
    "broadcast_i32", "div", "dot4", "dot4_7bit", "exp", "flip_top_bits", "fma", "highest", "highest_of_rows",
    "lane_numbers", "lane_numbers_tile", "load_bf16_as_f32", "load_bytes", "load_f16_as_f32", "load_f32", "load_i8_as_f32",
    "look_up_high", "look_up_low", "low_nibbles", "maximum", "minimum", "mul", "pause", "prefetch_tile",
    "prefetch_tile_early", "round_to_i32", "splat_f32", "splat_i32", "spread_bytes", "spread_f32_as_f16", "spread_words",
    "store_bytes", "store_f32", "store_f32_as_f16", "store_low_bytes", "store_scalar_bf16", "store_scalar_f32",
    "store_tile", "sub", "sum_of_vectors", "tile", "to_f32", "to_rows", "total", "total_i32", "total_of_rows",
    "total_of_rows_i32", "walsh_hadamard", "where_between", "where_negative", "without_low_nibbles", "words",
    "yield_thread", "zero_f32", "zero_f32_tile", "zero_i32", "zero_i32_tile",
]


# ---- memory --------------------------------------------------------------------------------------------------------

load_bytes = load_of(i8x64.llvm, i8x64)
load_f32 = load_of(f32x16.llvm, f32x16)
load_i8_as_f32 = load_of(vector(I8, 16), f32x16, lambda b, v: b.sitofp(b.sext(v, i32x16.llvm), f32x16.llvm))
load_bf16_as_f32 = load_of(vector(ir.IntType(16), 16), f32x16, bf16_to_f32)
load_f16_as_f32 = load_of(vector(ir.IntType(16), 16), f32x16, f16_to_f32)
broadcast4 = load_of(I32, i8x64, to_all_lanes)
broadcast_f32 = load_of(F32, f32x16, lambda b, v: splat(b, v, f32x16.llvm))
broadcast_i32 = load_of(I32, i32x16, lambda b, v: splat(b, v, i32x16.llvm))

store_bytes = store_of(i8x64.llvm, i8x64)
store_scalar_f32 = store_of(F32, types.float32)
store_f32 = store_of(f32x16.llvm, f32x16)
store_scalar_bf16 = store_of(I16, types.float32, f32_to_bf16)
store_low_bytes = store_of(vector(I8, 16), i32x16, lambda b, v: b.trunc(v, vector(I8, 16)))
store_f32_as_f16 = store_of(vector(ir.IntType(16), 16), f32x16, f32_to_f16)


def _low_bytes(builder, value):
    return builder.trunc(value, vector(I8, 16))


# Loops over the elements would become scatter instructions, which are ten times slower.
spread_words = spread_of(I32, 4, i32x16, _low_bytes)      # the low bytes of 16 int32, as 4 words
spread_bytes = spread_of(I8, 16, i32x16, _low_bytes)
spread_f32_as_f16 = spread_of(I16, 16, f32x16, f32_to_f16)


# ---- lane by lane --------------------------------------------------------------------------------------------------

def _select(builder, comparison, a, b):
    return builder.select(builder.fcmp_ordered(comparison, a, b), a, b)


def _fma(builder, a, b, c):
    return call(builder, "llvm.fma.v16f32", f32x16.llvm, a, b, c)


@operation(f32x16, types.float32)
def splat_f32(builder, scalar):
    return splat(builder, scalar, f32x16.llvm)


@operation(i32x16, types.int32)
def splat_i32(builder, scalar):
    return splat(builder, scalar, i32x16.llvm)


@operation(f32x16)
def zero_f32(builder):
    return constant(f32x16.llvm, 0.0)


@operation(i32x16)
def zero_i32(builder):
    return constant(i32x16.llvm, 0)


@constant_tile(f32x16)
def zero_f32_tile(builder, place):
    return constant(f32x16.llvm, 0.0)


@constant_tile(i32x16)
def zero_i32_tile(builder, place):
    return constant(i32x16.llvm, 0)


@constant_tile(i32x16)
def lane_numbers_tile(builder, place):
    """0, 1, ... through all vectors, row by row."""
    return ir.Constant(i32x16.llvm, list(range(16 * place, 16 * place + 16)))


@operation(i32x16)
def lane_numbers(builder):
    """0, 1, ... 15."""
    return ir.Constant(i32x16.llvm, list(range(16)))


@operation(f32x16, f32x16, f32x16)
def add(builder, a, b):
    return builder.fadd(a, b)


@operation(f32x16, f32x16, f32x16)
def sub(builder, a, b):
    return builder.fsub(a, b)


@operation(f32x16, f32x16, f32x16)
def mul(builder, a, b):
    return builder.fmul(a, b)


@operation(f32x16, f32x16, f32x16)
def div(builder, a, b):
    return builder.fdiv(a, b)


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    return _fma(builder, a, b, c)


@operation(f32x16, f32x16, f32x16)
def maximum(builder, a, b):
    """a where a > b, else b (also where a is not a number)."""
    return _select(builder, ">", a, b)


@operation(f32x16, f32x16, f32x16)
def minimum(builder, a, b):
    """a where a < b, else b (also where a is not a number)."""
    return _select(builder, "<", a, b)


@operation(f32x16, f32x16)
def absolute(builder, a):
    bits = builder.and_(builder.bitcast(a, i32x16.llvm), constant(i32x16.llvm, 0x7FFFFFFF))
    return builder.bitcast(bits, f32x16.llvm)


@operation(i32x16, i32x16, i32x16)
def add_i32(builder, a, b):
    return builder.add(a, b)


@operation(f32x16, i32x16)
def to_f32(builder, a):
    return builder.sitofp(a, f32x16.llvm)


@operation(i32x16, f32x16)
def round_to_i32(builder, a):
    """To the nearest integer, ties to even; |a| below 2**31."""
    return builder.fptosi(call(builder, "llvm.rint.v16f32", f32x16.llvm, a), i32x16.llvm)


@operation(f32x16, i32x16, i32x16, i32x16, f32x16, f32x16)
def where_between(builder, lanes, low, high, a, b):
    """a in the lanes where low <= lanes <= high, else b."""
    inside = builder.and_(builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<=", lanes, high))
    return builder.select(inside, a, b)


@operation(f32x16, f32x16, f32x16, f32x16)
def where_negative(builder, x, a, b):
    """a in the lanes where x < 0, else b."""
    return builder.select(builder.fcmp_ordered("<", x, constant(f32x16.llvm, 0.0)), a, b)


@operation(i8x64, i8x64)
def low_nibbles(builder, a):
    return builder.and_(a, constant(i8x64.llvm, 15))


@operation(i8x64, i8x64)
def without_low_nibbles(builder, a):
    """16 times the high nibbles."""
    return builder.and_(a, constant(i8x64.llvm, -16))


@operation(i8x64, i8x64)
def flip_top_bits(builder, a):
    """Signed bytes as unsigned ones that are 128 larger, and back."""
    return builder.xor(a, constant(i8x64.llvm, -128))


@operation(f32x16, f32x16)
def exp(builder, a):
    """e**a for a <= 0, relative error about 2e-7, 0 below -87: 2**n * polynomial (coefficients of Cephes)."""
    f, i = f32x16.llvm, i32x16.llvm
    x = _select(builder, ">", a, constant(f, -87.0))
    n = call(builder, "llvm.rint.v16f32", f, builder.fmul(x, constant(f, 1.44269504)))
    r = _fma(builder, n, constant(f, -0.693145752), x)
    r = _fma(builder, n, constant(f, -1.42860677e-6), r)
    p = constant(f, 1.3981999e-3)
    for coefficient in (8.3334519e-3, 4.1665795e-2, 1.6666665e-1, 0.5, 1.0, 1.0):
        p = _fma(builder, p, r, constant(f, coefficient))
    scale = builder.shl(builder.fptosi(n, i), constant(i, 23))
    result = builder.bitcast(builder.add(builder.bitcast(p, i), scale), f)
    return builder.select(builder.fcmp_ordered("<", a, constant(f, -87.0)), constant(f, 0.0), result)


# ---- across lanes --------------------------------------------------------------------------------------------------

@operation(f32x16, f32x16)
def walsh_hadamard(builder, a):
    """Lane i = the sum over j of a[j] * (-1)**(number of ones in i & j), in four steps."""
    for n in (1, 2, 4, 8):
        other = shuffle(builder, a, None, [lane ^ n for lane in range(16)])
        sums, differences = builder.fadd(a, other), builder.fsub(other, a)
        a = shuffle(builder, sums, differences, [lane + 16 if lane & n else lane for lane in range(16)])
    return a


def _pairs(values, combine):
    """Combine vectors in one fixed tree."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _fold(builder, values, combine):
    """Combine vectors, then the 16 lanes, in one fixed tree."""
    value = _pairs(values, combine)
    for n in (8, 4, 2, 1):
        value = combine(*(shuffle(builder, value, None, list(range(at, at + n))) for at in (0, n)))
    return builder.extract_element(value, ir.Constant(I32, 0))


def _fold_rows(builder, rows, combine):
    """`_fold` of each row in the same tree, several at once: a vector whose lane i is that of row i % rows.

    Two vectors become one of halves from both, as long as there are two: half of the work that one row after another takes.
    """
    values, n, width = [_pairs(row, combine) for row in rows], 16, 16    # width: lanes from one row in a vector to the next
    while n > 1:
        n //= 2
        if len(values) > 1:
            halves = [[lane + at for lane in range(32) if lane % width < n] for at in (0, n)]
            pairs, width = list(zip(values[::2], values[1::2], strict=True)), n
        else:
            halves = [[(lane + at) % 16 for lane in range(16)] for at in (0, n)]
            pairs = [(values[0], None)]
        values = [combine(*(shuffle(builder, a, b, half) for half in halves)) for a, b in pairs]
    return shuffle(builder, values[0], None, [lane % len(rows) * width for lane in range(16)])


@fold(types.float32, f32x16)
def highest(builder, values):
    return _fold(builder, values, lambda x, y: _select(builder, ">", x, y))


@fold(types.float32, f32x16)
def total(builder, values):
    return _fold(builder, values, builder.fadd)


@fold(types.int32, i32x16)
def total_i32(builder, values):
    return _fold(builder, values, builder.add)


@fold_rows(f32x16)
def highest_of_rows(builder, rows):
    """`highest` of every row of a tile: lane i is that of row i % rows."""
    return _fold_rows(builder, rows, lambda x, y: _select(builder, ">", x, y))


@fold_rows(f32x16)
def total_of_rows(builder, rows):
    return _fold_rows(builder, rows, builder.fadd)


@fold_rows(i32x16)
def total_of_rows_i32(builder, rows):
    return _fold_rows(builder, rows, builder.add)


@sum_rows
def sum_of_vectors(builder, values):
    """Of each row of a tile, lane by lane, in a tree of pairs: a tile of one column."""
    return _pairs(values, builder.fadd)


@intrinsic
def any_above(typingctx, a, b):
    """Whether a > b in any lane."""
    def emit(context, builder, sig, args):
        bits = builder.bitcast(builder.fcmp_ordered(">", *args), I16)
        return builder.icmp_unsigned("!=", bits, ir.Constant(I16, 0))
    return types.boolean(f32x16, f32x16), emit


# ---- the operations that instruction sets do differently --------------------------------------------------------------

@operation(i32x16, i32x16, i8x64, i8x64)
def dot4(builder, acc, u, s):
    """acc[lane] += the sum of the lane's 4 products of unsigned bytes u and signed bytes s."""
    return LOWERING.dot4(builder, acc, u, s)


@operation(i32x16, i32x16, i8x64, i8x64)
def dot4_7bit(builder, acc, u, s):
    """`dot4` where every byte of u is at most 127."""
    return LOWERING.dot4_7bit(builder, acc, u, s)


@operation(i8x64, i8x64, i8x64)
def look_up_low(builder, table, codes):
    """Byte i -> table[codes[i] & 15]; the table holds its 16 bytes four times."""
    return LOWERING.look_up_low(builder, table, codes)


@operation(i8x64, i8x64, i8x64)
def look_up_high(builder, table, codes):
    """Byte i -> table[codes[i] >> 4]."""
    return LOWERING.look_up_high(builder, table, codes)


# ---- between threads -------------------------------------------------------------------------------------------------

@intrinsic
def atomic_add(typingctx, array, index, value):
    """Add to array[index] (int64) and return what it held before."""
    def emit(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "acq_rel")
    return types.int64(array, types.intp, types.int64), emit


@intrinsic
def atomic_load(typingctx, array, index):
    """Read array[index] (int64) with all that its writer wrote before."""
    def emit(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)
    return types.int64(array, types.intp), emit


@intrinsic
def pause(typingctx):
    """Tell the CPU that this is a waiting loop."""
    def emit(context, builder, sig, args):
        if context.codegen().magic_tuple()[0].startswith(("x86", "i386", "i686")):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()
    return types.void(), emit


@intrinsic
def yield_thread(typingctx):
    """Let another thread run on this CPU: the symbol that `team` binds to the system's own call."""
    def emit(context, builder, sig, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "edgemistral_yield_thread")
        builder.call(function, [])
        return context.get_dummy_value()
    return types.void(), emit
