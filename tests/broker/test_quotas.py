"""Quotas: rules and their texts, token buckets over any window, and what stays over a reload."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.scheduling import quotas as q
from penstock.broker.scheduling.quotas import ClientRules, QuotaExceeded, Quotas, parse_rules

ALICE = ("uid:1", "alice")
BOB = ("uid:1", "bob")


def submit(quotas: Quotas, now: float, num_rows: int = 1, account: q.Account = ALICE) -> QuotaExceeded | None:
    """Check, and take what is allowed."""
    over = quotas.check(account, num_rows, 0, 0, 0, now)
    if over is None:
        quotas.take(account, num_rows, now)
    return over


# --- rules -----------------------------------------------------------------------------------------------------------


def test_rules_from_toml() -> None:
    text = """
        [clients.default]
        rate_per_s = 100
        [clients.alice]
        weight = 2
        max_open = 5000
        [clients."batch-*"]
        device_s_per_s = 0.5
        [clients."batch-night-*"]
        device_s_per_s = 4.0
    """
    quotas = Quotas(parse_rules(tomllib.loads(text)["clients"]))
    assert quotas.rules("alice") == ClientRules(weight=2, max_open=5000)
    assert quotas.rules("batch-7").device_s_per_s == 0.5
    assert quotas.rules("batch-night-7").device_s_per_s == 4.0
    assert quotas.rules("bob") == ClientRules(rate_per_s=100)
    assert Quotas({}).rules("bob") == ClientRules()


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"weight": 0}, "weight must be a number above 0, not 0"),
        ({"weight": float("nan")}, "weight must be a number above 0, not nan"),
        ({"weight": None}, "weight must be a number above 0, not None"),
        ({"rate_per_s": "fast"}, "rate_per_s must be a number above 0, not 'fast'"),
        ({"rate_per_s": True}, "rate_per_s must be a number above 0, not True"),
        ({"max_open": 1.5}, "max_open must be a whole number above 0, not 1.5"),
        ({"max_bytes": -1}, "max_bytes must be a whole number above 0, not -1"),
        ({"device_s_per_s": float("inf")}, "device_s_per_s must be a number above 0, not inf"),
        ({"burst": 5}, "burst must be 1 or more and needs rate_per_s"),
        ({"burst": 0.5, "rate_per_s": 1}, "burst must be 1 or more and needs rate_per_s"),
        ({"device_burst_s": 5}, "device_burst_s needs device_s_per_s"),
    ],
)
def test_bad_rules_say_what_is_wrong(given_: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=r"must|needs") as caught:
        ClientRules(**given_)  # type: ignore[arg-type]
    assert str(caught.value) == text
    with pytest.raises(ValueError, match=r"must|needs") as caught:
        parse_rules({"alice": given_})
    assert str(caught.value) == f"[clients.alice]: {text}"


def test_bad_tables_say_what_is_wrong() -> None:
    with pytest.raises(
        ValueError, match=r"\[clients.bob\]: unknown setting brust, rat; known: burst, device_burst_s, .*weight"
    ):
        parse_rules({"bob": {"rat": 1, "brust": 2}})
    with pytest.raises(ValueError, match=r"\[clients.weight\] must be a table, not 3"):
        parse_rules({"weight": 3})
    with pytest.raises(ValueError, match=r"\[clients.a\*b\]: a \* may only end a name"):
        parse_rules({"a*b": {}})


# --- what is open ----------------------------------------------------------------------------------------------------


def test_open_tasks() -> None:
    quotas = Quotas({"alice": ClientRules(max_open=100)})
    assert quotas.check(ALICE, 5, 95, 0, 0, 0.0) is None
    over = quotas.check(ALICE, 5, 96, 0, 0, 0.0, drain_s=2.5)
    assert over == QuotaExceeded(
        "alice may have 100 tasks open, has 96 and this has 5: wait for some to end, or try again in 2.5 s", 2.5
    )
    over = quotas.check(ALICE, 101, 0, 0, 0, 0.0)
    assert over == QuotaExceeded("alice may have 100 tasks open and this has 101: submit less at a time", None)
    assert quotas.check(BOB, 10**9, 10**9, 10**15, 10**15, 0.0) is None


def test_open_bytes() -> None:
    quotas = Quotas({"default": ClientRules(max_bytes=1000)})
    assert quotas.check(BOB, 1, 1, 900, 100, 0.0) is None
    over = quotas.check(BOB, 1, 1, 900, 101, 0.0)
    assert over is not None and over.retry_after_s == 1.0 and "bob may have 1,000 bytes open, has 900" in over.reason
    over = quotas.check(BOB, 1, 0, 0, 1001, 0.0)
    assert over is not None and over.retry_after_s is None


# --- rates -----------------------------------------------------------------------------------------------------------


def test_a_rate_with_a_burst() -> None:
    quotas = Quotas({"alice": ClientRules(rate_per_s=10, burst=20)})
    assert submit(quotas, 5.0, 20) is None
    over = submit(quotas, 5.0, 4)
    assert over == QuotaExceeded("alice may submit 10 tasks per second and 20 at once: try again in 400 ms", pytest.approx(0.4))
    assert submit(quotas, 5.39, 4) is not None
    assert submit(quotas, 5.4, 4) is None  # exactly as told
    assert submit(quotas, 5.4) is not None
    assert submit(quotas, 500.0, 20) is None
    assert submit(quotas, 500.0) is not None  # a full bucket holds no more than the burst
    over = submit(quotas, 600.0, 21)
    assert over is not None and over.retry_after_s is None and over.reason.endswith("not 21: submit less at a time")
    assert submit(quotas, 600.0, account=BOB) is None


def test_a_burst_left_out_is_a_second_and_at_least_a_task() -> None:
    quotas = Quotas({"alice": ClientRules(rate_per_s=10), "bob": ClientRules(rate_per_s=0.1)})
    assert submit(quotas, 0.0, 10) is None and submit(quotas, 0.0, 1) is not None
    assert submit(quotas, 0.0, account=BOB) is None
    over = submit(quotas, 1.0, account=BOB)
    assert over is not None and over.retry_after_s == pytest.approx(9.0)


def test_a_hint_is_never_too_small_to_act_on() -> None:
    quotas = Quotas({"alice": ClientRules(rate_per_s=1e6, burst=1)})
    submit(quotas, 0.0)
    over = submit(quotas, 0.0)
    assert over is not None and over.retry_after_s == 0.02


@given(
    rate=st.floats(0.01, 1e4),
    burst=st.floats(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 5) | st.none(), st.integers(1, 30)), max_size=60),
)
def test_no_window_has_more_than_its_rate_and_the_burst(
    rate: float, burst: float, steps: list[tuple[float | None, int]]
) -> None:
    """None waits exactly as long as the last refusal said; then the same submission is taken."""
    quotas = Quotas({"alice": ClientRules(rate_per_s=rate, burst=burst)})
    now, taken = 1000.0, list[tuple[float, int]]()
    for wait, num_rows in steps:
        over = None
        if wait is None:
            over = quotas.check(ALICE, num_rows, 0, 0, 0, now)
            now += (over.retry_after_s or 0.0) if over is not None else 0.0
        else:
            now += wait
        refused = submit(quotas, now, num_rows)
        if refused is None:
            taken.append((now, num_rows))
        elif over is not None and over.retry_after_s is not None:
            assert over.retry_after_s == 3600.0, "refused although it waited as told"
    for first, (start, _) in enumerate(taken):
        num_rows = 0
        for end, more in taken[first:]:
            num_rows += more
            assert num_rows <= rate * (end - start) + burst + 1e-6 * (1 + num_rows)


def test_device_time_may_be_overdrawn_and_then_new_work_waits() -> None:
    quotas = Quotas({"alice": ClientRules(device_s_per_s=0.5, device_burst_s=2)})
    assert submit(quotas, 10.0) is None
    quotas.spend(ALICE, 7000.0, 10.0)
    over = submit(quotas, 10.0)
    assert over == QuotaExceeded(
        "alice may use 0.5 device-seconds per second and is 5.0 s over: try again in 10.0 s", pytest.approx(10.0)
    )
    assert submit(quotas, 19.9) is not None and submit(quotas, 20.0) is None
    quotas.spend(ALICE, 4000.0, 20.0)
    quotas.spend(ALICE, -4000.0, 20.0)  # charged too much
    assert submit(quotas, 20.0) is None
    quotas.spend(ALICE, -1e9, 20.0)
    quotas.spend(ALICE, 2001.0, 20.0)
    assert submit(quotas, 20.0) is not None  # no credit for what was given back
    assert submit(quotas, 20.0, account=BOB) is None


def test_a_reload_keeps_what_was_used() -> None:
    quotas = Quotas({"alice": ClientRules(rate_per_s=1, burst=10), "bob": ClientRules()})
    assert submit(quotas, 0.0, 8) is None
    quotas.replace({"default": ClientRules(rate_per_s=1, burst=20)})
    assert submit(quotas, 0.0, 13) is not None and submit(quotas, 0.0, 12) is None
    quotas.replace({"alice": ClientRules(rate_per_s=4, burst=10)})
    over = submit(quotas, 0.0)
    assert over is not None and over.retry_after_s == pytest.approx(11 / 4)
    quotas.replace({})
    assert submit(quotas, 0.0, 10**6) is None
    quotas.replace({"*": ClientRules(rate_per_s=1, burst=5)})
    assert submit(quotas, 0.0, 5, account=BOB) is None  # no limit was nothing used


def test_accounts_are_bounded_and_only_full_buckets_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q, "MAX_ACCOUNTS", 100)
    quotas = Quotas({"default": ClientRules(rate_per_s=1, burst=1000)})
    assert submit(quotas, 0.0, 1000) is None
    for number in range(1000):  # each needs a second to be full again
        assert submit(quotas, 0.1 * number, account=("uid:1", f"c{number}")) is None
        assert len(quotas._meters) <= 100
    over = submit(quotas, 100.0, 101)
    assert over is not None and over.retry_after_s == pytest.approx(1.0)
    for number in range(1000):  # now nobody is full in time: the longest unused go
        assert submit(quotas, 100.0 + 0.001 * number, 900, account=("uid:1", f"d{number}")) is None
        assert len(quotas._meters) <= 100
    assert submit(quotas, 101.0, 900, account=("uid:1", "d999")) is not None
    assert submit(quotas, 101.0, 1000) is None
