"""Cosine search: unit rows that lie on the device against matrix product and top-k, any rows against semantic_search."""

import heapq
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import normalize

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.search.reference import similarity_topk as reference
from penstock.kernels.search.topk import unit_topk

WIDTH = 384
QUERY_CHUNK, CORPUS_CHUNK = 100, 500_000
"""As semantic_search has them by default."""


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    if device.type == "cuda":
        sizes = [(1, 4_000_000, 10), (64, 1_000_000, 10), (256, 1_000_000, 100)]
    else:
        sizes = [(1, 100_000, 10), (16, 50_000, 10), (256, 10_000, 10), (64, 20_000, 100)]
    for num_queries, num_rows, k in sizes:
        num_rows = num_rows // 4 if is_quick else num_rows
        queries, corpus = torch.randn(num_queries, WIDTH, device=device), torch.randn(num_rows, WIDTH, device=device)
        yield _unit(normalize(queries), normalize(corpus), k)
        yield _any(queries, corpus, k)


def _unit(queries: torch.Tensor, corpus: torch.Tensor, k: int) -> Case:
    is_cuda = queries.device.type == "cuda"
    return _case(
        "unit rows", queries, corpus, k, lambda: unit_topk(queries, corpus, k),
        {"torch": lambda: torch.topk(queries @ corpus.T, k)}, {FLOOR: 0.6} if is_cuda else {"torch": 0.95},
    )  # fmt: skip


def _any(queries: torch.Tensor, corpus: torch.Tensor, k: int) -> Case:
    def plain() -> Any:
        return torch.topk(normalize(queries) @ normalize(corpus).T, k)

    peers = {"torch": plain, "semantic_search": lambda: _semantic_search(queries, corpus, k)}
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers.util import semantic_search

        peers["sentence-transformers"] = lambda: semantic_search(queries, corpus, top_k=k)
    goal = 2.0 if queries.device.type == "cuda" else 0.95
    goals = {"torch": 0.95} | {name: goal for name in peers if name != "torch"}
    return _case("any rows", queries, corpus, k, lambda: ops.similarity_topk(queries, corpus, k), peers, goals)


def _case(
    what: str,
    queries: torch.Tensor,
    corpus: torch.Tensor,
    k: int,
    ours: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    peers: dict[str, Callable[[], Any]],
    goals: dict[str, float],
) -> Case:
    def check() -> None:
        score, index = ours()
        expected, _ = reference(queries[:2].cpu(), corpus.cpu(), k)
        torch.testing.assert_close(score[:2].cpu(), expected, rtol=0, atol=2e-6)
        cosines = torch.cosine_similarity(queries[:2, None].double(), corpus[index[:2]].double(), dim=2)
        torch.testing.assert_close(cosines.cpu().float(), expected, rtol=0, atol=2e-6)

    size = f"{what}, {len(queries)} x {len(corpus)} of {WIDTH}, k={k}"
    num_flops = 2.0 * len(queries) * corpus.numel()
    # The published formula collects its results in lists on the host.
    return Case("similarity_topk", size, ours, check, peers, corpus.nbytes, num_flops, goals=goals, can_graph=False)


def _semantic_search(queries: torch.Tensor, corpus: torch.Tensor, k: int) -> list[list[tuple[float, int]]]:
    """What sentence-transformers computes: chunks of cosines, top-k of each, merged in heaps on the host."""
    best: list[list[tuple[float, int]]] = [[] for _ in range(len(queries))]
    for first in range(0, len(queries), QUERY_CHUNK):
        for start in range(0, len(corpus), CORPUS_CHUNK):
            part = corpus[start : start + CORPUS_CHUNK]
            scores = normalize(queries[first : first + QUERY_CHUNK]) @ normalize(part).T
            top = torch.topk(scores, min(k, len(part)), dim=1, sorted=False)
            for row, pairs in enumerate(zip(top.values.cpu().tolist(), top.indices.cpu().tolist(), strict=True)):
                for score, index in zip(*pairs, strict=True):
                    heap = best[first + row]
                    (heapq.heappush if len(heap) < k else heapq.heappushpop)(heap, (score, start + index))
    return [sorted(heap, reverse=True) for heap in best]
