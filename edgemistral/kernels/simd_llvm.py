"""The vector vocabulary as LLVM intrinsics for jitted code; kernels import it from `simd`.

Every operation is one explicit sequence, so results are the same bits on every instruction set; only the operations of
`lowering` differ. Loads and stores check nothing. They take a one-dimensional array and an index in its elements (bytes in an
array of bytes, for every loaded type), or an address (int64) and an offset in bytes: the KV cache lies in many mappings.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgemistral.kernels.lowering import I8, I16, I32, call, choose, shuffle, vector
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
)

LOWERING = choose()

__all__ = [
    "LOWERING", "absolute", "add", "add_i32", "atomic_add", "atomic_load", "broadcast4", "div", "dot4", "dot4_7bit", "exp",
    "flip_top_bits", "fma", "high_nibbles", "highest", "lane_numbers", "load_bf16_as_f32", "load_bytes", "load_f16_as_f32",
    "load_f32", "load_i8_as_f32", "look_up", "low_nibbles", "maximum", "minimum", "mul", "pause", "prefetch",
    "round_to_i32", "splat_f32", "splat_i32", "spread_bytes", "spread_f32_as_f16", "spread_words", "store_bytes",
    "store_f32", "store_f32_as_f16", "store_low_bytes", "store_scalar_bf16", "store_scalar_f32", "sub", "to_f32", "total",
    "total_i32", "walsh_hadamard", "where_between", "where_negative", "without_low_nibbles", "yield_thread", "zero_f32",
    "zero_i32",
]


def _address(context, builder, base_type, base, index, llvm):
    """A pointer to element `index` of an array, or to byte `index` behind an address."""
    if isinstance(base_type, types.Integer):
        data = builder.inttoptr(base, I8.as_pointer())
    else:
        data = context.make_array(base_type)(context, builder, base).data
    return builder.bitcast(builder.gep(data, [index]), llvm.as_pointer())


def _base(base):
    """The type in a signature of what is loaded from or stored to: an array, or an address."""
    return types.int64 if isinstance(base, types.Integer) else base


# ---- memory --------------------------------------------------------------------------------------------------------

def _load(memory, result, convert=lambda builder, value: value):
    @intrinsic
    def load(typingctx, array, index):
        def emit(context, builder, sig, args):
            return convert(builder, builder.load(_address(context, builder, sig.args[0], *args, memory), align=1))
        return result(_base(array), types.intp), emit
    return load


def _store(memory, value_type, convert=lambda builder, value: value):
    @intrinsic
    def store(typingctx, array, index, value):
        def emit(context, builder, sig, args):
            pointer = _address(context, builder, sig.args[0], args[0], args[1], memory)
            builder.store(convert(builder, args[2]), pointer, align=1)
            return context.get_dummy_value()
        return types.void(_base(array), types.intp, value_type), emit
    return store


load_bytes = _load(i8x64.llvm, i8x64)
load_f32 = _load(f32x16.llvm, f32x16)
load_i8_as_f32 = _load(vector(I8, 16), f32x16, lambda b, v: b.sitofp(b.sext(v, i32x16.llvm), f32x16.llvm))
load_bf16_as_f32 = _load(vector(ir.IntType(16), 16), f32x16, bf16_to_f32)
load_f16_as_f32 = _load(vector(ir.IntType(16), 16), f32x16, f16_to_f32)
broadcast4 = _load(I32, i8x64, lambda b, v: b.bitcast(splat(b, v, i32x16.llvm), i8x64.llvm))    # 4 bytes to every lane

store_bytes = _store(i8x64.llvm, i8x64)
store_scalar_f32 = _store(F32, types.float32)
store_f32 = _store(f32x16.llvm, f32x16)
store_scalar_bf16 = _store(I16, types.float32, f32_to_bf16)
store_low_bytes = _store(vector(I8, 16), i32x16, lambda b, v: b.trunc(v, vector(I8, 16)))
store_f32_as_f16 = _store(vector(ir.IntType(16), 16), f32x16, f32_to_f16)


def _spread(element, count, value_type, convert):
    """A store of a vector, converted and cut into `count` elements, to array[index + stride * n]; strides as indices are."""
    @intrinsic
    def store(typingctx, array, index, stride, value):
        def emit(context, builder, sig, args):
            pieces = builder.bitcast(convert(builder, args[3]), vector(element, count))
            at = args[1]
            for n in range(count):
                piece = builder.extract_element(pieces, ir.Constant(I32, n))
                builder.store(piece, _address(context, builder, sig.args[0], args[0], at, element), align=1)
                at = builder.add(at, args[2])
            return context.get_dummy_value()
        return types.void(_base(array), types.intp, types.intp, value_type), emit
    return store


def _low_bytes(builder, value):
    return builder.trunc(value, vector(I8, 16))


# Loops over the elements would become scatter instructions, which are ten times slower.
spread_words = _spread(I32, 4, i32x16, _low_bytes)      # the low bytes of 16 int32, as 4 words
spread_bytes = _spread(I8, 16, i32x16, _low_bytes)
spread_f32_as_f16 = _spread(I16, 16, f32x16, f32_to_f16)


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index]; never faults, whatever the index."""
    def emit(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], *args, I8)
        read, keep_in_l1, data = (ir.Constant(I32, n) for n in (0, 3, 1))
        return call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep_in_l1, data)
    return types.void(_base(array), types.intp), emit


