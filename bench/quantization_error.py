"""The relative squared error of the quantized weights: a table, and JSON in bench/results.

    python bench/quantization_error.py          # the table
    python bench/quantization_error.py --fit    # makes the default levels

The figure is  sum((w - restored)**2) / sum(w**2).

"Fitted" levels are made for one matrix. A blob could hold them, because it stores levels with every matrix. But they would be
worth the time only for heavier tails than those of trained weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from edgemistral_quantize.groups import DEFAULT_LEVELS, default_levels, quantize_rows, quantize_to_levels, stored_levels
from numpy.typing import NDArray

from bench.harness import save
from edgemistral.files.layout import GROUP, LEVEL_ZERO, dequantize, unpack

F32 = NDArray[np.float32]
SHAPE = 1024, 4096
IQ4_NL = stored_levels((-64, -52, -42, -33, -25, -18, -11, -5, 0, 6, 12, 19, 26, 34, 44, 56))   # ggml's, halved


def gaussian(rng: np.random.Generator) -> F32:
    return rng.standard_normal(SHAPE, dtype=np.float32)


def student_t(freedom: int, rng: np.random.Generator) -> F32:
    return (rng.standard_t(freedom, SHAPE) * np.sqrt((freedom - 2) / freedom)).astype(np.float32)


def outliers(rng: np.random.Generator) -> F32:
    """Gaussian, every hundredth weight five times as large."""
    return np.where(rng.random(SHAPE) < 0.01, 5, 1).astype(np.float32) * gaussian(rng)


def absmax(w: F32, end: int) -> F32:
    """ggml's Q4_0 (end -8: the largest weight of a group of 32 becomes it, with its sign) and Q8_0 (end 127)."""
    groups = w.reshape(-1, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = extreme / np.float32(end)
    codes = np.clip(np.rint(groups / scale), -abs(end), abs(end) - (end < 0))
    return (codes * scale.astype(np.float16)).astype(np.float32).reshape(w.shape)


def ours(w: F32, bits: int, levels: NDArray[np.uint8] | None = None) -> F32:
    return dequantize(*quantize_rows(w, bits, levels), levels)[: w.shape[0], : w.shape[1]]


def fitted(w: F32) -> F32:
    return ours(w, 4, stored_levels(fit_levels(w, np.array(DEFAULT_LEVELS), 12)))


def fit_levels(w: F32, start: NDArray[np.generic], iterations: int) -> list[int]:
    """Levels made for w: Lloyd's algorithm (1957) with the search for scales in the loop, then whole numbers.

    Quantize, move each level to the least-squares value of the weights that chose it, repeat.
    """
    rows, cols = w.shape
    levels = start.astype(np.float64)
    for _ in range(iterations):
        packed, row_scales = quantize_to_levels(w, levels.astype(np.float32))
        codes, scales = (stored[:rows] for stored in unpack(packed, 4))
        codes = codes[:, :cols].ravel()
        scale = np.repeat(scales * row_scales[:rows, None], GROUP, axis=1)[:, :cols]
        weight = np.bincount(codes, (scale**2).ravel(), 16)
        np.divide(np.bincount(codes, (scale * w).ravel(), 16), weight, out=levels, where=weight > 0)
        levels *= LEVEL_ZERO / np.abs(levels).max()
    factors = np.linspace(0.8, 63 / 64, 200)[:, None]   # the common factor with the least rounding error is chosen
    whole = np.rint(levels * factors)
    best: list[int] = whole[np.argmin(((whole / factors - levels) ** 2 * weight).sum(axis=1))].astype(int).tolist()
    return best


METHODS: dict[str, Callable[[F32], F32]] = {
    "Q4_0, 4.5 bits": lambda w: absmax(w, -8),
    "our search, IQ4_NL's levels, 4.25 bits": lambda w: ours(w, 4, IQ4_NL),
    "ours, 4.25 bits": lambda w: ours(w, 4, default_levels()),
    "ours, levels fitted to the matrix, 4.25 bits": fitted,
    "Q8_0, 8.5 bits": lambda w: absmax(w, 127),
    "ours, 8.25 bits": lambda w: ours(w, 8),
}
WEIGHTS: dict[str, Callable[[np.random.Generator], F32]] = {
    "Gaussian": gaussian,
    "Student t, 8": lambda rng: student_t(8, rng),
    "Student t, 5": lambda rng: student_t(5, rng),
    "outliers": outliers,
}


def relative_error(w: F32, restored: F32) -> float:
    return float(np.sum((restored - w) ** 2, dtype=np.float64) / np.sum(w**2, dtype=np.float64))


def print_row(name: str, values: list[object]) -> None:
    print(f"{name:46}", *(f"{v:>13.3g}" if isinstance(v, float) else f"{v:>13}" for v in values), flush=True)


def compare() -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    samples = {name: make(rng) for name, make in WEIGHTS.items()}
    print_row("relative squared error", list(samples))
    table = {}
    for method, restore in METHODS.items():
        table[method] = {name: relative_error(w, restore(w)) for name, w in samples.items()}
        print_row(method, list(table[method].values()))
    return table


def speed() -> dict[str, float]:
    """Millions of weights per second that one thread quantizes: the best of three."""
    w = gaussian(np.random.default_rng(1))
    rates = {}
    for bits in (4, 8):
        quantize_rows(w[:16], bits)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            quantize_rows(w, bits, threads=1)
            seconds.append(time.perf_counter() - start)
        rates[f"{bits} bits"] = w.size / min(seconds) / 1e6
        print(f"{bits} bits: {rates[f'{bits} bits']:.0f} million weights a second on one thread")
    return rates


def fit() -> None:
    """Levels for Gaussian and Student-t(8) weights in equal parts, the best of several starts."""
    rng = np.random.default_rng(2)
    sample = np.concatenate([gaussian(rng)[:256], student_t(8, rng)[:256]])
    errors = {}
    for highest in (0.80, 0.83, 0.86, 0.89, 0.92):
        line = np.linspace(-1, highest, 16)
        levels = fit_levels(sample, 64 * (0.7 * line + 0.3 * line**3), 60)
        errors[tuple(levels)] = relative_error(sample, ours(sample, 4, stored_levels(levels)))
        print(f"{errors[tuple(levels)]:.6f}  {levels}", flush=True)
    print("DEFAULT_LEVELS =", min(errors, key=lambda levels: errors[levels]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the default levels anew and print them")
    options = parser.parse_args()
    if options.fit:
        fit()
    else:
        results = {"relative_squared_error": compare(), "million_weights_per_second": speed()}
        save("quantization_error", "python bench/quantization_error.py", results, of_machine=False)


if __name__ == "__main__":
    main()
