"""A kernel at run time: loading, what is passed on, which outputs are accepted; and the synthetic `sleep`."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels import Context, InvalidInput, Step, Tensor, kernel, registry
from penstock.kernels.sleep.reference import sleep as sleep_reference

CONTEXT = Context(torch.device("cpu"), Path("unused"), "uid:1")


def test_extra_parameters_are_passed_only_where_they_are_taken() -> None:
    seen: dict[str, Any] = {}

    @kernel("greedy", inputs={"x": Tensor(ragged="pad")})
    def greedy(x, x_lengths, context):
        seen.update(lengths=x_lengths, context=context)
        return x

    @kernel("modest", inputs={"x": Tensor(ragged="pad")})
    def modest(x):
        return x

    batch = {"x": torch.ones(2, 3), "x_lengths": torch.tensor([3, 1]), "context": CONTEXT}
    registry.create(greedy).run(**batch)
    assert seen == {"lengths": batch["x_lengths"], "context": CONTEXT}
    assert registry.create(modest).run(**batch)["out"] is batch["x"]


def test_a_missing_input_is_an_error() -> None:
    with pytest.raises(TypeError, match="missing"):
        registry.get("softmax").run(context=CONTEXT)


def test_gradients_are_not_kept() -> None:
    weight = torch.ones(3, requires_grad=True)

    @kernel("weighted")
    def weighted(x):
        return x * weight

    assert not registry.create(weighted).run(x=torch.ones(2, 3))["out"].requires_grad


@pytest.mark.parametrize(
    "output",
    [None, 3.0, [], {}, {"out": 1}, {1: torch.ones(1)}, {"out": torch.tensor(1.0)}, {"out": ["a", b"b"]}, {"out": [1]}],
)
def test_outputs_of_a_wrong_kind_are_refused(output: Any) -> None:
    @kernel("odd")
    def odd(x):
        return output

    with pytest.raises(TypeError, match="odd"):
        registry.create(odd).run(x=torch.ones(1))


def test_ragged_and_text_outputs_pass() -> None:
    @kernel("many")
    def many(x):
        return {"a": [x[0, :1], x[1]], "b": ["x", "y"], "c": [b"", b"1"], "d": x}

    assert set(registry.create(many).run(x=torch.ones(2, 2))) == {"a", "b", "c", "d"}


def test_state_is_loaded_once_and_given_back() -> None:
    calls: list[Any] = []

    @kernel("heavy")
    class Heavy:
        def load(self, device: torch.device) -> None:
            calls.append(device)

        def unload(self) -> None:
            calls.append("unload")

        def __call__(self, x):
            return x

    heavy = registry.create(Heavy)
    assert not heavy.is_loaded
    with pytest.raises(RuntimeError, match="not loaded"):
        heavy.run(x=torch.ones(1))
    heavy.load("cpu")
    heavy.load("cpu")
    assert heavy.is_loaded
    assert heavy.can_unload
    heavy.run(x=torch.ones(1))
    heavy.unload()
    heavy.unload()
    assert not heavy.is_loaded
    assert calls == [torch.device("cpu"), "unload"]


def test_a_failed_load_leaves_it_absent() -> None:
    @kernel("failing")
    class Failing:
        def load(self, device):
            raise OSError("no disk")

        def __call__(self, x):
            return x

    failing = registry.create(Failing)
    with pytest.raises(OSError, match="no disk"):
        failing.load("cpu")
    assert not failing.is_loaded
    assert not failing.can_unload


def test_step_must_answer_every_state() -> None:
    @kernel("short")
    class Short:
        def open(self, x):
            return x

        def step(self, states):
            return [Step()]

    short = registry.create(Short)
    assert short.step([short.open(x=1, context=CONTEXT)]) == [Step()]
    with pytest.raises(TypeError, match="one Step per state"):
        short.step([1, 2])
    with pytest.raises(RuntimeError, match="no mode 'batch'"):
        short.run(x=1)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Durations that were slept, instead of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_a_batch_sleeps_for_its_longest_task(naps: list[float]) -> None:
    seconds = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    out = registry.get("sleep").run(seconds=seconds)
    assert naps == [2.0]
    assert torch.equal(out["seconds"], sleep_reference(seconds)["seconds"])


def test_streams_sleep_together_and_finish_apart(naps: list[float]) -> None:
    sleep = registry.get("sleep")
    short, long = sleep.open(seconds=1.0, steps=1), sleep.open(seconds=6.0, steps=3, context=CONTEXT)
    first = sleep.step([short, long])
    assert [dict(step.chunk or {}) for step in first] == [{"step": torch.tensor(0)}] * 2
    assert first[0].result is not None
    assert first[0].result["seconds"].item() == 1.0
    assert first[1].result is None
    sleep.step([long])
    last = sleep.step([long])[0]
    assert naps == [2.0, 2.0, 2.0]
    assert last.chunk == {"step": torch.tensor(2)}
    assert last.result is not None
    assert last.result["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("steps", [0, -1, 10_001, 1.5, True, "2", None])
def test_steps_out_of_bounds_are_refused(naps: list[float], steps: Any) -> None:
    sleep = registry.get("sleep")
    with pytest.raises(InvalidInput, match="steps"):
        sleep.open(seconds=1.0, steps=steps)
    with pytest.raises(InvalidInput, match="steps"):
        sleep.run(seconds=torch.zeros(1), steps=steps)
    assert naps == []
