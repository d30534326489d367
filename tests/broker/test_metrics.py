"""What is recorded reads back as the official parser reads it: names, labels, buckets, and a bound on their number."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from penstock.broker import exposition
from penstock.broker.metrics import MAX_LABEL_SETS, OTHER, Gauges, Metrics, NoMetrics

TIMINGS = {"batch_wait_ms": 1.0, "load_ms": 0.0, "h2d_ms": 2.0, "compute_ms": 30.0, "d2h_ms": 4.0}


def parsed(metrics: Metrics, gauges: Gauges | None = None) -> dict[str, Metric]:
    """Families by name; the parser takes `_total` off a counter's."""
    text = metrics.render(gauges or Gauges())
    families = list(text_string_to_metric_families(text))
    assert len({f.name for f in families}) == len(families)
    assert all(f.name.startswith("penstock_") and f.documentation for f in families)
    return {f.name.removeprefix("penstock_"): f for f in families}


def values(family: Metric, suffix: str = "") -> dict[tuple[str, ...], float]:
    """Label values, in the order of the labels' names -> value."""
    return {
        tuple(s.labels[name] for name in sorted(s.labels)): s.value
        for s in family.samples
        if s.name.removesuffix(suffix) + suffix == s.name and (suffix or s.name == family.name)
    }


def test_a_batch_is_seen_from_every_side() -> None:
    metrics = Metrics()
    metrics.batch_completed("embed", TIMINGS | {"padding_ratio": 1.0}, 16, 64, predicted_ms=40.0, measured_ms=36.0)
    metrics.batch_completed("embed", TIMINGS, 64, 64, predicted_ms=40.0, measured_ms=36.0)
    found = parsed(metrics)
    expected = {
        "batch_size": 80.0, "batch_fill_ratio": 1.25, "batch_predicted_seconds": 0.08, "batch_actual_seconds": 0.072,
        "padding_waste_ratio": 0.5, "h2d_seconds": 0.004, "compute_seconds": 0.06, "d2h_seconds": 0.008,
    }  # fmt: skip
    for name, total in expected.items():
        assert found[name].type == "histogram"
        assert values(found[name], "_count") == {("embed",): 2.0}
        assert values(found[name], "_sum")["embed",] == pytest.approx(total), name


def test_rows_count_as_many_times_as_they_are() -> None:
    metrics = Metrics()
    metrics.rows_ended("embed", "done", "demo", 5, e2e_s=0.2, queue_s=0.1)
    metrics.rows_ended("embed", "expired", "demo", 3, e2e_s=9.0)
    metrics.rows_ended("embed", "failed", "demo", 1, e2e_s=0.4, queue_s=0.3)
    metrics.rows_ended("embed", "done", "demo", 2, e2e_s=0.2, queue_s=0.1)
    found = parsed(metrics)
    assert values(found["requests"], "_total") == {
        ("demo", "embed", "done"): 7.0, ("demo", "embed", "expired"): 3.0, ("demo", "embed", "failed"): 1.0
    }  # fmt: skip
    assert values(found["e2e_seconds"], "_count") == {("embed",): 8.0}
    assert values(found["queue_wait_seconds"], "_sum")["embed",] == pytest.approx(1.0)


def test_the_other_counters() -> None:
    metrics = Metrics()
    metrics.refused("overloaded", "queue_rows", 7)
    metrics.refused("unknown_kernel", "", 1)
    metrics.cancelled("queued", 2)
    metrics.deadline_missed("hopeless", 3)
    metrics.device_time("demo", 1500.0)
    metrics.device_time("demo", -500.0)  # a counter never falls
    metrics.loaded("embed", 250.0)
    found = parsed(metrics)
    rejections = {("overloaded", "queue_rows"): 7.0, ("unknown_kernel", "unknown_kernel"): 1.0}
    assert values(found["rejections"], "_total") == rejections
    assert values(found["cancelled"], "_total") == {("queued",): 2.0}
    assert values(found["deadline_missed"], "_total") == {("hopeless",): 3.0}
    assert values(found["device_seconds"], "_total") == {("demo",): 1.5}
    assert values(found["model_load_seconds"], "_sum") == {("embed",): 0.25}


def test_buckets_are_cumulative_and_hold_their_upper_bound() -> None:
    metrics = Metrics()
    for rows in (1, 2, 3, 4096, 5000):
        metrics.batch_completed("k", {}, rows, 0, 0.0, 0.0)
    buckets = values(parsed(metrics)["batch_size"], "_bucket")
    by_bound = {float(le): count for _, le in buckets for count in [buckets["k", le]]}
    assert [by_bound[b] for b in (1.0, 2.0, 4.0, 2048.0, 4096.0, math.inf)] == [1.0, 2.0, 3.0, 3.0, 4.0, 5.0]
    assert list(by_bound.values()) == sorted(by_bound.values())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0, 1e300, 1 << 63])
def test_what_a_worker_cannot_have_measured_is_left_out(wrong: float) -> None:
    metrics = Metrics()
    metrics.batch_completed("k", {"compute_ms": wrong, "padding_ratio": wrong, "h2d_ms": 1.0}, 1, 1, 1.0, wrong)
    found = parsed(metrics)
    assert values(found["compute_seconds"], "_count") == {("k",): 0.0}
    assert values(found["batch_actual_seconds"], "_sum") == {("k",): 0.0}
    assert values(found["h2d_seconds"], "_count") == {("k",): 1.0}
    assert 0.0 <= values(found["padding_waste_ratio"], "_sum")["k",] <= 1.0


