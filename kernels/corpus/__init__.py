"""Creates or replaces a named corpus: vectors that `search` looks through."""

import torch

from penstock.kernels.corpus.store import CorpusStore
from penstock.kernels.corpus.vectors import unit_rows
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput
from penstock.kernels.inputs import FLOATS, Static, Tensor
from penstock.kernels.runtime import Context
from penstock.kernels.spec import Cost


@kernel(
    "corpus",
    inputs={"vectors": Tensor(dtypes=FLOATS, rank=2), "name": Static()},
    cost=Cost(base_ms=20.0, per={"vectors.numel": 1e-5}),
    combine="sum",
    max_batch_size=1,
    scoped=True,
)
class Corpus:
    """Stores `vectors` as the newest version of the corpus `name`; the two newest versions are kept.

    vectors: float `[batch, n, d]`, n and d at least 1, all finite. `name`: lower-case letters, digits, _ and -, up to
    64, beginning with a letter or digit. Rows are scaled to unit length and stored as float32 (a row of zeros stays
    zeros and scores 0). A corpus belongs to its principal: others neither see nor replace it. Storing what is stored
    already makes no new version, so that a repeated task changes nothing. Returns `version` (counting from 1), `n` and
    `d`: int64 `[batch]` each. Once it is answered, the corpus survives a crash of the machine. Tolerance: 1e-6.

    Options: `max_corpora`: how many names a principal may have. Source: `store.py`.
    """

    def __init__(self, max_corpora: int = 1024) -> None:
        if type(max_corpora) is not int or max_corpora < 1:
            raise ValueError(f"max_corpora must be a positive integer; got {max_corpora!r}")
        self._max_corpora = max_corpora

    def __call__(self, vectors: torch.Tensor, name: str, *, context: Context) -> dict[str, torch.Tensor]:
        """Stores each of `vectors` `[batch, n, d]` under the same name, one after the other."""
        if vectors.ndim != 3 or 0 in vectors.shape[1:]:
            raise InvalidInput(f"corpus: vectors must be [n, d] with n, d >= 1; got {list(vectors.shape[1:])}")
        if not bool(vectors.isfinite().all()):
            raise InvalidInput("corpus: vectors must be finite; they hold NaN or infinity")
        store = CorpusStore(context.state_dir, context.principal, self._max_corpora)
        versions = [store.create(name, unit_rows(item).cpu()) for item in vectors]
        n, d = vectors.shape[1:]
        columns = {"version": versions, "n": [n] * len(versions), "d": [d] * len(versions)}
        return {key: torch.tensor(values) for key, values in columns.items()}
