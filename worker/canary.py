"""Does the device compute? A small task with a known answer, run where nothing else would tell.

Knows a few of torch's operations and what they must give; does not know when to ask, nor what follows.
"""

import math

import torch

from penstock.worker.config import DeviceFault

SIZE = 64


def check(device: torch.device) -> None:
    """Matrix product, softmax and sum in float32, whose results are known exactly or by a closed form.

    Product: of small integers, so that every order of summation gives the same: exact. Softmax: of equal values, 1/n in
    each place, within 1e-6. Sum: of 1 to n, exact; n (n + 1) / 2 is far below 2^24.

    Raises:
        DeviceFault: an answer is wrong, or the device fails.
    """
    try:
        with torch.inference_mode():
            found = _answers(device)
    except RuntimeError as e:
        raise DeviceFault(f"the known-answer test cannot be run on {device}: {e}") from e
    for name, (got, wanted, tolerance) in found.items():
        if not math.isclose(got, wanted, rel_tol=0.0, abs_tol=tolerance):
            raise DeviceFault(f"the known-answer test fails on {device}: {name} gives {got!r} instead of {wanted!r}")


def _answers(device: torch.device) -> dict[str, tuple[float, float, float]]:
    """Name -> (what came, what is right, tolerance)."""
    rows = torch.arange(SIZE, dtype=torch.float32, device=device)
    left, right = (rows[:, None] + rows) % 7, (rows[:, None] * 3 + rows) % 5
    product = left @ right
    softmax = torch.softmax(torch.full((SIZE, SIZE), 3.0, device=device), dim=-1)
    total = (rows + 1).sum()
    right_product = torch.tensor(
        [[sum((i + k) % 7 * ((3 * k + j) % 5) for k in range(SIZE)) for j in range(4)] for i in range(4)],
        dtype=torch.float32,
    )
    return {
        "the matrix product": ((product[:4, :4].cpu() - right_product).abs().max().item(), 0.0, 0.0),
        "softmax": ((softmax - 1.0 / SIZE).abs().max().item(), 0.0, 1e-6),
        "the sum": (total.item(), SIZE * (SIZE + 1) / 2, 0.0),
    }
