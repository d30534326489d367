"""Batches in flight: on a simulated device that delays every copy, and at once on the host where kernels raise as they do
on cuda. Whatever happens, every batch has the answers that it has when it runs alone."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import worker_kernels as kernels
from fake_broker import assign, tensor_block
from hypothesis import given
from hypothesis import strategies as st
from simulated_device import SimStream, SimTimeline
from test_runner import by_row, column, make_runner, ragged

from penstock.broker.protocol import Assign, Code, Error
from penstock.kernels import kernel
from penstock.worker.batch import run_alone
from penstock.worker.devices.timeline import HostTimeline, Timeline
from penstock.worker.engine import take_off
from penstock.worker.flight import Flight
from penstock.worker.flights import Flights, Landed
from penstock.worker.pool import Pool
from penstock.worker.runner import Runner

POOL_BYTES = 1 << 22


def flying(
    *targets: Any, on: Timeline | None = None, num_slots: int = 3, scrub: str = "poison", pool_bytes: int = POOL_BYTES
) -> Flights:
    return take_off(make_runner(*targets), on or HostTimeline(), num_slots, pool_bytes, scrub)


def fly(flights: Flights, assigns: list[Assign]) -> dict[int, Landed]:
    """Every batch through, answers copied out of the memory that is given back; nothing is left on loan."""
    landed = dict[int, Landed]()

    def keep(some: list[Landed]) -> None:
        for one in some:
            assert one.lease not in landed
            landed[one.lease] = one
            if one.answers is not None:
                one.answers = [type(a)(a.start, a.stop, a.block and copied(a.block), error=a.error) for a in one.answers]
            one.release()

    for a in assigns:
        while not flights.has_room:
            keep(flights.landed())
        flights.take(a, 0.0)
    keep(flights.finish())
    assert len(flights) == 0
    assert flights.pipeline.num_submitted == flights.pipeline.num_completed
    for pool in (flights.host, flights.device):
        pool.check()
        if all(one.fault is None for one in landed.values()):
            assert pool.available_bytes == pool.total_bytes
            assert pool.num_borrowed == pool.num_returned
    return landed


def copied(block: Any) -> Any:
    return type(block)(block.num_rows, block.layout, block.lengths, [bytes(frame) for frame in block.frames])


def rows_of(landed: Landed, num_rows: int) -> dict[int, Any]:
    assert landed.answers is not None
    return by_row(landed.answers, num_rows)


def batches(seed: int, count: int = 15) -> list[Assign]:
    """Batches of two kernels in many sizes, of three clients."""
    draw = random.Random(seed)
    made = list[Assign]()
    for lease in range(1, count + 1):
        principal = draw.choice(["ada", "bob", ""])
        if draw.random() < 0.5:
            x = np.full((draw.randrange(1, 9), draw.choice([1, 3, 700, 5000])), lease, np.float32)
            made.append(assign(lease, "scale", tensor_block(x), statics={"factor": 3.0}, principal=principal))
        else:
            rows = [np.full((draw.randrange(0, 5), 2), lease, np.float32) for _ in range(draw.randrange(1, 6))]
            made.append(assign(lease, "pads", *(ragged_row(row) for row in rows), principal=principal))
    return made


def ragged_row(row: np.ndarray) -> Any:
    block = ragged(len(row))
    return type(block)(1, block.layout, block.lengths, [row.tobytes()])


def expected(runner: Runner, assigns: list[Assign]) -> dict[int, list[bytes]]:
    return {a.lease: frames_of(run_alone(runner, a, 0.0)[0]) for a in assigns}


def frames_of(answers: Any) -> list[bytes]:
    return [bytes(frame) for answer in answers for frame in (answer.block.frames if answer.block else [])]


@pytest.mark.parametrize("pool_bytes", [POOL_BYTES, 3 * 4096])
def test_whatever_a_device_delays_the_answers_are_right(pool_bytes: int) -> None:
    """Also when the pool is far too small, and most buffers come from the allocator."""
    wanted = {seed: expected(make_runner(kernels.scale, kernels.pads), batches(seed)) for seed in range(12)}
    for seed in range(12):
        flights = flying(kernels.scale, kernels.pads, on=SimTimeline(seed), num_slots=1 + seed % 4, pool_bytes=pool_bytes)
        landed = fly(flights, batches(seed))
        assert {lease: frames_of(one.answers) for lease, one in landed.items()} == wanted[seed]
        assert (flights.host.num_allocated == 0) == (pool_bytes == POOL_BYTES)


def wrong_answers(num_seeds: int = 8) -> int:
    """How many of the seeds show it when something is wrong with order or memory."""
    found = 0
    for seed in range(num_seeds):
        wanted = expected(make_runner(kernels.scale, kernels.pads), batches(seed))
        flights = flying(kernels.scale, kernels.pads, on=SimTimeline(seed))
        try:
            landed = fly(flights, batches(seed))
            found += {lease: frames_of(one.answers) for lease, one in landed.items()} != wanted
        except (AssertionError, ValueError):
            found += 1
    return found


def test_nothing_is_wrong_as_it_is() -> None:
    assert wrong_answers() == 0


@pytest.mark.parametrize("which", ["compute", "d2h"])
def test_a_forgotten_wait_gives_wrong_answers(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimStream.wait
    monkeypatch.setattr(SimStream, "wait", lambda s, event: None if s.name == which else whole(s, event))
    assert wrong_answers() > 4


def test_buffers_given_back_too_soon_give_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Flight.copy_in

    def too_soon(flight: Flight) -> None:
        assert flight._staged is not None
        flight._staged, staged = None, flight._staged
        content = staged.bytes
        staged.give_back()
        assert flight._there is not None
        flight._there.bytes[: len(content)].copy_(content)

    monkeypatch.setattr(Flight, "copy_in", too_soon)
    assert wrong_answers() > 4
    monkeypatch.setattr(Flight, "copy_in", whole)


def test_outputs_lent_too_short_give_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer's memory goes back to the pool before the answer has left: the next batch writes into it."""
    def early(flight: Flight) -> None:
        back = Flight.__dict__["_released"](flight)
        if back is not None:
            back.give_back()

    monkeypatch.setattr(Flight, "_released", Flight.release, raising=False)
    monkeypatch.setattr(Flight, "release", early)
    assert wrong_answers() > 4


