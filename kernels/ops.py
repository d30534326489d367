"""The built-in kernels as plain functions, for direct calls on batches: `from penstock.kernels.ops import softmax`.

Each is imported on first use. They live here because in `penstock.kernels` itself their names are the folders.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.kernels.aggregate import aggregate
    from penstock.kernels.embed import Embed
    from penstock.kernels.filter import filter_rows
    from penstock.kernels.matmul import matmul
    from penstock.kernels.search.topk import similarity_topk
    from penstock.kernels.sha256 import sha256
    from penstock.kernels.softmax import softmax
    from penstock.kernels.transform import transform

__all__ = ["Embed", "aggregate", "filter_rows", "matmul", "sha256", "similarity_topk", "softmax", "transform"]

_MODULES = {"Embed": "embed", "filter_rows": "filter", "similarity_topk": "search.topk"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.kernels.{_MODULES.get(name, name)}"), name)
