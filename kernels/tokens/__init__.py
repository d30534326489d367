"""Tokens to the vectors that a model's layers begin with: embedding, position, norm."""

from pathlib import Path

import torch
from torch.nn import functional

from penstock.kernels import backends
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, LoadError, shown
from penstock.kernels.inputs import Tensor
from penstock.kernels.spec import Cost

NORMS = (None, "layer", "rms")
MAX_HIDDEN = 16_384
"""Longer rows do not fit the registers of the Triton form."""

_HALVES = (torch.float16, torch.bfloat16)


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
    """norm(scale * table[ids] + positions[position]) * norm_weight + norm_bias; `[..., hidden]` in the table's dtype.

    ids: int `[batch, length]` or `[total]`. table: float `[vocab, hidden]`. positions: `[max_positions, hidden]`;
    position_ids: int, shaped as ids, None = 0, 1, … along the last dimension. norm: "layer" (mean and variance), "rms"
    (mean square) or None; norm_weight and norm_bias: `[hidden]`. lengths: int64 `[batch]`, for ids `[batch, length]`: what
    lies beyond is padding, is not looked at, and gives zeros.

    An id or position outside of its table: InvalidInput on a CPU; on an accelerator, which is not waited for, the token's
    vector is NaN (without Triton, CUDA's own device-side assertion). Tolerance, whatever shares the batch, of the largest
    element: float32 2e-6, float64 1e-14, float16 4e-3, bfloat16 3e-2 (in torch sums are rounded before the layer norm, in
    Triton only at the end). No gradients.
    Source: Devlin et al. 2018; Ba et al. 2016 (layer norm), Zhang and Sennrich 2019 (RMS norm).
    """
    _check(ids, table, norm)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != table.shape[1:]:
            raise InvalidInput(f"token_transform: {name} must be [{table.shape[1]}]; got {list(vector.shape)}")
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != table.shape[1]):
        raise InvalidInput(f"token_transform: positions must be [n, {table.shape[1]}]; got {list(positions.shape)}")
    if position_ids is not None and (positions is None or position_ids.shape != ids.shape):
        raise InvalidInput("token_transform: position_ids need positions, and must have the shape of ids")
    if positions is not None and position_ids is None and ids.shape[-1] > len(positions):
        raise InvalidInput(f"token_transform: there are {len(positions)} positions for {ids.shape[-1]} tokens")
    if lengths is not None and (ids.ndim != 2 or lengths.shape != ids.shape[:1]):
        raise InvalidInput(f"token_transform: lengths must be [batch] for ids [batch, length]; got {list(lengths.shape)}")
    fits = table.shape[1] <= MAX_HIDDEN and table.dtype != torch.float64
    usable = backends.torch_or_triton(table.device) if fits else ["torch"]
    if backends.choose("token_transform", table.device, usable) == "triton":
        from penstock.kernels.tokens import gather

        return gather.token_transform(ids, table, positions, position_ids, norm, norm_weight, norm_bias, eps, scale, lengths)
    if lengths is not None:
        is_padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        ids = ids.masked_fill(is_padding, 0)
        position_ids = None if position_ids is None else position_ids.masked_fill(is_padding, 0)
    x = _looked_up(ids, table, positions, position_ids, scale)
    if norm == "rms" and x.dtype in _HALVES:
        x = x.float()  # which torch would do, twice
    out = _normalised(x, norm, norm_weight, norm_bias, eps)
    if lengths is not None:
        for row, length in zip(out, lengths.tolist(), strict=True):  # only what is padding is written
            row[max(length, 0) :] = 0.0
    return out.to(table.dtype)


def _check(ids: torch.Tensor, table: torch.Tensor, norm: object) -> None:
    if ids.ndim not in (1, 2) or ids.dtype not in (torch.int32, torch.int64):
        raise InvalidInput(f"token_transform: ids must be int64 [batch, length] or [total]; got {ids.dtype} {list(ids.shape)}")
    if table.ndim != 2 or 0 in table.shape or not table.is_floating_point():
        raise InvalidInput(f"token_transform: table must be float [vocab, hidden]; got {table.dtype} {list(table.shape)}")
    if norm not in NORMS:
        raise InvalidInput(f"token_transform: norm must be 'layer', 'rms' or None; got {shown(norm)}")


