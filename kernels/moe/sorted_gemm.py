"""Experts by sorting: the pairs ordered by expert, then two matrix products per expert that has any.

Knows sizes on the host, so it waits for a device that is not the CPU; the form for CPUs, and for what has no better one.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


def feed_forward(x: torch.Tensor, w_gate_up: Sequence[torch.Tensor], w_down: torch.Tensor) -> torch.Tensor:
    """w_down (silu(gate) * up) for the rows of x `[rows, hidden]`, with one expert's weights.

    w_gate_up: one tensor `[2 * inter, hidden]`, or two, of gate and of up; w_down: `[hidden, inter]`.
    """
    products = [functional.linear(x, part) for part in w_gate_up]
    gate, up = products if len(products) == 2 else products[0].chunk(2, 1)
    return functional.linear(functional.silu(gate).mul_(up), w_down)


def fill(
    y: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    place: torch.Tensor | None = None,
) -> None:
    """Writes the rows of all pairs, or of those whose expert has its weights here; the others are left alone.

    y: `[tokens * top_k, hidden]`, x: `[tokens, hidden]`, experts: int64 `[tokens, top_k]`, w_gate_up:
    `[places, 2 * inter, hidden]`, w_down: `[places, hidden, inter]`; place: int32 `[experts]`, where an expert's weights
    are, `places` = not here; None = expert e at e.
    """
    flat, top_k = experts.flatten(), experts.shape[1]
    places = range(len(w_down)) if place is None else place.tolist()
    if len(x) == 1:  # nothing to sort, and the sorting would show
        for pair, e in enumerate(flat.tolist()):
            if (at := places[e]) < len(w_down):
                y[pair : pair + 1] = feed_forward(x, (w_gate_up[at],), w_down[at])
        return
    order = flat.argsort(stable=True)
    rows = x.index_select(0, order // top_k)
    start = 0
    for at, size in zip(places, torch.bincount(flat, minlength=len(places)).tolist(), strict=True):
        part = slice(start, start + size)
        start += size
        if size and at < len(w_down):
            y.index_copy_(0, order[part], feed_forward(rows[part], (w_gate_up[at],), w_down[at]))
