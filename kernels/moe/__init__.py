"""A mixture of experts: each token is answered by a few of many feed-forward layers, chosen by a router."""

from collections.abc import Sequence
from typing import Any

import torch

from penstock.kernels import backends
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, LoadError, shown
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.linear.weights import check_file, load_weights, rows_for, split_rows
from penstock.kernels.moe import grouped, routing, sorted_gemm
from penstock.kernels.spec import Cost

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_PAIRS = 32
"""Pairs per expert from which `grouped_mm` comes before Triton's blocks; a guess, to be replaced by a measurement."""


def moe(
    x: torch.Tensor,
    router_w: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool = True,
) -> torch.Tensor:
    """sum over a token's top_k experts of p_e w_down[e] (silu(gate) * up), where gate, up = w_gate_up[e] x.

    x: `[tokens, hidden]`, router_w: `[experts, hidden]`, w_gate_up: `[experts, 2 * inter, hidden]` (gate rows first),
    w_down: `[experts, hidden, inter]`, all of one dtype (float32, bfloat16, float16) on one device. p = softmax of
    router_w x in float32; equal probabilities go to the lower expert; `renormalize`: the top_k p sum to 1. Returns
    `[tokens, hidden]` in x's dtype. No gradients.

    Tolerance, of the largest magnitude in a token's answer: 1e-5 in float32, 3e-2 in bfloat16 and 5e-3 in float16 (the
    experts' inner results are rounded to the dtype; their sum is float32), whatever the other tokens are. Exception: where
    two experts' probabilities at the edge of the top_k differ by less than 1e-6 of themselves, either may be taken. Equal
    calls give equal bits. Raises InvalidInput. Source: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral), from which the
    order of softmax, top-k and renormalising is.
    """
    check_shapes(x, router_w, top_k)
    check_experts(x, len(router_w), w_gate_up, w_down)
    if not len(x):
        return x.new_empty(x.shape)
    backend = backends.choose("moe", x.device, _usable(x, len(x) * top_k, w_gate_up, w_down))
    with torch.no_grad():
        weights, experts = route(backend, x, router_w, top_k, renormalize)
        y = x.new_empty(experts.numel(), x.shape[1])
        fill(backend, y, x, experts, w_gate_up, w_down)
        return combine(backend, y, weights)


