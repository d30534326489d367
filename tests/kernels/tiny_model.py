"""Writes a complete sentence-transformers folder with a tiny BERT of random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "jumps", "over"),
    *("lazy", "dog", "sort", "a", "list", "word", "return", "new", "of", "in"),
]
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "vocab_size": len(WORDS),
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def write_model(folder: Path, *, pooling: str = "mean", has_normalize: bool = True, prefix: str = "", **config: Any) -> Path:
    """The folder; `config` replaces entries of `CONFIG` (None removes one), `prefix` goes before weights' names."""
    merged = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    write_json(folder / "config.json", merged)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * has_normalize
    paths = ["", "1_Pooling", "2_Normalize"]
    write_json(
        folder / "modules.json",
        [{"idx": i, "path": paths[i], "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)],
    )
    write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in MODES[:3]})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32})
    _tokenizer().save(str(folder / "tokenizer.json"))
    save_file({prefix + name: weight for name, weight in _weights().items()}, folder / "model.safetensors")
    return folder


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=64)  # published tokenizers bring such settings; the loader must replace them
    return tokenizer


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    d, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], d),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (CONFIG["type_vocab_size"], d),
        "embeddings.LayerNorm": (d,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.self.{part}": (d, d) for part in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense": (d, d), f"{layer}.attention.output.LayerNorm": (d,)}
        shapes |= {f"{layer}.intermediate.dense": (wide, d), f"{layer}.output.dense": (d, wide)}
        shapes |= {f"{layer}.output.LayerNorm": (d,)}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            weights[name] = torch.randn(shape, generator=generator)
        else:
            weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return weights
