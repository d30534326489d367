"""Exact top-k in tiles, and searching named corpora: newest versions, owners, the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels import Context, InvalidInput, Kernel, ops, registry
from penstock.kernels.corpus.store import CorpusStore
from penstock.kernels.search.cache import ByteCache
from penstock.kernels.search.reference import similarity_topk as reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(CPU, tmp_path, "uid:1")


def store(context: Context, name: str, vectors: torch.Tensor) -> int:
    return int(registry.get("corpus").run(vectors=vectors[None], name=name, context=context)["version"][0])


@pytest.fixture
def search() -> Kernel:
    return registry.get("search")


@pytest.mark.parametrize("tile_rows", [1, 7, 64, 8192])
@pytest.mark.parametrize(("q", "n", "d", "k"), [(1, 1, 1, 1), (3, 131, 17, 10), (300, 97, 8, 97), (2, 50, 3, 200)])
def test_topk(q: int, n: int, d: int, k: int, tile_rows: int) -> None:
    queries, corpus = torch.randn(q, d), torch.randn(n, d)
    score, index = ops.similarity_topk(queries, corpus, k, tile_rows=tile_rows)
    expected, _ = reference(queries, corpus, k)
    assert score.shape == index.shape == (q, min(k, n))
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)
    assert (score.diff(dim=1) <= 0).all()
    all_scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(corpus).T
    torch.testing.assert_close(all_scores.gather(1, index), score, rtol=0, atol=2e-6)
    assert all(len(set(line)) == len(line) for line in index.tolist())


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1.0, 1e19, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_any_length(factor: float, dtype: torch.dtype) -> None:
    queries, corpus = torch.randn(5, 9) * 1e30, torch.randn(300, 9).to(dtype)
    corpus[::2] *= factor
    corpus[7] = 0.0
    score, index = ops.similarity_topk(queries, corpus, 300, tile_rows=77)
    expected, _ = reference(queries, corpus, 300)
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)
    assert (score[index == 7] == 0).all()


def test_no_table_of_all_scores_and_no_copy_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = torch.randn(600, 8), torch.randn(40_000, 8)
    sizes: list[int] = []
    real = torch.topk

    def topk(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(x.numel())
        return real(x, *rest, **options)

    monkeypatch.setattr(torch, "topk", topk)
    score, _ = ops.similarity_topk(queries, corpus, 3)
    assert max(sizes) <= 1 << 21 < score.shape[0] * len(corpus)


def test_topk_on_two_devices() -> None:
    with pytest.raises(InvalidInput, match="on one device; got cpu and meta"):
        ops.similarity_topk(torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("q", "n", "d", "k"), [(1, 1, 1, 1), (300, 200_003, 33, 10), (5, 5000, 384, 4096)])
def test_topk_on_a_gpu(q: int, n: int, d: int, k: int) -> None:
    queries, corpus = torch.randn(q, d), torch.randn(n, d) * torch.randint(1, 9, (n, 1)) ** 9.0
    on_device = queries.cuda(), corpus.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        score, index = ops.similarity_topk(*on_device, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, _ = reference(queries, corpus, k)
    torch.testing.assert_close(score.cpu(), expected, rtol=0, atol=2e-6)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], corpus[index.cpu()], dim=2)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=4e-6)


def test_topk_without_queries_or_rows() -> None:
    assert ops.similarity_topk(torch.empty(0, 3), torch.randn(5, 3), 2)[1].shape == (0, 2)
    assert ops.similarity_topk(torch.randn(4, 3), torch.empty(0, 3), 2)[0].shape == (4, 0)


def test_equal_scores_come_by_rising_row() -> None:
    corpus = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    score, index = ops.similarity_topk(torch.tensor([[1.0, 0.0]]), corpus, 5, tile_rows=2)
    assert index.tolist() == [[1, 2, 3, 0, 4]]
    assert score.tolist() == [[1.0, 1.0, 1.0, 0.0, -1.0]]


def test_topk_of_strided_rows() -> None:
    queries, corpus = torch.randn(6, 5).T, torch.randn(40, 12)[::2, ::2]
    torch.testing.assert_close(ops.similarity_topk(queries, corpus, 3)[0], reference(queries, corpus, 3)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "corpus", "k"),
    [((2, 3), (4, 5), 1), ((3,), (4, 3), 1), ((2, 0), (4, 0), 1), ((2, 3), (4, 3), 0)],
)
def test_topk_refuses(queries: Any, corpus: Any, k: int) -> None:
    with pytest.raises(InvalidInput):
        ops.similarity_topk(torch.zeros(queries), torch.zeros(corpus), k)


def test_a_stored_corpus_is_searched(search: Kernel, context: Context) -> None:
    corpus, queries = torch.randn(500, 24) * 7, torch.randn(9, 24)
    store(context, "docs", corpus)
    out = search.run(query=queries, corpus="docs", k=4, context=context)
    torch.testing.assert_close(out["score"], reference(queries, corpus, 4)[0], rtol=0, atol=2e-6)
    assert torch.equal(out["index"], reference(queries, corpus, 4)[1])
    assert out["version"].tolist() == [1] * 9
    alone = search.run(query=queries[5:6], corpus="docs", k=4, context=context)
    torch.testing.assert_close(alone["score"][0], out["score"][5], rtol=0, atol=2e-6)
    assert torch.equal(alone["index"][0], out["index"][5])


def test_k_is_capped_and_zeros_score_nothing(search: Kernel, context: Context) -> None:
    store(context, "docs", torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    out = search.run(query=torch.tensor([[5.0, 5.0], [0.0, 0.0]]), corpus="docs", context=context)
    assert out["index"].tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(out["score"], torch.tensor([[0.5**0.5, 0.0], [0.0, 0.0]]))


def test_a_newer_version_is_noticed(search: Kernel, context: Context) -> None:
    first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    query = torch.tensor([[1.0, 0.1]])

    def best(corpus: str) -> tuple[int, int]:
        out = search.run(query=query, corpus=corpus, k=1, context=context)
        return int(out["version"][0]), int(out["index"][0, 0])

    store(context, "docs", first)
    assert best("docs") == (1, 0)
    store(context, "docs", second)
    assert best("docs") == (2, 1)
    assert best("docs@1") == (1, 0)
    store(context, "docs", first * torch.tensor([[1.0], [-1.0]]))
    with pytest.raises(InvalidInput, match="docs@2, docs@3"):
        best("docs@1")


def test_a_corpus_is_its_owners(search: Kernel, context: Context) -> None:
    store(context, "docs", torch.eye(2))
    stranger = Context(CPU, context.state_dir, "uid:2")
    search.run(query=torch.eye(2), corpus="docs", context=context)  # and so it is in the cache
    with pytest.raises(InvalidInput, match="no corpus 'docs' of yours; create it with the kernel 'corpus'"):
        search.run(query=torch.eye(2), corpus="docs", context=stranger)
    store(stranger, "docs", -torch.eye(2))
    assert search.run(query=torch.eye(2), corpus="docs", k=1, context=stranger)["score"].tolist() == [[0.0], [0.0]]
    assert search.run(query=torch.eye(2), corpus="docs", k=1, context=context)["score"].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": "other"}, "no corpus 'other'"),
        ({"corpus": "../docs"}, "lower-case"),
        ({"corpus": "docs@9"}, "there are docs@1"),
        ({"corpus": None}, "lower-case"),
        ({"k": 0}, "k must be"),
        ({"k": 4097}, "k must be"),
        ({"k": True}, "k must be"),
        ({"k": 2.0}, "k must be"),
        ({"query": torch.ones(1, 3)}, r"vectors \[2\]; got a query \[3\]"),
        ({"query": torch.ones(1, 0)}, r"got a query \[0\]"),
        ({"query": torch.tensor([[1.0, torch.nan]])}, "finite"),
        ({"query": torch.tensor([[torch.inf, 1.0]])}, "finite"),
    ],
)
def test_wrong_searches_are_refused(search: Kernel, context: Context, arguments: dict[str, Any], message: str) -> None:
    store(context, "docs", torch.eye(2))
    with pytest.raises(InvalidInput, match=message):
        search.run(**{"query": torch.ones(1, 2), "corpus": "docs", "context": context, **arguments})


def test_a_version_dropped_between_finding_and_loading(
    search: Kernel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(context, "docs", torch.eye(2))
    real_load = CorpusStore.load

    def late_load(self: CorpusStore, name: str, version: int) -> torch.Tensor:
        monkeypatch.setattr(CorpusStore, "load", real_load)
        for value in (2.0, 3.0):
            self.create("docs", torch.tensor([[value, 0.0]]))
        return real_load(self, name, version)

    monkeypatch.setattr(CorpusStore, "load", late_load)
    assert search.run(query=torch.eye(2), corpus="docs", context=context)["version"].tolist() == [3, 3]


def test_the_cache_spares_reading(search: Kernel, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    store(context, "docs", torch.eye(4))
    loads: list[int] = []
    real_load = CorpusStore.load

    def counted_load(self: CorpusStore, name: str, version: int) -> torch.Tensor:
        loads.append(version)
        return real_load(self, name, version)

    monkeypatch.setattr(CorpusStore, "load", counted_load)
    for _ in range(3):
        search.run(query=torch.eye(4), corpus="docs", context=context)
    assert loads == [1]
    small = registry.get("search", cache_bytes=63)
    for _ in range(3):
        small.run(query=torch.eye(4), corpus="docs", context=context)
    assert loads == [1, 1, 1, 1]


def test_the_cache_is_bounded_and_drops_the_least_used() -> None:
    cache: ByteCache[str] = ByteCache(100)
    for key in "abc":
        cache.put(key, torch.zeros(10))  # 40 bytes each
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("d", torch.zeros(10))
    assert cache.get("c") is None
    assert cache.get("b") is not None
    cache.put("b", torch.zeros(20))
    assert (len(cache), cache.num_bytes) == (1, 80)
    cache.put("e", torch.zeros(26))
    assert (len(cache), cache.get("e")) == (1, None)
    cache.put("b", torch.zeros(26))
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_search_of_a_million_scores_stays_in_tiles() -> None:
    queries, corpus = torch.randn(300, 4), torch.randn(20_011, 4)
    score, index = ops.similarity_topk(queries, corpus, 3)
    expected, _ = reference(queries, corpus, 3)
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)
    assert index.max() > 8192
