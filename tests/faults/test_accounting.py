"""The account of a run with faults: every way in which something can go missing, or come too often, is seen."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
from accounting import Account, Log, content, settle


def answer(client: str, key: str, num_bytes: int = 0) -> bytes:
    return hashlib.sha256(content(client, key, num_bytes)).digest()


def finished(folder: Path, client: str = "c0", num_tasks: int = 4) -> Log:
    """A client that did all it should, but for saying so."""
    log = Log(folder / f"{client}.log", client)
    for i in range(num_tasks):
        key = f"k{i}"
        assert log.submitted(key, is_durable=True) == content(client, key)
        log.accepted(key)
        log.done(key, answer(client, key))
    return log


def account_of(folder: Path, *held: str) -> Account:
    return settle(sorted(folder.glob("*.log")), held)


def test_a_run_without_faults_is_clean(tmp_path: Path) -> None:
    for client in ("c0", "c1"):
        finished(tmp_path, client).ended()
    account = account_of(tmp_path, "k1")
    assert account.is_clean
    assert (account.num_submitted, account.num_accepted, account.num_done, account.num_lives) == (8, 8, 8, 2)
    assert "lost 0, unexpected 0, wrong owner 0, duplicates 0" in account.text()


def test_what_was_accepted_and_never_came_is_lost(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.submitted("missing", is_durable=True)
    log.accepted("missing")
    account = account_of(tmp_path)
    assert (account.lost, account.is_clean) == (["c0/missing"], False)
    assert "lost: c0/missing" in account.text()


@pytest.mark.parametrize("is_durable", [False, True])
def test_what_was_never_accepted_is_lost_only_if_its_client_lived_to_the_end(tmp_path: Path, is_durable: bool) -> None:
    log = finished(tmp_path)
    log.submitted("k", is_durable)
    log.unsure("k", "unavailable")
    log.submitted("open", is_durable)
    assert account_of(tmp_path).indeterminate == ["c0/k", "c0/open"]
    log.ended()
    account = account_of(tmp_path)
    assert (account.lost, account.unsure["unavailable"]) == (["c0/k", "c0/open"], 1)


def test_an_accepted_task_in_memory_may_die_with_its_client(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.submitted("m", is_durable=False)
    log.accepted("m")
    assert account_of(tmp_path).indeterminate == ["c0/m"]


def test_refused_is_neither_lost_nor_open(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.submitted("r", is_durable=True)
    log.refused("r", "overloaded")
    assert log.unsettled() == []
    log.ended()
    account = account_of(tmp_path)
    assert (account.refused, account.lost) == (["c0/r"], [])


def test_refused_when_submitted_again_does_not_take_the_acceptance_back(tmp_path: Path) -> None:
    log = finished(tmp_path)
    for line in (log.accepted, lambda key: log.refused(key, "overloaded")):
        log.submitted("a", is_durable=True)
        line("a")
    assert account_of(tmp_path).lost == ["c0/a"]
    assert Log(tmp_path / "c0.log", "c0").unsettled() == ["a"]


def test_what_the_broker_has_forgotten_is_lost_even_if_it_is_done_later(tmp_path: Path) -> None:
    log = finished(tmp_path)
    assert log.has_promise("k0")
    log.submitted("m", is_durable=False)
    log.accepted("m")
    assert not log.has_promise("m"), "it may die with the broker"
    log.gone("k0")
    assert account_of(tmp_path).lost == ["c0/k0"]


def test_the_answer_of_another_client_or_task_is_seen(tmp_path: Path) -> None:
    log = finished(tmp_path)
    for key, found in (("x", answer("c1", "x")), ("y", answer("c0", "x")), ("z", b"")):
        log.submitted(key, is_durable=True)
        log.done(key, found)
    assert account_of(tmp_path).wrong_owner == ["c0/x", "c0/y", "c0/z"]


def test_an_answer_that_is_longer_is_checked_to_its_end(tmp_path: Path) -> None:
    log = Log(tmp_path / "c0.log", "c0")
    for key, found in (("whole", answer("c0", "whole", 9000) * 3), ("torn", answer("c0", "torn", 9000) * 3 + b"?")):
        assert len(log.submitted(key, is_durable=True, num_bytes=9000)) == 9000
        log.done(key, found)
    assert account_of(tmp_path).wrong_owner == ["c0/torn"]


def test_delivered_twice_is_a_duplicate_even_if_it_is_the_same(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.done("k0", answer("c0", "k0"))
    log.failed("k1", "failed")
    account = account_of(tmp_path)
    assert (account.duplicates, account.failed) == (["c0/k0", "c0/k1"], {"failed": 1})


def test_what_nobody_submitted_is_unexpected(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.done("stray", answer("c0", "stray"))
    assert account_of(tmp_path, "k0", "planted").unexpected == ["c0/stray", "planted"]


def test_a_client_that_is_started_again_knows_what_is_open(tmp_path: Path) -> None:
    log = finished(tmp_path)
    log.submitted("large", is_durable=True, num_bytes=70_000)
    log.submitted("next", is_durable=True)
    log.accepted("next")
    with (tmp_path / "c0.log").open("ab") as f:  # the last line of a client that was killed
        f.write(b'{"is": "done", "key": "nex')
    again = Log(tmp_path / "c0.log", "c0")
    assert again.unsettled() == ["large", "next"]
    for key in again.unsettled():
        again.submitted(key, is_durable=True, num_bytes=again.num_bytes(key))
        again.done(key, answer("c0", key, again.num_bytes(key)))
    again.ended()
    account = account_of(tmp_path)
    assert (account.is_clean, account.num_submitted, account.num_done, account.num_lives) == (True, 6, 6, 2)


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    log = Log(tmp_path / "c0.log", "c0")

    def submit(thread: int) -> None:
        for i in range(200):
            key = f"{thread}-{i}"
            log.submitted(key, is_durable=True)
            log.done(key, answer("c0", key))

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    account = account_of(tmp_path)
    assert (account.is_clean, account.num_done) == (True, 800)


def test_no_two_logs_of_one_client_and_nothing_else(tmp_path: Path) -> None:
    Log(tmp_path / "a.log", "c0")
    Log(tmp_path / "b.log", "c0")
    with pytest.raises(ValueError, match="same client"):
        account_of(tmp_path)
    os.remove(tmp_path / "b.log")
    (tmp_path / "b.log").write_bytes(b"not a log\n")
    with pytest.raises(ValueError, match="Expecting value"):
        account_of(tmp_path)
