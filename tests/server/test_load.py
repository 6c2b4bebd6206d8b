"""The benchmark with many unkind clients, small: no answer is lost or mixed up, and the server ends well."""

from __future__ import annotations

import edgemistral
from bench import server_load


def test_unkind_clients_get_and_spoil_nothing():
    results = server_load.measure(edgemistral.demo_model(), clients=6, requests=30, warm_up=10, n_questions=8)
    assert results["wrong"] == []
    assert set(results["behaviours"]) == {behaviour.__name__ for behaviour in server_load.BEHAVIOURS}
    assert results["stop_seconds"] < 5
