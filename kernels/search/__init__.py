"""The nearest vectors of a named corpus, by cosine."""

import torch

from penstock.kernels.corpus.store import CorpusStore, parse_reference
from penstock.kernels.corpus.vectors import unit_rows
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import FLOATS, Static, Tensor
from penstock.kernels.runtime import Context
from penstock.kernels.search.cache import ByteCache
from penstock.kernels.search.topk import unit_topk
from penstock.kernels.spec import Cost

MAX_K = 4096
_Key = tuple[torch.device, str, str, int]


@kernel(
    "search",
    inputs={"query": Tensor(dtypes=FLOATS, rank=1), "corpus": Static()},
    cost=Cost(base_ms=0.5),
    combine="sum",
    max_batch_size=256,
    scoped=True,
)
class Search:
    """The k rows of a corpus with the largest cosine to the query, exactly.

    query: float `[batch, d]`, finite; zeros score 0 with everything. `corpus`: a name, for its newest version at the
    time of execution, or `name@version`. `k`: 1 to 4096; a corpus of fewer rows gives as many as it has. Returns
    `index`: int64 `[batch, k]`, rows of the corpus by falling score, `score`: float32 `[batch, k]`, and `version`:
    int64 `[batch]`. Tolerance: scores 2e-6 whatever shares the batch; rows whose scores differ by less may change
    places, equal scores come by rising row where both are found.

    Corpora are read on first use and kept on the device, the least used dropped first. Options: `cache_bytes`: how much
    is kept; a larger corpus is read for every batch. Source: `topk.py`, `penstock.kernels.corpus`.
    """

    def __init__(self, cache_bytes: int = 1 << 30) -> None:
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise ValueError(f"cache_bytes must be an integer of 0 or more; got {cache_bytes!r}")
        self._cache: ByteCache[_Key] = ByteCache(cache_bytes)

    def __call__(self, query: torch.Tensor, corpus: str, k: int = 10, *, context: Context) -> dict[str, torch.Tensor]:
        """Searches for all of `query` `[batch, d]` in one corpus."""
        if type(k) is not int or not 1 <= k <= MAX_K:
            raise InvalidInput(f"search: k must be an integer from 1 to {MAX_K}; got {shown(k)}")
        is_finite = query.isfinite().all()
        version, vectors = self._vectors(corpus, query.device, context)
        if query.ndim != 2 or query.shape[1] != vectors.shape[1]:
            raise InvalidInput(
                f"search: corpus {corpus!r} has vectors [{vectors.shape[1]}]; got a query {list(query.shape[1:])}"
            )
        score, index = unit_topk(unit_rows(query), vectors, k)
        if not bool(is_finite):  # looked at when all is on its way, so that no device waits
            raise InvalidInput("search: the query must be finite; it holds NaN or infinity")
        return {"index": index, "score": score, "version": torch.full((len(query),), version, device=query.device)}

    def _vectors(self, reference: str, device: torch.device, context: Context) -> tuple[int, torch.Tensor]:
        name, wanted = parse_reference(reference)
        store = CorpusStore(context.state_dir, context.principal)
        while True:
            version = store.find(name, wanted)
            key = (device, str(store.folder), name, version)
            vectors = self._cache.get(key)
            if vectors is None:
                try:
                    vectors = store.load(name, version).to(device)
                except FileNotFoundError:
                    continue  # replaced twice in the meantime: there is a newer one, or `find` says what there is
                self._cache.put(key, vectors)
            return version, vectors
