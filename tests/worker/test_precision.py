"""Mixed precision: which kernels, what they return, and that a digest says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_broker import assign, tensor_block
from test_runner import by_row

from penstock.kernels import Kernel, Step, kernel, registry
from penstock.worker.batch import run_alone
from penstock.worker.config import StartError, WorkerConfig, parse_precision
from penstock.worker.precision import Precision, precisions
from penstock.worker.runner import Runner
from penstock.worker.streams import Ended, Streams

CPU = torch.device("cpu")
seen = list[torch.dtype]()


@kernel("product", max_batch_size=8)
def product(x: torch.Tensor) -> dict[str, Any]:
    y = x @ x.transpose(-1, -2)
    seen.append(y.dtype)
    return {"y": y, "rows": [row[: i + 1] for i, row in enumerate(y)], "n": torch.arange(len(x)), "text": ["t"] * len(x)}


@kernel("steps")
class Steps:
    def open(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x

    def step(self, states: list[torch.Tensor]) -> list[Step]:
        return [Step(result={"y": state @ state, "word": "a"}) for state in states]


def built(target: Any, precision: str) -> tuple[Runner, Kernel]:
    made = registry.create(target)
    found = precisions({made.spec.name: made}, {made.spec.name: precision}, CPU)
    return Runner({made.spec.name: made}, CPU, Path("/tmp"), lambda _: None, precisions=found), made


def run(precision: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """The dtype that comes back, and the values."""
    runner, _ = built(product, precision)
    answers, _, _ = run_alone(runner, assign(1, "product", tensor_block(x)), 0.0)
    assert answers[0].block is not None, answers[0].error
    rows = by_row(answers, len(x))
    return answers[0].block.columns[0].dtype, np.stack([rows[i] for i in range(len(x))])


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [
    ("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3),
])  # fmt: skip
def test_a_kernel_runs_in_the_precision_and_returns_what_it_promised(
    precision: str, dtype: torch.dtype, tolerance: float
) -> None:
    seen.clear()
    x = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    name, values = run(precision, x)
    assert seen == [dtype]
    assert name == "float32"
    wanted = (x @ x.transpose(0, 2, 1)).reshape(2, -1)
    np.testing.assert_allclose(values.reshape(2, -1), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_who_sends_half_precision_gets_it_back() -> None:
    assert run("fp16", np.ones((1, 2, 2), np.float16))[0] == "float16"


def test_streams_run_in_it_too() -> None:
    runner, _ = built(Steps, "bf16")
    streams = Streams(runner)
    x = np.full((1, 2, 2), 1.01, np.float32)
    assert streams.open(assign(1, "steps", tensor_block(x), mode="stream"), 0.0) is None
    [ended] = streams.step()
    assert isinstance(ended, Ended)
    block = ended.answer.block
    assert block is not None, ended.answer.error
    assert {c.name: c.dtype for c in block.columns} == {"y": "float32", "word": "str"}
    y = np.frombuffer(block.row([c.name for c in block.columns].index("y"), 0), np.float32)
    assert y[0] != pytest.approx(1.01**4 * 8, rel=1e-6)
    assert y[0] == pytest.approx(1.01**4 * 8, rel=2e-2)


def test_the_digest_tells_versions_apart() -> None:
    digests = {name: built(product, name)[1].spec.to_wire()["digest"] for name in ("fp32", "fp16", "bf16")}
    assert len(set(digests.values())) == 3
    assert digests["fp32"] == registry.create(product).spec.to_wire()["digest"], "the default is no version of its own"


def test_only_kernels_that_exist() -> None:
    with pytest.raises(StartError, match="'nothing', which is no kernel; there are product"):
        precisions({"product": registry.create(product)}, {"nothing": "bf16"}, CPU)


def test_a_device_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: torch.inference_mode())  # which leaves float32 as it is
    with pytest.raises(StartError, match=r"'embed' cannot run in torch.bfloat16 on cpu"):
        Precision("embed", torch.bfloat16, CPU)


def test_settings() -> None:
    assert parse_precision(("embed=bf16", "my.kernel=fp32")) == {"embed": "bf16", "my.kernel": "fp32"}
    for wrong in ("embed", "embed=int8", "=bf16", "a b=bf16"):
        with pytest.raises(ValueError, match="a precision is kernel=fp32"):
            WorkerConfig(precision=(wrong,))
    for wrong_setting in ({"slots": -1}, {"slots": 17}, {"pool_bytes": 5}, {"scrub": "soap"}):
        with pytest.raises(ValueError, match=next(iter(wrong_setting))):
            WorkerConfig(**wrong_setting)
