"""Sentence embeddings one text at a time, each formula written out: no padding, no mask, no fused product."""

import math
from collections.abc import Callable

import torch

from penstock.kernels.embed.loader import Model


def embed(model: Model, text: list[str], normalize: bool | None = None) -> torch.Tensor:
    """The vectors of `text`, in float64, rounded once: float32 `[batch, hidden size]`."""
    weights = {name: weight.double() for name, weight in model.weights.items() if weight.is_floating_point()}
    vectors = torch.stack([_pool(model, _encode(model, weights, model.tokenizer.encode(item).ids)) for item in text])
    if model.is_normalized if normalize is None else normalize:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return vectors.float()


def _pool(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    return hidden[0] if model.pooling == "cls" else hidden.mean(0)


def _encode(model: Model, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Token ids to hidden states `[tokens, hidden size]`."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + model.config.layer_norm_eps).rsqrt()
        return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
    for i in range(model.config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = torch.cat([_head(*parts) for parts in zip(*map(_split(model), (q, k, v)), strict=True)], 1)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", mixed))
        wide = linear(f"{layer}.intermediate.dense", x)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", wide))
    return x


def _split(model: Model) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    return lambda x: x.chunk(model.config.num_attention_heads, dim=1)


def _head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head's attention, `[tokens, head size]` each."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v
