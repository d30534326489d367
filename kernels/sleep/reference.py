"""What `sleep` returns, without the time that it takes."""

import torch


def sleep(seconds: torch.Tensor, steps: int = 1) -> dict[str, torch.Tensor]:
    """`seconds` as given, whatever `steps`. seconds: float64 `[batch]`."""
    return {"seconds": seconds}
