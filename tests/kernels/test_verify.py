"""speculative_verify: against its reference, and by statistics, which must notice a wrong residual."""

from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, backends, ops, registry
from penstock.kernels.sampling import reference, verify

BACKENDS = ["torch", "triton"]
Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def drafted(batch: int, g: int, vocab: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Drafts drawn from a model that is not far from the target."""
    scores = torch.randn(batch, g + 1, vocab) * 2
    draft = (scores[:, :g] + torch.randn(batch, g, vocab) * 0.5).softmax(2)
    tokens = torch.multinomial(draft.view(-1, vocab), 1).view(batch, g) if g else torch.zeros(batch, 0, dtype=torch.int64)
    return {
        "draft_tokens": tokens,
        "draft_probs": draft.to(dtype),
        "target_probs": scores.softmax(2).to(dtype),
        "seeds": torch.arange(batch) * 31 - 5,
    }


def run(backend: str, inputs: Inputs) -> list[Any]:
    with backends.forced(backend):
        accepted, tokens = ops.speculative_verify(**inputs)
    assert accepted.dtype == tokens.dtype == torch.int64
    return [accepted.tolist(), tokens.tolist()]


def expected(inputs: Inputs) -> list[Any]:
    return [part.tolist() for part in reference.speculative_verify(**inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_drawn", [True, False])
@pytest.mark.parametrize(("batch", "g", "vocab"), [(0, 2, 5), (3, 0, 5), (1, 1, 1), (40, 1, 7), (17, 4, 131), (2, 3, 5003)])
def test_reference(batch: int, g: int, vocab: int, is_drawn: bool, dtype: torch.dtype) -> None:
    inputs = drafted(batch, g, vocab, dtype)
    inputs["draft_probs"] = inputs["draft_probs"] if is_drawn else None
    if dtype == torch.float64:  # computed in float32
        inputs = {key: value.float() if key.endswith("probs") and value is not None else value for key, value in inputs.items()}
    assert run("torch", inputs) == expected(inputs)


@pytest.mark.parametrize("is_drawn", [True, False])
@pytest.mark.parametrize(("batch", "g", "vocab"), [(2, 0, 5), (12, 1, 7), (10, 4, 131), (1, 3, 5003)])
def test_the_form_for_gpus_agrees_in_the_interpreter(batch: int, g: int, vocab: int, is_drawn: bool) -> None:
    inputs = drafted(batch, g, vocab)
    inputs["draft_probs"] = inputs["draft_probs"] if is_drawn else None
    assert run("triton", inputs) == expected(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_rows(backend: str) -> None:
    inputs = drafted(9, 3, 11)
    draft, target, tokens = inputs["draft_probs"], inputs["target_probs"], inputs["draft_tokens"]
    draft[0] = target[0, :3]  # equal: everything is accepted
    draft[1] = target[1, :3] * 1.0001  # nearly equal, and larger everywhere: if rejected, there is no residual
    draft[2] = 0.0  # a draft that could not have been drawn
    target[3] = 0.0  # nothing to draw from
    target[4, 0, tokens[4, 0]] = 0.0  # an impossible draft
    target[5] *= 0.97  # do not add up to 1
    target[6, 1] = torch.nan
    tokens[7] = torch.tensor([tokens[7, 0], -1, -1])  # fewer drafts than others
    tokens[8, 0] = 11
    got = run(backend, inputs)
    assert got == expected(inputs)
    accepted, out = got
    assert accepted[0] == 3
    assert out[3] == [-1] * 4
    assert accepted[4] == accepted[8] == 0
    assert accepted[7] <= 1
    assert all(0 <= token < 11 for row in (0, 1, 2, 4, 5, 7, 8) for token in out[row][: accepted[row] + 1])
    assert all(token == -1 for row in range(9) for token in out[row][accepted[row] + 1 :])


def test_no_residual_falls_back_to_the_target() -> None:
    """p < q everywhere by rounding: what is drawn after a rejection is of the target."""
    num = 4000
    p = torch.tensor([0.5, 0.3, 0.2]).expand(num, 2, 3)
    inputs = {"draft_tokens": torch.zeros(num, 1, dtype=torch.int64), "draft_probs": p[:, :1] * 1.5, "target_probs": p}
    accepted, tokens = ops.speculative_verify(**inputs, seeds=torch.arange(num))
    assert accepted.float().mean().item() == pytest.approx(1 / 1.5, abs=0.03)
    assert (tokens[accepted == 0, 0].bincount() / (accepted == 0).sum()).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


@pytest.mark.parametrize(("backend", "batch", "vocab"), [("torch", 64, 997), ("triton", 5, 40)])
def test_company_changes_no_bit(backend: str, batch: int, vocab: int) -> None:
    inputs = drafted(batch, 3, vocab)
    accepted, tokens = run(backend, inputs)
    for key in ("draft_probs", "target_probs"):
        inputs[key] = inputs[key].clone()
        inputs[key][::2] = torch.nan
    among = run(backend, inputs)
    assert (among[0][1::2], among[1][1::2]) == (accepted[1::2], tokens[1::2])
    alone = run(backend, {key: value[1:2] for key, value in inputs.items()})
    assert alone == [accepted[1:2], tokens[1:2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend: str) -> None:
    inputs = drafted(4, 2, 30)
    strided = {key: torch.stack([value, value], -1)[..., 0] for key, value in inputs.items()}
    assert run(backend, strided) == expected(inputs)


def test_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, real = drafted(4, 3, 20), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(77))
    assert run("triton", inputs) == expected(inputs)


NUM, VOCAB = 60_000, 6


def deviation(counts: torch.Tensor, share: torch.Tensor) -> float:
    """Standard deviations of chi-square by which `counts` miss `share`."""
    wanted = share.double() * counts.sum()
    statistic = float(((counts - wanted).square() / wanted).sum())
    return (statistic - (len(wanted) - 1)) / (2 * (len(wanted) - 1)) ** 0.5


def outcome(is_drawn: bool) -> tuple[float, float]:
    """(first token, first two tokens) against the target, over many seeds: deviations.

    The second token is drawn, where the first draft was rejected, as the next call would.
    """
    p = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.07, 0.03], [0.05, 0.1, 0.15, 0.2, 0.2, 0.3], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    q = torch.tensor([[0.10, 0.15, 0.20, 0.25, 0.20, 0.10], [0.30, 0.05, 0.15, 0.05, 0.40, 0.05]])
    seeds = torch.arange(NUM)
    if is_drawn:
        drafts = torch.stack([ops.sample(q[i].log().expand(NUM, VOCAB), seeds=seeds + (i + 1) * NUM) for i in range(2)], 1)
    else:
        drafts = torch.tensor([0, 5]).expand(NUM, 2)  # whatever it is: drafts in turn would hide a wrong residual
    probs = q.expand(NUM, 2, VOCAB) if is_drawn else None
    accepted, tokens = ops.speculative_verify(drafts, probs, p.expand(NUM, 3, VOCAB), seeds)
    assert 0 < (accepted == 0).sum() < NUM
    assert 0 < (accepted == 2).sum() < NUM
    first = deviation(tokens[:, 0].bincount(minlength=VOCAB), p[0])
    next_one = ops.sample(p[1].log().expand(NUM, VOCAB), seeds=seeds + 7 * NUM)
    second = torch.where(accepted > 0, tokens[:, 1], next_one)
    pair = (tokens[:, 0] * VOCAB + second).bincount(minlength=VOCAB**2)
    return first, deviation(pair, (p[0][:, None] * p[1]).flatten())


SURE = 5.0


@pytest.mark.parametrize("is_drawn", [True, False])
def test_what_comes_out_has_the_targets_distribution(is_drawn: bool) -> None:
    first, pair = outcome(is_drawn)
    assert first < SURE
    assert pair < SURE


def planted(residual: str) -> Any:
    """The torch form with another residual in place of max(p - q, 0)."""
    real = verify.pick

    def pick(units: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        pick.calls = 1 - pick.calls  # type: ignore[attr-defined]
        if pick.calls == 1:  # the residual comes first, the target second
            if residual == "p":
                return torch.full_like(real(units, u), -1)  # falls back to the target
            return real((units > 0).long(), u)  # "flat": any token that has a residual
        return real(units, u)

    pick.calls = 0  # type: ignore[attr-defined]
    return pick


@pytest.mark.parametrize("residual", ["p", "flat"])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_planted_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch, is_drawn: bool, residual: str) -> None:
    monkeypatch.setattr(verify, "pick", planted(residual))
    first, pair = outcome(is_drawn)
    assert first > SURE
    assert pair > SURE


def test_a_planted_wrong_acceptance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.uniform
    monkeypatch.setattr(verify, "uniform", lambda seeds, counter: real(seeds, counter) * 0.9)
    assert outcome(True)[0] > SURE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_probs": torch.zeros(2, 3, 5)}, r"must be float \[batch, g \+ 1, vocab\]"),
        ({"target_probs": torch.zeros(2, 4, 5, dtype=torch.int64)}, "must be float"),
        ({"target_probs": torch.zeros(2, 4, 0)}, "1 to"),
        ({"draft_probs": torch.zeros(2, 3, 4)}, r"draft_probs must be float \[2, 3, 5\]"),
        ({"draft_tokens": torch.zeros(2, 3)}, "draft_tokens must be integers"),
        ({"draft_tokens": torch.zeros(2, dtype=torch.int64)}, "must be float"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds"),
    ],
)
def test_what_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ops.speculative_verify(**{**drafted(2, 3, 5), **change})


@pytest.mark.parametrize("g", [0, 3])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_kernel(g: int, is_drawn: bool) -> None:
    inputs = drafted(8, g, 21)
    seeds = inputs.pop("seeds")
    given = {**inputs, "draft_tokens": inputs["draft_tokens"].int()}
    if not is_drawn:
        given["draft_probs"], inputs["draft_probs"] = torch.empty(8, 0, 21), None
    got = registry.get("speculative_verify").run(**given, seed=seeds.double())
    accepted, tokens = reference.speculative_verify(**inputs, seeds=seeds)
    assert got["num_accepted"].tolist() == accepted.tolist()
    assert got["tokens"].tolist() == tokens.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("is_drawn", [True, False])
@pytest.mark.parametrize(("batch", "g", "vocab"), [(1, 1, 1), (64, 4, 131), (16, 7, 128_256)])
def test_on_a_gpu(batch: int, g: int, vocab: int, is_drawn: bool) -> None:
    inputs = drafted(batch, g, vocab)
    inputs["draft_probs"] = inputs["draft_probs"] if is_drawn else None
    on_device = {key: None if value is None else value.cuda() for key, value in inputs.items()}
    ops.speculative_verify(**on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.speculative_verify(**on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backends.ran()["speculative_verify", "cuda"] == "triton"
    assert [part.tolist() for part in got] == run("torch", inputs)
