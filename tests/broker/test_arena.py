"""The arena: slots never overlap, come back once nobody has them, and neither side's death leaves memory behind."""

import errno
import gc
import os
import random
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker import segments
from penstock.broker.arena import MIN_SEGMENT_BYTES, PAGE, Arena, Extents
from penstock.broker.shared import MAX_SLOTS, SharedBytes

pytestmark = pytest.mark.skipif(not segments.IS_POSSIBLE, reason="shared memory is for Linux")
MB = 1 << 20
SIZES = st.integers(1, 9)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), SIZES, st.randoms(use_true_random=False)), max_size=80))
def test_extents_never_overlap_and_join_again(steps: list[tuple[bool, int, random.Random]]) -> None:
    extents, taken = Extents(64), dict[int, int]()
    for is_take, size, choose in steps:
        if is_take or not taken:
            offset = extents.take(size)
            if offset is None:
                assert all(b - a < size for a, b in extents.free)
                continue
            assert 0 <= offset <= 64 - size
            assert all(offset + size <= a or a + n <= offset for a, n in taken.items())
            taken[offset] = size
        else:
            offset = choose.choice(sorted(taken))
            extents.give(offset, taken.pop(offset))
        assert sum(b - a for a, b in extents.free) == 64 - sum(taken.values())
        assert all(a[1] < b[0] for a, b in zip(extents.free, extents.free[1:], strict=False))
    for offset, size in taken.items():
        extents.give(offset, size)
    assert extents.is_empty


STEPS = st.lists(st.tuples(st.sampled_from(["place", "drop", "lend", "back"]), st.integers(1, 3 * PAGE), st.integers(0, 99)))


@settings(deadline=None, max_examples=30)
@given(STEPS)
def test_slots_are_free_when_dropped_and_given_back(steps: list[tuple[str, int, int]]) -> None:
    """Against a model: what is in use is what somebody refers to or has on loan, and its bytes stay as they were."""
    arena = Arena(1 << 20, 1)
    mine, loans = list[SharedBytes](), list[tuple[int, int, int, int]]()
    for what, size, pick in steps:
        if what == "place":
            shared = arena.place(np.full(size, pick, np.uint8))
            if shared is not None:
                mine.append(shared)
        elif what == "drop" and mine:
            del mine[pick % len(mine)]
        elif what == "lend" and mine:
            shared = mine[pick % len(mine)]
            arena.lend([shared])
            loans.append((shared.place[1], shared.offset, shared.nbytes, shared.buffer[0]))
        elif what == "back" and loans:
            fd, offset, *_ = loans.pop(pick % len(loans))
            arena.take_back([(fd, offset)])
        shared = None  # whoever refers to a slot has it
        in_use = {(m.place[1], m.offset) for m in mine} | {loan[:2] for loan in loans}
        assert arena.num_taken == len(in_use)
        arena.check()
        assert all(set(bytes(m.buffer)) == {m.buffer[0]} for m in mine)
        for fd, offset, nbytes, byte in loans:
            assert os.pread(fd, nbytes, offset) == bytes([byte]) * nbytes
    mine.clear()
    arena.reconcile([])
    assert arena.num_taken == 0


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float32", "int64", "float64"])
def test_arrays_are_copied_in_c_order(dtype: str) -> None:
    arena = Arena(MB * 64, 1)
    base = (np.arange(3 * 5 * 7) % 2).astype(dtype).reshape(3, 5, 7)
    for array in (base, base.T, base[:, ::2], base[::-1, 1:, 3:4], base[:0]):
        shared = arena.place(array)
        if not array.size:
            assert shared is None
            continue
        assert shared is not None and bytes(shared.buffer) == array.tobytes()


def test_what_is_small_stays_out() -> None:
    arena = Arena(MB, 1000)
    assert arena.place(np.zeros(999, np.uint8)) is None and arena.num_full == 0
    assert arena.place(np.zeros(1000, np.uint8)) is not None


def test_it_grows_to_its_limit_and_no_further() -> None:
    arena = Arena(3 * MIN_SEGMENT_BYTES, 1)
    kept = [arena.place(np.zeros(MIN_SEGMENT_BYTES, np.uint8)) for _ in range(4)]
    assert [k is not None for k in kept] == [True, True, True, False]
    assert arena.num_bytes == 3 * MIN_SEGMENT_BYTES and arena.num_full == 1
    del kept[0]
    assert arena.place(np.zeros(MIN_SEGMENT_BYTES, np.uint8)) is not None


def test_small_segments_make_room_for_a_large_array() -> None:
    arena = Arena(4 * MIN_SEGMENT_BYTES, 1)
    small = [arena.place(np.zeros(MIN_SEGMENT_BYTES, np.uint8)) for _ in range(2)]
    assert None not in small
    before = set(arena.inodes())
    small.clear()
    assert arena.place(np.zeros(4 * MIN_SEGMENT_BYTES, np.uint8)) is not None
    assert arena.has_shrunk and not before & set(arena.inodes())
    arena.check()


def test_no_more_slots_than_a_header_can_list() -> None:
    arena = Arena(64 * MB, 1)
    kept = [arena.place(np.zeros(1, np.uint8)) for _ in range(MAX_SLOTS + 1)]
    assert kept[-1] is None and None not in kept[:-1]


def test_no_memory_left_is_found_at_once_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def full(fd: int, offset: int, nbytes: int) -> None:
        calls.append(nbytes)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = _num_descriptors()
    arena = Arena(64 * MB, 1)
    assert arena.place(np.zeros(MB, np.uint8)) is None and arena.place(np.zeros(MB, np.uint8)) is None
    assert len(calls) == 1 and "No space left" in arena.error and arena.num_full == 2
    assert _num_descriptors() == before


def test_a_closed_arena_lets_go_of_its_memory_with_the_last_reference() -> None:
    gc.collect()
    before = _num_descriptors()
    arena = Arena(64 * MB, 1)
    kept = arena.place(np.full(MB, 7, np.uint8))
    assert kept is not None
    arena.lend([kept])
    arena.close()
    assert arena.place(np.zeros(MB, np.uint8)) is None
    assert bytes(kept.buffer[:3]) == b"\7\7\7"
    del kept
    assert _num_descriptors() == before
    arena.take_back([(3, 0)])
    arena.check()


def test_idle_segments_can_be_given_up() -> None:
    arena = Arena(64 * MB, 1)
    kept: Any = arena.place(np.zeros(MB, np.uint8))
    arena.trim()
    assert arena.num_bytes and not arena.has_shrunk
    del kept
    arena.trim()
    assert not arena.num_bytes and arena.has_shrunk


def test_threads_get_slots_of_their_own() -> None:
    arena, wrong = Arena(64 * MB, 1), list[int]()

    def work(mark: int) -> None:
        choose = random.Random(mark)
        for _ in range(200):
            shared = arena.place(np.full(choose.randint(1, 5 * PAGE), mark, np.uint8))
            if shared is None or set(bytes(shared.buffer)) != {mark}:
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and arena.num_taken == 0
    arena.check()


def test_a_forked_child_has_no_part_in_it() -> None:
    from penstock.broker.peer_memory import PeerMemory

    probe = segments.make(PAGE)
    memory = PeerMemory(64 * MB)
    memory.welcome({"probe": list(probe.place), "min_bytes": 1, "max_bytes": 64 * MB, "held": []})
    kept = memory.place(np.zeros(MB, np.uint8))
    assert kept is not None
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, b"y" if memory.place(np.zeros(MB, np.uint8)) is None else b"n")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"
    os.close(read)
    os.close(write)
    assert memory.place(np.zeros(MB, np.uint8)) is not None


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
