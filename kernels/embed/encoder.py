"""The encoder of BERT in plain torch, from a model's weights by their published names.

Knows layers; does not know files, tokenizers or pooling. Letters in shapes: B texts, L tokens, D hidden size, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from penstock.kernels.errors import LoadError


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The part of a model's `config.json` that decides the computation."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "BertConfig":
        """Raises LoadError for anything but BERT with absolute positions and the exact GELU."""
        kinds = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for key, expected in kinds.items():
            got = values.get(key, None if key == "model_type" else expected)
            if got != expected:
                raise LoadError(f"only models with {key} {expected!r} are implemented; this one has {got!r}")
        sizes: dict[str, int] = {}
        for key in cls.__slots__[:-1]:
            size = values.get(key)
            if type(size) is not int or size < 1:
                raise LoadError(f"config.json: {key} must be a positive integer; got {size!r}")
            sizes[key] = size
        eps = values.get("layer_norm_eps", 1e-12)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise LoadError(f"config.json: layer_norm_eps must be between 0 and 1; got {eps!r}")
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise LoadError("config.json: hidden_size must be a multiple of num_attention_heads")
        return cls(**sizes, layer_norm_eps=eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights: (weight, bias) pairs; query, key and value joined to one product."""

    qkv: tuple[torch.Tensor, torch.Tensor]
    attended: tuple[torch.Tensor, torch.Tensor]
    attended_norm: tuple[torch.Tensor, torch.Tensor]
    widen: tuple[torch.Tensor, torch.Tensor]
    narrow: tuple[torch.Tensor, torch.Tensor]
    output_norm: tuple[torch.Tensor, torch.Tensor]


class Encoder:
    """Token ids to the last layer's hidden states."""

    def __init__(self, config: BertConfig, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """`weights`: by names as in `encoder.layer.0.output.dense.weight`; raises LoadError if one is missing."""
        self.config = config
        self.device = device
        self._weights = weights
        d, wide = config.hidden_size, config.intermediate_size
        self._words = self._take("embeddings.word_embeddings.weight", config.vocab_size, d)
        types = self._take("embeddings.token_type_embeddings.weight", config.type_vocab_size, d)
        positions = self._take("embeddings.position_embeddings.weight", config.max_position_embeddings, d)
        self._positions = positions + types[0]  # every token is of the first type
        self._norm = self._pair("embeddings.LayerNorm", d)
        self._layers = [self._layer(f"encoder.layer.{i}", d, wide) for i in range(config.num_hidden_layers)]
        self._weights = {}

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None or weight.shape != shape:
            got = "is missing" if weight is None else f"has shape {list(weight.shape)}"
            raise LoadError(f"model weights: {name!r} {got}; expected {list(shape)}")
        return weight.to(self.device, torch.float32)

    def _pair(self, name: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._take(f"{name}.weight", *shape), self._take(f"{name}.bias", shape[0])

    def _layer(self, name: str, d: int, wide: int) -> Layer:
        parts = [self._pair(f"{name}.attention.self.{part}", d, d) for part in ("query", "key", "value")]
        return Layer(
            qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
            attended=self._pair(f"{name}.attention.output.dense", d, d),
            attended_norm=self._pair(f"{name}.attention.output.LayerNorm", d),
            widen=self._pair(f"{name}.intermediate.dense", wide, d),
            narrow=self._pair(f"{name}.output.dense", d, wide),
            output_norm=self._pair(f"{name}.output.LayerNorm", d),
        )

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids: int64 `[B, L]`; mask: bool `[B, L]`, True for tokens, None = all. Returns float32 `[B, L, D]`.

        Positions that are masked out influence no other; what comes out of them has no meaning.
        """
        shape = (self.config.hidden_size,)
        eps = self.config.layer_norm_eps
        attention_mask = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, L]
        hidden = self._words[ids] + self._positions[: ids.shape[1]]
        hidden = functional.layer_norm(hidden, shape, *self._norm, eps)
        for layer in self._layers:
            mixed = functional.linear(self._attend(layer, hidden, attention_mask), *layer.attended)
            hidden = functional.layer_norm(hidden + mixed, shape, *layer.attended_norm, eps)
            fed = functional.linear(functional.gelu(functional.linear(hidden, *layer.widen)), *layer.narrow)
            hidden = functional.layer_norm(hidden + fed, shape, *layer.output_norm, eps)
        return hidden

    def _attend(self, layer: Layer, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        b, length, d = hidden.shape
        heads = self.config.num_attention_heads
        q, k, v = functional.linear(hidden, *layer.qkv).view(b, length, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, D / H]
        return mixed.transpose(1, 2).reshape(b, length, d)
