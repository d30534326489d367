"""Blocks to inputs and outputs to blocks: every kind of input, any cut of a batch into blocks, awkward shapes."""

import itertools
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import worker_kernels as kernels
import zmq
from fake_broker import received
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.columns import Block, gather, pack
from penstock.broker.layout import FRAMED_ROW_BYTES, Column
from penstock.kernels import InvalidInput, registry
from penstock.worker.inputs import DTYPES, Plan, take_rows
from penstock.worker.outputs import BadOutput, to_block, to_row

CPU = torch.device("cpu")


def plan(target: Any) -> Plan:
    return Plan(registry.create(target), CPU)


def fixed(rows: np.ndarray, is_framed: bool = False, name: str = "x") -> Block:
    column = Column(name, str(rows.dtype), rows.shape[1:], is_framed=is_framed)
    buffers = [row.tobytes() for row in rows] if is_framed else [rows.tobytes()]
    return pack([(column, None, buffers)], len(rows))


def ragged(rows: list[np.ndarray], is_framed: bool = False, name: str = "x") -> Block:
    column = Column(name, str(rows[0].dtype), rows[0].shape[1:], True, is_framed)
    return pack([(column, [len(r) for r in rows], [r.tobytes() for r in rows])], len(rows))


def blobs(values: list[Any], name: str, dtype: str) -> tuple[Column, list[int], list[bytes]]:
    rows = [v.encode() if isinstance(v, str) else v for v in values]
    return Column(name, dtype, (), True), [len(r) for r in rows], rows


def cut(block: Block, cuts: list[int]) -> list[Block]:
    """The block in pieces at these row numbers."""
    bounds = sorted({0, block.num_rows, *(c % (block.num_rows + 1) for c in cuts)})
    return [gather([(block, a, b)]) for a, b in itertools.pairwise(bounds)]


def travelled(block: Block) -> Block:
    """The block as the broker reads it."""
    described = msgpack.unpackb(msgpack.packb(block.describe()))
    return Block.parse(described, received(block.frames), 10)


def rows_of(block: Block, name: str) -> list[Any]:
    """One output's rows as numpy arrays, str or bytes, by the column's description only."""
    index = next(i for i, c in enumerate(block.columns) if c.name == name)
    column, lengths = block.columns[index], block.lengths[index]
    rows: list[Any] = []
    for i in range(block.num_rows):
        data = bytes(block.row(index, i))
        if column.dtype in ("str", "bytes"):
            rows.append(data.decode() if column.dtype == "str" else data)
        else:
            shape = column.shape if lengths is None else (lengths[i], *column.shape)
            dtype = np.uint16 if column.dtype == "bfloat16" else np.dtype(column.dtype)
            rows.append(np.frombuffer(data, dtype).reshape(shape))
    return rows


CUTS = st.lists(st.integers(0, 100), max_size=4)
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=9)
NUMPY_DTYPES = st.sampled_from([d for d in DTYPES if d != "bfloat16"])


@given(NUMPY_DTYPES, st.integers(1, 9), st.lists(st.integers(0, 4), max_size=3), CUTS, st.booleans())
def test_equal_rows_are_stacked(dtype: str, num_rows: int, shape: list[int], cuts: list[int], is_framed: bool) -> None:
    count = num_rows * int(np.prod(shape, dtype=int))
    rows = (np.arange(count) % 2).astype(dtype).reshape(num_rows, *shape)
    x = plan(kernels.scale).batch(cut(fixed(rows, is_framed), cuts), {})["x"]
    assert x.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(x.numpy(), rows)