def test_one_guilty_row_fails_alone_and_the_batches_around_it_are_done() -> None:
    flights = flying(kernels.picky, kernels.scale)
    landed = fly(
        flights,
        [
            assign(1, "scale", tensor_block(column(1, 2))),
            assign(2, "picky", tensor_block(column(1, 666, 2, 13))),
            assign(3, "scale", tensor_block(column(3))),
        ],
    )
    rows = rows_of(landed[2], 4)
    assert [getattr(rows[i], "code", None) for i in range(4)] == [None, Code.FAILED, None, Code.INVALID]
    assert rows[0].tolist() == [2, 1.5]
    assert rows_of(landed[1], 2)[1].tolist() == [4, 1]
    assert rows_of(landed[3], 1)[0].tolist() == [6, 1]
    assert landed[2].clock.num_runs == 7, "the run in flight is the first one of the search"


def test_bad_input_never_reaches_the_device() -> None:
    flights = flying(kernels.scale)
    landed = fly(flights, [assign(1, "scale", tensor_block(column(1)), tensor_block(np.ones((1, 3), np.float32)))])
    assert [row.tolist() for row in rows_of(landed[1], 2).values()] == [[2, 1], [2, 2, 2]]
    landed = fly(flights, [assign(2, "nothing", tensor_block(column(1)))])
    assert rows_of(landed[2], 1)[0].code == Code.UNAVAILABLE


