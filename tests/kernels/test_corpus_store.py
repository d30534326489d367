"""Corpora on disk: versions, durability, owners, hostile names; and what searching makes of them."""

import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from penstock.kernels import Context, InvalidInput, LoadError, registry
from penstock.kernels.corpus import store as store_module
from penstock.kernels.corpus.reference import unit_rows as unit_rows_reference
from penstock.kernels.corpus.store import CorpusStore, parse_reference
from penstock.kernels.corpus.vectors import unit_rows

HOSTILE = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\x00", "a b", "A", "-a", ".lock", "é", "a" * 65, "a@1", "a\n"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def store(tmp_path: Path) -> CorpusStore:
    return CorpusStore(tmp_path, "uid:1000", clock=lambda: 86_400.0)


def rows(n: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((n, 3), value)


def test_what_is_stored_is_loaded_with_its_facts(store: CorpusStore) -> None:
    vectors = torch.randn(7, 5)
    assert store.create("docs", vectors) == 1
    assert torch.equal(store.load("docs", 1), vectors)
    with safe_open(store.folder / "docs" / "1.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert facts.pop("content").startswith("[7, 5] ")
    assert facts == {"owner": "uid:1000", "name": "docs", "version": "1", "created": "1970-01-02T00:00:00Z"}
    assert store.names() == ["docs"]


def test_versions_count_up_and_the_last_two_are_kept(store: CorpusStore) -> None:
    assert [store.create("docs", rows(2, value)) for value in (1.0, 2.0, 3.0, 4.0)] == [1, 2, 3, 4]
    assert store.versions("docs") == [3, 4]
    assert store.find("docs") == 4
    assert store.find("docs", 3) == 3
    with pytest.raises(InvalidInput, match=r"no docs@1 \(any more\); there are docs@3, docs@4"):
        store.find("docs", 1)


def test_storing_the_same_again_changes_nothing(store: CorpusStore) -> None:
    assert [store.create("docs", rows(2)) for _ in range(3)] == [1, 1, 1]
    assert store.create("docs", rows(1)) == 2
    assert store.create("docs", rows(2)) == 3


@pytest.mark.parametrize("name", [*HOSTILE, 3, None, ["a"]])
def test_hostile_names_touch_no_file(store: CorpusStore, tmp_path: Path, name: object) -> None:
    for call in (lambda: store.create(name, rows(1)), lambda: store.find(name)):  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="lower-case letters"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "expected"), [("docs", ("docs", None)), ("a-b_1@12", ("a-b_1", 12)), ("9", ("9", None))])
def test_references(text: str, expected: tuple[str, int | None]) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", [*HOSTILE[:-3], "docs@", "docs@0", "docs@-1", "docs@1.5", "docs@x", "docs@1@2", "docs@٣", 3])
def test_references_that_are_refused(text: object) -> None:
    with pytest.raises(InvalidInput):
        parse_reference(text)


@pytest.mark.parametrize("principal", ["../../etc", "/", "..", "", "a\x00b", "é" * 300, "curve:p{%d/+.=" * 20])
def test_any_principal_has_a_folder_of_its_own(tmp_path: Path, principal: str) -> None:
    store = CorpusStore(tmp_path, principal)
    store.create("docs", rows(1))
    assert store.folder.parent == tmp_path / "corpora"
    assert store.folder.is_dir()
    assert CorpusStore(tmp_path, principal + " ").names() == []


def test_principals_that_read_alike_are_apart(tmp_path: Path) -> None:
    names = ["uid:1", "uid-1", "UID:1", "uid:1 ", "uid::1"]
    assert len({CorpusStore(tmp_path, name).folder.name.lower() for name in names}) == len(names)


def test_a_file_of_another_owner_or_name_is_not_used(store: CorpusStore, tmp_path: Path) -> None:
    other = CorpusStore(tmp_path, "uid:2")
    other.create("docs", rows(1))
    other.folder.rename(store.folder)
    with pytest.raises(LoadError, match="another owner"):
        store.load("docs", 1)


def test_a_damaged_file_is_an_error_of_the_store(store: CorpusStore) -> None:
    store.create("docs", rows(1))
    path = store.folder / "docs" / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match="docs@1: its file is damaged"):
        store.load("docs", 1)
    save_file({"other": rows(1)}, path, {"owner": "uid:1000", "name": "docs"})
    with pytest.raises(LoadError, match="damaged"):
        store.load("docs", 1)


