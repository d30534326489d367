"""The codec under the protocol: typed header fields, msgpack, and frames.

Knows how a declared message becomes frames and back, and refuses everything else with a `ProtocolError`. Does not know
any particular message: those are in `protocol.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar, cast, dataclass_transform

import msgpack

from penstock.broker.columns import Block, Buffer, frame_bytes, view
from penstock.broker.layout import LayoutError
from penstock.broker.packed import PackedError, unpack

MAJOR, MINOR = 1, 3
VERSION = bytes((ord("P"), ord("S"), MAJOR, MINOR))
MAX_HEADER_BYTES = 64 * 1024
MAX_ROWS = 4096
MAX_FRAMES = 2 * MAX_ROWS + 8
MAX_TEXT = 4096
EMPTY: Mapping[str, Any] = MappingProxyType({})


class ProtocolError(Exception):
    """Bytes from outside that are not a message of this protocol; the text says which rule they broke."""


class VersionError(ProtocolError):
    """The peer speaks another major version."""


class Reader:
    """The payload frames that a message's blocks take in turn."""

    __slots__ = ("frames",)

    def __init__(self, frames: Sequence[Buffer]) -> None:
        self.frames = frames

    def take_block(self, described: Any) -> Block:
        try:
            block = Block.parse(described, self.frames, MAX_ROWS)
        except LayoutError as e:
            raise ProtocolError(str(e)) from e
        self.frames = self.frames[len(block.sent_frames) :]
        return block

    def take_frame(self, max_bytes: int) -> bytes:
        if not self.frames:
            raise ProtocolError("a payload frame is missing")
        if frame_bytes(self.frames[0]) > max_bytes:
            raise ProtocolError(f"a frame of {frame_bytes(self.frames[0])} bytes, at most {max_bytes} allowed")
        data = bytes(view(self.frames[0]))
        self.frames = self.frames[1:]
        return data


@dataclass(frozen=True, slots=True)
class Kind:
    """How one field is checked when it arrives, and written when it leaves."""

    parse: Callable[[Any, Reader], Any]
    write: Callable[[Any, list[Buffer]], Any] | None = None


def wire(kind: Kind, default: Any = MISSING) -> Any:
    """A dataclass field that travels in the header as `kind`; left out on the wire when it equals `default`."""
    if isinstance(default, dict):
        return field(default_factory=lambda: EMPTY, metadata={"kind": kind, "default": EMPTY})
    return field(default=default, metadata={"kind": kind, "default": default})


M = TypeVar("M", bound="Message")


class Message:
    """Base of all messages. `TYPE` is the header's `type`; `FIELDS` its (name, kind, default)."""

    __slots__ = ()
    TYPE: str
    FIELDS: tuple[tuple[str, Kind, Any], ...]
    VALUES: Callable[[Any], tuple[Any, ...]]
    KINDS: dict[str, Callable[[Any, Reader], Any]]
    REQUIRED: frozenset[str]


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A dataclass that the type checker holds frozen. At run time it is not: that would double the cost of making one."""
    return dataclass(slots=True)(cls)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(wire,))
def message(type_name: str) -> Callable[[type[M]], type[M]]:
    """Make a class of `wire` fields a message named `type_name` on the wire; frozen as a `record` is."""

    def decorate(cls: type[M]) -> type[M]:
        made = cast(type[M], dataclass(slots=True, kw_only=True)(cls))
        made.TYPE = type_name
        made.FIELDS = tuple((f.name, f.metadata["kind"], f.metadata["default"]) for f in fields(cast(Any, made)))
        made.VALUES = attrgetter(*(f.name for f in fields(cast(Any, made))), "TYPE")
        made.KINDS = {name: kind.parse for name, kind, _ in made.FIELDS}
        made.REQUIRED = frozenset(name for name, _, default in made.FIELDS if default is MISSING)
        return made

    return decorate


def encode(msg: Message, max_header_bytes: int = MAX_HEADER_BYTES) -> list[Buffer]:
    """The message as frames: version, header, payload.

    Raises:
        ProtocolError: the header would be larger than `max_header_bytes`, or msgpack cannot hold what is in it.
    """
    header: dict[str, Any] = {"type": msg.TYPE}
    frames: list[Buffer] = [VERSION, b""]
    for (name, kind, default), value in zip(msg.FIELDS, msg.VALUES(msg), strict=False):
        if value is default or value == default:
            continue
        header[name] = kind.write(value, frames) if kind.write else value
    try:
        frames[1] = packed = cast(bytes, msgpack.packb(header))
    except (ValueError, OverflowError) as e:
        raise ProtocolError(f"{msg.TYPE} cannot be packed: {e}") from e
    if len(packed) > max_header_bytes:
        raise ProtocolError(f"a header of {len(packed)} bytes, at most {max_header_bytes} allowed")
    return frames


def _num_pairs(data: Any) -> int:
    """How many pairs the map at the front of `data` says it has (fixmap or map 16), or -1 if it is no such map."""
    first = data[0] if len(data) else 0
    if first & 0xF0 == 0x80:
        return int(first & 0x0F)
    return int.from_bytes(data[1:3], "big") if first == 0xDE else -1


def unpack_header(data: Any, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The header's map, or a ProtocolError."""
    if len(data) > max_bytes:
        raise ProtocolError(f"a header of {len(data)} bytes, at most {max_bytes} allowed")
    try:
        header = unpack(bytes(data))
    except PackedError as e:
        raise ProtocolError(f"the header: {e}") from e
    if type(header) is not dict:
        raise ProtocolError("the header is not a map")
    if len(header) != _num_pairs(data):
        raise ProtocolError("a key stands twice in the header")
    return header