def test_out_of_memory_in_company_is_tried_alone_before_it_is_split() -> None:
    alive = set[int]()

    @kernel("greedy", max_batch_size=64)
    def greedy(x: torch.Tensor) -> torch.Tensor:
        if flights.pipeline.num_in_flight or len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        alive.add(len(x))
        return x

    flights = flying(greedy)
    landed = fly(flights, [assign(lease, "greedy", tensor_block(column(lease, lease))) for lease in (1, 2, 3)])
    assert [row.tolist() for lease in (1, 2, 3) for row in rows_of(landed[lease], 2).values()] == [
        [lease, 0.5] for lease in (1, 1, 2, 2, 3, 3)
    ]
    assert [one.clock.num_oom for one in landed.values()] == [0, 0, 0], "it would fit: no cap to be learned"
    landed = fly(flights, [assign(4, "greedy", tensor_block(column(1, 2, 3, 4)))])
    assert (landed[4].clock.num_oom, landed[4].clock.oom_rows) == (1, 4)
    assert len(rows_of(landed[4], 4)) == 4
    assert alive == {2}


def test_what_is_not_idempotent_runs_once_and_alone() -> None:
    seen = list[int]()

    @kernel("effect", idempotent=False, max_batch_size=8)
    def effect(x: torch.Tensor) -> torch.Tensor:
        seen.append(flights.pipeline.num_in_flight)
        if (x[:, 0] == 666).any():
            raise ValueError("half done")
        return x

    flights = flying(effect, kernels.scale)
    landed = fly(
        flights,
        [
            assign(1, "scale", tensor_block(column(1))),
            assign(2, "effect", tensor_block(column(1, 666))),
            assign(3, "effect", tensor_block(column(5))),
        ],
    )
    assert seen == [0, 0]
    assert {row.code for row in rows_of(landed[2], 2).values()} == {Code.FAILED}
    assert rows_of(landed[3], 1)[0].tolist() == [5, 0.5]


def test_a_kernel_that_returns_its_own_memory_again_is_found_out() -> None:
    static = torch.zeros(8, 2)

    @kernel("static", max_batch_size=8)
    def own_memory(x: torch.Tensor) -> torch.Tensor:
        static[: len(x)] = x
        return static[: len(x)]

    flights = flying(own_memory)
    landed = fly(flights, [assign(lease, "static", tensor_block(column(lease, lease))) for lease in range(1, 9)])
    assert all(rows_of(landed[lease], 2)[1].tolist() == [lease, 0.5] for lease in range(1, 9))
    assert landed[1].clock.num_runs == landed[2].clock.num_runs == 2
    assert landed[8].clock.num_runs == 1


def test_an_input_may_be_returned() -> None:
    @kernel("same", max_batch_size=8)
    def same(x: torch.Tensor) -> dict[str, Any]:
        return {"a": x, "b": x.flip(1), "c": x.T.contiguous().T, "d": [row[:1] for row in x], "e": ["text"] * len(x)}

    for seed in range(10):
        flights = flying(same, on=SimTimeline(seed))
        landed = fly(flights, [assign(lease, "same", tensor_block(column(lease, 2))) for lease in range(1, 7)])
        runner = make_runner(same)
        for lease, one in landed.items():
            alone, _, _ = run_alone(runner, assign(lease, "same", tensor_block(column(lease, 2))), 0.0)
            assert frames_of(one.answers) == frames_of(alone)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 0), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.complex64), torch.ones(5, 1)]
)
def test_outputs_of_all_kinds_are_checked_as_always(x: torch.Tensor) -> None:
    kernels.Returns.values = x
    alone, _, _ = run_alone(make_runner(kernels.Returns), assign(1, "returns", tensor_block(column(1, 2))), 0.0)
    landed = fly(flying(kernels.Returns), [assign(1, "returns", tensor_block(column(1, 2)))])
    answers = landed[1].answers
    assert answers is not None
    assert frames_of(answers) == frames_of(alone)
    assert [a.error and a.error.message for a in answers] == [a.error and a.error.message for a in alone]


