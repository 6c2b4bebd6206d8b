"""The ARM lowerings executed under an emulator: their four operations, on random bytes, against NumPy.

A program without any library reads cases from standard input, computes, and writes what came out. Skipped where
qemu-aarch64 or the binutils for it are missing (Debian: qemu-user and binutils-aarch64-linux-gnu).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
from llvmlite import ir
from numba.core import cgutils

from edgemistral.kernels.lowering import I8, LOWERINGS
from tests.kernels.test_lowering import ARM, BYTES, LANES

TOOLS = [shutil.which(name) for name in ("qemu-aarch64", "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld")]
EMULATOR, ASSEMBLER, LINKER = TOOLS
pytestmark = pytest.mark.skipif(not all(TOOLS), reason="no emulator of ARM, or no assembler and linker for it")
CASES = 1000
INPUT, OUTPUT = 6 * 64, 4 * 64   # bytes of a case
I64 = ir.IntType(64)
START = f"""
.global _start
_start:
    mov x0, 0
    ldr x1, =data
    ldr x2, ={CASES * INPUT}
    mov x8, 63      // read
    svc 0
    ldr x0, =data
    ldr x1, =results
    bl compute
    mov x0, 1
    ldr x1, =results
    ldr x2, ={CASES * OUTPUT}
    mov x8, 64      // write
    svc 0
    mov x0, 0
    mov x8, 93      // exit
    svc 0
.bss
.balign 64
data: .skip {CASES * INPUT}
results: .skip {CASES * OUTPUT}
"""


def compute(name: str) -> ir.Module:
    """compute(data, results): dot4_7bit(acc, u7, s), dot4(acc, u8, s), and both look-ups of (table, codes), of all cases."""
    kind, module = LOWERINGS[name](), ir.Module()
    bytes_ = I8.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [bytes_, bytes_]), "compute")
    builder = ir.IRBuilder(function.append_basic_block())
    data, results = function.args

    def number(value: int) -> ir.Value:
        return ir.Constant(I64, value)

    def at(start: ir.Value, case: ir.Value, size: int, part: int, kind: ir.Type) -> ir.Value:
        offset = builder.add(builder.mul(case, number(size)), number(64 * part))
        return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

    with cgutils.for_range(builder, number(CASES)) as loop:
        table, codes, u7, u8, s = (builder.load(at(data, loop.index, INPUT, part, BYTES), align=64) for part in range(5))
        acc = builder.load(at(data, loop.index, INPUT, 5, LANES), align=64)
        made = (kind.dot4_7bit(builder, acc, u7, s), kind.dot4(builder, acc, u8, s),
                kind.look_up_low(builder, table, codes), kind.look_up_high(builder, table, codes))
        for part, value in enumerate(made):
            builder.store(value, at(results, loop.index, OUTPUT, part, value.type), align=64)
    builder.ret_void()
    return module


def build(name: str, cpu: str, folder: Path) -> Path:
    """The program for a CPU."""
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    machine = llvmlite.binding.Target.from_triple(ARM).create_target_machine(cpu=cpu, opt=3, reloc="static", codemodel="small")
    code, made = folder / "program.s", folder / "program"
    code.write_text(machine.emit_assembly(llvmlite.binding.parse_assembly(str(compute(name)))) + "\n.text\n" + START)
    subprocess.run([str(ASSEMBLER), "-march=armv8.6-a", "-o", folder / "program.o", code], check=True)
    subprocess.run([str(LINKER), "-static", "-o", made, folder / "program.o"], check=True)
    return made


@pytest.mark.parametrize(("name", "cpu", "emulated"), [
    ("neon", "cortex-a72", "cortex-a72"),       # has no dot products: one instruction of them would end the program
    ("dotprod", "cortex-a76", "cortex-a76"),
    ("i8mm", "neoverse-n2", "max"),
    ("plain", "cortex-a72", "cortex-a72"),
])
def test_operations(name: str, cpu: str, emulated: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = np.tile(rng.integers(0, 128, (CASES, 1, 16)), (1, 4, 1)).reshape(CASES, 64)
    codes, u7, u8 = (rng.integers(0, top, (CASES, 64)) for top in (256, 128, 256))
    s, acc = rng.integers(-128, 128, (CASES, 64)), rng.integers(-(1 << 30), 1 << 30, (CASES, 16), np.int32)
    u7[0], u8[0], s[0] = 127, 255, -128      # the largest products there are
    u7[1], u8[1], s[1] = 127, 255, 127
    parts = [each.astype(np.uint8) for each in (table, codes, u7, u8)] + [s.astype(np.int8).view(np.uint8), acc.view(np.uint8)]
    made = build(name, cpu, tmp_path)
    (tmp_path / "in").write_bytes(np.concatenate(parts, axis=1).tobytes())
    with (tmp_path / "in").open("rb") as given:
        done = subprocess.run([str(EMULATOR), "-cpu", emulated, made], stdin=given, capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.uint8).reshape(CASES, 4, 64)
    for part, nibbles in ((2, codes & 15), (3, codes >> 4)):
        np.testing.assert_array_equal(got[:, part], np.take_along_axis(table[:, :16], nibbles, axis=1))
    for part, u in ((0, u7), (1, u8)):
        expected = acc + (u * s).reshape(CASES, 16, 4).sum(axis=2)
        np.testing.assert_array_equal(np.ascontiguousarray(got[:, part]).view(np.int32), expected)