# ---- lane by lane --------------------------------------------------------------------------------------------------

def _operation(result, *arguments):
    """Make an intrinsic of the given types from a function (builder, *values) -> value."""
    def make(emit_values):
        def emit(context, builder, sig, args):
            return emit_values(builder, *args)
        names = ", ".join(f"a{n}" for n in range(len(arguments)))
        scope = {"signature": result(*arguments), "emit": emit}       # numba reads the parameters' names: no *args here
        exec(f"def {emit_values.__name__}(typingctx{', ' if names else ''}{names}):\n    return signature, emit", scope)
        function = scope[emit_values.__name__]
        function.__doc__ = emit_values.__doc__
        return intrinsic(function)
    return make


def _select(builder, comparison, a, b):
    return builder.select(builder.fcmp_ordered(comparison, a, b), a, b)


def _fma(builder, a, b, c):
    return call(builder, "llvm.fma.v16f32", f32x16.llvm, a, b, c)


@_operation(f32x16, types.float32)
def splat_f32(builder, scalar):
    return splat(builder, scalar, f32x16.llvm)


@_operation(i32x16, types.int32)
def splat_i32(builder, scalar):
    return splat(builder, scalar, i32x16.llvm)


@_operation(f32x16)
def zero_f32(builder):
    return constant(f32x16.llvm, 0.0)


@_operation(i32x16)
def zero_i32(builder):
    return constant(i32x16.llvm, 0)


@_operation(i32x16)
def lane_numbers(builder):
    """0, 1, ... 15."""
    return ir.Constant(i32x16.llvm, list(range(16)))


@_operation(f32x16, f32x16, f32x16)
def add(builder, a, b):
    return builder.fadd(a, b)


@_operation(f32x16, f32x16, f32x16)
def sub(builder, a, b):
    return builder.fsub(a, b)


@_operation(f32x16, f32x16, f32x16)
def mul(builder, a, b):
    return builder.fmul(a, b)


@_operation(f32x16, f32x16, f32x16)
def div(builder, a, b):
    return builder.fdiv(a, b)


@_operation(f32x16, f32x16, f32x16, f32x16)
def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    return _fma(builder, a, b, c)


@_operation(f32x16, f32x16, f32x16)
def maximum(builder, a, b):
    """a where a > b, else b (also where a is not a number)."""
    return _select(builder, ">", a, b)


@_operation(f32x16, f32x16, f32x16)
def minimum(builder, a, b):
    """a where a < b, else b (also where a is not a number)."""
    return _select(builder, "<", a, b)


@_operation(f32x16, f32x16)
def absolute(builder, a):
    bits = builder.and_(builder.bitcast(a, i32x16.llvm), constant(i32x16.llvm, 0x7FFFFFFF))
    return builder.bitcast(bits, f32x16.llvm)


