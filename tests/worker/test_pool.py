"""The pool of buffers: what is lent is nobody else's, nothing is lost, nothing is allocated, nobody reads another's bytes."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from penstock.worker.pool import PAGE_BYTES, Buffer, Pool, Refused, Scrub, plain


def make(num_pages: int = 16, scrub: Scrub = Scrub.ZERO) -> Pool:
    return Pool(num_pages * PAGE_BYTES, plain, scrub)


def lent(pool: Pool, num_bytes: int, principal: str = "ada") -> Buffer:
    buffer = pool.borrow(num_bytes, principal)
    assert isinstance(buffer, Buffer)
    return buffer


@pytest.mark.parametrize("num_bytes", [1, 7, PAGE_BYTES, PAGE_BYTES + 1, 5 * PAGE_BYTES, 16 * PAGE_BYTES])
def test_a_buffer_has_the_size_that_was_asked_for(num_bytes: int) -> None:
    pool = make()
    buffer = lent(pool, num_bytes)
    assert buffer.bytes.shape == (num_bytes,)
    assert buffer.bytes.dtype is torch.uint8
    assert pool.available_bytes == 16 * PAGE_BYTES - max(PAGE_BYTES, 1 << (num_bytes - 1).bit_length())
    buffer.give_back()
    assert pool.available_bytes == pool.total_bytes
    pool.check()


def test_a_full_pool_refuses_at_once_and_says_what_is_left() -> None:
    pool = make(4)
    held = [lent(pool, 1) for _ in range(3)]
    assert pool.borrow(PAGE_BYTES + 1) == Refused(PAGE_BYTES + 1, PAGE_BYTES)
    assert pool.borrow(64 * PAGE_BYTES) == Refused(64 * PAGE_BYTES, PAGE_BYTES)
    held[0].give_back()
    assert isinstance(pool.borrow(PAGE_BYTES), Buffer)


def test_a_refused_borrower_gets_memory_of_its_own_which_is_counted() -> None:
    pool = make(1)
    with pool.lend(10) as inside, pool.lend(3 * PAGE_BYTES) as beside:
        assert pool.num_allocated == 1
        assert pool.available_bytes == 0
        assert beside.shape == (3 * PAGE_BYTES,)
        assert not beside.any()
        assert inside.data_ptr() != beside.data_ptr()
    assert (pool.num_borrowed, pool.num_returned, pool.num_allocated) == (2, 2, 1)
    pool.check()


def test_a_loan_ends_once() -> None:
    pool = make()
    buffer = lent(pool, 1)
    buffer.give_back()
    with pytest.raises(ValueError, match="already"):
        buffer.give_back()
    assert not hasattr(buffer, "bytes"), "the memory is out of reach"


def test_a_loan_ends_with_an_exception_too() -> None:
    pool = make()
    with pytest.raises(KeyError), pool.lend(100):
        raise KeyError
    assert pool.available_bytes == pool.total_bytes


def test_any_size_of_pool_is_used_to_the_last_page() -> None:
    for num_pages in range(1, 40):
        pool = Pool(num_pages * PAGE_BYTES + 17, plain)
        assert sum(isinstance(pool.borrow(1), Buffer) for _ in range(num_pages + 1)) == num_pages
        assert pool.available_bytes == 0


@pytest.mark.parametrize(("scrub", "seen"), [(Scrub.ZERO, 0), (Scrub.POISON, 0xFF), (Scrub.NONE, 7)])
def test_what_the_next_client_sees(scrub: Scrub, seen: int) -> None:
    pool = make(1, scrub)
    first = lent(pool, PAGE_BYTES, "ada")
    first.bytes.fill_(7)
    first.give_back()
    assert lent(pool, PAGE_BYTES, "bob").bytes.eq(seen).all()


def test_the_same_client_costs_no_zeroing_and_nobody_in_particular_always_does() -> None:
    filled = list[int]()

    def fill(memory: torch.Tensor, byte: int) -> None:
        filled.append(len(memory))
        memory.fill_(byte)

    pool = Pool(PAGE_BYTES, plain, fill=fill)
    filled.clear()
    for principal, num_fills in [("ada", 0), ("ada", 0), ("bob", 1), ("", 2), ("", 3), ("ada", 4), ("ada", 4)]:
        buffer = lent(pool, 8, principal)
        assert len(filled) == num_fills, principal
        buffer.give_back()


def test_who_fills_a_buffer_leaves_what_lies_behind_it_for_nobody() -> None:
    pool = make(2)
    first = lent(pool, 2 * PAGE_BYTES, "ada")
    first.bytes.fill_(7)
    first.give_back()
    second = pool.borrow(PAGE_BYTES + 5, "bob", will_fill=True)
    assert isinstance(second, Buffer)
    assert second.bytes.eq(7).all(), "not zeroed: all of it is about to be written"
    second.bytes.fill_(8)
    second.give_back()
    third = lent(pool, 2 * PAGE_BYTES, "bob")
    assert not third.bytes.any(), "ada's bytes were behind it"


def test_poison_shows_a_late_reader() -> None:
    pool = make(1, Scrub.POISON)
    buffer = lent(pool, 8)
    kept = buffer.bytes.view(torch.float32)
    kept.fill_(1.0)
    buffer.give_back()
    assert kept.isnan().all()


def test_the_high_water_mark() -> None:
    pool = make(8)
    with pool.lend(1), pool.lend(3 * PAGE_BYTES):
        pass
    with pool.lend(1):
        pass
    assert pool.numbers("host") == {
        "host_available_bytes": 8 * PAGE_BYTES, "host_high_bytes": 5 * PAGE_BYTES, "host_borrowed": 3, "host_returned": 3,
        "host_allocated": 0,
    }  # fmt: skip


class Borrowers(RuleBasedStateMachine):
    """Three clients and one without a name write their own byte everywhere; each must find zeros or its own."""

    buffers = Bundle("buffers")
    clients = ("", "ada", "bob", "eve")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make(11)
        self.held: dict[int, tuple[Buffer, int]] = {}

    @rule(target=buffers, num_pages=st.floats(0.001, 9.0), who=st.integers(0, 3), will_fill=st.booleans())
    def borrow(self, num_pages: float, who: int, will_fill: bool) -> Buffer | None:
        num_bytes = max(int(num_pages * PAGE_BYTES), 1)
        buffer = self.pool.borrow(num_bytes, self.clients[who], will_fill=will_fill)
        if isinstance(buffer, Refused):
            return None
        own = who if who else -1  # nobody's bytes are nobody's own
        is_own = all(byte in (0, own) for byte in buffer.bytes.unique().tolist())
        assert is_own or will_fill, "another client's bytes"
        buffer.bytes.fill_(who or 99)
        self.held[id(buffer)] = buffer, who or 99
        return buffer

    @rule(buffer=consumes(buffers))
    def give_back(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            assert buffer.bytes.eq(self.held.pop(id(buffer))[1]).all(), "somebody wrote into a buffer on loan"
            buffer.give_back()

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        assert self.pool.num_borrowed - self.pool.num_returned == len(self.held)
        assert self.pool.num_allocated == 0

    def teardown(self) -> None:
        for buffer, _ in self.held.values():
            buffer.give_back()
        self.pool.check()
        assert self.pool.available_bytes == self.pool.total_bytes


TestBorrowers = Borrowers.TestCase
TestBorrowers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