def test_names_without_end_are_counted_as_other() -> None:
    metrics = Metrics()
    metrics.rows_ended("embed", "done", "first", 1, 0.1)
    for n in range(1000):
        for outcome in ("done", "failed", "expired", "cancelled", "dead"):
            metrics.rows_ended(f"kernel-{n % 300}", outcome, f"client-{n}", 1, 0.1, 0.1)
        metrics.device_time(f"client-{n}", 1000.0)
        metrics.refused("overloaded", f"reason {n}", 1)
    metrics.rows_ended("embed", "done", "first", 1, 0.1)
    found = parsed(metrics)
    for name, total in (("requests", 5002.0), ("device_seconds", 1000.0), ("rejections", 1000.0)):
        counts = values(found[name], "_total")
        assert len(counts) <= MAX_LABEL_SETS
        assert sum(counts.values()) == total, "nothing is lost"
    requests = values(found["requests"], "_total")
    assert requests["first", "embed", "done"] == 2.0, "who is known stays known"
    assert any(client == OTHER and kernel != OTHER for client, kernel, _ in requests), "the client's name goes first"
    assert requests[OTHER, OTHER, "dead"] > 0
    e2e = values(found["e2e_seconds"], "_count")
    assert len(e2e) == MAX_LABEL_SETS
    assert sum(e2e.values()) == 2002.0


def test_every_gauge_has_its_labels() -> None:
    gauges = Gauges(
        uptime_s=12.5, clients=3, tasks_open=9, queue_depth={("embed", "fast", 5): 7, ("embed", "slow", 0): 2},
        queue_oldest_age_s=1.5, admission_queued_s=0.25, bin_edges_s={"embed": np.array([0.1, 0.5])},  # type: ignore[dict-item]
        prediction_error={("embed", "cpu"): 0.125}, prediction_coverage={("embed", "cpu"): 0.95},
        workers=[("w1", "cuda:0", "busy"), ("w2", "cpu", "ready")], workers_lost=4,
        memory={"w1": {"rss_bytes": 10, "used_fraction": 0.5, "free_bytes": "much"}}, breakers_open=[("w1", "embed")],
        events={"shrunk": 2}, longest_turn_s=0.01,
    )  # fmt: skip
    found = parsed(Metrics(), gauges)
    expected: dict[str, dict[tuple[str, ...], float]] = {
        "uptime_seconds": {(): 12.5}, "clients": {(): 3.0}, "tasks_open": {(): 9.0},
        "queue_depth": {("fast", "embed", "5"): 7.0, ("slow", "embed", "0"): 2.0}, "queue_oldest_age_seconds": {(): 1.5},
        "admission_queued_seconds": {(): 0.25}, "bin_edge_seconds": {("1", "embed"): 0.1, ("2", "embed"): 0.5},
        "prediction_error_ratio": {("cpu", "embed"): 0.125}, "prediction_coverage_ratio": {("cpu", "embed"): 0.95},
        "worker_state": {("cuda:0", "busy", "w1"): 1.0, ("cpu", "ready", "w2"): 1.0},
        "device_memory_bytes": {("rss", "w1"): 10.0}, "breaker_open": {("embed", "w1"): 1.0},
        "longest_turn_seconds": {(): 0.01},
    }  # fmt: skip
    for name, samples in expected.items():
        assert found[name].type == "gauge"
        assert values(found[name]) == samples, name
    assert values(found["worker_restarts"], "_total") == {(): 4.0}
    assert values(found["events"], "_total") == {("shrunk",): 2.0}


def test_gauges_are_bounded_where_names_are_not() -> None:
    depth = {(f"kernel-{n}", "all", 5): 1 for n in range(1000)}
    edges = {f"kernel-{n}": [0.1, 0.2] for n in range(1000)}
    found = parsed(Metrics(), Gauges(queue_depth=depth, bin_edges_s=edges))
    counts = values(found["queue_depth"])
    assert len(counts) == MAX_LABEL_SETS
    assert sum(counts.values()) == 1000.0
    assert len(values(found["bin_edge_seconds"])) == MAX_LABEL_SETS


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5, unique=True), st.floats(allow_nan=False))
def test_any_name_and_any_value_come_back(names: list[str], value: float) -> None:
    rows = {(name.replace("\0", ""),): value for name in names}
    text = exposition.family("x", "gauge", "Back\\slash\nand line.", ("name",), rows)
    (family,) = text_string_to_metric_families(text)
    assert family.documentation == "Back\\slash\nand line."
    assert {(s.labels["name"],): s.value for s in family.samples} == rows


@given(st.text(max_size=20))
def test_any_name_in_a_histogram(name: str) -> None:
    (family,) = text_string_to_metric_families(exposition.histogram("x", "Text.", "name", (1.0, 2.0), {name: [1, 2, 3, 7.5]}))
    assert {s.labels["name"] for s in family.samples} == {name.replace("\0", "")}
    assert [s.value for s in family.samples] == [1.0, 3.0, 6.0, 7.5, 6.0]


def test_where_nobody_asks_nothing_is_kept() -> None:
    metrics = NoMetrics()
    metrics.batch_completed("embed", TIMINGS, 16, 64, predicted_ms=40.0, measured_ms=36.0)
    metrics.rows_ended("embed", "done", "demo", 5, e2e_s=0.2, queue_s=0.1)
    metrics.refused("overloaded", "", 1)
    metrics.cancelled("queued", 1)
    metrics.deadline_missed("queued", 1)
    metrics.device_time("demo", 1.0)
    metrics.loaded("embed", 1.0)
    assert metrics.render(Gauges()) == Metrics().render(Gauges())
