"""Decoding over a paged cache = contiguous attention, whatever lies in unused blocks, slots and table entries."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from penstock.kernels import InvalidInput, backends, ops, registry
from penstock.kernels.attention import paged, reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}
LENGTHS = [1, 0, 17, 127, 16, 33]
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # a maximum in the interpreter


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "triton" and not backends.has_triton(device):
        pytest.skip("Triton does not run here")
    return str(request.param)


@dataclass
class Paged:
    """Sequences in a cache whose unused blocks and slots are NaN and whose table is garbage beyond the contexts."""

    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    caches: dict[str, torch.Tensor]
    block_table: torch.Tensor
    context_lens: torch.Tensor
    slots: list[torch.Tensor]

    def decode(self, **options: Any) -> torch.Tensor:
        return ops.paged_decode(self.q, block_table=self.block_table, context_lens=self.context_lens, **self.caches, **options)

    def expected(self, **options: Any) -> torch.Tensor:
        return reference.paged_decode(
            self.q, block_table=self.block_table, context_lens=self.context_lens, **self.caches, **options
        )


def paged_of(
    lengths: list[int],
    heads: tuple[int, int],
    d: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
) -> Paged:
    blocks = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks) + 3
    free = torch.randperm(num_blocks).tolist()
    table = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)[torch.randint(3, (len(lengths), max(blocks) + 2))]
    slots = []
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        mine = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
        table[row, :count] = mine
        slots.append((mine[:, None] * block_size + torch.arange(block_size)).flatten()[:length].to(device))
    k, v = ([torch.randn(length, heads[1], d, device=device).to(dtype) for length in lengths] for _ in range(2))
    shape = (num_blocks, block_size, heads[1])
    caches = {f"{x}_cache": torch.full((*shape, d), torch.nan, device=device).to(cache_dtype or dtype) for x in "kv"}
    if cache_dtype is not None:
        caches |= {f"{x}_scale": torch.full(shape, torch.nan, device=device) for x in "kv"}
    ops.write_kv(torch.cat(k), torch.cat(v), slots=torch.cat(slots), **caches)
    q = torch.randn(len(lengths), heads[0], d, device=device).to(dtype)
    return Paged(q, k, v, caches, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), slots)


def assert_near(got: torch.Tensor, expected: torch.Tensor, largest: float) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    error = float((got.double() - expected.double()).abs().max())  # NaN is within nothing
    assert error <= TOLERANCE[got.dtype] * largest


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "d", "block_size"), [((2, 2), 16, 4), ((8, 1), 80, 16), ((4, 2), 128, 5)])
def test_paged_is_contiguous(
    dtype: torch.dtype, heads: tuple[int, int], d: int, block_size: int, backend: str, device: torch.device
) -> None:
    if dtype is torch.float64 and backend == "triton":
        pytest.skip("float64 has no Triton form")
    lengths = LENGTHS if backend == "torch" or device.type == "cuda" else [1, 0, 23, 50]
    case = paged_of(lengths, heads, d, block_size, dtype, device)
    with backends.forced(backend):
        got = case.decode(scale=0.2)
    for row, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        one = (x.transpose(0, 1)[None] for x in (k, v))
        expected = reference.attention(case.q[row, None, :, None], *one, scale=0.2)[0, :, 0]
        assert_near(got[row], expected, float(v.double().abs().max()) if len(v) else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_caches(dtype: torch.dtype, cache_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = paged_of([3, 0, 40], (4, 2), 24, 8, dtype, device, cache_dtype)
    case.v[0] *= 1e-4  # far below the others: a scale of its own keeps it
    ops.write_kv(case.k[0], case.v[0], slots=case.slots[0], **case.caches)
    with backends.forced(backend):
        got = case.decode()
    expected = case.expected()
    for row, v in enumerate(case.v):
        assert_near(got[row], expected[row], 1.01 * float(v.double().abs().max()) if len(v) else 0.0)
        step = 1 / 127 if cache_dtype is torch.int8 else 1 / 8
        if len(v):
            one = (x.transpose(0, 1)[None] for x in (case.k[row], v))
            exact = reference.attention(case.q[row, None, :, None], *one)[0, :, 0]
            assert_near((got[row] - exact) / (3 * step) * TOLERANCE[dtype], torch.zeros_like(exact), float(v.abs().max()))


def test_more_query_heads_than_one_program_takes(backend: str, device: torch.device) -> None:
    case = paged_of([5, 18], (70, 1), 16, 4, torch.float32, device)
    with backends.forced(backend):
        assert_near(case.decode(), case.expected(), 6.0)


def test_groups_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = paged_of([40, 3, 39, 1, 0, 64, 33, 8], (4, 2), 16, 8, torch.float32, torch.device("cpu"))
    block_bytes = case.caches["k_cache"][0].nbytes
    for padding, limit in ((0, 1 << 30), (block_bytes, 1 << 30), (1 << 30, 6 * block_bytes), (1 << 30, 1 << 30)):
        monkeypatch.setattr(paged, "MAX_PADDING_BYTES", padding)
        monkeypatch.setattr(paged, "MAX_GROUP_BYTES", limit)
        assert_near(case.decode(), case.expected(), 6.0)


def test_all_contexts_empty(backend: str, device: torch.device) -> None:
    case = paged_of([0, 0], (2, 1), 16, 4, torch.float32, device)
    with backends.forced(backend):
        assert torch.equal(case.decode(), torch.zeros_like(case.q))


def test_strided_inputs(backend: str, device: torch.device) -> None:
    case = paged_of([9, 22], (4, 2), 16, 4, torch.float32, device)
    expected = case.expected()
    case.caches = {name: torch.stack([x, x], 3)[:, :, :, 1] for name, x in case.caches.items()}
    case.block_table = case.block_table.T.contiguous().T.long()
    case.q = torch.stack([case.q, case.q], 2)[:, :, 0]
    with backends.forced(backend):
        assert_near(case.decode(), expected, 6.0)


@pytest.mark.parametrize(
    ("block", "length"), [(7, 3), (-1, 3), (2**31 - 1, 3), (0, 9), (0, -1)], ids=["beyond", "negative", "far", "long", "minus"]
)
def test_what_is_out_of_range_is_refused_or_nan(block: int, length: int, backend: str, device: torch.device) -> None:
    case = paged_of([6, 5], (2, 1), 16, 4, torch.float32, device)  # 7 blocks, two of them per row in a table of four
    case.block_table = case.block_table[:, :2].contiguous()
    expected = case.expected()
    case.block_table[1, 0] = block
    case.context_lens[1] = length
    with backends.forced(backend):
        if backend == "torch":
            with pytest.raises(InvalidInput, match="row 1"):
                case.decode()
        else:
            got = case.decode()
            assert_near(got[0], expected[0], 6.0)
            assert got[1].isnan().all()


@pytest.mark.gpu
def test_a_captured_graph_serves_other_contexts() -> None:
    torch.manual_seed(0)
    case = paged_of([40, 3, 129], (8, 2), 64, 16, torch.bfloat16, torch.device("cuda"))
    case.decode()
    assert backends.ran()["paged_decode", "cuda"] == "triton"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.decode()
    for lengths in ([40, 3, 129], [1, 0, 100], [0, 0, 0]):
        case.context_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert_near(out, case.expected(), 6.0)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_write_kv(cache_dtype: torch.dtype, slot_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    is_interpreted = backend == "triton" and backends.is_interpreted()
    if is_interpreted and cache_dtype is torch.float8_e4m3fn:
        pytest.skip("the interpreter rounds float8 wrongly")
    k, v = torch.randn(2, 5, 3, 2, 24, device=device)[:, :, 1]  # [5, 2, 24], strided
    k[1, 0], v[3, 1, 7] = 0.0, torch.nan
    slots = torch.tensor([11, -1, 0, 5, 6], dtype=slot_dtype, device=device)
    shape = (3, 4, 2)
    caches = [{f"{x}_cache": torch.full((*shape, 24), 3.0, device=device).to(cache_dtype) for x in "kv"} for _ in range(2)]
    if cache_dtype.itemsize == 1:
        for one in caches:
            one |= {f"{x}_scale": torch.full(shape, 3.0, device=device) for x in "kv"}
    with backends.forced(backend):
        ops.write_kv(k, v, slots=slots, **caches[0])
    reference.write_kv(k, v, slots=slots, **caches[1])
    for got, expected in zip(*(list(one.values()) for one in caches), strict=True):
        if got.dtype is torch.int8:  # a tie may fall to either side
            assert int((got.int() - expected.int()).abs().max()) <= 1
        else:
            relative = 2**-7 if is_interpreted and got.dtype is torch.bfloat16 else 1e-6  # there it is cut, not rounded
            torch.testing.assert_close(got.float(), expected.float(), rtol=relative, atol=0, equal_nan=True)


def test_a_row_of_int8_comes_back_within_half_a_step(device: torch.device) -> None:
    k = torch.randn(4, 2, 24, device=device) * torch.tensor([1e-6, 1.0, 1e6, 0.0], device=device)[:, None, None]
    caches = {f"{x}_cache": torch.zeros(1, 4, 2, 24, dtype=torch.int8, device=device) for x in "kv"}
    caches |= {f"{x}_scale": torch.zeros(1, 4, 2, device=device) for x in "kv"}
    ops.write_kv(k, k, slots=torch.arange(4, device=device), **caches)
    scale = caches["k_scale"][0, :, :, None]
    assert bool(((caches["k_cache"][0] * scale - k).abs() <= scale * 0.5001).all())


def test_slots_out_of_range_are_refused_or_skipped(backend: str, device: torch.device) -> None:
    k = torch.randn(2, 1, 8, device=device)
    caches = {f"{x}_cache": torch.zeros(2, 3, 1, 8, device=device) for x in "kv"}
    for bad in (6, -2):
        slots = torch.tensor([1, bad], device=device)
        with backends.forced(backend):
            if backend == "torch":
                with pytest.raises(InvalidInput, match="-1 to 5"):
                    ops.write_kv(k, k, slots=slots, **caches)
            else:
                ops.write_kv(k, k, slots=slots, **caches)
                assert torch.equal(caches["k_cache"][0, 1], k[0])
                assert int(caches["k_cache"].count_nonzero()) == 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "multiple"),
        ({"q": torch.zeros(2, 4, 9)}, "D that of the caches"),
        ({"q": torch.zeros(2, 4, 8).half()}, "dtype of q"),
        ({"v_cache": torch.zeros(3, 4, 2, 7)}, "alike"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, "B = 2"),
        ({"block_table": torch.zeros(2, 2)}, "int32 or int64"),
        ({"k_scale": torch.zeros(3, 4, 2)}, "k_scale belongs"),
        ({"k_cache": torch.zeros(3, 4, 2, 8).to(torch.int8), "v_cache": torch.zeros(3, 4, 2, 8).to(torch.int8)}, "k_scale"),
        ({"scale": "1"}, "finite"),
    ],
)
def test_paged_refuses(changes: dict[str, Any], match: str) -> None:
    cache = torch.zeros(3, 4, 2, 8)
    given: dict[str, Any] = {"q": torch.zeros(2, 4, 8), "k_cache": cache, "v_cache": cache}
    given |= {"block_table": torch.zeros(2, 2, dtype=torch.int32), "context_lens": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(InvalidInput, match=match):
        ops.paged_decode(**{**given, **changes})


def tasks_of(num: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch for the broker's kernel: caches of 5 blocks of 4 tokens each, contexts of 1, 4, 7, … tokens."""
    caches = {f"{x}_cache": torch.randn(num, 5, 4, 2, 16, device=device) for x in "kv"}
    tables = torch.stack([torch.randperm(5)[:3] for _ in range(num)]).to(device, torch.int32)
    lengths = torch.arange(num, dtype=torch.float64, device=device) * 3 + 1
    return {"q": torch.randn(num, 4, 16, device=device), **caches, "block_table": tables, "context_len": lengths}


