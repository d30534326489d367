"""Mixtures of experts, resident and offloaded, against transformers' own block and a loop over experts."""

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.moe.reference import moe as reference
from penstock.kernels.moe.routing import route
from penstock.kernels.moe.sorted_gemm import feed_forward

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    if device.type == "cuda":
        shapes = [("Qwen3-30B-A3B", 128, 2048, 768, 8), ("Mixtral-8x7B", 8, 4096, 14_336, 2)]
        tokens, dtype = (1, 16, 64, 1024, 4096), torch.bfloat16
    else:
        shapes, tokens, dtype = [("small", 16, 512, 512, 4)], (1, 16, 256), torch.float32
    for name, experts, hidden, inter, top_k in shapes[:1] if is_quick else shapes:
        weights = make(experts, hidden, inter, dtype, device)
        for count in tokens[:2] if is_quick else tokens:
            yield _resident(name, count, weights, top_k)
    yield from _offloaded(device, dtype)


def make(experts: int, hidden: int, inter: int, dtype: torch.dtype, device: torch.device) -> Weights:
    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5).contiguous()

    return draw(experts, hidden), draw(experts, 2 * inter, hidden), draw(experts, hidden, inter)


def _resident(name: str, count: int, weights: Weights, top_k: int) -> Case:
    router_w, _, w_down = weights
    (experts, hidden, inter), dtype = w_down.shape, w_down.dtype
    x = torch.randn(count, hidden, device=w_down.device, dtype=dtype)
    num_used = len(route(x, router_w, top_k, True)[1].unique())
    peers: dict[str, Callable[[], Any]] = {"torch": lambda: loop(x, weights, top_k)}
    if importlib.util.find_spec("transformers") is not None:
        peers["transformers"] = _transformers(x, weights, top_k, "eager")
        if hasattr(torch.nn.functional, "grouped_mm") and x.is_cuda:
            peers["transformers, grouped_mm"] = _transformers(x, weights, top_k, "grouped_mm")
    return Case(
        "moe", f"{name}: T={count} E={experts} k={top_k} H={hidden} I={inter}",
        lambda: ops.moe(x, *weights, top_k=top_k), lambda: check(ops.moe(x, *weights, top_k=top_k), x, weights, top_k),
        peers, num_used * 3.0 * hidden * inter * dtype.itemsize + 2 * x.nbytes, 6.0 * count * top_k * hidden * inter,
        str(dtype).removeprefix("torch."),
        {FLOOR: 0.8 if count <= 64 else 0.55} if x.is_cuda else dict.fromkeys(("torch", "transformers"), 0.95),
    )  # fmt: skip


def check(got: torch.Tensor, x: torch.Tensor, weights: Weights, top_k: int) -> None:
    """The first and last tokens against the definition, computed where the weights are."""
    few = [0, len(x) - 1]
    expected = reference(x[few], *weights, top_k=top_k).float()
    error = (got[few].float() - expected).abs().amax(1) / expected.abs().amax(1)
    assert bool((error <= TOLERANCE[x.dtype]).all()), f"off by {float(error.max()):g} of the largest magnitude"


def loop(x: torch.Tensor, weights: Weights, top_k: int) -> torch.Tensor:
    """As most models write it: for every expert, its tokens."""
    router_w, w_gate_up, w_down = weights
    probs, experts = torch.softmax(x @ router_w.T, 1, dtype=torch.float32).topk(top_k, 1)
    probs = (probs / probs.sum(1, keepdim=True)).to(x.dtype)
    out = torch.zeros_like(x)
    for e in range(len(w_down)):
        token, place = torch.where(experts == e)
        if len(token):
            rows = feed_forward(x[token], (w_gate_up[e],), w_down[e])
            out.index_add_(0, token, rows * probs[token, place, None])
    return out


def _transformers(x: torch.Tensor, weights: Weights, top_k: int, implementation: str) -> Callable[[], torch.Tensor]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    router_w, w_gate_up, w_down = weights
    experts, hidden, inter = w_down.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inter, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=True
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    state = {"gate.weight": router_w, "experts.gate_up_proj": w_gate_up, "experts.down_proj": w_down}
    block.load_state_dict(state, assign=True)
    return lambda: block(x[None])


def _offloaded(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One token a call. Hits: all of its experts have slots. Misses: the slots are those of another layer each time."""
    layers, (experts, hidden, inter), top_k = 4, ((32, 2048, 768) if device.type == "cuda" else (8, 512, 512)), 4
    by_layer = [make(experts, hidden, inter, dtype, device) for _ in range(layers)]
    x = torch.randn(1, hidden, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.safetensors"
        tensors = {}
        for layer, (_, w_gate_up, w_down) in enumerate(by_layer):
            tensors |= {f"layers.{layer}.w_gate_up": w_gate_up.cpu(), f"layers.{layer}.w_down": w_down.cpu()}
        save_file(tensors, path)
        for name, num_slots, cpu_compute in (
            ("hits", experts * layers, "never"), ("misses", top_k, "never"), ("misses, CPU where sooner", top_k, "auto")
        ):  # fmt: skip
            with ops.ExpertStore([path], num_slots, device=device, cpu_compute=cpu_compute) as store:
                yield _offloaded_case(name, store, by_layer, tensors, x, top_k)


def _offloaded_case(
    name: str,
    store: ops.ExpertStore,
    by_layer: list[Weights],
    tensors: dict[str, torch.Tensor],
    x: torch.Tensor,
    top_k: int,
) -> Case:
    turns: dict[str, Iterator[int]] = {key: itertools.cycle(range(len(by_layer))) for key in ("ours", "resident", "naive")}

    def ours() -> torch.Tensor:
        layer = next(turns["ours"])
        return ops.moe_offloaded(x, by_layer[layer][0], store, layer, top_k=top_k)

    def resident() -> torch.Tensor:
        return ops.moe(x, *by_layer[next(turns["resident"])], top_k=top_k)

    def naive() -> torch.Tensor:
        layer = next(turns["naive"])
        weights, chosen = route(x, by_layer[layer][0], top_k, True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for j, e in enumerate(chosen[0].tolist()):
            gate_up, down = (tensors[f"layers.{layer}.{name}"][e].to(x.device) for name in ("w_gate_up", "w_down"))
            out += weights[0, j] * feed_forward(x, (gate_up,), down)
        return out.to(x.dtype)

    def gate() -> None:
        for layer, weights in enumerate(by_layer):
            check(ops.moe_offloaded(x, weights[0], store, layer, top_k=top_k), x, weights, top_k)

    num_bytes = top_k * store.files.num_bytes
    return Case(
        "moe_offloaded", f"{name}: k={top_k}, {num_bytes / 2**20:.0f} MiB a call", ours, gate,
        {"resident": resident} if name == "hits" else {"naive .to()": naive},
        goals=({"resident": 0.97} if name == "hits" else {"naive .to()": 2.0}) if x.is_cuda else {}, can_graph=False,
    )  # fmt: skip
