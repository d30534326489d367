"""The scans as a broker's kernels: ragged batches, poisoned padding and neighbours; and the scans inside real layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from penstock.kernels import InvalidInput, ops, registry

Task = dict[str, torch.Tensor]
TIMED = {"selective_scan": ("u", "delta", "B", "C"), "ssd": ("x", "delta", "B", "C")}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scan_task(length: int, dtype: torch.dtype = torch.float32) -> Task:
    task = {"u": torch.randn(length, 5), "delta": torch.randn(length, 5), "B": torch.randn(length, 3)}
    task |= {"C": torch.randn(length, 3), "A": -torch.rand(5, 3) * 4, "D": torch.randn(5), "delta_bias": torch.randn(5)}
    return {name: part.to(dtype) for name, part in task.items()} | {"initial_state": torch.randn(5, 3)}


def ssd_task(length: int, dtype: torch.dtype = torch.float32) -> Task:
    task = {"x": torch.randn(length, 4, 3), "delta": torch.rand(length, 4), "B": torch.randn(length, 2, 3)}
    task |= {"C": torch.randn(length, 2, 3), "A": -torch.rand(4), "D": torch.randn(4), "delta_bias": torch.rand(4)}
    return {name: part.to(dtype) for name, part in task.items()} | {"initial_state": torch.randn(4, 3, 3)}


FAMILIES: dict[str, Callable[..., Task]] = {"selective_scan": scan_task, "ssd": ssd_task}
both = pytest.mark.parametrize("name", FAMILIES)


def run(name: str, tasks: list[Task], padding: float = torch.nan, **statics: Any) -> dict[str, Any]:
    """One batch, as a worker makes it, with `padding` beyond the tasks' ends."""
    batch: dict[str, Any] = {}
    for key in tasks[0]:
        rows = [task[key] for task in tasks]
        if key in TIMED[name]:
            batch[f"{key}_lengths"] = torch.tensor([len(row) for row in rows])
            batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        else:
            batch[key] = torch.stack(rows)
    return registry.get(name).run(**batch, **statics)


def alone(name: str, task: Task, **statics: Any) -> tuple[torch.Tensor, torch.Tensor]:
    timed = {key: part[None] if key in (*TIMED[name], "initial_state") else part for key, part in task.items()}
    y, last = getattr(ops, name)(**timed, **statics, return_last_state=True)
    return y[0], last[0]


@both
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e30])
def test_tasks_of_different_lengths(name: str, softplus: bool, padding: float) -> None:
    tasks = [FAMILIES[name](length) for length in (1, 7, 130, 64, 0)]
    out = run(name, tasks, padding, delta_softplus=softplus)
    assert [len(y) for y in out["y"]] == [1, 7, 130, 64, 0]
    for task, y, last in zip(tasks, out["y"], out["last_state"], strict=True):
        expected_y, expected_last = alone(name, task, delta_softplus=softplus)
        torch.testing.assert_close(y, expected_y, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(last, expected_last, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out["last_state"][4], tasks[4]["initial_state"])


@both
def test_poisoned_neighbours(name: str) -> None:
    task = FAMILIES[name](33)
    tasks = [{key: torch.full_like(part, torch.nan) for key, part in FAMILIES[name](length).items()} for length in (5, 40)]
    out = run(name, [tasks[0], task, tasks[1]])
    expected_y, expected_last = alone(name, task, delta_softplus=name == "selective_scan")
    torch.testing.assert_close(out["y"][1], expected_y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out["last_state"][1], expected_last, rtol=2e-5, atol=2e-5)
    assert out["y"][0].isnan().all()


@both
def test_the_state_goes_on_in_the_next_task(name: str) -> None:
    task = FAMILIES[name](50)
    head = run(name, [task | {key: task[key][:20] for key in TIMED[name]}])
    rest = task | {key: task[key][20:] for key in TIMED[name]}
    tail = run(name, [rest | {"initial_state": head["last_state"][0]}])
    whole = run(name, [task])
    torch.testing.assert_close(torch.cat([head["y"][0], tail["y"][0]]), whole["y"][0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(tail["last_state"], whole["last_state"], rtol=2e-5, atol=2e-5)


@both
def test_half_precision_tasks(name: str) -> None:
    tasks = [FAMILIES[name](length, torch.bfloat16) for length in (3, 20)]
    out = run(name, tasks)
    assert {y.dtype for y in out["y"]} == {torch.bfloat16}
    assert out["last_state"].dtype == torch.float32
    expected, _ = alone(name, tasks[0], delta_softplus=name == "selective_scan")
    torch.testing.assert_close(out["y"][0], expected, rtol=1.6e-2, atol=1e-2)


@both
def test_tasks_that_do_not_fit_themselves(name: str) -> None:
    task = FAMILIES[name](9)
    with pytest.raises(InvalidInput, match="of a task must have the same length"):
        run(name, [task | {"B": task["B"][:8]}])
    with pytest.raises(InvalidInput, match="initial_state must have the shape"):
        run(name, [task | {"initial_state": torch.zeros(2, 3)}])
    with pytest.raises(InvalidInput, match="delta_bias must have the shape"):
        run(name, [task | {"delta_bias": torch.zeros(2)}])
    with pytest.raises(InvalidInput, match="delta_softplus must be true or false"):
        run(name, [task], delta_softplus="no")


def test_a_chunk_size_of_a_task_is_bounded() -> None:
    with pytest.raises(InvalidInput, match="chunk_size must be an integer from 1 to 1024"):
        run("ssd", [ssd_task(9)], chunk_size=10**9)


@torch.no_grad()
def test_inside_a_mamba_layer() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=12, state_size=5, num_hidden_layers=1, vocab_size=8, time_step_rank=3)
    mixer = mamba.MambaMixer(config, layer_idx=0).eval()
    hidden = torch.randn(2, 37, 12)
    inside, gate = mixer.in_proj(hidden).chunk(2, -1)
    inside = F.silu(mixer.conv1d(inside.mT)[..., :37].mT)
    delta, B, C = mixer.x_proj(inside).split([3, 5, 5], -1)
    y = ops.selective_scan(
        inside, F.linear(delta, mixer.dt_proj.weight), -mixer.A_log.exp(), B, C, D=mixer.D, z=gate,
        delta_bias=mixer.dt_proj.bias,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(mixer.out_proj(y), mixer(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inside_a_mamba_2_layer() -> None:
    mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba.Mamba2Config(
        hidden_size=12, state_size=5, num_heads=6, head_dim=4, n_groups=2, num_hidden_layers=1, vocab_size=8, chunk_size=16
    )
    mixer = mamba.Mamba2Mixer(config, layer_idx=0).eval()
    hidden = torch.randn(2, 37, 12)
    gate, inside, delta = mixer.in_proj(hidden).split([24, 24 + 20, 6], -1)
    inside = F.silu(mixer.conv1d(inside.mT)[..., :37].mT)
    x, B, C = inside.split([24, 10, 10], -1)
    y = ops.ssd(
        x.unflatten(2, (6, 4)), delta, -mixer.A_log.exp(), B.unflatten(2, (2, 5)), C.unflatten(2, (2, 5)), chunk_size=8,
        D=mixer.D, delta_bias=mixer.dt_bias, delta_softplus=True,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(mixer.out_proj(mixer.norm(y.flatten(2), gate)), mixer(hidden), rtol=1e-4, atol=1e-5)
