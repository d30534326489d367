"""Experts in safetensors files: where each one's weights lie, as views of mapped memory.

Knows names, shapes and files; does not know devices, slots or who needs what. Nothing is read until a view is.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from penstock.kernels.experts.errors import ExpertFileError, ExpertMissing


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How an expert's tensors are called; `{layer}` and `{expert}` stand for numbers.

    `gate_up`: one name, of gate rows followed by up rows, `[2 * inter, hidden]`; or two, of `[inter, hidden]` each.
    `down`: of `[hidden, inter]`. A name without `{expert}` is of a tensor `[experts, ...]` with all of a layer's.
    """

    gate_up: tuple[str, ...] = ("layers.{layer}.w_gate_up",)
    down: str = "layers.{layer}.w_down"


STACKED = ExpertNames()
QWEN3_MOE = ExpertNames(
    (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    ),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
)
"""The names in checkpoints of Qwen3-MoE."""


@dataclass(frozen=True, slots=True)
class ExpertViews:
    """One expert's weights in mapped memory, as they are stored: gate and up together or apart, down `[hidden, inter]`."""

    gate_up: tuple[torch.Tensor, ...]
    down: torch.Tensor


class ExpertFiles:
    """The experts in some files, all of one shape and dtype.

    Attributes:
        num_experts: layer -> number of its experts; hidden_size, inter, dtype: of each; num_bytes: of one expert.
    """

    def __init__(self, paths: Iterable[Path | str], names: ExpertNames = STACKED) -> None:
        """Opens and maps the files. Raises ExpertFileError if they hold no experts, or different ones."""
        self._names = names
        self._where: dict[str, _MappedFile] = {}
        for path in paths:
            file = _MappedFile(Path(path))
            self._where.update(dict.fromkeys(file.names, file))
        self.num_experts = self._count()
        if not self.num_experts:
            raise ExpertFileError(f"no tensor in the files is called like {names.down!r}")
        layer = min(self.num_experts)
        views = self.views(layer, 0)
        self.dtype = views.down.dtype
        self.hidden_size, self.inter = views.down.shape
        self.num_bytes = sum(part.nbytes for part in (*views.gate_up, views.down))
        self._check_all()

    def views(self, layer: int, expert: int) -> ExpertViews:
        """An expert's weights, to be read now. Raises ExpertMissing, or ExpertFileError if a file was cut short."""
        if not 0 <= expert < self.num_experts.get(layer, 0):
            there = f"experts 0 to {self.num_experts[layer] - 1}" if layer in self.num_experts else "no such layer"
            raise ExpertMissing(f"there is no expert {expert} of layer {layer}; the files hold {there}")
        gate_up = tuple(self._view(name, layer, expert) for name in self._names.gate_up)
        return ExpertViews(gate_up, self._view(self._names.down, layer, expert))

    def _view(self, name: str, layer: int, expert: int) -> torch.Tensor:
        full_name = name.format(layer=layer, expert=expert)
        if full_name not in self._where:
            raise ExpertMissing(f"the files hold no tensor {full_name!r}")
        view = self._where[full_name].view(full_name)
        return view if "{expert}" in name else view[expert]

    def _count(self) -> dict[int, int]:
        """Experts per layer, by the names of their down tensors."""
        name = self._names.down
        pattern = re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
        counts: dict[int, int] = {}
        for there in self._where:
            if not (match := re.fullmatch(pattern, there)):
                continue
            layer = int(match["layer"])
            last = int(match["expert"]) + 1 if "{expert}" in name else len(self._where[there].view(there))
            counts[layer] = max(counts.get(layer, 0), last)
        return counts

    def _check_all(self) -> None:
        num_parts = len(self._names.gate_up)
        wanted = [(2 * self.inter // num_parts, self.hidden_size)] * num_parts + [(self.hidden_size, self.inter)]
        for layer, count in self.num_experts.items():
            for expert in range(count):
                views = self.views(layer, expert)
                parts = (*views.gate_up, views.down)
                if [part.shape for part in parts] != wanted or {part.dtype for part in parts} != {self.dtype}:
                    shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
                    raise ExpertFileError(
                        f"expert {expert} of layer {layer} differs from the first one, {self.dtype} of hidden "
                        f"{self.hidden_size} and inter {self.inter}: it has {shapes}"
                    )


class _MappedFile:
    """A safetensors file, mapped whole. A mapping that is longer than its file ends the process when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            tensors: Any = safe_open(path, "pt", device="cpu")
            self._num_bytes = os.stat(path).st_size
            self._views = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ExpertFileError(f"{path} cannot be read: {error}") from error

    @property
    def names(self) -> Iterable[str]:
        return self._views

    def view(self, name: str) -> torch.Tensor:
        try:
            num_bytes = os.stat(self._path).st_size
        except OSError:
            num_bytes = self._num_bytes  # unlinked or renamed: the mapping keeps what it had
        if num_bytes < self._num_bytes:
            raise ExpertFileError(f"{self._path} was cut from {self._num_bytes} to {num_bytes} bytes while it was in use")
        view: torch.Tensor = self._views[name]
        return view