@given(LENGTHS, st.integers(0, 3), CUTS, st.booleans())
def test_ragged_rows_are_padded(lengths: list[int], width: int, cuts: list[int], is_framed: bool) -> None:
    rows = [np.full((n, width), i + 1, np.float32) for i, n in enumerate(lengths)]
    inputs = plan(kernels.pads).batch(cut(ragged(rows, is_framed), cuts), {})
    assert inputs["x_lengths"].tolist() == lengths
    assert inputs["x"].shape == (len(rows), max(lengths), width)
    for got, row in zip(inputs["x"], rows, strict=True):
        np.testing.assert_array_equal(got[: len(row)].numpy(), row)
        assert (got[len(row) :] == -1).all()


@given(LENGTHS, CUTS, st.booleans())
def test_ragged_rows_are_packed(lengths: list[int], cuts: list[int], is_framed: bool) -> None:
    rows = [np.arange(n, dtype=np.int64) for n in lengths]
    inputs = plan(kernels.packs).batch(cut(ragged(rows, is_framed), cuts), {})
    assert inputs["x_offsets"].tolist() == [0, *np.cumsum(lengths)]
    np.testing.assert_array_equal(inputs["x"].numpy(), np.concatenate(rows))


@given(st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), min_size=1, max_size=6), CUTS)
def test_blobs_rows_and_statics(pairs: list[tuple[str, bytes]], cuts: list[int]) -> None:
    texts, datas = [t for t, _ in pairs], [d for _, d in pairs]
    block = pack([blobs(texts, "text", "str"), blobs(datas, "data", "bytes")], len(pairs))
    inputs = plan(kernels.words).batch(cut(block, cuts), {"weight": list(range(len(pairs)))})
    assert (inputs["text"], inputs["data"]) == (texts, datas)
    assert inputs["weight"].dtype == torch.float64
    assert inputs["weight"].tolist() == list(range(len(pairs)))
    assert plan(kernels.words).batch([block], {})["weight"].tolist() == [1.5] * len(pairs)


@given(st.integers(1, 9), CUTS, st.integers(0, 8), st.integers(0, 8))
def test_any_range_of_rows_can_be_taken(num_rows: int, cuts: list[int], a: int, b: int) -> None:
    start, stop = sorted((a % (num_rows + 1), b % (num_rows + 1)))
    if start == stop:
        return
    rows = np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3)
    blocks, scalars = take_rows(cut(fixed(rows), cuts), {"each": list(range(num_rows)), "all": 7}, start, stop)
    np.testing.assert_array_equal(plan(kernels.scale).batch(blocks, {})["x"].numpy(), rows[start:stop])
    assert scalars == {"each": list(range(start, stop)), "all": 7}


def test_a_received_frame_is_used_in_place() -> None:
    frame = zmq.Frame(bytearray(np.ones((4, 16), np.float32)))
    block = Block(4, (Column("x", "float32", (16,)),), [None], [frame])
    x = plan(kernels.scale).batch([block], {})["x"]
    assert x.data_ptr() == torch.frombuffer(frame.buffer, dtype=torch.float32).data_ptr()


def test_unaligned_bytes_are_moved() -> None:
    buffer = memoryview(bytearray(b"!" + np.arange(6, dtype=np.float64).tobytes()))[1:]
    block = Block(2, (Column("x", "float64", (3,)),), [None], [buffer])
    x = plan(kernels.scale).batch([block], {})["x"]
    assert x.data_ptr() % 8 == 0
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_bool_is_false_or_true_whatever_byte_came() -> None:
    block = Block(1, (Column("x", "bool", (3,)),), [None], [bytes([0, 1, 77])])
    x = plan(kernels.scale).batch([block], {})["x"]
    assert x.view(torch.uint8).tolist() == [[0, 1, 1]]


