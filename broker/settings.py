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
from typing import Any, TypeVar

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class SettingsError(ValueError):
    """A setting that cannot be used; the text names the setting, its source and what it should be."""


def load(
    cls: type[T],
    section: str,
    *,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
) -> T:
    """Build `cls` (a dataclass) from all sources.

    Args:
        section: table in the TOML file, and the middle of PENSTOCK_<SECTION>_<FIELD>.
        file: a TOML file that must exist; None looks for ./penstock.toml.
        overrides: from the command line; None values were not given.
    Raises:
        SettingsError: an unknown name, a wrong type, or what `cls` itself refuses.
    """
    types_ = typing.get_type_hints(cls)
    names = {f.name for f in fields(typing.cast(Any, cls))}
    values: dict[str, Any] = {}
    for source, given in (
        ("the file", _from_file(section, file)),
        ("the environment", _from_env(section, names, env)),
        ("the command line", {k: v for k, v in (overrides or {}).items() if v is not None}),
    ):
        for name, value in given.items():
            if name not in names:
                raise SettingsError(f"unknown setting {section}.{name} in {source}; known: {', '.join(sorted(names))}")
            values[name] = _convert(f"{section}.{name}", types_[name], value, source)
    try:
        return cls(**values)
    except ValueError as e:
        raise SettingsError(f"{section}: {e}") from e


def _from_file(section: str, file: Path | None) -> dict[str, Any]:
    path = file or Path("penstock.toml")
    if file is None and not path.is_file():
        return {}
    try:
        with path.open("rb") as f:
            content = tomllib.load(f)
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise SettingsError(f"{path}: {e}") from e
    table = content.get(section, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{path}: [{section}] must be a table")
    return table


def _from_env(section: str, names: set[str], env: Mapping[str, str]) -> dict[str, str]:
    keys = {name: f"PENSTOCK_{section}_{name}".upper() for name in names}
    return {name: env[key] for name, key in keys.items() if key in env}


def _convert(label: str, wanted: Any, value: Any, source: str) -> Any:
    """`value` as the type the field declares; text from the environment is parsed."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        base = typing.get_origin(option) or option
        if value is None and base is type(None):
            return None
        if isinstance(value, str):
            try:
                if base is bool:
                    return _WORDS[value.lower()]
                if base in (int, float, Path):
                    return base(value)
                if base is tuple:
                    return tuple(part for part in value.split(",") if part)
            except (ValueError, KeyError):
                continue
        if base is float and type(value) is int:
            return float(value)
        if base is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if isinstance(base, type) and isinstance(value, base) and not (base is int and isinstance(value, bool)):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise SettingsError(f"{label} from {source} must be {names}, not {value!r}")
