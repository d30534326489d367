"""The mixture of experts against its definition, in every form, on awkward sizes, among poisoned neighbours and memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels import InvalidInput, LoadError, backends, ops, registry
from penstock.kernels.moe import fill, grouped, routing
from penstock.kernels.moe.reference import moe as reference
from penstock.kernels.moe.sorted_gemm import feed_forward

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
HIDDEN, INTER = 24, 40
NUMPY_WARNS = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter, of NaN


CPU_FORMS = ["torch"]
CPU_FORMS += ["triton"] if backends.has_triton(torch.device("cpu")) else []
CPU_FORMS += ["grouped_mm"] if hasattr(torch.nn.functional, "grouped_mm") else []
FORM_DTYPES = {
    "torch": tuple(TOLERANCE),
    "triton": (torch.float32, torch.bfloat16),  # its interpreter is slow
    "grouped_mm": (torch.bfloat16,),
}
FORMS = [(name, dtype) for name in CPU_FORMS for dtype in FORM_DTYPES[name]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CPU_FORMS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form in turn, forced; grouped_mm takes bfloat16 only."""
    with backends.forced(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, or a large negative number."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min // 2)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: spoil(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: spoil(new_empty(*args, **kwargs)))


def make(experts: int, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, inter: int = INTER) -> Weights:
    return (
        torch.randn(experts, hidden).to(dtype),
        (torch.randn(experts, 2 * inter, hidden) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, inter) / inter**0.5).to(dtype),
    )


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.float() - expected.float()).abs().amax(1)
    assert (error <= TOLERANCE[got.dtype] * expected.float().abs().amax(1)).all(), error


@pytest.mark.parametrize(("backend", "dtype"), FORMS, indirect=["backend"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 5, 2), (1, 1, 1), (1, 8, 2), (7, 5, 1), (7, 5, 5), (7, 8, 8), (64, 1, 1), (64, 5, 2), (64, 8, 1)],
)
@pytest.mark.usefixtures("poisoned")
def test_moe(backend: str, tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    x, weights = torch.randn(tokens, HIDDEN).to(dtype), make(experts, dtype)
    for renormalize in (True, False) if tokens == 7 else (True,):
        got = ops.moe(x, *weights, top_k=top_k, renormalize=renormalize)
        assert_near(got, reference(x, *weights, top_k=top_k, renormalize=renormalize))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "dtype"), FORMS, indirect=["backend"])
def test_one_expert_receives_everything(backend: str, dtype: torch.dtype) -> None:
    router_w, *experts = make(5, dtype)
    x = torch.randn(37, HIDDEN).to(dtype)
    x[:, 0] = 4.0
    router_w.zero_()[3, 0] = 30.0
    assert_near(ops.moe(x, router_w, *experts, top_k=1), reference(x, router_w, *experts, top_k=1))
    # The second choice is then the lowest of four equal ones: experts 1, 2 and 4 receive nothing.
    for unused in (1, 2, 4):
        experts[0][unused] = torch.nan
    got = ops.moe(x, router_w, *experts, top_k=2)
    assert got.isfinite().all()
    assert_near(got, reference(x, router_w, *experts, top_k=2))


@pytest.mark.parametrize("hidden", [1, 13])
@pytest.mark.parametrize("inter", [1, 7])
def test_odd_sizes(hidden: int, inter: int) -> None:
    x, weights = torch.randn(5, hidden), make(3, hidden=hidden, inter=inter)
    for name in CPU_FORMS[:2]:
        with backends.forced(name):
            assert_near(ops.moe(x, *weights, top_k=2), reference(x, *weights, top_k=2))


def test_strided_inputs() -> None:
    x = torch.randn(HIDDEN, 9).T
    router_w, w_gate_up, w_down = make(4)
    strided = router_w.T.contiguous().T, w_gate_up.transpose(1, 2).contiguous().transpose(1, 2), w_down.flip(2).flip(2)
    for name in CPU_FORMS[:2]:
        with backends.forced(name):
            assert_near(ops.moe(x, *strided, top_k=2), reference(x, router_w, w_gate_up, w_down, top_k=2))


