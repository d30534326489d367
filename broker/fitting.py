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
MAX_OUTCOMES: Final = 32
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


def has_room(outcomes: list[Outcome], outcome: Outcome) -> bool:
    """Whether one more fits the message of these."""
    num_bytes = header_bytes(outcome) + sum(map(header_bytes, outcomes))
    num_frames = _HEAD_FRAMES + _num_frames(outcome) + sum(map(_num_frames, outcomes))
    return len(outcomes) < MAX_OUTCOMES and num_bytes <= MAX_MESSAGE_BYTES and num_frames <= MAX_FRAMES


def messages(outcomes: Iterable[Outcome]) -> Iterator[list[Outcome]]:
    """The outcomes in order, in lists that fit a message each."""
    fitting, num_bytes, num_frames = list[Outcome](), 0, _HEAD_FRAMES
    for whole in outcomes:
        for outcome in _cut(whole):
            more_bytes, more_frames = header_bytes(outcome), _num_frames(outcome)
            is_full = num_bytes + more_bytes > MAX_MESSAGE_BYTES or num_frames + more_frames > MAX_FRAMES
            if fitting and (is_full or len(fitting) == MAX_OUTCOMES):
                yield fitting
                fitting, num_bytes, num_frames = [], 0, _HEAD_FRAMES
            fitting.append(outcome)
            num_bytes, num_frames = num_bytes + more_bytes, num_frames + more_frames
    if fitting:
        yield fitting


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
