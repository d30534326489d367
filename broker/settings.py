"""Fill a frozen config dataclass: command line > environment > penstock.toml > default.

Knows types and sources of settings; what a setting means and its bounds are the dataclass's own business.
"""

import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
SECTIONS: Final = ("broker", "worker", "client", "scheduling", "clients", "kernels")
"""The tables of a penstock.toml: all programs read the same file, each its own part."""
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NO_VALUE: Final = object()


class SettingsError(ValueError):
    """A setting that cannot be used; the text names the setting, its source and what it should be."""


def load(
    cls: type[T],
    section: str,
    *,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
    content: Mapping[str, Any] | None = None,
) -> T:
    """Build `cls` (a dataclass) from all sources.

    Args:
        section: table in the TOML file, and the middle of PENSTOCK_<SECTION>_<FIELD>.
        file: a TOML file that must exist; None looks for ./penstock.toml.
        overrides: from the command line; None values were not given.
        content: what `read` gave, where several parts are taken from one reading.
    Raises:
        SettingsError: an unknown name, a wrong type, or what `cls` itself refuses.
    """
    names = {f.name for f in fields(typing.cast(Any, cls))}
    values: dict[str, Any] = {}
    for source, given in (
        ("the file", _table(read(file, section) if content is None else content, section)),
        ("the environment", _from_env(section, names, env)),
        ("the command line", {k: v for k, v in (overrides or {}).items() if v is not None}),
    ):
        values |= _converted(cls, section, given, source)
    return _build(cls, section, values)


def read(file: Path | None = None, *others: str) -> dict[str, Any]:
    """The tables of a TOML file that must exist; None looks for ./penstock.toml.

    Args:
        others: sections that may stand there beside the known ones.
    Raises:
        SettingsError: it cannot be read, or has a section that nobody knows.
    """
    path = file or Path("penstock.toml")
    if file is None and not path.is_file():
        return {}
    try:
        with path.open("rb") as f:
            content = tomllib.load(f)
    except (OSError, ValueError) as e:  # of the latter: not TOML, not UTF-8
        raise SettingsError(f"{path}: {e}") from e
    unknown = [name for name in content if name not in (*SECTIONS, *others)]
    if unknown:
        raise SettingsError(f"{path}: unknown section [{unknown[0]}]; known: {', '.join(SECTIONS)}")
    for name, table in content.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: [{name}] must be a table")
    return content


def _table(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    table: dict[str, Any] = content.get(section, {})
    return table


def _from_env(section: str, names: set[str], env: Mapping[str, str]) -> dict[str, str]:
    keys = {name: f"PENSTOCK_{section}_{name}".upper() for name in names}
    return {name: env[key] for name, key in keys.items() if key in env}


def _converted(cls: type[Any], section: str, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    wanted = typing.get_type_hints(cls)
    names = sorted(f.name for f in fields(cls))
    for name in given:
        if name not in names:
            raise SettingsError(f"unknown setting {section}.{name} in {source}; known: {', '.join(names)}")
    return {name: _convert(f"{section}.{name}", wanted[name], value, source) for name, value in given.items()}


def _build(cls: type[T], section: str, values: Mapping[str, Any]) -> T:
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise SettingsError(f"{section}: {e}") from e


def _convert(label: str, wanted: Any, value: Any, source: str) -> Any:
    """`value` as the type the field declares; text from the environment is parsed."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        made = _as(option, value)
        if made is not _NO_VALUE:
            return made
    raise SettingsError(f"{label} from {source} must be {' or '.join(map(_name, options))}, not {value!r}")


def _as(option: Any, value: Any) -> Any:
    """`value` as one type, or `_NO_VALUE`."""
    base = typing.get_origin(option) or option
    if base is tuple:
        return _as_tuple(option, value)
    if value is None and base is type(None):
        return None
    if isinstance(value, str):
        try:
            if base is bool:
                return _WORDS[value.lower()]
            if base in (int, float, Path):
                return base(value)
        except (ValueError, KeyError):
            return _NO_VALUE
    if base is float and type(value) is int:
        return float(value)
    if isinstance(base, type) and isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    return _NO_VALUE


def _as_tuple(option: Any, value: Any) -> Any:
    """A list, or text with commas, whose elements have the type of `tuple[type, ...]`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif not isinstance(value, list | tuple):
        return _NO_VALUE
    element, *_ = typing.get_args(option) or (Any,)
    made = [part if element is Any else _as(element, part) for part in value]
    return _NO_VALUE if _NO_VALUE in made else tuple(made)


def _name(option: Any) -> str:
    if typing.get_origin(option) is tuple:
        return f"a list of {_name(typing.get_args(option)[0])}"
    return getattr(option, "__name__", str(option))
