"""Which implementation of an operation runs: chosen by device and by what is there, logged once, never changed silently.

Knows names of backends and what this machine has; does not know what an operation computes. An operation asks for one of
the backends that it could use here, best first:

    if backends.choose("paged_decode", q.device, backends.torch_or_triton(q.device)) == "triton":

Tests and benchmarks force one with `backends.forced("torch")`, and read `backends.ran()`.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

log = logging.getLogger("penstock.kernels")
_forced: ContextVar[str | None] = ContextVar("penstock_forced_backend", default=None)
_ran: dict[tuple[str, str], str] = {}


class BackendError(RuntimeError):
    """The backend that is forced does not exist for this operation on this device."""


@cache
def _is_triton_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """True if Triton's kernels run in its interpreter: correct, on any device's tensors, and very slow."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def has_triton(device: torch.device) -> bool:
    """True if Triton kernels can run on tensors of `device`: natively on cuda, elsewhere only in the interpreter."""
    return _is_triton_there() and (device.type == "cuda" or is_interpreted())


def torch_or_triton(device: torch.device) -> list[str]:
    """The backends of an operation with both forms, best first: Triton comes first only where it is compiled."""
    if not has_triton(device):
        return ["torch"]
    return ["torch", "triton"] if is_interpreted() else ["triton", "torch"]


def choose(op: str, device: torch.device, usable: Sequence[str]) -> str:
    """The backend to run `op` with: the forced one, or the first of `usable`.

    Raises BackendError if the forced one is not among them.
    """
    name = _forced.get() or usable[0]
    if name not in usable:
        raise BackendError(f"{op}: there is no backend {name!r} on {device.type}; there are {', '.join(usable)}")
    key = (op, device.type)
    if _ran.get(key) != name:
        _ran[key] = name
        log.info("%s on %s runs with %s", op, device.type, name)
    return name


def ran() -> dict[tuple[str, str], str]:
    """(operation, device type) -> the backend that it ran with last."""
    return dict(_ran)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Every operation inside runs with the backend `name`, or raises BackendError."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