def breaks() -> Any:
    @kernel("breaks", max_batch_size=8)
    def broken(x: torch.Tensor) -> torch.Tensor:
        if (x[:, 0] == 666).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return x

    return broken


def test_a_broken_device_blames_nobody() -> None:
    """What is not answered comes back to the broker, which separates it until it knows the row."""
    for on in (HostTimeline(), SimTimeline(1)):
        landed = fly(flying(breaks(), on=on), [assign(1, "breaks", tensor_block(column(666)))])
        assert landed[1].fault is not None
        assert landed[1].answers == []
    for seed in range(20):
        flights = flying(breaks(), on=SimTimeline(seed))
        landed = fly(flights, [assign(lease, "breaks", tensor_block(column(666 if lease == 2 else 1))) for lease in (1, 2, 3)])
        faults = [one for one in landed.values() if one.fault is not None]
        assert 2 in {one.lease for one in faults}
        assert all(one.answers == [] for one in faults)


def test_a_broken_device_that_the_next_launch_meets_blames_none_of_the_two() -> None:
    """As cuda does it: what batch 1 has done is said to whoever calls next."""
    timeline = SimTimeline(3)

    @kernel("late", max_batch_size=8)
    def late(x: torch.Tensor) -> torch.Tensor:
        return x

    flights = flying(late, on=timeline)
    flights.take(assign(1, "late", tensor_block(column(1))), 0.0)
    timeline.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    whole = flights.pipeline.h2d.run
    flights.pipeline.h2d.run = lambda work: (timeline.look(), whole(work))[1]  # type: ignore[method-assign]
    flights.take(assign(2, "late", tensor_block(column(2))), 0.0)
    landed = {one.lease: one for one in flights.finish()}
    assert {lease: (one.answers, one.fault is not None) for lease, one in landed.items()} == {1: ([], True), 2: ([], True)}


def test_what_must_run_alone_does_not_run_on_a_broken_device() -> None:
    ran = list[int]()

    @kernel("effect", idempotent=False)
    def effect(x: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return x

    flights = flying(breaks(), effect, on=SimTimeline(1))
    flights.take(assign(1, "breaks", tensor_block(column(666))), 0.0)
    flights.take(assign(2, "effect", tensor_block(column(1))), 0.0)
    landed = {one.lease: one for one in flights.finish()}
    assert landed[1].answers == []
    assert isinstance(rows_of(landed[2], 1)[0], Error), "it may not run again either"
    assert landed[2].fault is not None
    assert ran == []


def test_memory_that_is_free_may_be_the_next_output() -> None:
    """A kernel whose output is not contiguous leaves its memory to the allocator while the copy of it is in flight."""
    made = list[torch.Tensor]()

    @kernel("strided", max_batch_size=8)
    def strided(x: torch.Tensor) -> torch.Tensor:
        made.append(torch.stack([x, x], -1)[..., 0])
        return made.pop()

    flights = flying(strided)
    landed = fly(flights, [assign(lease, "strided", tensor_block(column(lease, lease))) for lease in range(30)])
    assert [rows_of(one, 2)[0].tolist() for one in landed.values()] == [[lease, 0.5] for lease in range(30)]
    assert not flights._alone


def test_what_is_forgotten_does_not_come_out() -> None:
    for seed in range(10):
        flights = flying(kernels.scale, on=SimTimeline(seed))
        for lease in (1, 2, 3):
            flights.take(assign(lease, "scale", tensor_block(column(1))), 0.0)
        flights.forget()
        landed = flights.landed()
        while not flights.has_room:
            landed += flights.landed()
        flights.take(assign(1, "scale", tensor_block(column(7))), 0.0)
        landed += flights.finish()
        assert [one.lease for one in landed] == [1]
        assert rows_of(landed[0], 1)[0].tolist() == [14, 1]
        landed[0].release()
        assert flights.host.available_bytes == flights.host.total_bytes


def test_times_are_the_devices() -> None:
    took = {"h2d": 2.0, "compute": 5.0, "d2h": 1.0}
    flights = flying(kernels.scale, on=SimTimeline(duration_ms=lambda name: took[name]), scrub="none")
    landed = fly(flights, [assign(lease, "scale", tensor_block(column(1))) for lease in range(1, 20)])
    for one in landed.values():
        timings = one.clock.timings()
        assert timings["compute_ms"] == pytest.approx(5.0)
        assert timings["h2d_ms"] >= 2.0  # and what gathering them took
        assert timings["d2h_ms"] >= 1.0
        assert "num_runs" not in timings
    numbers = flights.numbers()
    assert 0.7 < numbers["queue_efficiency"] <= 1.0  # a look at this device lets time pass
    assert 0.6 < numbers["queue_overlap"] <= 1.0
    assert {"host_pool_allocated", "device_pool_high_bytes", "queue_stalls"} <= numbers.keys()


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 2.0, 13.0, 666.0])), max_size=8), st.integers(0, 3))
def test_any_mix_of_good_and_bad_has_the_answers_of_one_after_another(plan: list[tuple[int, float]], num_slots: int) -> None:
    assigns = [
        assign(lease, "picky", tensor_block(column(*[float(i) for i in range(num_rows)], bad)))
        for lease, (num_rows, bad) in enumerate(plan)
    ]
    runner = make_runner(kernels.picky)
    landed = fly(flying(kernels.picky, num_slots=num_slots + 1), assigns)
    for a, (num_rows, _) in zip(assigns, plan, strict=True):
        alone = by_row(run_alone(runner, a, 0.0)[0], num_rows + 1)
        flown = rows_of(landed[a.lease], num_rows + 1)
        assert [getattr(r, "message", None) or r.tolist() for r in flown.values()] == [
            getattr(r, "message", None) or r.tolist() for r in alone.values()
        ]


