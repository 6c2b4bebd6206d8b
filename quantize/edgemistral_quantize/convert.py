"""From checkpoint to blob, a strip of rows at a time: read, check, widen, quantize, write, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from edgemistral.config import ModelConfig
from edgemistral.errors import BadCheckpoint, BadInput
from edgemistral.files.bf16 import to_bf16, widen
from edgemistral.files.blob_writer import BlobWriter
from edgemistral.files.layout import BLOCK_BYTES, PANEL, Matrix, Recipe, TensorSpec, matrices, matrix_tensors
from edgemistral_quantize import exponents, gptq, sensitivity
from edgemistral_quantize.ahead import map_ahead, one_ahead
from edgemistral_quantize.calibrate import MATRICES, TILE, CalibrationPass, Inputs, sample_bytes, tiled, work_bytes
from edgemistral_quantize.calibration_text import Calibration, read_calibration
from edgemistral_quantize.checkpoint import Checkpoint, Strip
from edgemistral_quantize.equalise import Change, Changes, layer_changes, output_changes
from edgemistral_quantize.groups import default_levels, quantize_rows

STRIP_BYTES = 1 << 24   # of rows as float32: large enough to keep all threads busy, small relative to the disk cache
STRIPS_IN_WORK = 8      # memory in strips at any time: two being read and widened, one being quantized, copies
ENOUGH = 1024           # different tokens that suffice to calibrate any model; narrower models need as many as columns
WINDOWS_AT_ONCE = 8     # most windows of calibration that pass a layer together; the layer is read again for the next ones

Progress = Callable[[int, int], object]
Notice = Callable[[str], object]

_NO_CHANGES = Changes({}, {})


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    bits: float | None = None,
    output_bits: int = 8,
    max_ram: int = 2 << 30,
    resume: bool = False,
    force: bool = False,
    progress: bool | Progress = True,
    calibrate: str = "fast",
    calibration_text: str | os.PathLike[str] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    notice: Notice | None = None,
) -> Path:
    """Make a blob from a checkpoint directory in Hugging Face or Mistral layout, or from a GGUF file; returns its path.

    bits: of the layers' matrices, 4 or 8; None: 4, or 8 for a GGUF that is quantized already. A value between, such as 4.5,
    is the average over the layers with scales: the matrices that lose most in 4 bits get 8 (`sensitivity.py`). output_bits:
    of the output head. Embeddings become bfloat16. max_ram: bytes of working memory, without Python and compiled kernels.

    calibrate: "fast" measures the inputs of each column on a text, weights the rounding errors by them and equalises the
    columns; later columns compensate the errors of earlier ones (GPTQ), in parts of 512 columns. "full" does this over up
    to 4096 columns, reads more text and improves the result. It takes several times as long. "none" skips all of this. The
    text is the package's own or `calibration_text`, in UTF-8. The blob keeps the method and the text's sha256. If the text
    has fewer different tokens than the model has columns (1024 are always enough), nothing is calibrated: `notice` says so,
    and the blob is that of "none".

    The blob is written as DST.partial and renamed when it is complete and on the disk. After a crash or an error,
    `resume=True` continues after the tensors in DST.partial whose checksums, and those of their sources, match; the
    calibration of their layers is computed again. `force=True` starts again and replaces an existing DST.

    chat_template: a file with a Jinja template to use instead of the checkpoint's. lora: the folder of a PEFT adapter to
    merge into the weights. progress: whether to show a bar on the terminal, or a function called as progress(done, total),
    in bytes, from any thread; its exceptions end the work. notice: called with one line that the user should know.

    Raises BadConfig and BadCheckpoint if the checkpoint cannot be used (before anything is written, except for a NaN, an
    infinity, inputs that overflow or an unreadable file in the middle), BadInput for wrong arguments and all problems with
    DST, such as a full disk.
    """
    if output_bits not in BLOCK_BYTES:
        raise BadInput(f"output_bits is {output_bits}; supported: {' and '.join(map(str, BLOCK_BYTES))}")
    if bits is not None and bits not in BLOCK_BYTES:
        sensitivity.check_bits(bits)
        if calibrate == "none":
            raise BadInput(f"bits is {bits} and calibrate is 'none': choosing the matrices with 8 bits takes a calibration")
    checkpoint = Checkpoint(
        Path(src), None if chat_template is None else Path(chat_template), None if lora is None else Path(lora)
    )
    if bits is None:
        bits = 4 if checkpoint.quantized_as is None else 8
    if checkpoint.quantized_as is not None and notice is not None:
        notice(quantized_twice(checkpoint.quantized_as, checkpoint.bits or 0, bits))
    config = checkpoint.config
    calibration = read_calibration(
        calibrate, None if calibration_text is None else Path(calibration_text), checkpoint.tokenizer_of_text, config.context
    )
    if calibration is None or bits in BLOCK_BYTES:
        recipe = Recipe(int(bits), output_bits)
    else:
        recipe = _choose(checkpoint, calibration, bits, output_bits, max_ram, progress)
    if calibration is not None and calibration.different < min(config.dim, ENOUGH):
        if notice is not None:
            notice(few_tokens(calibration.different, config.dim))
        calibration = None
    return convert(checkpoint, Path(dst), recipe, calibration, max_ram, resume, force, progress, notice)


def _choose(
    checkpoint: Checkpoint, calibration: Calibration, bits: float, output_bits: int, max_ram: int, progress: bool | Progress
) -> Recipe:
    few = dataclasses.replace(calibration, method="fast", windows=calibration.windows[: sensitivity.WINDOWS])
    strip_bytes, some, _ = _share_memory(checkpoint, few, max_ram, bits=4)   # no samples are taken
    assert some is not None
    runs = 1 + len(MATRICES)
    with (
        tqdm(total=checkpoint.n_bytes * runs, desc="sensitivity", unit="B", unit_scale=True, unit_divisor=1024,
             disable=None if progress is True else True) as bar,
        threadpool_limits(1, user_api="blas"),
    ):
        update = _telling(progress, checkpoint.n_bytes * runs) if callable(progress) else bar.update
        return sensitivity.choose(checkpoint, some.windows, bits, output_bits, strip_bytes, update)


def quantized_twice(types: str, source_bits: float, bits: float) -> str:
    """The notice before quantizing weights that are already quantized."""
    return (
        f"note: SRC is quantized already ({types}, {source_bits:.1f} bits per weight). Quantizing it again to {bits:g} bits "
        f"loses again: {'little' if bits == 8 else 'much'}. The original model gives a better file"
        f"{'' if bits == 8 else '; --bits 8 keeps nearly all of this one'}."
    )


def few_tokens(different: int, dim: int) -> str:
    """The notice that calibration is skipped."""
    return (
        f"note: the calibration text has {different} different tokens of this vocabulary. That is too few for {dim} "
        "columns: quantizing without calibration. A longer --calibration-text helps if the vocabulary is larger"
    )


def few_windows(n: int, total: int, max_ram: int, enough: int) -> str:
    """The notice that only a part of the calibration text is read."""
    return (
        f"note: max_ram is {max_ram} bytes, room for {n} of the {total} parts of the calibration text: only these are read. "
        f"{enough} bytes hold all"
    )


def convert(
    checkpoint: Checkpoint, dst: Path, recipe: Recipe, calibration: Calibration | None, max_ram: int, resume: bool = False,
    force: bool = False, progress: bool | Progress = True, notice: Notice | None = None,
) -> Path:
    """`quantize` with a checkpoint and calibration tokens that are already read."""
    if dst.exists() and any(dst.samefile(file) for file in checkpoint.files):
        raise BadInput(f"{dst}: a part of the checkpoint itself")
    strip_bytes, calibration, at_once = _share_memory(checkpoint, calibration, max_ram, recipe.bits, notice)

    config = checkpoint.config
    by_name = {matrix.name: matrix for matrix in matrices(config, recipe)}
    in_matrices = {tensor.name for matrix in by_name.values() for tensor in matrix_tensors(matrix)}
    rounds = 0 if calibration is None else -(-len(calibration.windows) // at_once)
    with (
        BlobWriter(
            dst, config, recipe, len(checkpoint.tokenizer), text=checkpoint.text, resume=resume, force=force,
            calibration=None if calibration is None else calibration.describe(),
        ) as writer,
        _Bar(
            total=checkpoint.n_bytes * (1 + rounds), desc=dst.name, unit="B", unit_scale=True, unit_divisor=1024,
            disable=None if progress is True else True,   # None: only in a terminal
        ) as bar,
        # We use our own threads, each with its own products: sums have one order, and no idle BLAS thread spins.
        threadpool_limits(1, user_api="blas"),
        contextlib.ExitStack() as stack,
    ):
        update = _telling(progress, checkpoint.n_bytes * (1 + rounds)) if callable(progress) else bar.update
        samples, spare = 1, 0
        if calibration is not None:
            samples, spare = calibration.different, work_bytes(config, max(map(len, calibration.windows)), 0, at_once)
        conversion = _Conversion(checkpoint, writer, strip_bytes, samples, spare, update)
        states = None
        if calibration is not None:
            states = CalibrationPass(
                checkpoint, calibration.windows, at_once, strip_bytes, update, samples=recipe.bits == 8
            )
            stack.callback(states.close)
        changes = _NO_CHANGES
        moments: dict[str, gptq.Moments] = {}
        for spec in writer.tensors.values():
            at, _, part = spec.name.rpartition(".")
            if calibration is not None and states is not None and part in ("attention_norm", "norm"):
                moments = _moments(config, calibration.method, writer, at)
                add = partial(_add_moments, moments, states.map) if moments else None
                if at:
                    inputs = states.pass_layer(int(at.removeprefix("layers.")), add)
                    _check_inputs(at, inputs, states.tokens)
                    alpha = None if recipe.bits == 4 else exponents.choose(config, inputs, calibration.kinds)
                    changes = layer_changes(config, inputs.mean_squares, samples, alpha)
                else:
                    inputs = states.pass_norm(add)
                    _check_inputs("the head", inputs, states.tokens)
                    changes = output_changes(inputs.mean_squares["output"], recipe.output_bits, samples)
            if spec.name in by_name:
                conversion.write_matrix(by_name[spec.name], changes.matrices.get(part, Change()), moments.pop(part, None))
            elif spec.name == "tokenizer":
                conversion.write_tokenizer()
            elif spec.name not in in_matrices:
                conversion.write_plain(spec, changes.norms.get(part))
        return writer.finish()


class _Bar(tqdm):  # type: ignore[misc]
    """A bar without tqdm's monitor thread, which never ends."""

    monitor_interval = 0


