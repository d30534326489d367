"""The selective scan, its single step and SSD against their references: every form, awkward shapes, cut sequences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import InvalidInput, backends, ops
from penstock.kernels.scan import chunked, reference, stepped

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not backends.has_triton(DEVICE), reason="needs Triton")),
]
TOLERANCE = 2e-5
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Inputs = dict[str, torch.Tensor]
WEIGHTS = ("A", "D", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _real=real, **options: _real(*args, **options).fill_(torch.nan))


def scan_inputs(batch: int, length: int, channels: int, state: int, dtype: torch.dtype = torch.float32) -> Inputs:
    def line(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, *shape, device=DEVICE).to(dtype)

    inputs = {"u": line(channels), "delta": line(channels) * 2 - 1, "B": line(state), "C": line(state), "z": line(channels)}
    inputs["A"] = -torch.rand(channels, state, device=DEVICE) * 16
    inputs["D"], inputs["delta_bias"] = torch.randn(2, channels, device=DEVICE)
    inputs["initial_state"] = torch.randn(batch, channels, state, device=DEVICE)
    return inputs


def ssd_inputs(batch: int, length: int, heads: int, dim: int, groups: int, state: int, dtype: Any = torch.float32) -> Inputs:
    def line(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, *shape, device=DEVICE).to(dtype)

    inputs = {"x": line(heads, dim), "delta": line(heads).sigmoid(), "B": line(groups, state), "C": line(groups, state)}
    inputs |= {"z": line(heads, dim), "A": -torch.rand(heads, device=DEVICE) * 8}
    inputs["D"], inputs["delta_bias"] = torch.rand(2, heads, device=DEVICE)
    inputs["initial_state"] = torch.randn(batch, heads, dim, state, device=DEVICE)
    return inputs


def steps(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The same layer on a part of the time."""
    return {name: part if name in WEIGHTS else part[:, start:stop] for name, part in inputs.items()}


def assert_near(got: Any, op: Callable[..., Any], inputs: Inputs, **options: Any) -> None:
    """(y, last state) is that of the reference, by the stated tolerance: of the sum of the terms' absolute values."""
    expected = op(**inputs, **options, return_last_state=True)
    signed = {name: part.abs() if name not in ("A", "delta", "delta_bias", "z") else part for name, part in inputs.items()}
    gate = signed.pop("z", None)
    size, state_size = op(**signed, **options, return_last_state=True)
    if gate is not None:
        size = size.double() * torch.nn.functional.silu(gate.double()).abs()
    for value, wanted, bound, rounding in zip(got, expected, (size, state_size), (ROUNDING[got[0].dtype], 0.0), strict=True):
        assert value.shape == wanted.shape
        assert value.dtype == wanted.dtype
        error = (value.double() - wanted.double()).abs() - rounding * wanted.double().abs()
        assert (error <= TOLERANCE * bound.double() + 1e-30).all(), float((error / bound.double()).max())


