"""The vector types of `simd_llvm`, and how their numbers are converted."""

from __future__ import annotations

import struct

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from edgemistral.kernels.lowering import I8, I16, I32, shuffle, vector

F32 = ir.FloatType()


class Vector(types.Type):
    """A numba type for an LLVM vector."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


i8x64, i32x16, f32x16 = Vector("i8x64", vector(I8, 64)), Vector("i32x16", vector(I32, 16)), Vector("f32x16", vector(F32, 16))


def splat(builder, scalar, llvm):
    one = builder.insert_element(ir.Constant(llvm, ir.Undefined), scalar, ir.Constant(I32, 0))
    return shuffle(builder, one, None, [0] * llvm.count)


def to_all_lanes(builder, word):
    """4 bytes, repeated."""
    return builder.bitcast(splat(builder, word, i32x16.llvm), i8x64.llvm)


def constant(llvm, value):
    """The same value in all lanes. Floats are rounded to float32 first: LLVM takes exact doubles."""
    if llvm.element == F32:
        value = struct.unpack("f", struct.pack("f", value))[0]
    return ir.Constant(llvm, [value] * llvm.count)


def bf16_to_f32(builder, value):
    bits = builder.shl(builder.zext(value, i32x16.llvm), constant(i32x16.llvm, 16))
    return builder.bitcast(bits, f32x16.llvm)


def f16_to_f32(builder, value):
    """Exact for every finite half: the exponent is moved by a multiplication with 2**112, which subnormals survive."""
    wide, c = builder.zext(value, i32x16.llvm), lambda x: constant(i32x16.llvm, x)
    magnitude = builder.bitcast(builder.shl(builder.and_(wide, c(0x7FFF)), c(13)), f32x16.llvm)
    scaled = builder.bitcast(builder.fmul(magnitude, constant(f32x16.llvm, 2.0**112)), i32x16.llvm)
    return builder.bitcast(builder.or_(scaled, builder.shl(builder.and_(wide, c(0x8000)), c(16))), f32x16.llvm)


def f32_to_f16(builder, value):
    """Round to nearest even, after clamping to the largest half.

    Below 2**-14, where halves are multiples of 2**-24, the addition of 0.5 rounds to one: rounding the product with
    2**-112 would round twice, because that is subnormal too.
    """
    f, i, c = f32x16.llvm, i32x16.llvm, lambda x: constant(i32x16.llvm, x)
    bits = builder.bitcast(value, i)
    magnitude = builder.bitcast(builder.and_(bits, c(0x7FFFFFFF)), f)
    largest, half = constant(f, 65504.0), constant(f, 0.5)
    magnitude = builder.select(builder.fcmp_ordered("<", magnitude, largest), magnitude, largest)
    scaled = builder.sub(builder.bitcast(magnitude, i), c(112 << 23))
    even = builder.and_(builder.lshr(scaled, c(13)), c(1))
    normal = builder.lshr(builder.add(builder.add(scaled, c(0xFFF)), even), c(13))
    subnormal = builder.sub(builder.bitcast(builder.fadd(magnitude, half), i), builder.bitcast(half, i))
    result = builder.select(builder.fcmp_ordered("<", magnitude, constant(f, 2.0**-14)), subnormal, normal)
    return builder.trunc(builder.or_(result, builder.and_(builder.lshr(bits, c(16)), c(0x8000))), vector(ir.IntType(16), 16))


def f32_to_bf16(builder, value):
    """Of one number: round to nearest even."""
    bits, sixteen = builder.bitcast(value, I32), ir.Constant(I32, 16)
    even = builder.and_(builder.lshr(bits, sixteen), ir.Constant(I32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), even)
    return builder.trunc(builder.lshr(rounded, sixteen), I16)
