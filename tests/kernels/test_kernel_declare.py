"""The decorator: what a signature declares, what is refused, and what goes onto the wire."""

import math
from typing import Annotated, Any

import msgpack
import pytest
import torch

from penstock.kernels import Blob, Context, Cost, KernelSpec, Row, SpecError, Static, Tensor, kernel
from penstock.kernels.declare import spec_of


def declared(function: Any, **fields: Any) -> KernelSpec:
    spec = spec_of(kernel("k", **fields)(function))
    assert spec is not None
    return spec


def test_parameters_are_tensors_without_default_and_statics_with_one() -> None:
    def scale(x, factor=2.0, *, mode=None, axes=(0, [1, "a"])):
        return x * factor

    assert declared(scale).inputs == (
        ("x", Tensor()),
        ("factor", Static(required=False, default=2.0)),
        ("mode", Static(required=False, default=None)),
        ("axes", Static(required=False, default=[0, [1, "a"]])),
    )
    assert scale(torch.ones(2), 3.0).tolist() == [3.0, 3.0]  # still the same function


def test_inputs_override_annotations_which_override_defaults() -> None:
    def mixed(a: Annotated[torch.Tensor, Tensor(rank=1)], b: Blob("text"), c: Row() = 3, d: Row() = 1.0):  # type: ignore[valid-type]
        return a

    spec = declared(mixed, inputs={"d": Row(default=2, minimum=0), "b": Blob("bytes")})
    assert spec.inputs == (("a", Tensor(rank=1)), ("b", Blob("bytes")), ("c", Row(3.0)), ("d", Row(2.0, 0.0)))


def test_annotations_as_text_are_resolved() -> None:
    def late(x: "Annotated[torch.Tensor, Tensor(rank=3)]"):
        return x

    assert declared(late).inputs == (("x", Tensor(rank=3)),)

    def lost(x: "NotImported"):  # type: ignore[name-defined]  # noqa: F821
        return x

    with pytest.raises(SpecError, match="cannot be resolved"):
        declared(lost)
    assert declared(lost, inputs={"x": Tensor(rank=2)}).inputs == (("x", Tensor(rank=2)),)


def test_context_lengths_and_offsets_are_no_inputs() -> None:
    def ragged(x, y, x_lengths, y_offsets, context: Context, y_lengths=1):
        return x

    spec = declared(ragged, inputs={"x": Tensor(ragged="pad"), "y": Tensor(ragged="pack")})
    assert [name for name, _ in spec.inputs] == ["x", "y", "y_lengths"]


class Both:
    def load(self, device: torch.device) -> None: ...

    def __call__(self, text: list[str], size: int = 1) -> torch.Tensor:
        return torch.zeros(len(text))

    def open(self, text: str, size: int = 1, context: object = None) -> object:
        return None

    def step(self, states: list[object]) -> list[object]:
        return []


def test_the_class_form_takes_its_call_and_its_modes() -> None:
    spec = declared(type("K", (Both,), {}), inputs={"text": Blob("text")}, combine="sum")
    assert spec.modes == ("batch", "stream")
    assert spec.resident
    assert spec.inputs == (("text", Blob("text")), ("size", Static(required=False, default=1)))

    class Streaming:
        def open(self, x): ...

        def step(self, states): ...

    assert declared(Streaming).modes == ("stream",)


def test_a_subclass_is_not_a_kernel_by_inheritance() -> None:
    base = kernel("base", inputs={"text": Blob("text")})(type("Base", (Both,), {}))
    assert spec_of(type("Derived", (base,), {})) is None


def bad(**fields: Any) -> Any:
    return lambda: kernel(**{"name": "k", **fields})(lambda x: x)


def starred(*xs): ...


def named(**xs): ...


def positional(x, /): ...


def nothing(): ...


def optional_blob(x: Blob("text") = "a"): ...  # type: ignore[valid-type]


def odd_default(x, y=object()): ...  # noqa: B008