def scan(form: str, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with backends.forced(form):
        y, last = ops.selective_scan(**inputs, **options, return_last_state=True)
    return y, last


SHAPES = [(1, 1, 1, 1), (2, 7, 3, 8), (3, 8, 33, 16), (1, 17, 33, 5), (2, 16, 1, 16), (1, 9, 40, 32)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan(poisoned: None, shape: tuple[int, ...], form: str) -> None:
    inputs = scan_inputs(*shape)
    assert_near(scan(form, inputs), reference.selective_scan, inputs)


@pytest.mark.parametrize("shape", [(1, 127, 33, 16), (2, 257, 3, 8), (9, 130, 70, 16), (1, 257, 600, 16)])
def test_scan_of_long_sequences(poisoned: None, shape: tuple[int, ...]) -> None:
    inputs = scan_inputs(*shape)
    assert_near(scan("torch", inputs), reference.selective_scan, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("left_out", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias")])
def test_scan_without_options(left_out: tuple[str, ...], form: str) -> None:
    inputs = {name: part for name, part in scan_inputs(2, 11, 5, 3).items() if name not in left_out}
    assert_near(scan(form, inputs), reference.selective_scan, inputs)
    inputs |= {name: inputs[name].abs() for name in ("delta", "delta_bias") if name in inputs}  # steps are never negative
    assert_near(scan(form, inputs, delta_softplus=False), reference.selective_scan, inputs, delta_softplus=False)
    assert torch.equal(ops.selective_scan(**inputs), scan(backends.ran()["selective_scan", DEVICE.type], inputs)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scan_of_other_dtypes(dtype: torch.dtype, form: str) -> None:
    inputs = scan_inputs(2, 19, 33, 4, dtype)
    y, last = scan(form, inputs)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert_near((y, last), reference.selective_scan, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_scan_of_strided_input(form: str) -> None:
    inputs = scan_inputs(2, 13, 6, 4)
    both = torch.randn(2, 13, 12, device=DEVICE)
    inputs |= {"u": both[..., :6], "z": both[..., 6:]}
    inputs |= {"delta": inputs["delta"].mT.contiguous().mT, "A": inputs["A"].T.contiguous().T}
    inputs["B"] = inputs["B"][:, :1].expand(2, 13, 4)
    inputs["C"] = torch.randn(2, 13, 8, device=DEVICE)[..., ::2]
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    assert_near(scan(form, inputs), reference.selective_scan, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_per_sequence(form: str) -> None:
    inputs = scan_inputs(3, 10, 5, 4)
    inputs |= {name: torch.stack([inputs[name] * factor for factor in (0.5, 1.0, 2.0)]) for name in ("A", "D", "delta_bias")}
    y, last = scan(form, inputs)
    for row in range(3):
        alone = {name: part[row] if name in WEIGHTS[:3] else part[row : row + 1] for name, part in inputs.items()}
        assert_near((y[row : row + 1], last[row : row + 1]), reference.selective_scan, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)])
def test_scan_of_nothing(shape: tuple[int, ...], form: str) -> None:
    inputs = scan_inputs(*shape)
    assert_near(scan(form, inputs), reference.selective_scan, inputs)
    update = {name: part if name in WEIGHTS else part.sum(1) for name, part in inputs.items()}
    state = update.pop("initial_state")
    before = state.clone()
    with backends.forced(form):
        assert ops.selective_state_update(state, **update).shape == update["u"].shape
    assert state.shape == before.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [0, 1, 8, 12, 20])
def test_a_sequence_cut_in_two(cut: int, form: str) -> None:
    inputs = scan_inputs(2, 20, 5, 4)
    head, state = scan(form, steps(inputs, 0, cut))
    tail, state = scan(form, steps(inputs, cut, 20) | {"initial_state": state})
    assert_near((torch.cat([head, tail], 1), state), reference.selective_scan, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "state"), [(1, 1), (3, 8), (33, 16), (5, 3)])
def test_steps_are_the_scan(poisoned: None, channels: int, state: int, form: str) -> None:
    inputs = scan_inputs(2, 6, channels, state)
    now, outputs = inputs["initial_state"].mT.contiguous().mT.clone(memory_format=torch.preserve_format), []
    for t in range(6):
        step = {name: part[:, t] if name not in WEIGHTS else part for name, part in inputs.items() if name != "initial_state"}
        same = now
        with backends.forced(form):
            outputs.append(ops.selective_state_update(now, **step))
        assert same is now
    assert_near((torch.stack(outputs, 1), now), reference.selective_scan, inputs)


def test_the_reference_step_is_the_reference_scan() -> None:
    inputs = scan_inputs(2, 4, 3, 2)
    state, outputs = inputs["initial_state"].clone(), []
    for t in range(4):
        step = {name: part[:, t] if name not in WEIGHTS else part for name, part in inputs.items() if name != "initial_state"}
        outputs.append(reference.selective_state_update(state, **step))
    assert_near((torch.stack(outputs, 1), state), reference.selective_scan, inputs)


@pytest.mark.skipif(not backends.has_triton(DEVICE), reason="needs Triton")
@pytest.mark.parametrize(("length", "num_chunks", "left_out"), [(1, 4, ()), (37, 3, ("z", "initial_state")), (24, 3, ("D",))])
def test_chunks_are_the_serial_form(poisoned: None, length: int, num_chunks: int, left_out: tuple[str, ...]) -> None:
    from penstock.kernels.scan import fused

    inputs = {name: part for name, part in scan_inputs(2, length, 33, 3).items() if name not in left_out}
    layer = {name: inputs[name].expand(2, *inputs[name].shape) for name in ("A", "D", "delta_bias") if name in inputs}
    arguments = dict.fromkeys(left_out) | inputs | layer
    got = fused.selective_scan(**arguments, delta_softplus=True, num_chunks=num_chunks)  # type: ignore[arg-type]
    assert_near(got, reference.selective_scan, inputs)


def test_how_many_chunks() -> None:
    fused = pytest.importorskip("penstock.kernels.scan.fused")
    assert fused.num_chunks_for(4096, num_warps=48, num_processors=132) == 22
    assert fused.num_chunks_for(4096, num_warps=1, num_processors=132) == 64
    assert fused.num_chunks_for(256, num_warps=1, num_processors=132) == 4
    assert fused.num_chunks_for(128, num_warps=1, num_processors=132) == 1
    assert fused.num_chunks_for(4096, num_warps=500, num_processors=132) == 1
    assert fused.num_chunks_for(1, num_warps=10**6, num_processors=132) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delta", [-100.0, -20.0, 19.99, 20.01, 100.0, 1e4])
def test_extreme_steps(delta: float, form: str) -> None:
    inputs = scan_inputs(1, 9, 3, 2)
    inputs["delta"][:, ::2] = delta  # decays of exp(-1e5), and none at all
    y, last = scan(form, inputs)
    assert y.isfinite().all()
    assert last.isfinite().all()
    assert_near((y, last), reference.selective_scan, inputs)


def test_4096_steps_of_strong_and_weak_decay() -> None:
    inputs = scan_inputs(1, 4096, 4, 3)
    inputs["A"] = torch.tensor([1e-6, 1e-3, 1.0, 1e3], device=DEVICE)[:, None] * -torch.ones(3, device=DEVICE)
    assert_near(scan("torch", inputs), reference.selective_scan, inputs)
    inputs = ssd_inputs(1, 4096, 4, 2, 1, 3)
    inputs["A"] = -torch.tensor([1e-6, 1e-3, 1.0, 1e3], device=DEVICE)
    assert_near(ops.ssd(**inputs, return_last_state=True), reference.ssd, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_where_it_came_in(form: str) -> None:
    inputs = scan_inputs(2, 12, 3, 2)
    clean, _ = scan(form, inputs)
    for name in ("u", "delta", "z"):
        broken = inputs | {name: inputs[name].clone()}
        broken[name][1, 5, 2] = torch.nan
        y, last = scan(form, broken)
        hit = torch.zeros_like(y, dtype=torch.bool)
        hit[1, 5 : (6 if name == "z" else None), 2] = True
        assert torch.equal(y.isnan(), hit)
        assert torch.equal(y[~hit], clean[~hit])
        assert bool(last[1, 2].isnan().all()) == (name != "z")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_scan_of_any_shape(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, top)) for top in (3, 90, 9, 6))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    inputs = scan_inputs(*shape)
    for name in data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"]))):
        del inputs[name]
    assert_near(scan("torch", inputs), reference.selective_scan, inputs)


def test_blocks_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepped, "BLOCK_ELEMENTS", 1)
    inputs = scan_inputs(2, 9, 3, 2)
    assert_near(scan("torch", inputs), reference.selective_scan, inputs)


SSD_SHAPES = [(1, 1, 1, 1, 1, 1), (2, 64, 4, 8, 2, 16), (1, 127, 3, 5, 3, 8), (2, 257, 6, 7, 2, 3), (1, 65, 2, 33, 1, 1)]


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 1000])
@pytest.mark.parametrize("shape", SSD_SHAPES)
def test_ssd(poisoned: None, shape: tuple[int, ...], chunk_size: int) -> None:
    inputs = ssd_inputs(*shape)
    got = ops.ssd(**inputs, chunk_size=chunk_size, return_last_state=True)
    assert_near(got, reference.ssd, inputs)
    assert torch.equal(got[0], ops.ssd(**inputs, chunk_size=chunk_size))


