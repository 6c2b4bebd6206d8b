"""How much of a prompt a step brings beside readers."""

from __future__ import annotations

import numpy as np
import pytest

from edgemistral.generate.pace import LONGEST, SLOWER, Pace, best_pair

TILE = 7
SIZES = (8, *range(14, 128, TILE))


def read(tokens, alone, per_token, overhead, readers=1, noise=0.0, seed=0):
    """Read a prompt where a step takes max(alone, overhead + per_token * places); (seconds, the readers' tokens)."""
    rng, pace = np.random.default_rng(seed), Pace(SIZES)
    took, read_by_them = 0.0, 0
    for _ in range(10):
        pace.note(readers, 0, alone)
    while tokens > 0:
        n = min(tokens, pace.prompt_tokens(readers))
        places = max(8, -(-(n + readers) // TILE) * TILE)
        seconds = (max(alone, overhead + per_token * places) if n else alone) * (1 + noise * rng.exponential())
        pace.note(readers, n, seconds)
        took, read_by_them, tokens = took + seconds, read_by_them + 1, tokens - n
    return took, read_by_them


@pytest.mark.parametrize(("alone", "per_token", "overhead"), [
    (25, 2.1, 5),      # products cost little: two or three tiles a step
    (25, 4.0, 5),      # much: a tile already takes longer than a reader may wait
    (25, 0.5, 5),      # next to nothing: the largest step
    (25, 9.0, 2),
])
@pytest.mark.parametrize("readers", [1, 3])
def test_readers_keep_half_their_speed(alone, per_token, overhead, readers):
    seconds, tokens = read(4000, alone, per_token, overhead, readers)
    assert tokens / seconds >= 0.5 / alone


def test_the_prompt_loses_little():
    """Where a step of three tiles lasts twice as long as one without a prompt: 20 tokens of 21 for the price of the tiles."""
    seconds, _ = read(4000, 25, 2.1, 5)
    assert seconds <= 1.25 * 4000 * 2.1


def test_measurements_that_scatter_change_little():
    for seed in range(5):
        seconds, tokens = read(4000, 25, 2.1, 5, noise=0.2, seed=seed)
        assert tokens / seconds >= 0.5 / (25 * 1.2)
        assert seconds <= 1.35 * 4000 * 2.1 * 1.2


def test_without_a_measurement_the_readers_come_first():
    pace = Pace(SIZES)
    assert pace.prompt_tokens(2) == 0
    pace.note(2, 0, 0.02)
    assert pace.prompt_tokens(2) + 2 == SIZES[0]


def test_one_long_pause_is_made_up_for_but_not_for_ever():
    pace = Pace(SIZES)
    pace.note(1, 0, 1.0)
    n = pace.prompt_tokens(1)
    pace.note(1, n, 1000.0)       # the machine slept
    turns = 0
    while not pace.prompt_tokens(1):
        pace.note(1, 0, 1.0)
        turns += 1
    assert 1 <= turns <= LONGEST / (SLOWER - 1)


@pytest.mark.parametrize(("steps", "expected"), [
    ([(0, 1.0)], (0, 0)),
    ([(0, 1.0), (7, 1.2)], (7, 7)),                       # nothing takes too long
    ([(0, 1.0), (7, 2.5)], (0, 7)),
    ([(0, 1.0), (7, 1.25), (20, 2.25)], (7, 20)),         # three large ones in four: 16.75 a step
    ([(0, 1.0), (7, 1.25), (13, 1.75), (20, 2.6)], (13, 20)),
    ([(0, 1.0), (7, 1.25), (13, 1.9), (20, 3.0)], (13, 13)),
])
def test_the_best_pair_of_sizes(steps, expected):
    small, large = best_pair(steps, 2.0)
    assert (small, large) == expected