def packed(x: Tensor(ragged="pack")): ...  # type: ignore[valid-type]


class OpenOnly:
    def open(self, x): ...


class SavesOnly:
    def open(self, x): ...

    def step(self, states): ...

    def checkpoint(self, state): ...


class NothingToSave:
    def __call__(self, x): ...

    def checkpoint(self, state): ...

    def restore(self, state, saved): ...


class NoForm:
    pass


class UnloadOnly:
    def __call__(self, x): ...

    def unload(self): ...


class Narrow:
    def __call__(self, x, size=1): ...

    def open(self, x): ...

    def step(self, states): ...


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (starred, "name every parameter"),
        (named, "name every parameter"),
        (positional, "positional-only"),
        (nothing, "no input"),
        (optional_blob, "cannot have a default"),
        (odd_default, "cannot be a static"),
        (packed, "x_offsets"),
        (OpenOnly, "both `open` and `step`"),
        (SavesOnly, "needs `checkpoint` and `restore`"),
        (NothingToSave, "beside `open` and `step`"),
        (NoForm, "neither"),
        (UnloadOnly, "without `load`"),
        (Narrow, "does not take the inputs size"),
        (math.sqrt, "a function or a class"),
    ],
)
def test_targets_that_are_refused(target: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kernel("k")(target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": 3}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"combine": "mean"}, "combine"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": 2.5}, "max_batch_size"),
        ({"max_batch_size": 4097}, "max_batch_size"),
        ({"max_batch_cost_ms": 0}, "max_batch_cost_ms"),
        ({"max_batch_cost_ms": math.nan}, "max_batch_cost_ms"),
        ({"scoped": 1}, "scoped"),
        ({"version": ""}, "version"),
        ({"inputs": {"y": Tensor()}}, "no parameter"),
        ({"inputs": {"x": "tensor"}}, "must be declared"),
        ({"cost": 3.0}, "Cost or a function"),
        ({"cost": Cost(per={"x.bytes": 1.0})}, r"unknown terms 'x\.bytes'; possible are x\.numel"),
        ({"cost": Cost(per={"y": 1.0})}, "unknown terms"),
        ({"cost": Cost(per={"x.numel": -1.0})}, "not negative"),
        ({"cost": Cost(base_ms=math.inf)}, "finite"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        bad(**fields)()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tensor(dtypes=("complex64",)),
        lambda: Tensor(dtypes=()),
        lambda: Tensor(rank=-1),
        lambda: Tensor(ragged="jagged"),
        lambda: Tensor(rank=0, ragged="pad"),
        lambda: Blob("json"),
        lambda: Row(default=math.inf),
        lambda: Row(default=True),
        lambda: Row(default=1, minimum=2),
        lambda: Row(minimum=2, maximum=1),
    ],
)
def test_inputs_that_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must|does not hold|needs"):
        make()


def test_a_kernel_is_declared_once() -> None:
    @kernel("one")
    def one(x):
        return x

    with pytest.raises(SpecError, match="already a kernel"):
        kernel("two")(one)


def test_a_linear_cost_function_is_reproduced() -> None:
    def f(x, text, n): ...

    spec = declared(
        f,
        inputs={"text": Blob("text"), "n": Row(minimum=2, maximum=100)},
        cost=lambda t: 1.5 + 0.25 * t["x.numel"] + 3.0 * t["n"],
    )
    assert spec.linear_cost.base_ms == pytest.approx(1.5)
    assert spec.linear_cost.per == pytest.approx({"x.numel": 0.25, "n": 3.0})


def test_a_curved_cost_function_is_fitted_without_negative_slopes() -> None:
    def f(x, y): ...

    spec = declared(f, cost=lambda t: 5.0 + (t["x.numel"] * 1e-3) ** 1.1 - 1e-9 * t["y.numel"])
    cost = spec.linear_cost
    assert all(slope > 0 for slope in cost.per.values())
    for size in (1.0, 100.0, 60_000.0):
        assert cost.of({"x.numel": size}) == pytest.approx(5.0 + (size * 1e-3) ** 1.1, rel=0.35)