@NUMPY_WARNS
def test_a_nan_token_stays_alone(backend: str) -> None:
    x, weights = torch.randn(21, HIDDEN).bfloat16(), make(5, torch.bfloat16)
    clean = ops.moe(x, *weights, top_k=2)
    x[4], x[20] = torch.nan, torch.inf
    got = ops.moe(x, *weights, top_k=2)
    assert got[[4, 20]].isnan().any(1).all()
    kept = [i for i in range(21) if i not in (4, 20)]
    assert_near(got[kept], clean[kept])


def test_a_token_alone_and_in_company(backend: str) -> None:
    x, weights = torch.randn(40, HIDDEN).bfloat16(), make(8, torch.bfloat16)
    together = ops.moe(x, *weights, top_k=2)
    alone = torch.cat([ops.moe(x[i : i + 1], *weights, top_k=2) for i in (0, 17, 39)])
    assert_near(alone, together[[0, 17, 39]])


def test_equal_calls_give_equal_bits(backend: str) -> None:
    x, weights = torch.randn(50, HIDDEN).bfloat16(), make(5, torch.bfloat16)
    assert torch.equal(ops.moe(x, *weights, top_k=3), ops.moe(x, *weights, top_k=3))


@NUMPY_WARNS
def test_ties_go_to_the_lower_expert() -> None:
    x, router_w = torch.randn(6, HIDDEN), torch.zeros(7, HIDDEN)
    routes: list[Callable[..., tuple[torch.Tensor, torch.Tensor]]] = [routing.route]
    if "triton" in CPU_FORMS:
        from penstock.kernels.moe import triton_moe

        routes.append(triton_moe.route)
    for route in routes:
        weights, experts = route(x, router_w, 3, True)
        assert experts.tolist() == [[0, 1, 2]] * 6
        torch.testing.assert_close(weights, torch.full((6, 3), 1 / 3))
        weights, experts = route(x, torch.randn(7, HIDDEN), 7, False)
        assert (weights.diff(dim=1) <= 0).all()
        assert (experts.sort(1).values == torch.arange(7)).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        experts = route(torch.full((1, HIDDEN), torch.nan), torch.randn(7, HIDDEN), 2, True)[1]
        assert ((experts >= 0) & (experts < 7)).all()