def _usable(x: torch.Tensor, num_pairs: int, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> Sequence[str]:
    """Best first: `grouped_mm` for many pairs, blocks in Triton for few, and what waits for the device last."""
    usable = backends.torch_or_triton(x.device)
    if not grouped.can_group(x, w_gate_up, w_down):
        return usable
    is_first = x.device.type == "cuda" and num_pairs >= MANY_PAIRS * len(w_down)
    return ["grouped_mm", *usable] if is_first else [*usable, "grouped_mm"]


def route(
    backend: str, x: torch.Tensor, router_w: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`routing.route` by the backend."""
    if _has_triton(backend, x):
        from penstock.kernels.moe import triton_moe

        return triton_moe.route(x, router_w, top_k, renormalize)
    return routing.route(x, router_w, top_k, renormalize)


def fill(
    backend: str,
    y: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    place: torch.Tensor | None = None,
) -> None:
    """`sorted_gemm.fill` by the backend; "grouped_mm" takes no `place`."""
    if backend == "triton":
        from penstock.kernels.moe import triton_moe

        triton_moe.fill(y, x, experts, w_gate_up, w_down, place)
    elif backend == "grouped_mm" and place is None:
        grouped.fill(y, x, experts, w_gate_up, w_down)
    else:
        sorted_gemm.fill(y, x, experts, w_gate_up, w_down, place)


def combine(backend: str, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`routing.combine` by the backend."""
    if _has_triton(backend, y):
        from penstock.kernels.moe import triton_moe

        return triton_moe.combine(y, weights)
    return routing.combine(y, weights)


def _has_triton(backend: str, x: torch.Tensor) -> bool:
    return backend == "triton" or (backend == "grouped_mm" and x.is_cuda and backends.has_triton(x.device))


def check_shapes(x: torch.Tensor, router_w: torch.Tensor, top_k: object) -> None:
    """Raises InvalidInput unless x and router_w go together and there are `top_k` experts."""
    if x.ndim != 2 or router_w.ndim != 2 or not x.shape[1] == router_w.shape[1] >= 1:
        raise InvalidInput(
            f"moe: x must be [tokens, hidden] and router_w [experts, hidden]; got {list(x.shape)} and {list(router_w.shape)}"
        )
    if x.dtype not in DTYPES or router_w.dtype != x.dtype or router_w.device != x.device:
        raise InvalidInput(
            f"moe: x and the weights must be of one dtype, float32, bfloat16 or float16, on one device; "
            f"got {x.dtype} on {x.device} and {router_w.dtype} on {router_w.device}"
        )
    if type(top_k) is not int or not 1 <= top_k <= len(router_w):
        raise InvalidInput(f"moe: top_k must be an integer from 1 to {len(router_w)}, the experts; got {shown(top_k)}")


def check_experts(x: torch.Tensor, num_experts: int, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> None:
    """Raises InvalidInput unless there are weights of so many experts, for x."""
    inter = w_down.shape[-1] if w_down.ndim == 3 else 0
    wanted = (num_experts, 2 * inter, x.shape[1]), (num_experts, x.shape[1], inter)
    if inter < 1 or (w_gate_up.shape, w_down.shape) != wanted:
        raise InvalidInput(
            "moe: w_gate_up must be [experts, 2 * inter, hidden] and w_down [experts, hidden, inter] with "
            f"{num_experts} experts and hidden {x.shape[1]}; got {list(w_gate_up.shape)} and {list(w_down.shape)}"
        )
    if {w_gate_up.dtype, w_down.dtype} != {x.dtype} or {w_gate_up.device, w_down.device} != {x.device}:
        raise InvalidInput(
            f"moe: x and the experts must be of one dtype on one device; got {x.dtype} on {x.device}, "
            f"{w_gate_up.dtype} on {w_gate_up.device} and {w_down.dtype} on {w_down.device}"
        )


@kernel(
    "moe",
    inputs={"x": Tensor(dtypes=FLOATS, rank=2, ragged="pack")},
    cost=Cost(base_ms=0.5, per={"x.numel": 1e-4}),
    combine="sum",
    max_batch_size=256,
)
class MoELayer:
    """A mixture-of-experts layer with its weights on the device: tasks bring tokens, a batch runs them together.

    x: float `[tokens, hidden]` per task, any number of tokens; computed in the weights' dtype, returned as x's. Returns
    `out`: `[tokens, hidden]` per task. Tolerance: that of `ops.moe`; a token's answer does not depend on its neighbours.

    Options: `file`: a safetensors file with `router_w`, `w_gate_up` and `w_down`, shaped as in `ops.moe`, set by who runs
    the worker, never by a task; `top_k`; `renormalize`. The function with weights as arguments is for direct calls only:
    as a kernel, every task would bring all experts, and a batch would hold a copy of them per task.
    """

    def __init__(self, file: str | None = None, top_k: int = 2, renormalize: bool = True) -> None:
        check_file("moe", file)
        if type(top_k) is not int or top_k < 1 or type(renormalize) is not bool:
            raise ValueError(f"top_k must be a positive integer and renormalize a bool; got {top_k!r}, {renormalize!r}")
        self._file, self._top_k, self._renormalize = file, top_k, renormalize
        self._weights: dict[str, torch.Tensor] = {}

    def load(self, device: torch.device) -> None:
        """Reads the weights onto `device`. Raises LoadError, also for those that do not go together."""
        ranks = {"router_w": 2, "w_gate_up": 3, "w_down": 3}
        weights = load_weights("moe", self._file, ranks, device, dtypes=DTYPES)
        try:
            self._moe(weights["router_w"][:0], weights)
        except InvalidInput as error:
            raise LoadError(f"{self._file}: {error}") from error
        self._weights = weights

    def unload(self) -> None:
        """Drops the weights."""
        self._weights = {}

    def __call__(self, x: torch.Tensor, x_offsets: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """The answers for all tokens x `[total, hidden]`, one tensor per task."""
        rows = rows_for("moe", x, self._weights["router_w"])
        return {"out": split_rows(self._moe(rows, self._weights).to(x.dtype), x_offsets)}

    def _moe(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        settings: dict[str, Any] = {**weights, "top_k": self._top_k, "renormalize": self._renormalize}
        return moe(x, **settings)
