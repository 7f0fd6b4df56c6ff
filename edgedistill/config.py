"""Strict settings: a mapping becomes a frozen dataclass, or one error names everything that is wrong."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgedistill.errors import ConfigError, require

Settings = TypeVar("Settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: If the file is missing or is no such YAML.
        MissingDependencyError: If PyYAML is not installed.
    """
    yaml = require("yaml", "train")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        msg = f"{path}: no such recipe file."
        raise ConfigError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path}: not readable as YAML ({' '.join(str(error).split())})."
        raise ConfigError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path}: a recipe is a mapping of settings, got {type(data).__name__}."
        raise ConfigError(msg)
    return data


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested settings with ``a.b=value`` assignments applied; values are YAML.

    Raises:
        ConfigError: If an assignment has no ``=`` or passes through something that is no mapping.
    """
    yaml = require("yaml", "train")
    result: dict[str, Any] = {**data}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            msg = f"`--set {assignment}`: write it as key=value, such as training.batch_size=32."
            raise ConfigError(msg)
        *parents, last = key.split(".")
        place = result
        for name in parents:
            inner = place.get(name) or {}
            if not isinstance(inner, dict):
                msg = f"`--set {assignment}`: `{name}` is a value, not a group of settings."
                raise ConfigError(msg)
            place[name] = {**inner}
            place = place[name]
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            msg = f"`--set {assignment}`: {text!r} is not readable as YAML."
            raise ConfigError(msg) from error
    return result


def build(kind: type[Settings], data: Mapping[str, Any], source: str) -> Settings:
    """Build a frozen dataclass from a mapping; nested dataclasses from nested mappings.

    Args:
        kind: The dataclass; its field types and its ``__post_init__`` say what is allowed.
        data: The settings as read from a file.
        source: Name of the file, for messages.

    Raises:
        ConfigError: With every unknown key (and the nearest known one), missing key and wrong type.
    """
    problems: list[str] = []
    made = _build(kind, data, "", problems)
    if problems:
        msg = f"{source}: " + "; ".join(problems) + "."
        raise ConfigError(msg)
    return typing.cast(Settings, made)


def _build(kind: Any, data: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"`{path or 'recipe'}` must be a group of settings, got {data!r}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    before = len(problems)
    for name in data:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(fields)}"
            problems.append(f"`{path}{name}` is not a setting ({hint})")
    for name, item in fields.items():
        required = (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if required and name not in data:
            problems.append(f"`{path}{name}` is missing")
    values = {
        name: _value(hints[name], value, f"{path}{name}", problems)
        for name, value in data.items()
        if name in fields
    }
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ConfigError as error:
        problems.append(f"{path.rstrip('.') + ': ' if path else ''}{str(error).rstrip('.')}")
        return None


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        hint = next(item for item in choices if item is not type(None))
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{path}.", problems)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            problems.append(
                f"`{path}` must be one of {', '.join(map(str, allowed))}, got {value!r}"
            )
        return value
    if origin is tuple:
        return _tuple(hint, value, path, problems)
    if origin is Mapping:
        return _mapping(hint, value, path, problems)
    return _scalar(hint, value, path, problems)


def _tuple(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    inner = typing.get_args(hint)
    if not isinstance(value, list | tuple):
        problems.append(f"`{path}` must be a list, got {value!r}")
        return ()
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        problems.append(f"`{path}` must hold {len(kinds)} values, got {list(value)}")
        return ()
    return tuple(
        _value(kind, item, f"{path}[{index}]", problems)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _mapping(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"`{path}` must be a group of named values, got {value!r}")
        return {}
    inner = typing.get_args(hint)[1]
    return {name: _value(inner, item, f"{path}.{name}", problems) for name, item in value.items()}


def _scalar(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if hint is not Any and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        problems.append(f"`{path}` must be {_NAMES.get(hint, hint.__name__)}, got {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def finite(*numbers: Any) -> bool:
    """Whether all are finite numbers of Python's own: a numpy float64 would lift a float32 state to float64."""
    top = sys.float_info.max
    return all(type(item) in (int, float) and -top <= item <= top for item in numbers)


def rises(low: Any, high: Any) -> bool:
    """Whether two numbers make a range."""
    return finite(low, high) and low < high
