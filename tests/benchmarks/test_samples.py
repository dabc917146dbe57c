from __future__ import annotations

import numpy as np
import pytest
from latentrt.benchmarks.measure.scenarios import highest_rate, latencies, offline, server, single_stream
from latentrt.benchmarks.measure.statistics import power_law, summarize


def test_summary_of_samples_that_are_easy_to_count() -> None:
    found = summarize([float(n) for n in range(1, 102)])  # 1 … 101: percentile p is 1 + p
    assert (found["count"], found["min"], found["p50"], found["p90"], found["p99"]) == (101, 1, 51, 91, 100)
    assert found["mean"] == 51
    assert found["spread"] == pytest.approx(50 / 51)


def test_power_law_finds_the_exponent() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    fit = power_law(x, [3 * value**1.5 for value in x])
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3)
    assert fit.error == pytest.approx(0, abs=1e-9)


def test_queue_latencies_by_hand() -> None:
    service = np.array([3.0, 1.0, 2.0, 1.0])
    gaps = np.array([0.0, 1.0, 1.0, 9.0])  # arrivals at 0, 1, 2, 11; the server is free at 0, 3, 4, 6
    assert latencies(service, gaps).tolist() == [3, 3, 4, 1]


def test_highest_rate_of_a_queue_with_known_waiting_times() -> None:
    rng = np.random.default_rng(2)
    count = 200_000
    service, gaps = rng.exponential(size=count), rng.exponential(size=count)
    rate = highest_rate(service, gaps, bound=np.log(100) / 0.5)
    # M/M/1 with rate r: latency is exponential of rate 1 − r, its 99th percentile ln 100 / (1 − r)
    assert rate == pytest.approx(0.5, abs=0.02)


def test_highest_rate_is_zero_when_service_alone_is_too_slow() -> None:
    assert highest_rate(np.full(1000, 2.0), np.ones(1000), bound=1.0) == 0


def test_server_without_a_possible_rate_runs_no_requests() -> None:
    found = server([2.0, 2.0, 2.0], 1.0, 10.0, lambda: pytest.fail("no request should be sent"))
    assert found == {"bound_seconds": 1.0, "simulated_rate": 0.0, "rate": 0.0, "confirmed": None}


def test_server_does_not_wait_for_requests_that_are_too_rare() -> None:
    found = server([1.0, 1.0, 1.0], 1.1, 10.0, lambda: pytest.fail("no request should be sent"))
    assert 0 < found["rate"] < 0.5
    assert found["confirmed"] is None


def test_server_confirms_its_rate_with_requests() -> None:
    sent: list[int] = []
    found = server([1e-4] * 10, 1.0, 0.01, lambda: sent.append(1))
    assert found["confirmed"]["requests"] == len(sent) == int(0.01 * found["rate"])
    assert found["rate"] < found["simulated_rate"] <= 1e4


def test_offline_takes_the_best_batch_after_a_warm_up() -> None:
    seen: list[int] = []

    def run(batch: int) -> float:
        seen.append(batch)
        return {1: 1.0, 4: 2.0}[batch]

    found = offline([1, 4], run)
    assert (found["batch"], found["images_per_second"]) == (4, 2.0)
    assert seen == [1, 1, 1, 4, 4, 4]


def test_single_stream_is_the_90th_percentile() -> None:
    assert single_stream([float(n) for n in range(11)]) == {"p90_seconds": 9.0, "requests": 11}