def test_paged_tasks_among_poisoned_neighbours(device: torch.device) -> None:
    given = tasks_of(4, device)
    kernel = registry.get("paged_decode")
    alone = kernel.run(**{name: x[1:2] for name, x in given.items()})["out"]
    caches = (given["k_cache"][1], given["v_cache"][1])
    expected = reference.paged_decode(given["q"][1:2], *caches, given["block_table"][1:2], torch.tensor([4]))
    assert_near(alone, expected, 6.0)
    for name in ("q", "k_cache", "v_cache"):
        given[name][[0, 2, 3]] = torch.nan
    assert_near(kernel.run(**given)["out"][1:2], alone, 6.0)


@pytest.mark.parametrize(
    ("block", "length"), [(5, 4), (-1, 4), (-(2**31), 4), (0, 13), (0, 1.5), (0, float("nan")), (0, 1e300)]
)
def test_a_task_cannot_reach_the_cache_of_another(block: int, length: float, device: torch.device) -> None:
    given = tasks_of(3, device)
    given["block_table"][1, 0] = block
    given["context_len"][1] = length
    with pytest.raises(InvalidInput, match="context_len must be an integer from 0 to 12"):
        registry.get("paged_decode").run(**given)


def test_a_context_of_more_tokens_than_the_cache_is_refused() -> None:
    given = tasks_of(1, torch.device("cpu"))
    given["block_table"] = torch.zeros(1, 1000, dtype=torch.int32)
    given["context_len"][0] = 21
    with pytest.raises(InvalidInput, match="from 0 to 20"):
        registry.get("paged_decode").run(**given)
