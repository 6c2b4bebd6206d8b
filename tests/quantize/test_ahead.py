"""Work ahead keeps the order, takes no more than it may, and passes errors on."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from edgemistral_quantize.ahead import map_ahead, one_ahead


@pytest.mark.parametrize("n", [1, 2, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_come_in_order_and_few_items_are_taken(n, count):
    taken, got = [], 0

    def items():
        for item in range(count):
            assert item < got + n
            taken.append(item)
            yield item

    def slow(item):
        time.sleep(0.01 * (item % 2))
        return item * item

    with ThreadPoolExecutor(3) as pool:
        for result in map_ahead(pool, slow, items(), n):
            assert result == got * got
            got += 1
    assert got == len(taken) == count


def test_an_error_in_the_work_reaches_the_caller():
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(map_ahead(pool, lambda n: 1 // n, [1, 0, 1], 2))
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(1 // n for n in (1, 0, 1)))


def test_the_next_item_is_made_while_the_caller_works():
    made = [threading.Event() for _ in range(3)]

    def items():
        for event in made:
            event.set()
            yield event

    for n, _ in enumerate(one_ahead(items())):
        assert n == 2 or made[n + 1].wait(10)