@pytest.mark.parametrize("elements", [1, 300, 5000])
def test_ssd_in_spans(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setitem(chunked.SPAN_ELEMENTS, DEVICE.type, elements)
    inputs = ssd_inputs(2, 131, 2, 3, 1, 4)
    assert_near(ops.ssd(**inputs, chunk_size=16, return_last_state=True), reference.ssd, inputs)


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("delta_bias",), ("initial_state",)])
@pytest.mark.parametrize("softplus", [True, False])
def test_ssd_without_options(left_out: tuple[str, ...], softplus: bool) -> None:
    inputs = {name: part for name, part in ssd_inputs(2, 21, 2, 3, 1, 4).items() if name not in left_out}
    got = ops.ssd(**inputs, delta_softplus=softplus, return_last_state=True)
    assert_near(got, reference.ssd, inputs, delta_softplus=softplus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ssd_of_other_dtypes(dtype: torch.dtype) -> None:
    inputs = ssd_inputs(2, 70, 2, 3, 1, 4, dtype)
    got = ops.ssd(**inputs, return_last_state=True)
    assert got[0].dtype == dtype
    assert_near(got, reference.ssd, inputs)


def test_ssd_of_strided_input() -> None:
    inputs = ssd_inputs(2, 70, 4, 3, 2, 4)
    joint = torch.randn(2, 70, 4 * 3 + 2 * 2 * 4, device=DEVICE)
    inputs |= {"x": joint[..., :12].unflatten(2, (4, 3)), "B": joint[..., 12:20].unflatten(2, (2, 4))}
    inputs |= {"C": inputs["C"].mT.contiguous().mT, "delta": inputs["delta"].mT.contiguous().mT}
    assert_near(ops.ssd(**inputs, return_last_state=True), reference.ssd, inputs)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 100])
