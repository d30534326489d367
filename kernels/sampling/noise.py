"""Uniform numbers from seeds and counters: the same for everybody who asks for the same ones, on every device.

Knows integers only. `pivots.py` has the same function in Triton; a test compares them bit by bit.
Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied to the seed and again to seed and counter.
"""

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, and so on: int64 has no other way to write them
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def uniform(seeds: torch.Tensor, counter: torch.Tensor | int = 0) -> torch.Tensor:
    """float64 in [0, 1), multiples of 2^-53. seeds: int64 of any shape; counter: int64, broadcast against it."""
    bits = _mixed(_mixed(seeds + _GOLDEN) + torch.as_tensor(counter, device=seeds.device) * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST  # int64 wraps around, and its shift must not copy the sign
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