@pytest.mark.parametrize("broken", ["save_file", "_sync"])
def test_a_crash_while_writing_leaves_the_old_version(store: CorpusStore, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    store.create("docs", rows(2))

    def crash(*arguments: object) -> None:
        if broken == "save_file":
            Path(str(arguments[1])).write_bytes(b"half")
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, broken, crash)
        with pytest.raises(OSError, match="power cut"):
            store.create("docs", rows(3))
    assert store.versions("docs") == [1]
    assert store.create("docs", rows(3)) == 2
    assert sorted(path.name for path in (store.folder / "docs").iterdir()) == [".lock", "1.safetensors", "2.safetensors"]


def test_the_file_is_durable_before_it_has_its_name(store: CorpusStore, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_replace = store_module._sync, os.replace

    def sync(path: Path) -> None:
        events.append(("sync", path.name))
        real_sync(path)

    def replace(source: Path, target: Path) -> None:
        events.append(("name", target.name))
        real_replace(source, target)

    monkeypatch.setattr(store_module, "_sync", sync)
    monkeypatch.setattr(os, "replace", replace)
    store.create("docs", rows(1))
    assert events[-3:] == [("sync", ".new.safetensors"), ("name", "1.safetensors"), ("sync", "docs")]
    assert ("sync", "corpora") in events


def test_writers_at_the_same_time_get_versions_of_their_own(tmp_path: Path) -> None:
    versions: list[int] = []

    def write(value: int) -> None:
        for step in range(4):
            versions.append(CorpusStore(tmp_path, "p").create("docs", rows(5, value * 10.0 + step)))

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(1, 17))
    assert CorpusStore(tmp_path, "p").versions("docs") == [15, 16]


def test_there_is_a_limit_of_corpora(tmp_path: Path) -> None:
    corpus = registry.get("corpus", max_corpora=2)
    context = Context(torch.device("cpu"), tmp_path, "p")
    for name in ("a", "b", "a"):
        corpus.run(vectors=torch.randn(1, 2, 2), name=name, context=context)
    with pytest.raises(InvalidInput, match="2 corpora already"):
        corpus.run(vectors=torch.randn(1, 2, 2), name="c", context=context)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    extremes = torch.tensor([[0, 0, 0], [info.max] * 3, [info.tiny, 0, -info.tiny], [3, 0, 4]], dtype=dtype)
    for x in (extremes, torch.randn(131, 17).to(dtype), torch.randn(5, 1).to(dtype), torch.empty(0, 3, dtype=dtype)):
        got = unit_rows(x)
        assert got.dtype == torch.float32
        if x is not extremes:
            torch.testing.assert_close(got, unit_rows_reference(x), rtol=1e-6, atol=1e-6)
    expected = [[0, 0, 0], [3**-0.5] * 3, [0.5**0.5, 0, -(0.5**0.5)], [0.6, 0, 0.8]]
    torch.testing.assert_close(unit_rows(extremes), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 0, 3), (1, 3, 0)])
def test_empty_corpora_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="n, d >= 1"):
        registry.get("corpus").run(vectors=torch.zeros(shape), name="a", context=Context(torch.device("cpu"), tmp_path, "p"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    vectors = torch.ones(1, 2, 2)
    vectors[0, 1, 1] = value
    with pytest.raises(InvalidInput, match="finite"):
        registry.get("corpus").run(vectors=vectors, name="a", context=Context(torch.device("cpu"), tmp_path, "p"))


def test_pairs_of_tasks_make_versions(tmp_path: Path) -> None:
    out = registry.get("corpus").run(
        vectors=torch.randn(2, 4, 3), name="a", context=Context(torch.device("cpu"), tmp_path, "p")
    )
    assert {name: values.tolist() for name, values in out.items()} == {"version": [1, 2], "n": [4, 4], "d": [3, 3]}
    assert all(values.dtype == torch.int64 for values in out.values())


def test_permissions_are_the_owners_only(store: CorpusStore) -> None:
    store.create("docs", rows(1))
    for folder in (store.folder / "docs", store.folder, store.folder.parent):
        assert folder.stat().st_mode & 0o077 == 0
    assert not list(itertools.chain(store.folder.glob("**/.new*")))
