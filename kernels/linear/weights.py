"""What layers with weights share: reading them from a safetensors file, and taking tasks' rows together and apart.

Knows files and rows; does not know what a layer computes.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from penstock.kernels.errors import InvalidInput, LoadError


def check_file(kernel: str, file: object) -> None:
    """Raises TypeError unless `file` is a path as text, or None: to be given before the kernel is loaded."""
    if not isinstance(file, str | None):
        raise TypeError(f"{kernel}: file is the path of a safetensors file; got {file!r}")


def load_weights(
    kernel: str,
    file: str | None,
    ranks: Mapping[str, int],
    device: torch.device,
    *,
    optional: Collection[str] = (),
    dtypes: Collection[torch.dtype] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors called as in `ranks`, with so many dimensions each, on `device`; without those `optional` that are not there.

    `dtypes`: what they may be, None = anything. Raises LoadError in one line.
    """
    if file is None:
        raise LoadError(f"{kernel} needs its weights: --option {kernel}.file=<a safetensors file with {', '.join(ranks)}>")
    weights = {}
    try:
        with safe_open(Path(file).expanduser(), "pt", device="cpu") as tensors:
            there = set(tensors.keys())
            if missing := set(ranks) - there - set(optional):
                raise LoadError(f"{file} has no tensor {', '.join(sorted(missing))}")
            for name in ranks:
                if name in there:
                    weights[name] = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error
    for name, weight in weights.items():
        if weight.ndim != ranks[name]:
            raise LoadError(f"{file}: {name} must have {ranks[name]} dimensions; it is {list(weight.shape)}")
        if dtypes is not None and weight.dtype not in dtypes:
            raise LoadError(f"{file}: {name} must be {' or '.join(map(str, dtypes))}; it is {weight.dtype}")
    # A copy also on the CPU: the file is mapped, and would end the process if it were cut short under it.
    return {name: weight.to(device, copy=True) for name, weight in weights.items()}


def rows_for(kernel: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` in the dtype of `weight` `[out, in]`. Raises InvalidInput if its rows have another length."""
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise InvalidInput(f"{kernel}: x must be [rows, {weight.shape[1]}] for this layer; got {list(x.shape)}")
    return x.to(weight.dtype)


def split_rows(out: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """out `[total, ...]` cut at `offsets`, int64 `[tasks + 1]`."""
    return list(torch.split(out, offsets.diff().tolist()))
