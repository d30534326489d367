"""Cosine search by its definition: all scores, sorted."""

import torch

from penstock.kernels.corpus.reference import unit_rows


def similarity_topk(queries: torch.Tensor, corpus: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(score, index) `[q, min(k, n)]` of the largest cosines. queries: `[q, d]`, corpus: `[n, d]`."""
    scores = unit_rows(queries).double() @ unit_rows(corpus).double().T
    score, index = scores.sort(dim=1, descending=True, stable=True)
    return score[:, :k].float(), index[:, :k]
