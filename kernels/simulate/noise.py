"""Random numbers without a generator: a hash of (seed, step, agent), equal on every device and backend.

Knows 32-bit integer mixing; does not know what the numbers are for.
"""

import torch

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit numbers, held in int64, in which every bit of x stirs every bit of the result."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keys(seeds: torch.Tensor) -> torch.Tensor:
    """One 32-bit key per world, from int64 seeds `[worlds]`."""
    return _mix((seeds & _MASK) ^ _mix((seeds >> 32) & _MASK))


def uniform(keys: torch.Tensor, steps: torch.Tensor, num_agents: int) -> torch.Tensor:
    """Uniform in [-1, 1), multiples of 2^-23, float32 `[worlds, agents, 2]`. keys, steps: `[worlds]`."""
    counter = torch.arange(2 * num_agents, device=keys.device)
    now = _mix(keys ^ _mix(steps & _MASK))
    bits = _mix(now[:, None] ^ _mix(counter)) >> 8
    return (bits.float() * 2.0**-23 - 1.0).view(len(keys), num_agents, 2)
