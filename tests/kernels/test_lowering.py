"""Which lowering a CPU gets, and what the ARM ones compile to; test_simd holds those that this host runs to NumPy's bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import pytest
from llvmlite import ir

from edgemistral.errors import BadInput
from edgemistral.kernels import lowering
from edgemistral.kernels.lowering import I8, I32, vector

ROOT = Path(__file__).parents[2]
X86, ARM, MAC = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
BYTES, LANES = vector(I8, 64), vector(I32, 16)


def machine(triple, cpu, features=""):
    """A machine to compile for, whatever this host is."""
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    return llvmlite.binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)


@pytest.mark.parametrize(("triple", "cpu", "names"), [
    (X86, "x86-64", ["plain"]),
    (X86, "haswell", ["avx2", "plain"]),
    (X86, "skylake", ["avx2", "plain"]),
    (X86, "znver3", ["avx2", "plain"]),
    (X86, "skylake-avx512", ["avx2", "plain"]),
    (X86, "alderlake", ["avxvnni", "avx2", "plain"]),
    (X86, "cascadelake", ["avx512vnni", "avxvnni", "avx2", "plain"]),
    (X86, "icelake-client", ["avx512vbmi", "avx512vnni", "avxvnni", "avx2", "plain"]),
    (X86, "sapphirerapids", ["avx512vbmi", "avx512vnni", "avxvnni", "avx2", "plain"]),
    (ARM, "generic", ["neon", "plain"]),
    (ARM, "cortex-a72", ["neon", "plain"]),
    (ARM, "cortex-a76", ["dotprod", "neon", "plain"]),
    (ARM, "neoverse-n2", ["i8mm", "dotprod", "neon", "plain"]),
    (MAC, "apple-m1", ["dotprod", "neon", "plain"]),      # with no list of features, as on macOS
])
def test_lowerings_of_a_cpu(triple, cpu, names):
    assert lowering.runs_on(machine(triple, cpu)) == names


def test_features_count_beside_the_cpu():
    assert lowering.runs_on(machine(X86, "sapphirerapids", "-avx512vbmi"))[0] == "avx512vnni"
    assert lowering.runs_on(machine(X86, "sapphirerapids", "-avx512vnni"))[0] == "avxvnni"
    assert lowering.runs_on(machine(X86, "sapphirerapids", "-avx512vnni,-avxvnni"))[0] == "avx2"
    assert lowering.runs_on(machine(ARM, "generic", "+dotprod"))[0] == "dotprod"


def test_prefetching_is_the_hosts_matter(monkeypatch):
    monkeypatch.setenv("EDGEMISTRAL_PREFETCH", "2048")
    for host, few, level, direct in (("znver5", 4, 1, 32), ("alderlake", 4, 1, 32), ("znver4", 2, 2, lowering.ANY)):
        monkeypatch.setattr(llvmlite.binding, "get_host_cpu_name", lambda host=host: host)
        assert lowering.choose_reading() == (few, 2048, 2048, 2048, level, direct)
    monkeypatch.delenv("EDGEMISTRAL_PREFETCH")
    assert lowering.choose_reading() == lowering.READING["znver4"]
    for wrong in ("far", "-64", "1.5", "65537"):
        monkeypatch.setenv("EDGEMISTRAL_PREFETCH", wrong)
        with pytest.raises(BadInput, match="EDGEMISTRAL_PREFETCH"):
            lowering.choose_reading()


def test_the_best_is_chosen_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(lowering, "available", lambda: ["avxvnni", "avx2", "plain"])
    monkeypatch.delenv("EDGEMISTRAL_SIMD", raising=False)
    assert type(lowering.choose()) is lowering.AVXVNNI
    monkeypatch.setenv("EDGEMISTRAL_SIMD", "avx2")
    assert type(lowering.choose()) is lowering.AVX2
    for name in ("mmx", "avx512vnni", "neon"):
        monkeypatch.setenv("EDGEMISTRAL_SIMD", name)
        with pytest.raises(BadInput, match=f"EDGEMISTRAL_SIMD is '{name}': this processor runs avxvnni, avx2, plain"):
            lowering.choose()


def run(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)


def test_a_named_cpu_is_compiled_for_without_the_hosts_features():
    code = "from edgemistral.kernels import lowering; print(*lowering.available())"
    assert run("-c", code, NUMBA_CPU_NAME="generic", EDGEMISTRAL_SIMD="").stdout.split() in (["plain"], ["neon", "plain"])
    if "avx2" in lowering.available():
        assert run("-c", code, NUMBA_CPU_NAME="haswell", EDGEMISTRAL_SIMD="").stdout.split() == ["avx2", "plain"]


def test_a_wrong_name_is_one_line_and_no_illegal_instruction():
    done = run("-m", "edgemistral", "run", "demo", "hi", EDGEMISTRAL_SIMD="mmx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: EDGEMISTRAL_SIMD is 'mmx': this processor runs ") and done.stderr.count("\n") == 1


# ---- ARM, seen from any host -----------------------------------------------------------------------------------------

def assembly(name, triple, cpu):
    """Of a function with operations of a lowering."""
    kind, module = lowering.LOWERINGS[name](), ir.Module()
    function = ir.Function(module, ir.FunctionType(LANES, [LANES, BYTES, BYTES, BYTES, BYTES]), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    acc, table, codes, u, s = function.args
    acc = kind.dot4_7bit(builder, acc, kind.look_up_low(builder, table, codes), s)
    builder.ret(kind.dot4(builder, acc, u, s))
    return machine(triple, cpu).emit_assembly(llvmlite.binding.parse_assembly(str(module)))


@pytest.mark.parametrize(("name", "cpu", "counts"), [
    # 4 quarters of 64 bytes, each: look up, 7 bits, 8 bits
    ("i8mm", "neoverse-n2", {"tbl": 4, "sdot": 4, "usdot": 4}),
    ("dotprod", "cortex-a76", {"tbl": 4, "sdot": 12, "usdot": 0}),
    ("neon", "cortex-a72", {"tbl": 4, "sdot": 0, "smull": 4, "addp": 8}),
])
def test_arm_instructions(name, cpu, counts):
    for triple in (ARM, MAC):
        code = assembly(name, triple, cpu)
        assert {word: len(re.findall(rf"\b{word}\b", code)) for word in counts} == counts