X = fixed(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("target", "blocks", "scalars", "message"),
    [
        (kernels.scale, [fixed(np.ones((1, 1), np.float32), name="y")], {}, "'x' is missing"),
        (kernels.scale, [X, fixed(np.ones((1, 4), np.float32))], {}, "differ in shape"),
        (kernels.scale, [ragged([np.ones(2), np.ones(3)])], {}, "differ in shape"),
        (kernels.scale, [X, fixed(np.ones((1, 3), np.int8))], {}, "differ in dtype"),
        (kernels.scale, [pack([blobs(["a"], "x", "str")], 1)], {}, "must be an array"),
        (kernels.pads, [X, fixed(np.ones((1, 3, 2), np.float32))], {}, "more than dimension 0"),
        (kernels.packs, [fixed(np.ones(2, np.float32))], {}, "at least one dimension"),
        (kernels.nap, [], {}, "'seconds' is missing"),
        (kernels.nap, [X], {"seconds": [1.0]}, "1 values for 2 rows"),
        (kernels.words, [pack([blobs([b"\xff"], "text", "str"), blobs([b""], "data", "bytes")], 1)], {}, "not UTF-8"),
        (kernels.words, [pack([blobs([b"a"], "text", "bytes"), blobs([b""], "data", "bytes")], 1)], {}, "must be text"),
        (
            kernels.words,
            [pack([blobs(["a"], "text", "str"), blobs([b""], "data", "bytes")], 1)],
            {"weight": float("nan")},
            "must be a number",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(target: Any, blocks: list[Block], scalars: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(target).batch(blocks, scalars)


@pytest.mark.parametrize(
    ("target", "packed", "message"),
    [
        (kernels.words, b"", "'mode' is missing"),
        (kernels.scale, b"\xc1", "not msgpack"),
        (kernels.scale, b"\x93\x01\x02\x03", "not a map"),
        (kernels.scale, b"\x81\xa1z\x01", "has no input 'z'"),
        (kernels.scale, b"\x81\xa6factor\xc4\x01a", "factor: a static holds"),
    ],
)
def test_statics_that_do_not_fit_are_refused(target: Any, packed: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(target).statics(packed)


def test_statics_stand_over_their_defaults() -> None:
    assert plan(kernels.scale).statics(b"") == {"factor": 2.0}
    assert plan(kernels.scale).statics(b"\x81\xa6factor\x05") == {"factor": 5}


def test_one_task_for_a_stream_has_no_batch_dimension() -> None:
    block = pack([blobs(["a"], "text", "str"), blobs([b"b"], "data", "bytes")], 1)
    inputs = plan(kernels.words).single([block], {"weight": [2]})
    assert inputs == {"text": "a", "data": b"b", "weight": 2.0}
    one = [ragged([np.ones((2, 3), np.float32)])]
    assert plan(kernels.pads).single(one, {})["x"].shape == (2, 3)
    assert plan(kernels.packs).single(one, {})["x"].shape == (2, 3)
    assert plan(kernels.scale).single([fixed(np.ones((1, 3)))], {})["x"].shape == (3,)


# --- outputs -----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(DTYPES)), st.integers(1, 6), st.lists(st.integers(0, 4), max_size=3))
def test_a_batched_tensor_is_one_buffer(dtype: str, num_rows: int, shape: list[int]) -> None:
    out = torch.arange(num_rows * int(np.prod(shape, dtype=int))).reshape(num_rows, *shape).to(DTYPES[dtype])
    block = to_block("k", {"out": out}, num_rows)
    assert len(block.frames) == block.num_frames == 1
    described = travelled(block)
    raw = out.view(torch.uint16) if dtype == "bfloat16" and out.ndim else out
    for got, row in zip(rows_of(described, "out"), raw, strict=True):
        np.testing.assert_array_equal(got, row.numpy())


@given(LENGTHS, st.integers(0, 3))
def test_a_list_of_tensors_is_ragged(lengths: list[int], width: int) -> None:
    rows = [torch.full((n, width), float(i)) for i, n in enumerate(lengths)]
    block = to_block("k", {"out": rows, "n": torch.tensor(lengths)}, len(rows))
    assert block.columns[0].is_ragged == (len(set(lengths)) > 1)
    parsed = travelled(block)
    for got, row in zip(rows_of(parsed, "out"), rows, strict=True):
        np.testing.assert_array_equal(got, row.numpy())
    assert [int(n) for n in rows_of(parsed, "n")] == lengths


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=5), st.binary(max_size=5)), min_size=1, max_size=6))
def test_texts_and_bytes(pairs: list[tuple[str, bytes]]) -> None:
    outputs = {"text": [t for t, _ in pairs], "data": [d for _, d in pairs]}
    block = to_block("k", outputs, len(pairs))
    assert {name: rows_of(block, name) for name in outputs} == outputs


def test_large_rows_get_frames_of_their_own() -> None:
    wide = torch.arange(3 * FRAMED_ROW_BYTES, dtype=torch.uint8).reshape(3, -1)
    uneven = [wide[0], wide[1][:10], wide[2]]
    texts = ["a" * FRAMED_ROW_BYTES, "", "b"]
    block = to_block("k", {"wide": wide, "small": wide[:, :2], "uneven": uneven, "text": texts}, 3)
    assert [c.is_framed for c in block.columns] == [True, False, True, True]
    assert len(block.frames) == block.num_frames == 1 + 3 * 3
    parsed = travelled(block)
    np.testing.assert_array_equal(np.stack(rows_of(parsed, "wide")), wide.numpy())
    assert [len(r) for r in rows_of(parsed, "uneven")] == [FRAMED_ROW_BYTES, 10, FRAMED_ROW_BYTES]
    assert rows_of(parsed, "text") == texts
    just_below = to_block("k", {"out": wide[:, 1:]}, 3)
    assert not just_below.columns[0].is_framed


def test_strided_and_negated_views_are_written_in_order() -> None:
    out = torch.arange(6.0).reshape(2, 3).t()
    negated = torch.tensor([[1 + 2j], [3 + 4j], [5 + 6j]]).conj().imag  # a lazily negated view
    block = to_block("k", {"out": out, "neg": negated}, 3)
    np.testing.assert_array_equal(np.stack(rows_of(block, "out")), out.numpy())
    assert [float(r[0]) for r in rows_of(block, "neg")] == [-2, -4, -6]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"out": torch.ones(3, 2)}, "has 3 rows for a batch of 2"),
        ({"out": ["a"]}, "has 1 rows for a batch of 2"),
        ({"out": torch.ones(2, dtype=torch.complex64)}, "is complex64; possible are bool"),
        ({"out": torch.eye(2).to_sparse()}, "sparse"),
        ({"out": [torch.ones(2, 3), torch.ones(2, 4)]}, "more than dimension 0"),
        ({"out": [torch.ones(2), torch.ones(2, 2)]}, "more than dimension 0"),
        ({"out": [torch.ones(2), torch.ones(2, dtype=torch.int8)]}, "differ in dtype"),
        ({"out": ["a", b"b"]}, "of one kind"),
        ({"out": [{}, {}]}, "of one kind"),
        ({"out": ["a", "\ud800"]}, "UTF-8"),
        ({"out": torch.ones(2, *[1] * 9)}, "at most 8"),
        ({"": torch.ones(2)}, "1 to 64 characters"),
        ({}, "0 outputs"),
    ],
)
def test_a_wrong_output_names_the_kernel(outputs: Any, message: str) -> None:
    with pytest.raises(BadOutput, match=message) as caught:
        to_block("mine", outputs, 2)
    assert "kernel 'mine'" in str(caught.value)


def test_a_row_of_a_stream() -> None:
    block = to_row("k", {"a": torch.tensor(3), "b": np.ones((2, 2)), "c": "text", "d": b"bytes", "e": 1.5})
    assert block.num_rows == 1
    assert int(rows_of(block, "a")[0]) == 3
    assert rows_of(block, "b")[0].shape == (2, 2)
    assert (rows_of(block, "c"), rows_of(block, "d")) == (["text"], [b"bytes"])
    with pytest.raises(BadOutput, match="no array or text"):
        to_row("k", {"a": object()})