def decode(
    types: dict[str, type[Message]], frames: Sequence[Buffer], max_header_bytes: int = MAX_HEADER_BYTES
) -> Message:
    """Parse one message of a closed set of types.

    Args:
        types: header `type` -> message class.
        frames: version, header, payload frames.
    Raises:
        VersionError: another major version.
        ProtocolError: anything else that is not exactly such a message.
    """
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"a message has 2 to {MAX_FRAMES} frames, this has {len(frames)}")
    if frames[0] != VERSION:
        _check_version(bytes(view(frames[0])))
    header = unpack_header(frames[1] if type(frames[1]) is bytes else view(frames[1]), max_header_bytes)
    type_name = header.pop("type", None)
    cls = types.get(type_name) if type(type_name) is str else None
    if cls is None:
        raise ProtocolError(f"unknown message type {type_name!r:.40}")
    reader, kinds, name = Reader(frames[2:]), cls.KINDS, ""
    values: dict[str, Any] = {}  # never `dict[str, Any]()` where it is hot: that builds the alias each time
    try:
        for name, value in header.items():
            parse = kinds.get(name)
            if parse is not None:
                values[name] = parse(value, reader)
    except ProtocolError as e:
        raise ProtocolError(f"{cls.TYPE}.{name}: {e}") from None
    if reader.frames:
        raise ProtocolError(f"{len(reader.frames)} frames too many")
    try:
        return cls(**values)
    except TypeError:
        raise ProtocolError(f"{cls.TYPE} needs {', '.join(sorted(cls.REQUIRED - values.keys()))}") from None


def _check_version(version: bytes) -> None:
    """Any minor version of our major one will do: unknown fields are ignored."""
    if len(version) != 4 or version[:2] != VERSION[:2]:
        raise ProtocolError("the first frame is not a Penstock version")
    if version[2] != MAJOR:
        raise VersionError(f"protocol {version[2]}.{version[3]} met {MAJOR}.{MINOR}: the major versions must be equal")


# --- the kinds of fields -------------------------------------------------------------------------------------------


def integer(low: int, high: int) -> Kind:
    def parse(value: Any, _: Reader) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ProtocolError(f"must be an integer from {low} to {high}")
        return value

    return Kind(parse)


def number(low: float, high: float, can_be_nil: bool = False) -> Kind:
    def parse(value: Any, _: Reader) -> float | None:
        if value is None and can_be_nil:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise ProtocolError(f"must be a number from {low:g} to {high:g}")
        return cast(float, value)

    return Kind(parse)


def text(max_length: int = MAX_TEXT, min_length: int = 0, can_be_nil: bool = False) -> Kind:
    def parse(value: Any, _: Reader) -> str | None:
        if value is None and can_be_nil:
            return None
        if not isinstance(value, str) or not min_length <= len(value) <= max_length:
            raise ProtocolError(f"must be text of {min_length} to {max_length} characters")
        return value

    return Kind(parse)


def binary(min_bytes: int, max_bytes: int, can_be_nil: bool = False) -> Kind:
    def parse(value: Any, _: Reader) -> bytes | None:
        if value is None and can_be_nil:
            return None
        if type(value) is not bytes or not min_bytes <= len(value) <= max_bytes:
            raise ProtocolError(f"must be {min_bytes} to {max_bytes} bytes")
        return value

    return Kind(parse)


def listing(item: Kind, max_items: int, num_items: int | None = None) -> Kind:
    def parse(value: Any, reader: Reader) -> list[Any]:
        if not isinstance(value, list) or len(value) > max_items or (num_items is not None and len(value) != num_items):
            raise ProtocolError(f"must be a list of {max_items if num_items is None else num_items} items at most")
        return [item.parse(v, reader) for v in value]

    def write(value: Any, frames: list[Buffer]) -> list[Any]:
        return [item.write(v, frames) for v in value] if item.write else list(value)

    return Kind(parse, write if item.write else None)


def _parse_flag(value: Any, _: Reader) -> bool:
    if type(value) is not bool:
        raise ProtocolError("must be true or false")
    return value


def _parse_map(value: Any, _: Reader) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ProtocolError("must be a map with text keys")
    return value


def _parse_scalars(value: Any, reader: Reader) -> dict[str, Any]:
    """Row scalars: name -> one number for all rows, or a list with one number per row."""
    for v in _parse_map(value, reader).values():
        if not (type(v) in (int, float) or (isinstance(v, list) and all(type(x) in (int, float) for x in v))):
            raise ProtocolError("a row scalar is a number or a list of numbers")
    return cast(dict[str, Any], value)


def _write_block(block: Block, frames: list[Buffer]) -> Any:
    frames.extend(block.sent_frames)
    return block.describe()


def _write_frame(data: bytes, frames: list[Buffer]) -> int:
    frames.append(data)
    return len(data)


FLAG = Kind(_parse_flag)
MAP = Kind(_parse_map)
SCALARS = Kind(_parse_scalars)
BLOCK = Kind(lambda value, reader: reader.take_block(value), _write_block)
MAYBE_BLOCK = Kind(
    lambda value, reader: None if value is None else reader.take_block(value),
    lambda block, frames: None if block is None else _write_block(block, frames),
)


def frame(max_bytes: int) -> Kind:
    """Bytes in a payload frame of their own."""
    return Kind(lambda value, reader: reader.take_frame(max_bytes), _write_frame)
