"""Dense and packed attention against their references: causal alignment, grouped heads, neighbours, both backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, backends, ops, registry
from penstock.kernels.attention import reference, sdpa

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}
Heads = tuple[int, int]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""
    for name in ("empty", "empty_like"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)

        def poisoned(*args: Any, _make: Callable[..., torch.Tensor] = make, **kwargs: Any) -> torch.Tensor:
            made = _make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


def assert_near(got: torch.Tensor, expected: torch.Tensor, v: torch.Tensor) -> None:
    """Within the stated tolerance: a share of the largest value."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.numel():
        largest = float(v.double().abs().max()) if v.numel() else 0.0
        error = float((got.double() - expected.double()).abs().max())  # NaN is within nothing
        assert error <= TOLERANCE[got.dtype] * largest


def qkv(
    shape: tuple[int, ...], keys: int, heads: Heads, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """q `[B, Hq, Lq, D]` of shape (B, Lq), k and v `[B, Hkv, keys, D]`."""
    b, queries = shape
    sizes = ((b, heads[0], queries, d), (b, heads[1], keys, d), (b, heads[1], keys, d))
    return tuple(torch.randn(size, device=device).to(dtype) for size in sizes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "d"), [((1, 1), 16), ((4, 2), 80), ((8, 1), 32), ((3, 3), 128)])
def test_dense(dtype: torch.dtype, heads: Heads, d: int, device: torch.device) -> None:
    for queries, keys in ((1, 1), (1, 127), (17, 17), (127, 127), (17, 127), (127, 17), (3, 0), (0, 3)):
        q, k, v = qkv((2, queries), keys, heads, d, dtype, device)
        for causal in (False, True):
            assert_near(ops.attention(q, k, v, causal=causal), reference.attention(q, k, v, causal=causal), v)


def test_causal_is_aligned_with_the_last_query_and_the_last_key(device: torch.device) -> None:
    v = torch.eye(5, device=device)[None, None]  # the output is the row of weights
    for num_queries, expected in ((2, [4, 5]), (5, [1, 2, 3, 4, 5]), (7, [0, 0, 1, 2, 3, 4, 5])):
        q, k = torch.zeros(1, 1, num_queries, 5, device=device), torch.zeros(1, 1, 5, 5, device=device)
        weights = ops.attention(q, k, v, causal=True)[0, 0]
        assert (weights > 0).sum(1).tolist() == expected
        torch.testing.assert_close(weights.sum(1).tolist(), [float(seen > 0) for seen in expected])


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_dense_of_strided_views_and_a_scale(heads: Heads, device: torch.device) -> None:
    q, _, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv((2, 19), 31, heads, 48, torch.float32, device))
    wide = torch.randn(2, heads[1], 31, 96, device=device)[..., ::2]
    for causal in (False, True):
        expected = reference.attention(q, wide, v, causal=causal, scale=0.3)
        assert_near(ops.attention(q, wide, v, causal=causal, scale=0.3), expected, v)


def test_masks_of_many_queries_are_made_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(sdpa, "TILE_QUERIES", 7)
    q, k, v = qkv((2, 30), 41, (4, 2), 16, torch.float32, torch.device("cpu"))
    assert_near(ops.attention(q, k, v, causal=True), reference.attention(q, k, v, causal=True), v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (300, 333), (1, 777)])
def test_every_kernel_of_cuda_agrees(dtype: torch.dtype, heads: Heads, queries: int, keys: int) -> None:
    q, k, v = qkv((2, queries), keys, heads, 128, dtype, torch.device("cuda"))
    ran = set()
    for name in ("cudnn", "flash", "efficient", "math", "torch"):
        for causal in (False, True):
            try:
                with backends.forced(name):
                    got = ops.attention(q, k, v, causal=causal)
            except backends.BackendError:  # it does not take this dtype, or this mask
                continue
            ran.add(name)
            assert_near(got, reference.attention(q, k, v, causal=causal), v)
    assert {"math", "torch"} < ran


