"""What the broker tells of waiting tasks and of its scheduling: positions, times, reasons, bins, events."""

from typing import Any

from broker_world import FakeClient, World, X, number_per_row, spec

from penstock.broker import protocol as p
from penstock.broker.scheduling.config import SchedulingConfig

SLEEP = spec("sleep", (X, number_per_row("ms")), per={"ms": 1.0}, max_batch_size=4)


def ask(client: FakeClient, **fields: Any) -> dict[str, Any]:
    client.send(p.Status(request=1, **fields))
    (reply,) = client.take(p.Reply)
    assert reply.error is None
    return dict(reply.body)


def nap(client: FakeClient, ms: float, **fields: Any) -> bytes:
    return client.submit(kernel="sleep", scalars={"ms": ms}, **fields)


def test_a_task_knows_where_it_stands_and_why() -> None:
    w = World()
    client, worker = w.client(), w.worker()
    first = client.submit()
    rest = [client.submit() for _ in range(3)]
    assert worker.sizes() == [1]
    running, waiting = ask(client, id=first), ask(client, id=rest[2])
    assert (running["state"], running["position"]) == ("running", 0)
    assert "worker" in running["why"]
    assert (waiting["state"], waiting["position"]) == ("queued", 2)
    assert "behind about 2 rows" in waiting["why"]
    assert waiting["eta_ms"] >= 0.0
    assert 1.0 <= waiting["complexity"] <= 10.0
    assert (waiting["client"], waiting["id"], waiting["deadline_in_ms"]) == ("client", rest[2], None)


def test_why_names_what_is_missing() -> None:
    w = World()
    client = w.client()
    run = client.submit(kernel="echo")
    report = ask(client, id=run)
    assert report["is_waiting_for_kernel"]
    assert report["why"] == "no worker offers 'echo' yet"
    worker = w.worker(batches=0)
    assert ask(client, id=run)["why"] == "next in line"
    worker.crash()
    report = ask(client, id=run)
    assert report["eta_ms"] is None
    assert "no worker that offers 'echo' can take work" in report["why"]


def test_tasks_of_the_same_principal_are_seen_by_all_its_clients_and_by_nobody_else() -> None:
    w = World()
    mine, also_mine, yours = w.client("a"), w.client("b"), w.client("c", principal="uid:2")
    run = mine.submit()
    assert [task["id"] for task in ask(also_mine, what="tasks")["tasks"]] == [run]
    assert ask(also_mine, id=run)["client"] == "a"
    assert ask(yours, what="tasks")["tasks"] == []
    assert ask(yours, id=run) == {"state": "unknown"}


def test_the_most_urgent_tasks_come_first() -> None:
    w = World()
    client = w.client()
    w.worker(batches=0)
    runs = [client.submit(priority=priority) for priority in (9, 5, 0)]
    assert [task["id"] for task in ask(client, what="tasks")["tasks"]] == runs[::-1]


def test_what_is_not_known_is_refused() -> None:
    w = World()
    client = w.client()
    client.send(p.Status(request=3, what="weather"))
    (reply,) = client.take(p.Reply)
    assert reply.error.code == "invalid_input"


def test_status_shows_bins_accounts_and_admission() -> None:
    w = World(scheduling=SchedulingConfig(boundaries_ms=(50.0,)))
    client, other = w.client("a"), w.client("b")
    worker = w.worker(SLEEP)
    for ms in (10.0, 20.0, 200.0):
        nap(client, ms)
    nap(other, 10.0)
    body = ask(client)
    (row,) = body["bins"]
    assert row["edges_ms"] == [50.0]
    assert [entry["bin"] for entry in row["occupancy"]] == ["<50 ms", ">=50 ms"]
    assert sum(entry["queued"] for entry in row["occupancy"]) == 3
    assert {account["client"]: account["queued"] + account["leased"] for account in body["accounts"]} == {"a": 3, "b": 1}
    assert body["admission"]["queued_s"] > 0.0
    worker.finish_all()
    shares = {account["client"]: account["share"] for account in ask(client)["accounts"]}
    assert sum(shares.values()) == 1.0


def test_an_answer_names_its_bin() -> None:
    w = World(scheduling=SchedulingConfig(boundaries_ms=(50.0,)))
    client, worker = w.client(), w.worker(SLEEP)
    run = nap(client, 100.0)
    worker.finish()
    outcome = client.row(run).outcome
    assert outcome is not None and outcome.timings is not None
    assert outcome.timings["bin"] == ">=50 ms"