def many(num_batches: int, num_rows: int) -> Iterator[Assign]:
    x = np.ones((num_rows, 4), np.float32)
    for lease in range(num_batches):
        x[:, 0] = lease % 1000
        yield assign(lease, "scale", tensor_block(x))


def test_a_hundred_thousand_tasks_allocate_nothing_after_warm_up() -> None:
    """Counted by the pools, and by who makes their memory."""
    made = list[int]()

    def counted(num_bytes: int) -> torch.Tensor:
        made.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    base = flying(kernels.scale)
    flights = Flights(make_runner(kernels.scale), base.pipeline, Pool(POOL_BYTES, counted), Pool(POOL_BYTES, counted))
    assert made == [POOL_BYTES, POOL_BYTES]
    num_tasks = 0
    for a in many(1600, 64):
        flights.take(a, 0.0)
        for one in flights.landed():
            assert one.answers is not None
            block = one.answers[0].block
            assert block is not None
            assert np.frombuffer(block.frames[0], np.float32)[0] == 2 * (one.lease % 1000)
            num_tasks += block.num_rows
            one.release()
    assert num_tasks == 1600 * 64 > 100_000
    assert made == [POOL_BYTES, POOL_BYTES]
    for pool in (flights.host, flights.device):
        assert pool.num_allocated == 0
        assert pool.num_borrowed == pool.num_returned >= 1600
        assert pool.high_bytes <= 64 * 1024


def test_kernels_in_flight_are_known() -> None:
    """They may have to run again: memory that is short is not to be had by unloading them."""
    timeline = SimTimeline(1)

    @kernel("here", max_batch_size=8)
    def here(x: torch.Tensor) -> torch.Tensor:
        return x

    flights = flying(here, on=timeline)
    assert flights.kernels == set()
    flights.take(assign(1, "here", tensor_block(column(1))), 0.0)
    assert flights.kernels == {"here"}
    flights.finish()
    assert flights.kernels == set()