def test_dense_of_poisoned_neighbours(device: torch.device) -> None:
    q, k, v = qkv((3, 17), 29, (4, 2), 32, torch.float32, device)
    alone = ops.attention(q[1:2], k[1:2], v[1:2], causal=True)
    for x in (q, k, v):
        x[0] = x[2] = torch.nan
    assert_near(registry.get("attention").run(q=q, k=k, v=v, causal=True)["out"][1:2], alone, v[1])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"causal": 1}, "causal must be True or False"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": True}, "scale must be a finite number"),
        ({"q": torch.zeros(1, 3, 2, 8)}, "multiple"),
        ({"q": torch.zeros(1, 4, 2, 9)}, "last dimension"),
        ({"v": torch.zeros(1, 2, 4, 8)}, "k and v one shape"),
        ({"q": torch.zeros(1, 4, 2, 8).half()}, "one float dtype"),
        ({"q": torch.zeros(2, 4, 2, 8)}, "a batch of 2"),
        ({"k": torch.zeros(1, 0, 3, 8), "v": torch.zeros(1, 0, 3, 8)}, "4 and 0"),
    ],
)
def test_dense_refuses(changes: dict[str, Any], match: str) -> None:
    given = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 2, 3, 8), "v": torch.zeros(1, 2, 3, 8), **changes}
    with pytest.raises(InvalidInput, match=match):
        ops.attention(**given)


LENGTHS = ([1, 0, 17, 40, 40, 3, 70, 1, 0], [17, 5, 0, 40, 40, 33, 20, 1, 0])


def packed(
    lengths: tuple[list[int], list[int]], heads: Heads, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """q, k, v, cu_seqlens_q (int64), cu_seqlens_k (int32)."""
    bounds_q, bounds_k = (torch.tensor([0, *part], device=device).cumsum(0) for part in lengths)
    q = torch.randn(sum(lengths[0]), heads[0], d, device=device).to(dtype)
    k, v = (torch.randn(sum(lengths[1]), heads[1], d, device=device).to(dtype) for _ in range(2))
    return q, k, v, bounds_q, bounds_k.int()


def run_varlen(backend: str, *args: torch.Tensor, **options: Any) -> torch.Tensor:
    """`attention_varlen` with a backend; "" is what it chooses itself."""
    if not backend:
        return ops.attention_varlen(*args, **options)
    if backend == "triton" and not backends.has_triton(args[0].device):
        pytest.skip("Triton does not run here")
    with backends.forced(backend):
        return ops.attention_varlen(*args, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "d"), [((1, 1), 16), ((4, 2), 80), ((8, 1), 32), ((3, 3), 128)])
def test_varlen(dtype: torch.dtype, heads: Heads, d: int, device: torch.device) -> None:
    q, k, v, bounds_q, bounds_k = packed(LENGTHS, heads, d, dtype, device)
    for causal in (False, True):
        expected = reference.attention_varlen(q, k, v, bounds_q, bounds_k, causal=causal, scale=0.2)
        for backend in ("", "torch"):
            assert_near(run_varlen(backend, q, k, v, bounds_q, bounds_k, causal=causal, scale=0.2), expected, v)


@pytest.mark.parametrize(
    ("dtype", "heads", "d", "causal"),
    [
        (torch.float32, (1, 1), 80, False),
        (torch.float32, (2, 1), 16, True),
        (torch.float16, (2, 1), 48, True),
        (torch.bfloat16, (2, 1), 16, True),
    ],
)
def test_varlen_in_triton(dtype: torch.dtype, heads: Heads, d: int, causal: bool, device: torch.device) -> None:
    q, k, v, bounds_q, bounds_k = packed(LENGTHS, heads, d, dtype, device)
    expected = reference.attention_varlen(q, k, v, bounds_q, bounds_k, causal=causal)
    assert_near(run_varlen("triton", q, k, v, bounds_q, bounds_k, causal=causal), expected, v)


@pytest.mark.parametrize("backend", ["", "torch", "triton"])
def test_varlen_of_strided_views_of_one_projection(backend: str, device: torch.device) -> None:
    bounds = torch.tensor([0, 20, 33], device=device)
    q, k, v = torch.randn(33, 3, 2, 32, device=device).unbind(1)
    expected = reference.attention_varlen(q, k, v, bounds, causal=True)
    assert_near(run_varlen(backend, q, k, v, bounds, causal=True), expected, v)
    wide = torch.randn(33, 2, 64, device=device)[..., ::2]
    assert_near(run_varlen(backend, q, wide, v, bounds), reference.attention_varlen(q, wide, v, bounds), v)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # a maximum in the interpreter
