"""Derives a kernel's inputs from a function's signature.

Knows parameters, defaults and annotations; does not know what a spec is for.

The kind of a parameter, first match wins: its entry in `inputs=`; an `Input` in its annotation, bare or within
`Annotated`; `Static` if it has a default value; else `Tensor()`. Three names are not inputs but are filled in:
`context`, `<padded tensor>_lengths`, `<packed tensor>_offsets`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from penstock.kernels.errors import SpecError
from penstock.kernels.inputs import Blob, Input, Row, Static, Tensor, as_static

CONTEXT = "context"


def filled_in(inputs: Mapping[str, Input]) -> set[str]:
    """Names of the parameters that the worker fills in beside the inputs."""
    names = {CONTEXT}
    for name, kind in inputs.items():
        if isinstance(kind, Tensor) and kind.ragged != "exact":
            names.add(f"{name}_lengths" if kind.ragged == "pad" else f"{name}_offsets")
    return names


def parameters_of(owner: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of `function` (bound method: without `self`). Raises SpecError where keywords cannot reach."""
    parameters = dict(inspect.signature(function).parameters)
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise SpecError(f"kernel {owner!r}: *{name} has no meaning as an input; name every parameter")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise SpecError(f"kernel {owner!r}: {name!r} is positional-only; kernels are called by keyword")
    return parameters


def derive_inputs(
    owner: str, function: Callable[..., Any], declared: Mapping[str, Input] | None
) -> tuple[tuple[str, Input], ...]:
    """(name, kind) for every input of `function`, in the order of its parameters. Raises SpecError."""
    parameters = parameters_of(owner, function)
    declared = declared or {}
    for name, kind in declared.items():
        if name not in parameters:
            raise SpecError(
                f"kernel {owner!r}: inputs declares {name!r}, which is no parameter; they are {', '.join(parameters)}"
            )
        if not isinstance(kind, Input):
            raise SpecError(
                f"kernel {owner!r}: {name!r} must be declared as a Tensor(), Blob(), Row() or Static(), not {kind!r}"
            )
    kinds = {**_annotated(owner, function, declared), **declared}
    reserved = filled_in(kinds)
    for name, kind in kinds.items():
        if isinstance(kind, Tensor) and kind.ragged == "pack" and f"{name}_offsets" not in parameters:
            raise SpecError(f"kernel {owner!r}: {name!r} is packed, so the function needs a parameter '{name}_offsets'")
    inputs = tuple(
        (name, _with_default(owner, parameter, kinds.get(name)))
        for name, parameter in parameters.items()
        if name not in reserved
    )
    if clash := reserved & set(kinds):
        raise SpecError(f"kernel {owner!r}: {', '.join(sorted(clash))} is filled in by the worker and is no input")
    if not inputs:
        raise SpecError(f"kernel {owner!r}: it has no input")
    return inputs


def _annotated(owner: str, function: Callable[..., Any], declared: Mapping[str, Input]) -> dict[str, Input]:
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        hints = get_type_hints(target, include_extras=True)
    except Exception as error:
        if declared:  # the author chose the other way to declare; names only for type checkers may stay unresolved
            return {}
        raise SpecError(
            f"kernel {owner!r}: its annotations cannot be resolved ({error}); declare with inputs={{...}}"
        ) from error
    found: dict[str, Input] = {}
    for name, hint in hints.items():
        kinds = [item for item in (hint, *getattr(hint, "__metadata__", ())) if isinstance(item, Input)]
        if len(kinds) > 1:
            raise SpecError(f"kernel {owner!r}: the annotation of {name!r} declares more than one input")
        if kinds and name != "return":
            found[name] = kinds[0]
    return found


def _with_default(owner: str, parameter: inspect.Parameter, kind: Input | None) -> Input:
    """`kind` completed by the parameter's default value; without a kind: a static or a tensor."""
    name, default = parameter.name, parameter.default
    has_default = default is not parameter.empty
    if kind is None:
        kind = Static() if has_default else Tensor()
    if not has_default:
        return kind
    if isinstance(kind, Static):
        try:
            return Static(required=False, default=as_static(default))
        except TypeError as error:
            raise SpecError(f"kernel {owner!r}: the default of {name!r} cannot be a static: {error}") from error
    if isinstance(kind, Row):
        if kind.default is not None:
            return kind
        try:
            return Row(default, kind.minimum, kind.maximum)
        except ValueError as error:
            raise SpecError(f"kernel {owner!r}: the default of {name!r} does not fit: {error}") from error
    word = "a Tensor" if isinstance(kind, Tensor) else "a Blob" if isinstance(kind, Blob) else "an input"
    raise SpecError(f"kernel {owner!r}: {name!r} is {word} and is always sent; it cannot have a default")