def _looked_up(
    ids: torch.Tensor, table: torch.Tensor, positions: torch.Tensor | None, position_ids: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """scale * table[ids] + positions[position], in memory of its own."""
    try:
        x = functional.embedding(ids, table)
        added = None if positions is None else positions[: ids.shape[-1]]
        if positions is not None and position_ids is not None:
            added = functional.embedding(position_ids, positions)
    except IndexError as error:
        limits = f"from 0 to {len(table) - 1}" + (f", positions to {len(positions) - 1}" if positions is not None else "")
        raise InvalidInput(f"token_transform: ids must be {limits}; one is not") from error
    if scale != 1.0:
        x.mul_(scale)
    return x if added is None else x.add_(added)


def _normalised(
    x: torch.Tensor, norm: str | None, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    weight, bias = (None if vector is None else vector.to(x.dtype) for vector in (weight, bias))
    if norm == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm == "rms":
        x = functional.rms_norm(x, x.shape[-1:], weight, eps)
    elif weight is not None:
        x = x.mul_(weight)
    return x if bias is None else x.add_(bias)


@kernel(
    "token_transform",
    inputs={"ids": Tensor(dtypes=("int32", "int64"), rank=1, ragged="pad")},
    cost=Cost(base_ms=0.05, per={"ids.numel": 1e-3}),
    combine="sum",
    max_batch_size=256,
)
class TokenTransform:
    """The vectors of each task's tokens, by tables from a file: see `penstock.kernels.tokens.token_transform`.

    ids: int `[length]`, tasks of a batch may differ. Returns `out`: per task `[length, hidden]` in the table's dtype. An id
    outside of the table, or more ids than positions, is refused for that task alone. Tolerance: as the function's.

    Options: `weights`: a safetensors file; `table`, `positions`, `norm_weight`, `norm_bias`: the names of its tensors, None
    = not used; `norm`, `eps`, `scale`: as the function's.
    """

    def __init__(
        self,
        weights: str = "",
        table: str = "table",
        positions: str | None = None,
        norm_weight: str | None = None,
        norm_bias: str | None = None,
        norm: str | None = "layer",
        eps: float = 1e-5,
        scale: float = 1.0,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be 'layer', 'rms' or None; got {norm!r}")
        self._weights = Path(weights)
        self._names = {"table": table, "positions": positions, "norm_weight": norm_weight, "norm_bias": norm_bias}
        self._norm, self._eps, self._scale = norm, float(eps), float(scale)
        self._tensors: dict[str, torch.Tensor] = {}

    def load(self, device: torch.device) -> None:
        """Puts the named tensors onto `device`. Raises LoadError."""
        from safetensors import SafetensorError, safe_open

        if not self._weights.is_file():
            raise LoadError("token_transform: give a safetensors file: --option token_transform.weights=<path>")
        try:
            with safe_open(self._weights, framework="pt") as file:
                tensors = {key: file.get_tensor(name).to(device) for key, name in self._names.items() if name is not None}
        except (SafetensorError, OSError) as error:
            raise LoadError(f"token_transform: {self._weights.name} cannot be read: {error}") from error
        hidden = tensors["table"].shape[-1:]
        ranks = {"table": 2, "positions": 2, "norm_weight": 1, "norm_bias": 1}
        for key, tensor in tensors.items():
            if tensor.ndim != ranks[key] or tensor.shape[-1:] != hidden or not tensor.is_floating_point():
                wanted = "float [hidden]" if ranks[key] == 1 else "float [rows, hidden]"
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise LoadError(f"token_transform: {self._weights.name}: {key} must be {wanted}; got {got}")
        self._tensors = tensors

    def unload(self) -> None:
        """Drops the tensors."""
        self._tensors = {}

    def __call__(self, ids: torch.Tensor, ids_lengths: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """ids: `[batch, longest]`, ids_lengths: int64 `[batch]`."""
        out = token_transform(
            ids, **self._tensors, norm=self._norm, eps=self._eps, scale=self._scale, lengths=ids_lengths
        )
        if out.device.type != "cpu" and bool(self._has_stranger(ids, ids_lengths)):
            raise InvalidInput(f"token_transform: ids must be from 0 to {len(self._tensors['table']) - 1}; one is not")
        return {"out": [row[:length] for row, length in zip(out, ids_lengths.tolist(), strict=True)]}

    def _has_stranger(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        is_real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return (((ids < 0) | (ids >= len(self._tensors["table"]))) & is_real).any()
