"""sample: against its reference, transformers' warpers and exact distributions; alone, in company and among bad rows."""

from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, backends, ops, registry
from penstock.kernels.sampling import draw, reference, thresholds
from penstock.kernels.sampling.noise import uniform

BACKENDS = ["torch", "triton"]
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-k beyond": {"top_k": 10**9},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rows(num_rows: int, vocab: int, spread: float = 3.0) -> dict[str, torch.Tensor]:
    return {"logits": torch.randn(num_rows, vocab) * spread, "seeds": torch.arange(num_rows) * 7919 - 3}


def per_row(num_rows: int) -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.rand(num_rows) * (torch.arange(num_rows) % 4 > 0),
        "top_k": torch.randint(0, 12, (num_rows,)) * (torch.arange(num_rows) % 3 > 0),
        "top_p": torch.rand(num_rows).clamp_min(0.1).masked_fill(torch.arange(num_rows) % 5 == 0, 1.0),
        "min_p": torch.rand(num_rows) * 0.3,
    }


def run(backend: str, inputs: dict[str, torch.Tensor], **parameters: Any) -> torch.Tensor:
    with backends.forced(backend):
        return ops.sample(**inputs, **parameters)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("num_rows", "vocab"), [(0, 5), (1, 1), (31, 7), (9, 131), (3, 9001)])
def test_reference(num_rows: int, vocab: int, name: str) -> None:
    inputs = rows(num_rows, vocab)
    expected = reference.sample(**inputs, **FILTERS[name])
    assert run("torch", inputs, **FILTERS[name]).tolist() == expected.tolist()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("num_rows", "vocab"), [(2, 1), (3, 131), (1, 4099)])
def test_the_form_for_gpus_agrees_in_the_interpreter(num_rows: int, vocab: int, name: str) -> None:
    inputs = rows(num_rows, vocab)
    expected = reference.sample(**inputs, **FILTERS[name])
    assert run("triton", inputs, **FILTERS[name]).tolist() == expected.tolist()


@pytest.mark.parametrize(("backend", "num_rows", "vocab"), [("torch", 200, 300), ("torch", 7, 50_021), ("triton", 10, 37)])
def test_parameters_may_differ_by_row(backend: str, num_rows: int, vocab: int) -> None:
    inputs, parameters = rows(num_rows, vocab), per_row(num_rows)
    assert run(backend, inputs, **parameters).tolist() == reference.sample(**inputs, **parameters).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_and_equal_scores(backend: str, dtype: torch.dtype) -> None:
    inputs = rows(3, 200)
    inputs["logits"] = inputs["logits"].to(dtype)  # the short ones have many equal scores
    for parameters in ({"top_k": 7}, {"top_p": 0.7}):
        assert run(backend, inputs, **parameters).tolist() == reference.sample(**inputs, **parameters).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits(backend: str) -> None:
    inputs = rows(3, 64)
    for view in (inputs["logits"].T.contiguous().T, torch.stack([inputs["logits"]] * 2, 2)[:, :, 1]):
        got = run(backend, {**inputs, "logits": view}, top_k=9)
        assert got.tolist() == run("torch", inputs, top_k=9).tolist()


