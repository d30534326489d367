"""Blocks: joined pieces hold exactly the rows they were cut from, whatever the columns."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import column_sets, rows_of

from penstock.broker.columns import Block, gather, pack, reshape
from penstock.broker.layout import Column, LayoutError


def rows_in(block: Block) -> list[list[bytes]]:
    return [[bytes(block.row(i, row)) for row in range(block.num_rows)] for i in range(len(block.columns))]


def parsed(block: Block) -> Block:
    """The block as its receiver has it."""
    described = block.describe()
    lengths = [[None if n is None else list(n) for n in x] for x in described[2:]]
    return Block.parse([*described[:2], *lengths], [bytes(f) for f in block.frames], 4096)


@given(data=st.data())
@settings(max_examples=200)
def test_rows_survive_packing_and_parsing(data: st.DataObject) -> None:
    columns = data.draw(column_sets())
    block, rows = data.draw(rows_of(columns, data.draw(st.integers(0, 5))))
    again = parsed(block)
    assert rows_in(block) == rows_in(again) == rows
    assert again.columns == columns
    assert again.nbytes == sum(len(r) for column in rows for r in column)
    assert len(again.frames) == again.num_frames


@given(data=st.data())
@settings(max_examples=200)
def test_gathered_pieces_are_their_rows_one_after_another(data: st.DataObject) -> None:
    columns = data.draw(column_sets())
    pieces = list[tuple[Block, int, int]]()
    wanted: list[list[bytes]] = [[] for _ in columns]
    for _ in range(data.draw(st.integers(1, 4))):
        num_rows = data.draw(st.integers(0, 5))
        block, rows = data.draw(rows_of(columns, num_rows))
        start = data.draw(st.integers(0, num_rows))
        stop = data.draw(st.integers(start, num_rows))
        pieces.append((parsed(block), start, stop))
        for column, add in zip(wanted, rows, strict=True):
            column += add[start:stop]
    joined = gather(pieces)
    assert joined.num_rows == sum(stop - start for _, start, stop in pieces)
    assert rows_in(joined) == wanted
    assert rows_in(parsed(joined)) == wanted, "and it is a valid block"


@given(data=st.data())
@settings(max_examples=100)
def test_gathering_what_was_cut_gives_the_whole(data: st.DataObject) -> None:
    block, rows = data.draw(rows_of(data.draw(column_sets()), 6))
    cuts = sorted(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    pieces = [gather([(block, a, b)]) for a, b in zip([0, *cuts], [*cuts, 6], strict=True)]
    joined = gather([(piece, 0, piece.num_rows) for piece in pieces])
    assert rows_in(joined) == rows
    assert joined.columns == block.columns


def test_a_whole_block_is_handed_on_as_it_came() -> None:
    block = pack([(Column("x", "uint8", (2,)), None, [b"ab", b"cd"])], 2)
    assert gather([(block, 0, 2)]) is block


@given(data=st.data())
@settings(max_examples=200)
def test_reshaping_keeps_the_bytes(data: st.DataObject) -> None:
    columns = data.draw(column_sets())
    block, rows = data.draw(rows_of(columns, data.draw(st.integers(0, 4))))
    for index, column in enumerate(columns):
        for is_ragged in (True, False):
            try:
                made = reshape(block, index, is_ragged)
            except LayoutError:
                lengths = block.lengths[index]
                differ = lengths is not None and len(set(lengths)) > 1
                assert differ if column.is_ragged else not column.shape
                continue
            assert made.columns[index].is_ragged == is_ragged
            assert rows_in(made) == rows
            assert rows_in(parsed(made)) == rows
            if not (is_ragged == column.is_ragged or block.num_rows == 0):
                back = reshape(made, index, column.is_ragged)
                assert back.columns == columns
                assert [n and list(n) for n in back.lengths] == [n and list(n) for n in block.lengths]


COLUMN = Column("x", "int32", (2,), True)


@pytest.mark.parametrize(
    ("lengths", "frames"),
    [
        ([[1, 2]], [b"x" * 23]), ([[1, 2]], []), ([[1]], [b"x" * 24]), ([[1, 2, 0]], [b"x" * 24]), ([[1, -1]], [b""]),
        ([[1, 2.0]], [b"x" * 24]), ([[True, 2]], [b"x" * 24]), ([None], [b"x" * 24]), ([], [b"x" * 24]),
        ([[1 << 60, 2]], [b"x" * 24]),
    ],
)  # fmt: skip
def test_what_does_not_fit_down_to_the_last_byte(lengths: Any, frames: list[bytes]) -> None:
    good = pack([(COLUMN, [1, 2], [b"x" * 8, b"y" * 16])], 2)
    assert parsed(good).num_rows == 2
    with pytest.raises(LayoutError):
        Block.parse([2, good.layout.packed, lengths], frames, 4096)


@pytest.mark.parametrize("is_framed", [True, False])
@pytest.mark.parametrize("is_ragged", [True, False])
def test_two_columns_in_every_form(is_framed: bool, is_ragged: bool) -> None:
    first = Column("a", "float64", () if is_ragged else (3,), is_ragged, is_framed)
    second = Column("b", "bytes", (), True)
    a, b = [b"1" * 24, b"2" * 24, b"3" * 24], [b"", b"xx", b"y"]
    block = pack([(first, [3, 3, 3] if is_ragged else None, a), (second, [0, 2, 1], b)], 3)
    assert rows_in(parsed(block)) == [a, b]
    assert rows_in(gather([(block, 1, 3), (block, 0, 1)])) == [[*a[1:], a[0]], [*b[1:], b[0]]]
