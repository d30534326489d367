"""How durable tasks look, and how their results are saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from penstock.client.cli import jobs_view, values
from penstock.client.cli.jobs import _named
from penstock.client.errors import UnknownTask

JOB: dict[str, Any] = {
    "id": "3fa94c12" + "0" * 24, "key": "nightly [run]", "client": "cron", "kernel": "embed", "rows": 64, "state": "dead",
    "done": 61, "failed": 1, "dead": 2, "expired": 0, "cancelled": 0, "open": 0, "age_ms": 90_000.0, "bytes": 2048,
    "expires_in_ms": 3_600_000.0, "is_acknowledged": True, "can_requeue": True,
}  # fmt: skip
ERROR = {"rows": [[5, 6], [9, 11]], "code": "dead", "message": "2 workers were lost", "detail": "first line\nlast line"}


def text_of(shown: object) -> str:
    console = Console(width=160, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_the_list() -> None:
    open_one = {"id": "beef" + "0" * 28, "key": b"\xff", "kernel": "embed", "state": "queued", "rows": 1, "expires_in_ms": None}
    text = text_of(jobs_view.render([JOB, open_one], False))
    for part in ("3fa94c12", "nightly [run]", "cron", "dead", "61", "1 min 30 s", "1 h 0 min", "beef0000", "ff", "queued"):
        assert part in text
    assert " 61       3 " in text, "all that failed counts, however it did"
    assert "nothing has failed" in text_of(jobs_view.render([], True))
    assert "no durable tasks" in text_of(jobs_view.render([], False))


def test_one_with_its_evidence() -> None:
    text = text_of(jobs_view.render_one({**JOB, "errors": [ERROR]}))
    told = ("64 (61 done, 1 failed, 2 dead)", "row 5, 9 to 10: dead: 2 workers were lost", "last line", "2.0 KiB", "can be")
    for part in told:
        assert part in text


class Named:
    """A client that knows some tasks."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def jobs(self) -> list[dict[str, str]]:
        return [{"id": id_} for id_ in self.ids]

    def act(self, *, id: str | None = None, key: str | None = None) -> str:
        if key == "nightly" or key == "f" * 32 or (id is not None and id.partition("/")[0] in self.ids):
            return f"id {id}" if id is not None else f"key {key}"
        raise UnknownTask("no")


ONE, TWO = "3fa94c12" + "0" * 24, "3fa9" + "1" * 28


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nightly", "key nightly"), (ONE, f"id {ONE}"), (f"{ONE}/3", f"id {ONE}/3"), ("f" * 32, f"key {'f' * 32}"),
        ("3fa94", f"id {ONE}"), ("3FA94/7", f"id {ONE}/7"),
    ],
)  # fmt: skip
def test_a_task_is_found_by_id_key_or_beginning(name: str, found: str) -> None:
    client: Any = Named(ONE, TWO)
    assert _named(client, name, client.act) == found


@pytest.mark.parametrize(
    ("name", "why"), [("3fa9", "2 tasks begin"), ("3fa", "is called '3fa'"), ("other", "is called 'other'")]
)
def test_a_name_that_fits_none_or_several(name: str, why: str) -> None:
    client: Any = Named(ONE, TWO)
    with pytest.raises(Exception, match=why):
        _named(client, name, client.act)


def test_results_are_saved_by_output(tmp_path: Path) -> None:
    def saved(*rows: Any) -> dict[str, Any]:
        values.save(tmp_path / "x.npz", rows)
        with np.load(tmp_path / "x.npz", allow_pickle=False) as content:
            return {name: content[name].tolist() for name in content.files}

    assert saved(np.arange(3)) == {"out": [0, 1, 2]}
    assert saved(np.arange(2), np.arange(2)) == {"out": [[0, 1], [0, 1]]}
    assert saved(np.arange(2), np.arange(1)) == {"out.0": [0, 1], "out.1": [0]}
    assert saved({"file": "text", "n": 1.5}) == {"file": "text", "n": 1.5}
    assert saved({"file": "a"}, {"file": "long"}) == {"file": ["a", "long"]}
    assert saved(b"ab", b"c") == {"out.0": [97, 98], "out.1": [99]}