@_operation(i32x16, i32x16, i32x16)
def add_i32(builder, a, b):
    return builder.add(a, b)


@_operation(f32x16, i32x16)
def to_f32(builder, a):
    return builder.sitofp(a, f32x16.llvm)


@_operation(i32x16, f32x16)
def round_to_i32(builder, a):
    """To the nearest integer, ties to even; |a| below 2**31."""
    return builder.fptosi(call(builder, "llvm.rint.v16f32", f32x16.llvm, a), i32x16.llvm)


@_operation(f32x16, i32x16, types.int32, types.int32, f32x16, f32x16)
def where_between(builder, lanes, low, high, a, b):
    """a in the lanes where low <= lanes <= high, else b."""
    above = builder.icmp_signed(">=", lanes, splat(builder, low, i32x16.llvm))
    below = builder.icmp_signed("<=", lanes, splat(builder, high, i32x16.llvm))
    return builder.select(builder.and_(above, below), a, b)


@_operation(f32x16, f32x16, f32x16, f32x16)
def where_negative(builder, x, a, b):
    """a in the lanes where x < 0, else b."""
    return builder.select(builder.fcmp_ordered("<", x, constant(f32x16.llvm, 0.0)), a, b)


@_operation(i8x64, i8x64)
def low_nibbles(builder, a):
    return builder.and_(a, constant(i8x64.llvm, 15))


@_operation(i8x64, i8x64)
def high_nibbles(builder, a):
    return builder.lshr(a, constant(i8x64.llvm, 4))


@_operation(i8x64, i8x64)
def without_low_nibbles(builder, a):
    """16 times the high nibbles."""
    return builder.and_(a, constant(i8x64.llvm, -16))


@_operation(i8x64, i8x64)
def flip_top_bits(builder, a):
    """Signed bytes as unsigned ones that are 128 larger, and back."""
    return builder.xor(a, constant(i8x64.llvm, -128))


@_operation(f32x16, f32x16)
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

@_operation(f32x16, f32x16)
def walsh_hadamard(builder, a):
    """Lane i = the sum over j of a[j] * (-1)**(number of ones in i & j), in four steps."""
    for n in (1, 2, 4, 8):
        other = shuffle(builder, a, None, [lane ^ n for lane in range(16)])
        sums, differences = builder.fadd(a, other), builder.fsub(other, a)
        a = shuffle(builder, sums, differences, [lane + 16 if lane & n else lane for lane in range(16)])
    return a


def _fold(builder, value, combine):
    """Combine 16 lanes in one fixed tree."""
    for n in (8, 4, 2, 1):
        value = combine(*(shuffle(builder, value, None, list(range(at, at + n))) for at in (0, n)))
    return builder.extract_element(value, ir.Constant(I32, 0))


@_operation(types.float32, f32x16)
def highest(builder, a):
    return _fold(builder, a, lambda x, y: _select(builder, ">", x, y))


@_operation(types.float32, f32x16)
def total(builder, a):
    return _fold(builder, a, builder.fadd)


@_operation(types.int32, i32x16)
def total_i32(builder, a):
    return _fold(builder, a, builder.add)


# ---- the operations that instruction sets do differently --------------------------------------------------------------

@_operation(i32x16, i32x16, i8x64, i8x64)
def dot4(builder, acc, u, s):
    """acc[lane] += the sum of the lane's 4 products of unsigned bytes u and signed bytes s."""
    return LOWERING.dot4(builder, acc, u, s)


@_operation(i32x16, i32x16, i8x64, i8x64)
def dot4_7bit(builder, acc, u, s):
    """`dot4` where every byte of u is at most 127."""
    return LOWERING.dot4_7bit(builder, acc, u, s)


@_operation(i8x64, i8x64, i8x64)
def look_up(builder, table, codes):
    """Byte i -> table[i rounded down to 16 + codes[i]], codes within 0..15; the table holds its 16 bytes four times."""
    return LOWERING.look_up(builder, table, codes)


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