@pytest.mark.parametrize("backend", ["", "torch", "triton"])
def test_varlen_among_poisoned_neighbours(backend: str, device: torch.device) -> None:
    lengths = ([13, 21, 40], [30, 21, 9])
    q, k, v, bounds_q, bounds_k = packed(lengths, (2, 1), 24, torch.float32, device)
    mine, keys = slice(13, 34), slice(30, 51)
    alone = reference.attention_varlen(q[mine], k[keys], v[keys], torch.tensor([0, 21]), causal=True)
    for x, part in ((q, mine), (k, keys), (v, keys)):
        kept = x[part].clone()
        x.fill_(torch.nan)[part] = kept
    assert_near(run_varlen(backend, q, k, v, bounds_q, bounds_k, causal=True)[mine], alone, v[keys])


@pytest.mark.parametrize("backend", ["", "triton"])
@pytest.mark.parametrize("lengths", [([0, 0], [3, 0]), ([3, 0], [0, 0]), ([0], [0])])
def test_varlen_of_nothing(lengths: tuple[list[int], list[int]], backend: str, device: torch.device) -> None:
    q, k, v, bounds_q, bounds_k = packed(lengths, (2, 1), 16, torch.float32, device)
    got = run_varlen(backend, q, k, v, bounds_q, bounds_k)
    assert torch.equal(got, torch.zeros_like(q))


@pytest.mark.gpu
def test_varlen_on_cuda_runs_flash_attention_and_can_be_captured() -> None:
    lengths = ([100, 300, 0, 77], [200, 300, 10, 77])
    q, k, v, bounds_q, bounds_k = packed(lengths, (8, 2), 64, torch.bfloat16, torch.device("cuda"))
    call: Callable[[], torch.Tensor] = lambda: ops.attention_varlen(  # noqa: E731
        q, k, v, bounds_q, bounds_k, causal=True, max_seqlen_q=300, max_seqlen_k=300
    )
    call()
    assert backends.ran()["attention_varlen", "cuda"] == "varlen_attn"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert_near(out, reference.attention_varlen(q, k, v, bounds_q, bounds_k, causal=True), v)


@pytest.mark.parametrize("bounds", [[0, 5, 3, 9], [1, 9], [0, 8], [0, -1, 9], [0, 10]])
def test_varlen_refuses_bounds(bounds: list[int]) -> None:
    x = torch.zeros(9, 2, 8)
    with pytest.raises(InvalidInput, match="must rise from 0 to 9"):
        ops.attention_varlen(x, x, x, torch.tensor(bounds))


@pytest.mark.parametrize("bounds", [torch.tensor([0.0, 9.0]), torch.tensor(9), torch.zeros(0, dtype=torch.int64)])
def test_varlen_refuses_what_are_no_bounds(bounds: torch.Tensor) -> None:
    x = torch.zeros(9, 2, 8)
    with pytest.raises(InvalidInput, match="cu_seqlens_q must be int32 or int64"):
        ops.attention_varlen(x, x, x, bounds)


def test_varlen_tasks(device: torch.device) -> None:
    q, k, v, bounds_q, bounds_k = packed(LENGTHS, (4, 2), 24, torch.float32, device)
    kernel = registry.get("attention_varlen")
    offsets = {"q_offsets": bounds_q, "k_offsets": bounds_k.long(), "v_offsets": bounds_k.long()}
    got = kernel.run(q=q, k=k, v=v, **offsets, causal=True)["out"]
    assert [len(part) for part in got] == LENGTHS[0]
    assert_near(torch.cat(got), reference.attention_varlen(q, k, v, bounds_q, bounds_k, causal=True), v)
    swapped = torch.tensor([0, 5, 22, *offsets["v_offsets"].tolist()[3:]], device=device)  # as many keys, of other tasks
    with pytest.raises(InvalidInput, match="k and v of a task must have the same length"):
        kernel.run(q=q, k=k, v=v, **{**offsets, "v_offsets": swapped})
