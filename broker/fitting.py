"""Outcomes into messages: what one header, one block and one message can hold.

Knows how much of a header an outcome takes, at most; does not know to whom it goes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from penstock.broker.columns import Block, any_shared, gather
from penstock.broker.protocol import Outcome
from penstock.broker.shared import DESCRIPTOR_BYTES
from penstock.broker.wire import MAX_FRAMES, MAX_HEADER_BYTES

SPAN_BYTES: Final = 40
"""A span with its time in the queue."""
MAX_LENGTH_BYTES: Final = 5
MAX_PORTION_BYTES: Final = 24 * 1024
"""Of spans and lengths in one outcome: its layout, its error and its timings come to at most 30 KiB more."""
MAX_MESSAGE_BYTES: Final = MAX_HEADER_BYTES - 4096
MAX_OUTCOMES: Final = 256
_FIXED_BYTES: Final = 128
_TIMING_BYTES: Final = 48
_HEAD_FRAMES: Final = 2


def row_bytes(block: Block | None) -> int:
    """What a header needs for each row of a block: a length per ragged column, a descriptor per shared row."""
    if block is None:
        return 0
    listed = MAX_LENGTH_BYTES * sum(lengths is not None for lengths in block.lengths)
    return listed + (DESCRIPTOR_BYTES * block.layout.num_framed if any_shared([block]) else 0)


def header_bytes(outcome: Outcome) -> int:
    """What it takes of a header, at most."""
    block, error = outcome.block, outcome.error
    num_bytes = _FIXED_BYTES + SPAN_BYTES * len(outcome.spans) + _TIMING_BYTES * len(outcome.timings or ())
    if block is not None:
        num_bytes += len(block.layout.packed) + row_bytes(block) * block.num_rows
    if error is not None:
        num_bytes += len(error.message.encode(errors="replace")) + len(error.detail.encode(errors="replace"))
    return num_bytes


class Filling:
    """The outcomes of one message while there is room for more."""

    __slots__ = ("_num_bytes", "_num_frames", "outcomes")

    def __init__(self, first: Outcome) -> None:
        self.outcomes = [first]
        self._num_bytes, self._num_frames = header_bytes(first), _HEAD_FRAMES + _num_frames(first)

    def take(self, outcome: Outcome) -> bool:
        """Add one more; False if it does not fit."""
        num_bytes, num_frames = self._num_bytes + header_bytes(outcome), self._num_frames + _num_frames(outcome)
        if num_bytes > MAX_MESSAGE_BYTES or num_frames > MAX_FRAMES or len(self.outcomes) >= MAX_OUTCOMES:
            return False
        self.outcomes.append(outcome)
        self._num_bytes, self._num_frames = num_bytes, num_frames
        return True


def messages(outcomes: Iterable[Outcome]) -> Iterator[list[Outcome]]:
    """The outcomes in order, in lists that fit a message each."""
    filling: Filling | None = None
    for outcome in (part for whole in outcomes for part in _cut(whole)):
        if filling is None or not filling.take(outcome):
            if filling is not None:
                yield filling.outcomes
            filling = Filling(outcome)
    if filling is not None:
        yield filling.outcomes


def _num_frames(outcome: Outcome) -> int:
    return 0 if outcome.block is None else len(outcome.block.sent_frames)


def _cut(outcome: Outcome) -> Iterator[Outcome]:
    """The same rows in outcomes that fit a message each; mostly it is one."""
    block = outcome.block
    per_row = row_bytes(block)
    if per_row * sum(stop - start for _, start, stop in outcome.spans) <= MAX_PORTION_BYTES:
        yield outcome
        return
    most, base = max(1, MAX_PORTION_BYTES // per_row), 0
    for index, (run_id, start, stop) in enumerate(outcome.spans):
        for first in range(start, stop, most):
            last = min(first + most, stop)
            assert block is not None
            part = gather([(block, base + first - start, base + last - start)])
            yield replace(outcome, spans=[(run_id, first, last)], block=part, queue_ms=outcome.queue_ms[index : index + 1])
        base += stop - start
