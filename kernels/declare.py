"""The `@kernel` decorator: attaches a spec to a function or a class, and leaves it otherwise as it is.

Knows the two forms of a kernel; keeps no list of them (`registry.py` finds them in modules).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from penstock.kernels.errors import SpecError
from penstock.kernels.inputs import Input
from penstock.kernels.signature import CONTEXT, derive_inputs, filled_in, parameters_of
from penstock.kernels.spec import Cost, CostFunction, KernelSpec

SPEC_ATTRIBUTE = "__penstock_kernel__"
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def kernel(
    name: str,
    *,
    inputs: Mapping[str, Input] | None = None,
    cost: Cost | CostFunction | None = None,
    combine: str = "max",
    idempotent: bool = True,
    max_batch_size: int = 32,
    max_batch_cost_ms: float | None = None,
    scoped: bool = False,
    version: str = "1",
    doc: str | None = None,
    hang_limit_s: float | None = None,
) -> Callable[[_Decorated], _Decorated]:
    """Declares a function or a class as the kernel `name`; the fields are those of `KernelSpec`.

    A function is called with a batch, by keyword. A class is constructed with its options and has `__call__` for
    batches, or `open` and `step` for streaming, or all three; `checkpoint` and `restore` if its streamed tasks can go on from
    where another worker was lost; `load(device)` and `unload()` if it has state; `trim()` if it
    has caches that it can give back when memory is short, and returns their bytes.
    `inputs` overrides what the signature says (`signature.py` has the rules). Raises SpecError at once if the
    declaration is wrong; a cost function is called here, and nowhere else, and only a warning tells of one that fails.
    """

    def declare(target: _Decorated) -> _Decorated:
        if spec_of(target) is not None:
            raise SpecError(f"kernel {name!r}: {target.__qualname__} is already a kernel")
        if inspect.isclass(target):
            function, modes, is_resident = _class_form(name, target)
        elif inspect.isfunction(target):
            function, modes, is_resident = target, ("batch",), False
        else:
            raise SpecError(f"kernel {name!r}: a kernel is a function or a class, not {type(target).__name__}")
        spec = KernelSpec(
            name=name,
            inputs=derive_inputs(name, function, inputs),
            modes=modes,
            cost=cost,
            combine=combine,
            idempotent=idempotent,
            max_batch_size=max_batch_size,
            max_batch_cost_ms=max_batch_cost_ms,
            scoped=scoped,
            resident=is_resident,
            version=version,
            doc=(inspect.getdoc(target) or "") if doc is None else doc,
            hang_limit_s=hang_limit_s,
            checkpoints="stream" in modes and callable(getattr(target, "checkpoint", None)),
        )
        if "stream" in modes:
            _check_open(spec, target.open)  # type: ignore[attr-defined]
        setattr(target, SPEC_ATTRIBUTE, spec)
        return target

    return declare


def spec_of(target: object) -> KernelSpec | None:
    """The spec that `kernel` attached to exactly this object (a subclass does not inherit it), or None."""
    attributes = getattr(target, "__dict__", {})
    spec = attributes.get(SPEC_ATTRIBUTE)
    return spec if isinstance(spec, KernelSpec) else None


def _class_form(name: str, target: type) -> tuple[Callable[..., Any], tuple[str, ...], bool]:
    """(the method whose signature counts, modes, has state to load)."""
    methods = ("open", "step", "load", "unload", "checkpoint", "restore")
    has = {method: callable(getattr(target, method, None)) for method in methods}
    if has["open"] != has["step"]:
        raise SpecError(f"kernel {name!r}: streaming needs both `open` and `step`")
    if has["checkpoint"] != has["restore"] or (has["checkpoint"] and not has["open"]):
        raise SpecError(f"kernel {name!r}: going on elsewhere needs `checkpoint` and `restore`, beside `open` and `step`")
    if has["unload"] and not has["load"]:
        raise SpecError(f"kernel {name!r}: it has `unload` without `load`")
    is_callable = "__call__" in {attribute for base in target.__mro__ for attribute in vars(base)}
    modes = (("batch",) if is_callable else ()) + (("stream",) if has["open"] else ())
    if not modes:
        raise SpecError(f"kernel {name!r}: the class has neither `__call__` nor `open` and `step`")
    method = target.__call__ if is_callable else target.open  # type: ignore[attr-defined]
    return _without_self(name, method), modes, has["load"]


def _without_self(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if not inspect.isfunction(method):
        raise SpecError(f"kernel {name!r}: {getattr(method, '__name__', method)!r} must be a plain method")
    bound: Callable[..., Any] = method.__get__(object())
    return bound


def _check_open(spec: KernelSpec, method: Callable[..., Any]) -> None:
    parameters = parameters_of(spec.name, _without_self(spec.name, method))
    names = {name for name, _ in spec.inputs}
    expected = names | {CONTEXT} | filled_in(dict(spec.inputs))
    if missing := sorted(names - set(parameters)):
        raise SpecError(f"kernel {spec.name!r}: `open` does not take the inputs {', '.join(missing)}")
    if extra := sorted(set(parameters) - expected):
        raise SpecError(f"kernel {spec.name!r}: `open` takes {', '.join(extra)}, which are no inputs")
