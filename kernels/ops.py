"""The built-in kernels as plain functions, for direct calls on batches: `from penstock.kernels.ops import softmax`.

Each is imported on first use. They live here because in `penstock.kernels` itself their names are the folders.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.kernels.aggregate import aggregate as aggregate
    from penstock.kernels.attention import attention as attention
    from penstock.kernels.attention.cache import write_kv as write_kv
    from penstock.kernels.attention.paged import paged_decode as paged_decode
    from penstock.kernels.attention.varlen import attention_varlen as attention_varlen
    from penstock.kernels.embed import Embed as Embed
    from penstock.kernels.experts import ExpertStore as ExpertStore
    from penstock.kernels.experts import moe_offloaded as moe_offloaded
    from penstock.kernels.filter import filter_rows as filter_rows
    from penstock.kernels.linear import linear as linear
    from penstock.kernels.matmul import matmul as matmul
    from penstock.kernels.moe import moe as moe
    from penstock.kernels.quantized import quantize_weight as quantize_weight
    from penstock.kernels.quantized import quantized_linear as quantized_linear
    from penstock.kernels.sampling import sample as sample
    from penstock.kernels.sampling import speculative_verify as speculative_verify
    from penstock.kernels.scan import selective_scan as selective_scan
    from penstock.kernels.scan import selective_state_update as selective_state_update
    from penstock.kernels.scan import ssd as ssd
    from penstock.kernels.search.topk import similarity_topk as similarity_topk
    from penstock.kernels.sha256 import sha256 as sha256
    from penstock.kernels.simulate.driver import simulate as simulate
    from penstock.kernels.simulate.worlds import AgentState as AgentState
    from penstock.kernels.simulate.worlds import Boids as Boids
    from penstock.kernels.simulate.worlds import Circles as Circles
    from penstock.kernels.simulate.worlds import GridWorld as GridWorld
    from penstock.kernels.softmax import softmax as softmax
    from penstock.kernels.tokens import token_transform as token_transform
    from penstock.kernels.transform import transform as transform

_MODULES = {
    "AgentState": "simulate.worlds",
    "Boids": "simulate.worlds",
    "Circles": "simulate.worlds",
    "Embed": "embed",
    "ExpertStore": "experts",
    "GridWorld": "simulate.worlds",
    "aggregate": "aggregate",
    "attention": "attention",
    "attention_varlen": "attention.varlen",
    "filter_rows": "filter",
    "linear": "linear",
    "matmul": "matmul",
    "moe": "moe",
    "moe_offloaded": "experts",
    "paged_decode": "attention.paged",
    "quantize_weight": "quantized",
    "quantized_linear": "quantized",
    "sample": "sampling",
    "selective_scan": "scan",
    "selective_state_update": "scan",
    "sha256": "sha256",
    "similarity_topk": "search.topk",
    "simulate": "simulate.driver",
    "softmax": "softmax",
    "speculative_verify": "sampling",
    "ssd": "scan",
    "token_transform": "tokens",
    "transform": "transform",
    "write_kv": "attention.cache",
}
"""Name -> its module under `penstock.kernels`."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.kernels.{_MODULES[name]}"), name)