def _telling(progress: Progress, total: int) -> Callable[[int], object]:
    """A function that counts bytes and calls `progress` at every hundredth of the total."""
    done = told = 0

    def update(n: int) -> None:
        nonlocal done, told
        done += n
        if done * 100 // total > told:
            told = done * 100 // total
            progress(min(done, total), total)

    return update


def _share_memory(
    checkpoint: Checkpoint, calibration: Calibration | None, max_ram: int, bits: int, notice: Notice | None = None
) -> tuple[int, Calibration | None, int]:
    """Bytes of a strip, the calibration with as many windows as fit, and how many of them pass a layer at once."""
    needed = STRIPS_IN_WORK * checkpoint.min_strip_bytes
    if max_ram < needed:
        raise BadInput(f"max_ram is {max_ram} bytes; this checkpoint needs {needed}")
    if calibration is None:
        return min(STRIP_BYTES, max_ram // STRIPS_IN_WORK), None, 0
    config, window, total = checkpoint.config, max(map(len, calibration.windows)), len(calibration.windows)

    def taken(n: int, at_once: int) -> int:
        """With n windows, `at_once` of them in a layer at the same time."""
        samples = sample_bytes(config, n) if bits == 8 else 0
        return needed + gptq.work_bytes(config, calibration.method) + samples + work_bytes(config, window, n, at_once)

    if taken(1, 1) > max_ram:
        raise BadInput(f"max_ram is {max_ram} bytes; to calibrate this checkpoint needs {taken(1, 1)}")
    n = max(k for k in range(1, total + 1) if taken(k, 1) <= max_ram)
    if n < total and notice is not None:
        notice(few_windows(n, total, max_ram, taken(total, 1)))
    at_once = max(k for k in range(1, WINDOWS_AT_ONCE + 1) if taken(n, k) <= max_ram)
    strip_bytes = min(STRIP_BYTES, (max_ram - taken(n, at_once) + needed) // STRIPS_IN_WORK)
    return strip_bytes, dataclasses.replace(calibration, windows=calibration.windows[:n]), at_once


def _moments(config: ModelConfig, method: str, writer: BlobWriter, layer: str) -> dict[str, gptq.Moments]:
    """The moments to collect for each matrix of a layer, or for the head if `layer` is empty; none if all are written."""
    cols = {"wqkv": config.dim, "wo": config.q_dim, "w13": config.dim, "w2": config.hidden_dim}
    names = {f"{layer}.{part}": part for part in cols} if layer else {"output": "output"}
    if all(writer.done(name) for name in writer.tensors if name in names or name.rpartition(".")[0] in names):   # earlier
        return {}
    return {part: gptq.Moments(cols.get(part, config.dim), method) for part in names.values()}


def _check_inputs(layer: str, inputs: Inputs, tokens: int) -> None:
    """Raises BadCheckpoint if sums of squares of a matrix's inputs do not fit in float32."""
    for part, mean_squares in inputs.mean_squares.items():
        if not (mean_squares * tokens < np.finfo(np.float32).max).all():
            raise BadCheckpoint(f"{layer}: the calibration text gives {part} inputs that are too large for float32 sums; "
                                "--calibrate none quantizes without a text")


def _add_moments(
    moments: dict[str, gptq.Moments], map_: gptq.Map, matrix: str, inputs: Sequence[NDArray[np.float32]]
) -> None:
    for x in inputs:
        moments[matrix].add(x, map_)


class _Conversion:
    """Writes single tensors of a blob, unless an earlier run did."""

    def __init__(
        self, checkpoint: Checkpoint, writer: BlobWriter, strip_bytes: int, samples: int, spare: int,
        progress: Callable[[int], object],
    ) -> None:
        self.checkpoint, self.writer, self.strip_bytes, self.progress = checkpoint, writer, strip_bytes, progress
        self.samples = samples     # number of different inputs of the calibration
        self.spare = spare         # free bytes between two layers of the calibration

    def write_matrix(self, matrix: Matrix, change: Change, moments: gptq.Moments | None = None) -> None:
        """Codes, row scales and levels of one matrix, which `change` prepares; by GPTQ if there are `moments`."""
        if self._is_done(matrix.name, *(spec.name for spec in matrix_tensors(matrix))):
            return
        levels = default_levels() if matrix.bits == 4 else None
        digest = hashlib.sha256()
        row_scales: list[NDArray[np.float32]] = []

        def panels() -> Iterator[NDArray[np.uint8]]:
            n_panels = 0
            for packed, scales in self._rounded(matrix, change, levels, moments, digest):
                n_panels += len(packed)
                row_scales.append(scales)
                yield packed
            if padding := matrix.panels - n_panels:
                zeros = np.zeros((padding * PANEL, matrix.cols), np.float32)
                packed, scales = quantize_rows(zeros, matrix.bits, levels)
                row_scales.append(scales)
                yield packed

        self.writer.write(matrix.name, panels(), digest.hexdigest)
        self.writer.write(matrix.name + ".row_scales", row_scales, digest.hexdigest)
        if levels is not None:
            self.writer.write(matrix.name + ".levels", [levels], digest.hexdigest)

    def _rounded(
        self, matrix: Matrix, change: Change, levels: NDArray[np.uint8] | None, moments: gptq.Moments | None, digest: Any
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        """Packed panels and row scales of the matrix, some rows at a time."""
        strips = one_ahead(widen(strip) for strip in self._read(matrix.name, digest))
        if moments is None or change.columns is None:
            n_rows = 0
            for strip in strips:
                yield quantize_rows(change.apply(strip, n_rows), matrix.bits, levels, change.importance)
                n_rows += len(strip)
            return
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(gptq.factors_at_once(moments, cores, self.spare)) as pool:
            factors, tiles = gptq.Factors.of(moments, change.columns, self.samples, pool.map), tiled(strips)
        threads = gptq.tiles_at_once(matrix.cols, cores, self.spare)
        firsts = itertools.count(0, TILE)
        changed = (change.apply(tile, first) for tile, first in zip(tiles, firsts, strict=False))
        with ThreadPoolExecutor(threads) as pool:
            yield from map_ahead(pool, partial(gptq.quantize_rows, levels=levels, factors=factors), changed, threads + 1)

    def write_plain(self, spec: TensorSpec, factors: NDArray[np.float32] | None = None) -> None:
        """A tensor that is not quantized: the embeddings in bfloat16, or a norm in float32, times `factors` (dim,)."""
        if not self._is_done(spec.name):
            digest = hashlib.sha256()
            rows: Iterator[NDArray[Any]] = map(to_bf16 if spec.dtype == "BF16" else widen, self._read(spec.name, digest))
            if factors is not None:
                rows = (row * factors for row in rows)
            self.writer.write(spec.name, rows, digest.hexdigest)

    def write_tokenizer(self) -> None:
        """The tokenizer's bytes, unchanged."""
        tokenizer = self.checkpoint.tokenizer
        self.writer.write("tokenizer", [tokenizer], hashlib.sha256(tokenizer).hexdigest)

    def _read(self, name: str, digest: Any) -> Iterator[Strip]:
        for strip in self.checkpoint.strips(name, self.strip_bytes):
            digest.update(strip)
            self.progress(strip.nbytes)
            yield strip

    def _is_done(self, name: str, *stored: str) -> bool:
        """Whether an earlier run wrote all tensors made from source `name`, with the same weights."""
        if not all(self.writer.done(each) for each in (name, *stored)):
            return False
        digest = hashlib.sha256()
        for _ in self._read(name, digest):
            pass
        if digest.hexdigest() != self.writer.source_sha256(name):
            raise BadInput(f"{self.writer.partial}: tensor {name} was made of other weights; pass force to start again")
        return True
