"""Exact top-k by cosine in two stages: the best of every tile, then the best of those.

Knows matrices only. Queries and corpus are taken in tiles, so that the table of all scores, queries x corpus, is never
in memory.
"""

import torch

from penstock.kernels.corpus.vectors import unit_rows
from penstock.kernels.errors import InvalidInput

TILE_QUERIES = 256
TILE_ROWS = 8_192
"""A tile's scores take 8 MiB."""


def similarity_topk(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, *, tile_rows: int = TILE_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(score float32, index int64), `[q, min(k, n)]` each: the rows of `corpus` with the largest cosine to each query.

    queries: float `[q, d]`, corpus: float `[n, d]` on one device, of any lengths, finite. Scores fall along a line.
    Tolerance: 2e-6; rows whose scores differ by less may change places. Raises InvalidInput if d or devices differ.
    """
    if queries.ndim != 2 or corpus.ndim != 2 or not queries.shape[1] == corpus.shape[1] >= 1:
        raise InvalidInput(f"queries must be [q, d] and corpus [n, d]; got {list(queries.shape)}, {list(corpus.shape)}")
    if k < 1 or tile_rows < 1:
        raise InvalidInput(f"k and tile_rows must be at least 1; got {k} and {tile_rows}")
    return unit_topk(unit_rows(queries), unit_rows(corpus), k, tile_rows=tile_rows)


def unit_topk(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, *, tile_rows: int = TILE_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for float32 rows of unit length, unchecked."""
    starts = range(0, max(len(queries), 1), TILE_QUERIES)
    parts = [_topk_of_tile(queries[start : start + TILE_QUERIES], corpus, k, tile_rows) for start in starts]
    return torch.cat([score for score, _ in parts]), torch.cat([index for _, index in parts])


def _topk_of_tile(queries: torch.Tensor, corpus: torch.Tensor, k: int, tile_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    score = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(corpus), tile_rows):
        tile = corpus[start : start + tile_rows]
        best = torch.topk(queries @ tile.T, min(k, len(tile)), dim=1, sorted=False)
        score = torch.cat([score, best.values], 1)
        index = torch.cat([index, best.indices + start], 1)
        if score.shape[1] > k:
            score, kept = torch.topk(score, k, dim=1, sorted=False)
            index = index.gather(1, kept)
    # By row, then by score with a stable sort: equal scores come by rising row.
    index, order = index.sort(dim=1)
    score, order = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score, index.gather(1, order)
