"""Exact top-k by cosine in two stages: the best of every tile, then the best of those.

Knows matrices only. Queries and corpus are taken in tiles, so that the table of all scores, queries x corpus, is never
in memory, and neither is a copy of the corpus: rows that are not of unit length are divided out of their scores.
"""

import math

import torch

from penstock.kernels.corpus.vectors import unit_rows
from penstock.kernels.errors import InvalidInput

TILE_QUERIES = 256
MAX_SCORES = {"cuda": 1 << 25}
"""Scores of a tile, about; 2^21, or 8 MiB, elsewhere."""

MIN_TILE_ROWS, MAX_TILE_ROWS = 8_192, 131_072
_SAFE_LENGTHS = (1e-15, 1e15)
"""Squares of float32 elements of such rows neither overflow nor vanish."""


def similarity_topk(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, *, tile_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(score float32, index int64), `[q, min(k, n)]` each: the rows of `corpus` with the largest cosine to each query.

    queries: float `[q, d]`, corpus: float `[n, d]` on one device, finite, of any lengths (on CUDA, rows of the corpus from
    1e-30 to 1e38, or 0). Scores fall along a line. `tile_rows`: rows of the corpus at a time, None = by device. Does not
    look at values on CUDA. Tolerance: 2e-6; rows whose scores differ by less may change places. Raises InvalidInput if d or
    devices differ.
    """
    if queries.ndim != 2 or corpus.ndim != 2 or not queries.shape[1] == corpus.shape[1] >= 1:
        raise InvalidInput(f"queries must be [q, d] and corpus [n, d]; got {list(queries.shape)}, {list(corpus.shape)}")
    if queries.device != corpus.device:
        raise InvalidInput(f"queries and corpus must be on one device; got {queries.device} and {corpus.device}")
    if k < 1 or (tile_rows is not None and tile_rows < 1):
        raise InvalidInput(f"k and tile_rows must be at least 1; got {k} and {tile_rows}")
    return _topk(unit_rows(queries), corpus, k, tile_rows, is_unit=False)


def unit_topk(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, *, tile_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for float32 rows of unit length, unchecked."""
    return _topk(queries, corpus, k, tile_rows, is_unit=True)


def _topk(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, tile_rows: int | None, is_unit: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.split(queries, TILE_QUERIES)
    best = [(block.new_empty(len(block), 0), block.new_empty(len(block), 0, dtype=torch.int64)) for block in blocks]
    tile_rows = tile_rows or _tile_rows(len(corpus), len(blocks[0]), queries.device)
    for start in range(0, len(corpus), tile_rows):
        rows, factor = corpus[start : start + tile_rows], None
        if not is_unit:
            rows, factor = _directions(rows)
        for i, block in enumerate(blocks):
            score = block @ rows.T
            best[i] = _merged(*best[i], score if factor is None else score.mul_(factor), start, k)
    ordered = [_ordered(*part) for part in best]
    return torch.cat([score for score, _ in ordered]), torch.cat([index for _, index in ordered])


def _tile_rows(num_rows: int, num_queries: int, device: torch.device) -> int:
    wanted = min(max(MAX_SCORES.get(device.type, 1 << 21) // max(num_queries, 1), MIN_TILE_ROWS), MAX_TILE_ROWS)
    return max(1, math.ceil(num_rows / max(1, round(num_rows / wanted))))  # equal tiles, up to half as large again


def _directions(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 rows, and by what a score with each has to be multiplied (None: they are of unit length)."""
    if rows.dtype == torch.float64:
        return unit_rows(rows), None
    rows = rows.float()
    if rows.device.type == "cuda":
        length = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return rows, torch.where(length > 0, 1.0 / length, 0.0).float()
    length = torch.linalg.vector_norm(rows, dim=1)
    if bool(((length < _SAFE_LENGTHS[0]) | (length > _SAFE_LENGTHS[1])).any()):
        return unit_rows(rows), None
    return rows, length.reciprocal_()


def _merged(
    score: torch.Tensor, index: torch.Tensor, new: torch.Tensor, start: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of those so far and of a tile's scores, whose rows count from `start`."""
    tile = torch.topk(new, min(k, new.shape[1]), dim=1)
    if not score.shape[1]:
        return tile.values, tile.indices + start
    score, index = torch.cat([score, tile.values], 1), torch.cat([index, tile.indices + start], 1)
    if score.shape[1] > k:
        score, kept = torch.topk(score, k, dim=1)
        index = index.gather(1, kept)
    return score, index


def _ordered(score: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By row, then by score with a stable sort: equal scores come by rising row."""
    if score.device.type == "cpu" and bool((score[:, 1:] < score[:, :-1]).all()):  # as one tile mostly comes
        return score, index
    index, order = index.sort(dim=1)
    score, order = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score, index.gather(1, order)