def test_ssd_cut_in_two(cut: int) -> None:
    inputs = ssd_inputs(2, 130, 2, 3, 1, 4)
    head, state = ops.ssd(**steps(inputs, 0, cut), return_last_state=True)
    tail, state = ops.ssd(**(steps(inputs, cut, 130) | {"initial_state": state}), return_last_state=True)
    assert_near((torch.cat([head, tail], 1), state), reference.ssd, inputs)


def test_ssd_step_by_step() -> None:
    inputs = ssd_inputs(2, 9, 4, 3, 2, 4)
    state, outputs = inputs["initial_state"], []
    for t in range(9):
        y, state = ops.ssd(**(steps(inputs, t, t + 1) | {"initial_state": state}), return_last_state=True)
        outputs.append(y)
    assert_near((torch.cat(outputs, 1), state), reference.ssd, inputs)


def test_ssd_of_weak_steps_after_a_strong_one() -> None:
    inputs = ssd_inputs(1, 64, 2, 3, 1, 4)
    inputs |= {"delta": torch.full((1, 64, 2), 1e-3, device=DEVICE), "delta_bias": torch.zeros(2, device=DEVICE)}
    inputs["delta"][:, 5] = 1e6  # running sums of 1e7 in float32 would lose steps of 1e-3
    inputs["x"][:, 5] = 0.0
    assert_near(ops.ssd(**inputs, return_last_state=True), reference.ssd, inputs)


