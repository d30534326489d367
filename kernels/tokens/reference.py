"""Token rows by their definition: float32 throughout (float64 for float64), one formula after the other."""

import torch


def token_transform(
    ids: torch.Tensor,
    table: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    norm: str | None = "layer",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * table[id] + positions[position], normalised, one token at a time; see `penstock.kernels.tokens`."""
    out = torch.zeros(*ids.shape, table.shape[1], dtype=table.dtype)
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    for place in torch.cartesian_prod(*map(torch.arange, ids.shape)).view(-1, ids.ndim).tolist():
        at = tuple(place)
        if lengths is not None and at[1] >= int(lengths[at[0]]):
            continue
        x = scale * table[ids[at]].to(wide)
        if positions is not None:
            x = x + positions[at[-1] if position_ids is None else position_ids[at]].to(wide)
        if norm == "layer":
            x = x - x.mean()
        if norm is not None:
            x = x / (x.square().mean() + eps).sqrt()
        if norm_weight is not None:
            x = x * norm_weight.to(wide)
        if norm_bias is not None:
            x = x + norm_bias.to(wide)
        out[at] = x.to(table.dtype)
    return out