@pytest.mark.parametrize(
    ("cost", "why"),
    [
        (lambda features: features["y"], "raised KeyError('y')"),
        (lambda features: -1.0, "0 or more; it returned -1.0"),
        (lambda features: "long", "0 or more; it returned 'long'"),
        (lambda features: math.nan, "0 or more; it returned nan"),
    ],
)
def test_a_cost_function_that_fails_is_left_out(cost: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    def f(x): ...

    spec = declared(f, cost=cost)
    assert spec.linear_cost == Cost()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("kernel 'k': its cost function ")
    assert why in record.getMessage()
    assert "offered without a cost" in record.getMessage()


def test_the_cost_of_nothing_is_the_base() -> None:
    def f(x, **_): ...

    assert Cost(2.0, {"x.numel": 1.0}).of({}) == 2.0


def test_the_wire_form_is_plain_and_complete() -> None:
    def f(x, data, n, mode, flag=True): ...

    spec = declared(
        f,
        inputs={
            "x": Tensor(dtypes=("float32", "int8"), rank=2, ragged="pad"),
            "data": Blob(),
            "n": Row(1, maximum=9),
            "mode": Static(),
        },
        cost=Cost(1.0, {"x.numel": 0.5, "data.bytes": 0.25, "n": 2}),
        max_batch_cost_ms=50.0,
        scoped=True,
    )
    wire = spec.to_wire()
    digest = wire["digest"]
    assert isinstance(digest, bytes)
    assert len(digest) == 8
    assert msgpack.unpackb(msgpack.packb(wire)) == wire
    assert {key: value for key, value in wire.items() if key != "digest"} == {
        "name": "k",
        "version": "1",
        "inputs": [
            ["x", "tensor", {"dtypes": ["float32", "int8"], "rank": 2, "ragged": "pad"}],
            ["data", "blob", {"kind": "bytes"}],
            ["n", "row", {"default": 1.0, "min": None, "max": 9.0}],
            ["mode", "static", {"required": True, "default": None}],
            ["flag", "static", {"required": False, "default": True}],
        ],
        "modes": ["batch"],
        "combine": "max",
        "idempotent": True,
        "scoped": True,
        "resident": False,
        "max_batch_size": 32,
        "max_batch_cost_ms": 50.0,
        "cost": {"base_ms": 1.0, "per": {"x.numel": 0.5, "data.bytes": 0.25, "n": 2.0}},
    }


def test_the_digest_tells_kernels_apart() -> None:
    def plain(x, factor=1.0): ...

    def padded(x: Tensor(ragged="pad"), factor=1.0): ...  # type: ignore[valid-type]

    def filled(x: Tensor(ragged="pad", pad_value=1.0), factor=1.0): ...  # type: ignore[valid-type]

    def other(x, factor=2.0): ...

    specs = [declared(f) for f in (plain, padded, filled, other)]
    specs += [specs[0].with_options({"model": name}) for name in ("a", "b")]
    digests = {spec.to_wire()["digest"] for spec in specs}
    assert len(digests) == len(specs)
    assert declared(lambda x, factor=1.0: None).to_wire()["digest"] in digests


def test_checkpoints_are_another_kernel_and_no_news_to_those_without() -> None:
    class Plain:
        def open(self, x): ...

        def step(self, states): ...

    class Saving(Plain):
        def checkpoint(self, state): ...

        def restore(self, state, saved): ...

    plain, saving = (spec_of(kernel("k")(target)) for target in (Plain, Saving))
    assert plain is not None
    assert saving is not None
    assert saving.checkpoints
    assert saving.to_wire()["checkpoints"] is True
    assert "checkpoints" not in plain.to_wire()
    assert plain.to_wire()["digest"] != saving.to_wire()["digest"]
    with pytest.raises(SpecError, match="never runs again"):
        kernel("k", idempotent=False)(type("Once", (Saving,), {}))