@pytest.mark.parametrize(("backend", "num_rows", "vocab"), [("torch", 40, 9973), ("triton", 4, 300)])
def test_company_changes_no_bit(backend: str, num_rows: int, vocab: int) -> None:
    inputs, parameters = rows(num_rows, vocab, 1.0), per_row(num_rows)
    together = run(backend, inputs, **parameters)
    logits = inputs["logits"].clone()
    logits[::2] = torch.nan
    among = run(backend, {**inputs, "logits": logits}, **parameters)
    assert among[1::2].tolist() == together[1::2].tolist()
    assert set(among[::2].tolist()) == {-1}
    for i in range(1, num_rows, 6):
        alone = {key: value[i : i + 1] for key, value in {**inputs, **parameters}.items()}
        with backends.forced(backend):
            assert ops.sample(**alone).tolist() == [together[i]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_rows_without_a_distribution(backend: str, name: str) -> None:
    inf, nan = torch.inf, torch.nan
    logits = [[nan, 1.0, 2.0], [1.0, inf, 0.0], [-inf] * 3, [nan] * 3, [-inf, 3.0, -inf], [2.0, 1.0, nan], [1e38, 2e38, 0.0]]
    inputs = {"logits": torch.tensor(logits), "seeds": torch.arange(7)}
    assert run(backend, inputs, **FILTERS[name]).tolist() == [-1, -1, -1, -1, 1, -1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_lowest_of_equals(backend: str) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [1e-39, 2e-39, 2e-39, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    got = run(backend, {"logits": logits, "seeds": torch.arange(3)}, temperature=torch.zeros(3), top_k=3)
    assert got.tolist() == [1, 1, 0]


def test_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = rows(2, 150)
    expected = reference.sample(**inputs, top_p=0.9, top_k=40)
    real = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        out = real(*size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert run("triton", inputs, top_p=0.9, top_k=40).tolist() == expected.tolist()


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """transformers' distribution."""
    from transformers.generation import logits_process

    scores: Any = logits_process.TemperatureLogitsWarper(temperature)(None, logits)
    scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    return torch.as_tensor(logits_process.MinPLogitsWarper(min_p)(None, scores)).double().softmax(1)


@pytest.mark.parametrize("parameters", [(0.7, 30, 0.9, 0.01), (1.0, 500, 0.5, 0.0), (2.0, 3, 0.99, 0.3), (1.0, 1, 1.0, 0.0)])
def test_transformers_has_the_same_distribution(parameters: tuple[float, int, float, float]) -> None:
    logits = torch.randn(20, 500) * 3
    expected = warped(logits, *parameters)
    names = ("temperature", "top_k", "top_p", "min_p")
    got = torch.stack([reference.probabilities(row, *parameters) for row in logits])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    draws = ops.sample(logits, seeds=torch.arange(20), **dict(zip(names, parameters, strict=True)))  # type: ignore[arg-type]
    assert (expected.gather(1, draws[:, None]) > 0).all()


def chi_square(tokens: torch.Tensor, share: torch.Tensor) -> float:
    """Standard deviations by which the counts of `tokens` miss `share`; infinite if one has no share."""
    expected = share * len(tokens)
    counts = torch.bincount(tokens, minlength=len(share)).double()
    if (counts[expected == 0] > 0).any():
        return torch.inf
    is_large = expected >= 5  # the others count as one
    expected = torch.cat([expected[is_large], expected[~is_large].sum()[None]])
    counts = torch.cat([counts[is_large], counts[~is_large].sum()[None]])
    statistic = ((counts - expected).square() / expected.clamp_min(1e-9)).sum()
    degrees = int((expected > 1e-6).sum()) - 1
    return float((statistic - degrees) / (2 * max(degrees, 1)) ** 0.5)


SURE = 5.0
"""Deviations that a right sampler does not reach (p < 1e-4 for these many cells), and a wrong one passes by far."""


@pytest.mark.parametrize("name", FILTERS)
def test_many_draws_have_the_distribution(name: str) -> None:
    logits, num = torch.randn(50) * 2, 40_000
    tokens = ops.sample(logits.expand(num, 50), seeds=torch.arange(num), **FILTERS[name])
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **FILTERS[name]}
    assert chi_square(tokens, reference.probabilities(logits, *given.values())) < SURE


def test_draws_in_the_interpreter_have_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, 0.5])
    tokens = run("triton", {"logits": logits.expand(80, 6), "seeds": torch.arange(80)}, min_p=0.06)
    assert chi_square(tokens, reference.probabilities(logits, 1.0, 0, 1.0, 0.06)) < SURE


def test_this_statistic_sees_planted_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, num = torch.randn(50), 40_000
    batch = {"logits": logits.expand(num, 50), "seeds": torch.arange(num), "top_p": 0.8}
    share = reference.probabilities(logits, 1.0, 0, 0.8, 0.0)
    assert (share > 0).sum() > 10
    assert chi_square(ops.sample(**batch), share) < SURE
    assert chi_square(ops.sample(**batch, temperature=0.95), share) > SURE
    least_score = thresholds._least_score
    with monkeypatch.context() as patch:  # the token that crosses top_p is lost
        patch.setattr(thresholds, "_least_score", lambda *given: least_score(*given) + 1e-6)
        assert chi_square(ops.sample(**batch), share) > SURE
    with monkeypatch.context() as patch:  # uniform numbers that are not
        patch.setattr(thresholds, "pick", lambda units, u: draw.pick(units, u * 0.98))
        assert chi_square(ops.sample(**batch), share) > SURE


def test_seeds_in_a_row_are_independent() -> None:
    u = uniform(torch.arange(100_000))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004
    assert abs(u.var() - 1 / 12) < 0.001
    for other in (uniform(torch.arange(1, 100_001)), uniform(torch.arange(100_000), 1), uniform(torch.arange(100_000) << 32)):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 0.015


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2)}, "logits must be float"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits must be float"),
        ({"logits": torch.zeros(2, 0)}, "logits must be float"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be int64 \[2\]"),
        ({"seeds": torch.zeros(2)}, "seeds must be integers"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0; got -0.1"),
        ({"temperature": torch.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p must be a number above 0, 1 at most"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": torch.tensor([0.5, torch.nan])}, "min_p must be .* in every row"),
        ({"top_p": torch.ones(3)}, r"top_p must be a number or \[2\]"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"logits": torch.zeros(2, 3), "seeds": torch.arange(2), **change}
    with pytest.raises(InvalidInput, match=message):
        ops.sample(**given)


def test_the_kernel() -> None:
    inputs, kernel = rows(40, 50), registry.get("sample")
    parameters = per_row(40)
    wide = {key: value.double() for key, value in parameters.items()}
    got = kernel.run(logits=inputs["logits"], seed=inputs["seeds"].double(), **wide)["out"]
    assert got.tolist() == reference.sample(**inputs, **parameters).tolist()
    largest = torch.tensor([2.0**53, -(2.0**53)], dtype=torch.float64)
    got = kernel.run(logits=inputs["logits"][:2], seed=largest, **{key: value[:2] for key, value in wide.items()})["out"]
    whole = torch.tensor([2**53, -(2**53)])
    cut = {key: value[:2] for key, value in parameters.items()}
    assert got.tolist() == reference.sample(inputs["logits"][:2], seeds=whole, **cut).tolist()


def test_the_kernel_refuses() -> None:
    given = {key: value.double() for key, value in per_row(2).items()}
    kernel = registry.get("sample")
    with pytest.raises(InvalidInput, match="must hold a finite number"):
        kernel.run(logits=torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), seed=torch.zeros(2, dtype=torch.float64), **given)
    with pytest.raises(InvalidInput, match="whole number"):
        kernel.run(logits=torch.zeros(2, 2), seed=torch.tensor([1.0, 0.5], dtype=torch.float64), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (64, 131), (7, 128_256), (64, 32_000)])
def test_on_a_gpu(num_rows: int, vocab: int, name: str) -> None:
    inputs = rows(num_rows, vocab)
    on_device = {key: value.cuda() for key, value in inputs.items()}
    got = ops.sample(**on_device, **FILTERS[name])
    assert backends.ran()["sample", "cuda"] == "triton"
    # The last bits of exp differ, so that one draw in some hundred thousand may fall to the neighbour.
    assert (got.cpu() != ops.sample(**inputs, **FILTERS[name])).sum() <= num_rows // 32
    alone = ops.sample(on_device["logits"][-1:], seeds=on_device["seeds"][-1:], **FILTERS[name])
    assert alone.tolist() == got[-1:].tolist()


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    inputs = {key: value.cuda() for key, value in rows(8, 1000).items()}
    parameters = {key: value.cuda() for key, value in per_row(8).items()}
    ops.sample(**inputs, **parameters)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sample(**inputs, **parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
