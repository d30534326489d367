"""A bounded cache of tensors: the least recently used is dropped first.

Knows bytes; does not know what the tensors are.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch

_Key = TypeVar("_Key", bound=Hashable)


class ByteCache(Generic[_Key]):
    """Key -> tensor, at most `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[_Key, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: _Key) -> torch.Tensor | None:
        """The tensor of `key`, now the most recently used; None if it is not there."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: _Key, tensor: torch.Tensor) -> None:
        """Keeps `tensor` and drops what no longer fits; one that is larger than the whole cache is not kept."""
        if key in self._items:
            self.num_bytes -= self._items.pop(key).nbytes
        if tensor.nbytes > self.max_bytes:
            return
        while self.num_bytes + tensor.nbytes > self.max_bytes:
            self.num_bytes -= self._items.popitem(last=False)[1].nbytes
        self._items[key] = tensor
        self.num_bytes += tensor.nbytes
