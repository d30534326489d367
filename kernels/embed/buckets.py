"""Groups texts of similar length, so that little is padded.

Knows lengths only. Fewer groups cost less per call, more groups waste less: padding is worth a call of its own when it
is more than a share of the group and more than one call's fixed work.
"""

from collections.abc import Sequence

MAX_WASTE = 0.05
"""Share of a group that may be padding."""

FREE_TOKENS = 32
"""Padding that costs less than another call."""

MAX_TOKENS = 16_384
"""Padded tokens of a group, which bounds the memory of activations."""


def make_buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices into `lengths`, each in one group; groups by ascending length."""
    buckets: list[list[int]] = []
    num_tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if buckets:
            padded = lengths[i] * (len(buckets[-1]) + 1)
            waste = padded - num_tokens - lengths[i]
            if waste <= max(FREE_TOKENS, MAX_WASTE * padded) and padded <= MAX_TOKENS:
                buckets[-1].append(i)
                num_tokens += lengths[i]
                continue
        buckets.append([i])
        num_tokens = lengths[i]
    return buckets