@pytest.mark.parametrize("empty", [0, 1, 2, 3, 5])
def test_ssd_of_nothing(empty: int) -> None:
    shape = [2, 5, 2, 3, 1, 2]
    shape[empty] = 0
    inputs = ssd_inputs(*shape)
    assert_near(ops.ssd(**inputs, return_last_state=True), reference.ssd, inputs)


def test_inputs_are_left_as_they_are() -> None:
    for op, inputs in ((ops.selective_scan, scan_inputs(2, 9, 3, 2)), (ops.ssd, ssd_inputs(2, 9, 2, 3, 1, 2))):
        before = {name: part.clone() for name, part in inputs.items()}
        y, last = op(**inputs, return_last_state=True)
        assert all(torch.equal(part, before[name]) for name, part in inputs.items())
        pointers = {part.untyped_storage().data_ptr() for part in inputs.values()}
        assert pointers.isdisjoint({y.untyped_storage().data_ptr(), last.untyped_storage().data_ptr()})


def test_gradients_are_not_asked_for() -> None:
    inputs = scan_inputs(1, 5, 3, 2)
    inputs["A"].requires_grad_()
    assert not ops.selective_scan(**inputs).requires_grad


BAD = [
    ("u", (2, 9)), ("delta", (2, 9, 4)), ("A", (3,)), ("A", (4, 2)), ("A", (1, 3, 2)), ("B", (2, 9, 3)), ("C", (2, 8, 2)),
    ("D", (4,)), ("z", (2, 9)), ("delta_bias", (2,)), ("initial_state", (2, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), BAD)
def test_scan_refuses_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=f"selective_scan: {name} must have"):
        ops.selective_scan(**(scan_inputs(2, 9, 3, 2) | {name: torch.zeros(shape, device=DEVICE)}))


def test_scan_refuses_integers_and_devices() -> None:
    inputs = scan_inputs(2, 9, 3, 2)
    with pytest.raises(InvalidInput, match="floating point"):
        ops.selective_scan(**(inputs | {"u": torch.zeros(2, 9, 3, dtype=torch.int64, device=DEVICE)}))
    with pytest.raises(InvalidInput, match="B must be floating point and on"):
        ops.selective_scan(**(inputs | {"B": inputs["B"].to("meta")}))
    state = inputs.pop("initial_state").bfloat16()
    step = {name: part if name in WEIGHTS else part[:, 0] for name, part in inputs.items()}
    with pytest.raises(InvalidInput, match="state must be float32"):
        ops.selective_state_update(state, **step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be"), ({"chunk_size": 10**9}, "chunk_size must be"),
        ({"chunk_size": True}, "chunk_size must be"), ({"B": torch.zeros(2, 9, 3, 2)}, "multiple of B's groups"),
        ({"B": torch.zeros(2, 9, 0, 2)}, "multiple of B's groups"), ({"x": torch.zeros(2, 9, 4)}, "x must have 4"),
        ({"delta": torch.zeros(2, 9, 3)}, "delta must have"), ({"A": torch.zeros(4, 2)}, "A must have"),
    ],
)  # fmt: skip
def test_ssd_refuses(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = ssd_inputs(2, 9, 4, 3, 2, 2)
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(InvalidInput, match=message):
        ops.ssd(**(inputs | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4096, 768, 16), (8, 513, 1536, 16), (64, 100, 96, 64), (2, 300, 65, 256)])
def test_compiled_scan(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = scan_inputs(*shape, dtype)
    assert_near(scan("triton", inputs), reference.selective_scan, inputs)
    state = inputs.pop("initial_state").clone()
    step = {name: part if name in WEIGHTS else part[:, 0] for name, part in inputs.items()}
    expected = state.clone()
    torch.testing.assert_close(
        ops.selective_state_update(state, **step), reference.selective_state_update(expected, **step),
        rtol=ROUNDING[dtype] + 1e-4, atol=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