def test_experts_elsewhere_are_left_alone() -> None:
    """Experts 0 to 4; the weights of 3 and 1 are at 0 and 2, those of the others are not here."""
    _, w_gate_up, w_down = make(3)
    x, experts = torch.randn(9, HIDDEN), torch.randint(0, 5, (9, 2))
    place = torch.tensor([3, 2, 3, 0, 3], dtype=torch.int32)
    is_here = torch.isin(experts.flatten(), torch.tensor([1, 3]))
    for name in CPU_FORMS[:2]:
        y = torch.full((18, HIDDEN), -7.0)
        fill(name, y, x, experts, w_gate_up, w_down, place)
        assert (y[~is_here] == -7.0).all()
        for pair in is_here.nonzero()[:, 0].tolist():
            at = int(place[experts.flatten()[pair]])
            expected = feed_forward(x[pair // 2][None], (w_gate_up[at],), w_down[at])
            torch.testing.assert_close(y[pair][None], expected, rtol=1e-4, atol=1e-5)


def test_grouped_mm_is_for_aligned_bfloat16() -> None:
    _, w_gate_up, w_down = make(2, torch.bfloat16)
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    assert grouped.can_group(x, w_gate_up, w_down) == hasattr(torch.nn.functional, "grouped_mm")
    assert not grouped.can_group(x.float(), w_gate_up.float(), w_down.float())
    _, w_gate_up, w_down = make(2, torch.bfloat16, inter=12)
    assert not grouped.can_group(x, w_gate_up, w_down)


@pytest.mark.parametrize("top_k", [0, 6, 10**9, True, 1.0, None])
def test_top_k_is_refused(top_k: object) -> None:
    with pytest.raises(InvalidInput, match="top_k must be an integer from 1 to 5"):
        ops.moe(torch.zeros(1, HIDDEN), *make(5), top_k=top_k)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    x, (router_w, w_gate_up, w_down) = torch.zeros(2, HIDDEN), make(5)
    with pytest.raises(InvalidInput, match=r"x must be \[tokens, hidden\]"):
        ops.moe(x[0], router_w, w_gate_up, w_down, top_k=1)
    with pytest.raises(InvalidInput, match=r"with 5 experts and hidden 24; got \[4, 80, 24\]"):
        ops.moe(x, router_w, w_gate_up[1:], w_down, top_k=1)
    with pytest.raises(InvalidInput, match="one dtype"):
        ops.moe(x, router_w.double(), w_gate_up, w_down, top_k=1)
    with pytest.raises(InvalidInput, match="one dtype"):
        ops.moe(x, router_w, w_gate_up.half(), w_down, top_k=1)


def save(path: Path, weights: Weights) -> str:
    save_file(dict(zip(("router_w", "w_gate_up", "w_down"), weights, strict=True)), path)
    return str(path)


def test_the_layer_as_a_kernel(tmp_path: Path) -> None:
    weights = make(5)
    layer = registry.get("moe", file=save(tmp_path / "moe.safetensors", weights), top_k=2)
    assert not layer.is_loaded
    layer.load("cpu")
    x = torch.randn(12, HIDDEN)
    x[3:5] = torch.nan  # a neighbour's
    out = layer.run(x=x, x_offsets=torch.tensor([0, 3, 5, 5, 12]))["out"]
    assert [len(rows) for rows in out] == [3, 2, 0, 7]
    assert_near(torch.cat([out[0], out[3]]), reference(x[[0, 1, 2, *range(5, 12)]], *weights, top_k=2))
    assert layer.run(x=x[:3].double(), x_offsets=torch.tensor([0, 3]))["out"][0].dtype == torch.float64
    with pytest.raises(InvalidInput, match=r"x must be \[rows, 24\]"):
        layer.run(x=torch.zeros(1, 7), x_offsets=torch.tensor([0, 1]))
    layer.unload()
    assert not layer.is_loaded


def test_the_layer_refuses_files(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--option moe\.file="):
        registry.get("moe").load("cpu")
    with pytest.raises(LoadError, match="cannot be read"):
        registry.get("moe", file=str(tmp_path / "none")).load("cpu")
    router_w, w_gate_up, w_down = make(5)
    file = save(tmp_path / "moe.safetensors", (router_w[1:].clone(), w_gate_up, w_down))
    with pytest.raises(LoadError, match="with 4 experts"):
        registry.get("moe", file=file).load("cpu")
    file = save(tmp_path / "moe.safetensors", (router_w, w_gate_up, w_down))
    with pytest.raises(LoadError, match="top_k must be an integer from 1 to 5"):
        registry.get("moe", file=file, top_k=9).load("cpu")
    with pytest.raises(registry.RegistryError, match="top_k must be a positive integer"):
        registry.get("moe", top_k=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (64, 32, 4), (1000, 8, 2), (1000, 128, 8)])
def test_moe_on_cuda(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    x, weights = torch.randn(tokens, 256).to(dtype), make(experts, dtype, hidden=256, inter=160)
    on_device = [w.cuda() for w in weights]
    chosen = torch.arange(0, tokens, max(tokens // 20, 1))
    expected = reference(x[chosen], *weights, top_k=top_k)
    for name in ("torch", "triton", "grouped_mm"):
        if name == "grouped_mm" and not grouped.can_group(x.cuda(), on_device[1], on_device[2]):
            continue
        with backends.forced(name):
            got = ops.moe(x.cuda(), *on_device, top_k=top_k)
            assert torch.equal(got, ops.moe(x.cuda(), *on_device, top_k=top_k))
        assert_near(got.cpu()[chosen], expected)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x, weights = torch.randn(33, HIDDEN).bfloat16().cuda(), [w.cuda() for w in make(5, torch.bfloat16)]
    for name in ("triton", "grouped_mm"):
        if name == "grouped_mm" and not grouped.can_group(x, weights[1], weights[2]):
            continue
        with backends.forced(name):
            ops.moe(x, *weights, top_k=2)  # compiled here
            torch.cuda.set_sync_debug_mode("error")
            try:
                ops.moe(x, *weights, top_k=2)
            finally:
                torch.cuda.set_sync_debug_mode("default")
