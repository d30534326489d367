"""The selective scan in plain torch: step after step, everything else in blocks of steps.

Knows float32 arithmetic and cache sizes; shapes were checked before. Decays and inputs of a block of steps are made at
once, `[steps, batch, state, channels]`, so that a step is a single multiply-add in place, and the outputs of a block
are one batched product. Nothing is divided and no exponent is positive, so strong decay cannot overflow.
"""

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 20
"""Decays made at once: a block of them and of the states, 8 MiB, stays in the outer cache."""
MAX_BLOCK_STEPS = 64


def step_sizes(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """The steps' sizes in float32: softplus(delta + bias), or delta + bias. bias: anything that broadcasts to delta."""
    delta = delta.float() if bias is None else delta.float() + bias
    return F.softplus(delta) if softplus else delta


def shared_once(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` `[batch, ...]`, each sequence's contiguous; one that all sequences share stays one, at stride 0."""
    if parameter.stride(0):
        return parameter.contiguous()
    return parameter[:1].contiguous().expand(parameter.shape)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state). A: float32 `[batch, channels, state]`, D and delta_bias: float32 `[batch, channels]`."""
    batch, length, channels = u.shape
    num_states = A.shape[2]
    A = shared_once(A.transpose(1, 2))
    state = u.new_zeros(batch, num_states, channels, dtype=torch.float32)
    if initial_state is not None:
        state.copy_(initial_state.transpose(1, 2))
    num_steps = max(1, min(BLOCK_ELEMENTS // max(state.numel(), 1), MAX_BLOCK_STEPS, length))
    decays, states = (state.new_empty(num_steps, batch, num_states, channels) for _ in range(2))
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    for first in range(0, length, num_steps):
        block = slice(first, min(first + num_steps, length))
        values = u[:, block].transpose(0, 1).float()
        sizes = step_sizes(delta[:, block].transpose(0, 1), delta_bias, delta_softplus)
        into, outof = (part[:, block].transpose(0, 1).float() for part in (B, C))
        decay, history = decays[: len(sizes)], states[: len(sizes)]
        torch.mul(sizes.unsqueeze(2), A, out=decay).exp_()
        torch.mul((sizes * values).unsqueeze(2), into.unsqueeze(3), out=history)
        previous = state
        for factor, current in zip(decay.unbind(), history.unbind(), strict=True):
            previous = torch.addcmul(current, factor, previous, out=current)
        state.copy_(previous)
        out = (outof.unsqueeze(2) @ history).squeeze(2)
        y[:, block] = finished(out, values, D, None if z is None else z[:, block].transpose(0, 1)).transpose(0, 1)
    return y, state.transpose(1, 2).contiguous()


def selective_state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> torch.Tensor:
    """y; `state` is updated in place. Parameters as in `selective_scan`."""
    values, sizes = u.float(), step_sizes(delta, delta_bias, delta_softplus)
    state.mul_((sizes.unsqueeze(2) * A).exp_())
    state.addcmul_((sizes * values).unsqueeze(2), B.float().unsqueeze(1))
    return finished((state @ C.float().unsqueeze(2)).squeeze(2), values, D, z).to(u.dtype)


def finished(y: torch.Tensor, u: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(y + D u) silu(z) in float32, in place where y is."""
    if D is not None:
        y = y.addcmul_(D, u)
    return y if z is None else y.mul_(F.silu(z.float()))
