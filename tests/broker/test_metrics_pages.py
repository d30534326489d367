"""What the pages say of a core: health with its reason, gauges of what waits, and a status that is JSON."""

import json
import math
from typing import Any

import pytest
from broker_world import World, spec
from prometheus_client.parser import text_string_to_metric_families

from penstock.broker.events import Stop
from penstock.broker.http import Page
from penstock.broker.pages import gauges, pages_of, plain


def page(world: World, path: str) -> Page:
    return pages_of(world.core)[path](world.now)


def test_health_says_why_not() -> None:
    world = World()
    assert page(world, "/healthz") == Page(503, "no worker is ready: none has come\n")
    worker = world.worker(name="w1")
    assert page(world, "/healthz") == Page(200, "ok\n")
    world.core.workers.lose_route(worker.route)
    found = page(world, "/healthz")
    assert (found.status, found.body) == (503, "no worker is ready: w1 is away\n")
    world.worker(name="w2")
    world.step(Stop())
    assert page(world, "/healthz") == Page(503, "the broker is stopping\n")


def test_what_waits_is_counted_by_kernel_bin_and_class() -> None:
    world = World()
    client, _ = world.client(), world.worker(spec("echo", max_batch_size=1), spec("other", max_batch_size=1))
    client.submit(3, priority=2)  # one of these is with the worker from now on
    world.turn()
    world.now += 2.0
    client.submit(4, priority=7)
    client.submit(5, kernel="other")
    world.turn()
    found = gauges(world.core, world.now)
    by_class: dict[tuple[str, int], int] = {}
    for (kernel, _, priority), rows in found.queue_depth.items():
        by_class[kernel, priority] = by_class.get((kernel, priority), 0) + rows
    leased = world.state.ledger.num_rows["leased"]
    assert sum(by_class.values()) == 12 - leased
    assert by_class["echo", 7] == 4
    assert by_class["other", 5] == 5
    assert found.queue_oldest_age_s == pytest.approx(2.0)
    assert (found.tasks_open, found.clients) == (12, 1)
    assert [state for *_, state in found.workers] == ["busy"]
    list(text_string_to_metric_families(page(world, "/metrics").body))


def test_an_empty_broker_has_pages() -> None:
    world = World()
    found = gauges(world.core, world.now)
    assert (found.queue_depth, found.queue_oldest_age_s, found.tasks_open) == ({}, 0.0, 0)
    families = {f.name for f in text_string_to_metric_families(page(world, "/metrics").body)}
    assert {"penstock_requests", "penstock_queue_depth", "penstock_batch_size", "penstock_uptime_seconds"} <= families
    assert json.loads(page(world, "/status").body)["num_clients"] == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": b"\x01\xff"}, {"a": "01ff"}), ({b"k": 1, 2: None}, {"6b": 1, "2": None}),
        ([math.nan, math.inf, 1.5], [None, None, 1.5]),
        ((1, True, "x"), [1, True, "x"]), ({"a": {"b": [memoryview(b"z")]}}, {"a": {"b": ["7a"]}}), (1 + 2j, "(1+2j)"),
    ],
)  # fmt: skip
def test_anything_can_be_said_as_json(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)
