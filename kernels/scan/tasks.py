"""What a broker offers of the scans: kernels over tasks of different lengths, `selective_scan` and `ssd`.

Knows padding and the layout of a task. The gate z is left out: it is an elementwise product of the result that would
double what is sent. All other inputs are always sent, with zeros for what a layer does not have.
"""

import torch

from penstock.kernels import scan
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.scan.stepped import step_sizes
from penstock.kernels.spec import Cost

Outputs = dict[str, torch.Tensor | list[torch.Tensor]]


def _sequence(rank: int) -> Tensor:
    return Tensor(dtypes=FLOATS, rank=rank, ragged="pad")


def _parameter(rank: int) -> Tensor:
    return Tensor(dtypes=FLOATS, rank=rank)


@kernel(
    "selective_scan",
    inputs={
        **dict.fromkeys(("u", "delta", "B", "C"), _sequence(2)),
        **dict.fromkeys(("A", "initial_state"), _parameter(2)),
        **dict.fromkeys(("D", "delta_bias"), _parameter(1)),
    },
    cost=Cost(base_ms=0.5, per={"u.numel": 3e-5}),
    combine="sum",
    max_batch_size=64,
)
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor,
    initial_state: torch.Tensor,
    delta_softplus: bool = True,
    *,
    u_lengths: torch.Tensor,
    delta_lengths: torch.Tensor,
    B_lengths: torch.Tensor,
    C_lengths: torch.Tensor,
) -> Outputs:
    """Mamba's scan of a whole sequence, or of the next piece of one.

    A task gives u, delta `[length, channels]`, B, C `[length, state]`, A `[channels, state]` (negative), D, delta_bias
    `[channels]`, initial_state `[channels, state]` (zeros at a sequence's start; else the last piece's `last_state`).
    Lengths of a batch may differ, each has its own parameters; channels, state, dtypes and `delta_softplus` are equal.
    Returns `y`, `[length, channels]` in u's dtype, to be multiplied by silu(z) where there is a gate, and `last_state`,
    float32 `[channels, state]`, after the task's own last step. Formula, tolerance: `penstock.kernels.ops.selective_scan`.
    """
    lengths = _lengths("selective_scan", u=u_lengths, delta=delta_lengths, B=B_lengths, C=C_lengths)
    is_padding = _is_padding(u, u_lengths)
    y, last = scan.selective_scan(
        _emptied(u, is_padding), _sizes(delta, delta_bias, delta_softplus, is_padding), A, _emptied(B, is_padding),
        _emptied(C, is_padding), D=D, delta_softplus=False, initial_state=initial_state, return_last_state=True,
    )  # fmt: skip
    return {"y": [row[:length] for row, length in zip(y, lengths, strict=True)], "last_state": last}


@kernel(
    "ssd",
    inputs={
        **dict.fromkeys(("x", "B", "C"), _sequence(3)),
        "delta": _sequence(2),
        **dict.fromkeys(("A", "D", "delta_bias"), _parameter(1)),
        "initial_state": _parameter(3),
    },
    cost=Cost(base_ms=0.5, per={"x.numel": 1e-5}),
    combine="sum",
    max_batch_size=64,
)
def ssd(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor,
    initial_state: torch.Tensor,
    delta_softplus: bool = False,
    chunk_size: int = 64,
    *,
    x_lengths: torch.Tensor,
    delta_lengths: torch.Tensor,
    B_lengths: torch.Tensor,
    C_lengths: torch.Tensor,
) -> Outputs:
    """Mamba-2's scan of a whole sequence, or of the next piece of one.

    A task gives x `[length, heads, head_dim]`, delta `[length, heads]`, B, C `[length, groups, state]`, A (negative), D,
    delta_bias `[heads]`, initial_state `[heads, head_dim, state]`. What may differ within a batch, what is returned and
    what to do about a gate: as for `selective_scan`. Formula, tolerance: `penstock.kernels.ops.ssd`.
    """
    lengths = _lengths("ssd", x=x_lengths, delta=delta_lengths, B=B_lengths, C=C_lengths)
    is_padding = _is_padding(x, x_lengths)
    y, last = scan.ssd(
        _emptied(x, is_padding), _sizes(delta, delta_bias, delta_softplus, is_padding), A, _emptied(B, is_padding),
        _emptied(C, is_padding), chunk_size=chunk_size, D=D, initial_state=initial_state, return_last_state=True,
    )  # fmt: skip
    return {"y": [row[:length] for row, length in zip(y, lengths, strict=True)], "last_state": last}


def _lengths(op: str, **lengths: torch.Tensor) -> list[int]:
    """The tasks' lengths, on the host. Raises InvalidInput if a task's inputs differ in theirs."""
    first, *rest = torch.stack(list(lengths.values())).tolist()
    if any(other != first for other in rest):
        raise InvalidInput(f"{op}: {', '.join(lengths)} of a task must have the same length")
    return list(first)


def _is_padding(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """bool `[batch, longest]`."""
    return torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)


def _emptied(x: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """`x` with zeros in the padding, whatever was there."""
    return x.masked_fill(is_padding.view(*is_padding.shape, *(1,) * (x.ndim - 2)), 0.0)


def _sizes(delta: torch.Tensor, bias: torch.Tensor, softplus: bool, is_padding: torch.Tensor) -> torch.Tensor:
    """The sizes of the steps, 0 in the padding: such a step changes no state."""
    if type(softplus) is not bool:
        raise InvalidInput(f"delta_softplus must be true or false; got {shown(softplus)}")
    if bias.ndim != 2 or bias.shape[1:] != delta.shape[2:]:
        raise InvalidInput(f"delta_bias must have the shape {list(delta.shape[2:])}; got {list(bias.shape[1:])}")
    return _emptied(step_sizes(delta, bias.float().unsqueeze(1), softplus), is_padding)
