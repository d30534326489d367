"""State space layers: Mamba's selective scan, its single step, and Mamba-2's scan (SSD). For inference: no gradients.

Knows shapes, and which form runs; the forms are in `stepped.py` (torch), `fused.py` (Triton) and `chunked.py` (SSD), and
what a broker offers is in `tasks.py`. Letters are the papers': u or x the input, delta the step's size, A the rate of
decay, B what comes into the state, C what comes out of it, D the skip, z the gate.
"""

import torch

from penstock.kernels import backends
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.scan import chunked, stepped

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
MAX_CHUNK_SIZE = 1024
MAX_TRITON_STATE = 256


@torch.no_grad()
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
) -> Result:
    """x_t = exp(d_t A) x_{t-1} + d_t B_t u_t, y_t = (C_t x_t + D u_t) silu(z_t), with d = softplus(delta + delta_bias).

    u, delta, z: float `[batch, length, channels]`; A: `[channels, state]`, negative, that is -exp(A_log); B, C:
    `[batch, length, state]`; D, delta_bias: `[channels]`; initial_state: float32 `[batch, channels, state]`, zeros if
    None. A, D and delta_bias may have a batch dimension: one layer per sequence. Of z, D, delta_bias None leaves it out;
    `delta_softplus=False`: d = delta + delta_bias. Any strides; floats of different widths may be mixed.

    Returns y in u's shape and dtype and, if asked, the last state, float32 `[batch, channels, state]`: given as the next
    call's initial_state, a sequence may be cut anywhere. States and sums are float32 whatever the inputs are. Tolerance:
    2e-5 of the sum of the absolute values of the terms of y_t (of the state), 2e-7 for each step of more than 100 that
    have hardly decayed, and y's rounding to its dtype; the same whatever shares the batch. Raises InvalidInput if shapes,
    dtypes or devices do not fit. Source: Gu and Dao 2023, algorithm 2; softplus is torch's, linear above 20.
    """
    batch, length, channels = _shape("selective_scan", "u", u, 3)
    num_states = _shape("selective_scan", "A", A, A.ndim if A.ndim == 3 else 2)[-1]
    _check(
        "selective_scan",
        u,
        delta=(delta, (batch, length, channels)),
        z=(z, (batch, length, channels)),
        B=(B, (batch, length, num_states)),
        C=(C, (batch, length, num_states)),
        initial_state=(initial_state, (batch, channels, num_states)),
    )
    A = _parameter("selective_scan", "A", A, u, (batch, channels, num_states))
    D = _optional("selective_scan", "D", D, u, (batch, channels))
    delta_bias = _optional("selective_scan", "delta_bias", delta_bias, u, (batch, channels))
    if initial_state is not None:
        initial_state = initial_state.float()
    form = stepped.selective_scan
    if _is_triton("selective_scan", u, num_states):
        from penstock.kernels.scan import fused

        form = fused.selective_scan
    y, last = form(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    return (y, last) if return_last_state else y


@torch.no_grad()
def selective_state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """One step of `selective_scan`: returns y and **writes the new state into `state`**.

    state: float32 `[batch, channels, state]`, any strides; u, delta, z: `[batch, channels]`; B, C: `[batch, state]`; the
    others, the tolerance and the errors are those of `selective_scan`.
    """
    batch, channels, num_states = _shape("selective_state_update", "state", state, 3)
    if state.dtype != torch.float32:
        raise InvalidInput(f"selective_state_update: state must be float32; got {state.dtype}")
    _check(
        "selective_state_update",
        state,
        u=(u, (batch, channels)),
        delta=(delta, (batch, channels)),
        z=(z, (batch, channels)),
        B=(B, (batch, num_states)),
        C=(C, (batch, num_states)),
    )
    A = _parameter("selective_state_update", "A", A, state, (batch, channels, num_states))
    D = _optional("selective_state_update", "D", D, state, (batch, channels))
    delta_bias = _optional("selective_state_update", "delta_bias", delta_bias, state, (batch, channels))
    form = stepped.selective_state_update
    if _is_triton("selective_state_update", u, num_states):
        from penstock.kernels.scan import fused

        form = fused.selective_state_update
    return form(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@torch.no_grad()
def ssd(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
) -> Result:
    """S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T, y_t = (S_t C_t + D x_t) silu(z_t), with d = delta + delta_bias, per head.

    x, z: float `[batch, length, heads, head_dim]`; delta: `[batch, length, heads]`; A, D, delta_bias: `[heads]` or
    `[batch, heads]`, A negative; B, C: `[batch, length, groups, state]`, each group shared by heads / groups heads in
    order; initial_state: float32 `[batch, heads, head_dim, state]`. `delta_softplus=True`: d = softplus(delta +
    delta_bias). chunk_size: 1 to 1024, for speed only. Work and memory grow with length times chunk_size.

    Returns y in x's shape and dtype and, if asked, the last state in the shape of initial_state, float32, to go on with.
    Computed in float32 (matrix products in what torch is set to use for float32). Tolerance: as for `selective_scan`; a
    NaN or infinity reaches its whole chunk. Raises InvalidInput. Source: Dao and Gu 2024, section 6.
    """
    batch, length, heads, head_dim = _shape("ssd", "x", x, 4)
    groups, num_states = _shape("ssd", "B", B, 4)[2:]
    if type(chunk_size) is not int or not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise InvalidInput(f"ssd: chunk_size must be an integer from 1 to {MAX_CHUNK_SIZE}; got {shown(chunk_size)}")
    if groups < 1 or heads % groups:
        raise InvalidInput(f"ssd: the number of heads must be a multiple of B's groups; got {heads} heads, {groups} groups")
    _check(
        "ssd",
        x,
        delta=(delta, (batch, length, heads)),
        z=(z, tuple(x.shape)),
        B=(B, (batch, length, groups, num_states)),
        C=(C, (batch, length, groups, num_states)),
        initial_state=(initial_state, (batch, heads, head_dim, num_states)),
    )
    A = _parameter("ssd", "A", A, x, (batch, heads))
    D = _optional("ssd", "D", D, x, (batch, heads))
    delta_bias = _optional("ssd", "delta_bias", delta_bias, x, (batch, heads))
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, head_dim, num_states, dtype=torch.float32)
    bias = None if delta_bias is None else delta_bias.unsqueeze(1)
    sizes = stepped.step_sizes(delta, bias, delta_softplus)
    y, last = chunked.ssd(x, sizes, A, B, C, chunk_size, initial_state.float())
    skip = None if D is None else D[:, None, :, None]
    y = stepped.finished(y, x.float(), skip, z).to(x.dtype)
    return (y, last) if return_last_state else y


def _is_triton(op: str, u: torch.Tensor, num_states: int) -> bool:
    if not (u.numel() and num_states):
        return False  # nothing to launch
    usable = backends.torch_or_triton(u.device) if num_states <= MAX_TRITON_STATE else ["torch"]
    return backends.choose(op, u.device, usable) == "triton"


def _shape(op: str, name: str, part: torch.Tensor, rank: int) -> tuple[int, ...]:
    if part.ndim != rank:
        raise InvalidInput(f"{op}: {name} must have {rank} dimensions; got {list(part.shape)}")
    return tuple(part.shape)


def _check(op: str, first: torch.Tensor, **parts: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Raises InvalidInput unless all are floats of these shapes on the device of `first`."""
    if not first.is_floating_point():
        raise InvalidInput(f"{op}: inputs must be floating point; got {first.dtype}")
    for name, (part, shape) in parts.items():
        if part is None:
            continue
        if tuple(part.shape) != shape:
            raise InvalidInput(f"{op}: {name} must have the shape {list(shape)}; got {list(part.shape)}")
        if not part.is_floating_point() or part.device != first.device:
            raise InvalidInput(
                f"{op}: {name} must be floating point and on {first.device}; got {part.dtype} on {part.device}"
            )


def _parameter(op: str, name: str, part: torch.Tensor, first: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A layer's parameter in float32, `[batch, ...]`: its own batch dimension, or none."""
    _check(op, first, **{name: (part, shape if part.ndim == len(shape) else shape[1:])})
    return part.float().expand(shape)


def _optional(
    op: str, name: str, part: torch.Tensor | None, first: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor | None:
    return None if part is None else _parameter(op, name, part, first, shape)
