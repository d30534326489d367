"""Which rows of a kernel's outputs are not finite? One sum per output, on the device that holds it.

Knows tensors; does not know what becomes of such rows. A row's sum is not finite if any of its values is not (infinity
and NaN never leave a sum); the few rows whose finite values add up to more than float32 holds are looked at again.
"""

from collections.abc import Mapping
from typing import Any

import torch


def sums(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The sum of every row, `[batch]`, of each output of floats, on its device: nothing waits for it."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                found[name] = _sum(value.reshape(len(value), -1), 1)
        elif value and isinstance(value[0], torch.Tensor) and value[0].is_floating_point():
            found[name] = torch.stack([_sum(row.reshape(-1), 0) for row in value])
    return found


def _sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values.sum(dim, dtype=torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None)


def not_finite(found: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]) -> dict[int, str]:
    """Row -> its first output that is not finite, from `sums` and the outputs, both on the CPU."""
    rows: dict[int, str] = {}
    for name, totals in found.items():
        suspects = ~torch.isfinite(totals)
        if bool(suspects.any()):
            for row in suspects.nonzero()[:, 0].tolist():
                if not bool(torch.isfinite(outputs[name][row]).all()):
                    rows.setdefault(row, name)
    return rows
