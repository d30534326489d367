"""State space layers by their definition: one step after another, in float64.

Signatures and shapes are those of `penstock.kernels.scan`. Nothing is checked here.
"""

import torch
import torch.nn.functional as F

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


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
    """x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t, y_t = C_t x_t + D u_t, times silu(z_t). Equations 2 of the paper."""
    batch, length, channels = u.shape
    steps = _step_sizes(delta, delta_bias, delta_softplus)  # [batch, length, channels]
    x = u.new_zeros(batch, channels, A.shape[-1], dtype=torch.float64)
    if initial_state is not None:
        x = initial_state.double()
    y = torch.zeros_like(u, dtype=torch.float64)
    for t in range(length):
        drive = (steps[:, t] * u[:, t].double())[..., None] * B[:, t, None].double()
        x = torch.exp(steps[:, t, :, None] * A.double()) * x + drive
        y[:, t] = (x * C[:, t, None].double()).sum(-1)
    return _result(y, u, None if D is None else _per_sequence(D, 1), z, x, return_last_state)


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
    """One step of `selective_scan`; the state is updated in place."""
    y, last = selective_scan(
        u[:, None], delta[:, None], A, B[:, None], C[:, None], D=D, z=None if z is None else z[:, None],
        delta_bias=delta_bias, delta_softplus=delta_softplus, initial_state=state, return_last_state=True,
    )  # fmt: skip
    state.copy_(last)
    return y[:, 0]


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
    """The same recurrence with one decay for a whole head: S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t^T, y_t = S_t C_t."""
    batch, length, heads, head_dim = x.shape
    steps = _step_sizes(delta, delta_bias, delta_softplus)  # [batch, length, heads]
    B, C = (part.double().repeat_interleave(heads // part.shape[2], 2) for part in (B, C))
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1], dtype=torch.float64)
    if initial_state is not None:
        state = initial_state.double()
    y = torch.zeros_like(x, dtype=torch.float64)
    for t in range(length):
        drive = (steps[:, t, :, None] * x[:, t].double())[..., None] * B[:, t, :, None]
        state = torch.exp(steps[:, t] * A.double())[..., None, None] * state + drive
        y[:, t] = (state * C[:, t, :, None]).sum(-1)
    return _result(y, x, None if D is None else _per_sequence(D, 1)[..., None], z, state, return_last_state)


def _step_sizes(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    delta = delta.double() if bias is None else delta.double() + _per_sequence(bias, 1)
    return F.softplus(delta) if softplus else delta


def _per_sequence(parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """[1 or batch, 1, ...]: a parameter of the layer, or one for each sequence, against `[batch, length, ...]`."""
    return (parameter if parameter.ndim > rank else parameter[None]).double().unsqueeze(1)


def _result(
    y: torch.Tensor, u: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None, state: torch.Tensor, with_state: bool
) -> Result:
    if D is not None:
        y = y + D * u.double()
    if z is not None:
        y = y * F.silu(z.double())
    return (y.to(u.dtype), state.float()) if with_state else y.to(u.dtype)
