"""What `scripts/bench kernels` measures: one module per family of operations, each with `cases(device, is_quick)`.

A case is one operation at one size: ours, what it must equal, whom it is compared with, and the floor it is measured
against.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FLOOR = "floor"
"""The key in `Case.goals` for the share of the hardware's floor."""


@dataclass(frozen=True)
class Case:
    """One operation at one size; all inputs exist, on the device, when the case is made.

    Attributes:
        op: the operation, as in `penstock.kernels.ops`; size: what is particular, as in "B=64 V=128k float32".
        ours: one call; its result is not read.
        check: the correctness gate, run before anything is timed: raises AssertionError if a result of `ours` differs from
            the reference by more than the stated tolerance. May look at a part where all of it would take long.
        peers: name -> one call of another implementation on the same inputs ("torch", "torch.compile", "transformers", …).
            Left out where it cannot be installed.
        num_bytes: what must cross the device's memory at least once; num_flops: what must be computed at least; 0 = no floor.
        flops_dtype: the dtype that decides the rate of computing ("float32", "bfloat16", …).
        goals: FLOOR -> at least this share of the floor; a peer's name -> at least so many times as fast as it.
        can_graph: False if a call looks at values on the host, so that it cannot be captured into a CUDA graph.
    """

    op: str
    size: str
    ours: Callable[[], Any]
    check: Callable[[], None]
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    num_bytes: float = 0.0
    num_flops: float = 0.0
    flops_dtype: str = "float32"
    goals: Mapping[str, float] = field(default_factory=dict)
    can_graph: bool = True
