"""Frozen dataclasses to plain data and back, strictly: how recipes, models and sets keep their settings."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar

from crossmr.errors import ConfigError

T = TypeVar("T")


def read_text(
    settings: Any, name: str, kind: Any, read: Callable[[str], Any], example: str, otherwise: str = ""
) -> None:
    """Replace an attribute of a frozen dataclass, where it is given as text, by what `read` makes of it.

    `otherwise` is how a `kind` is written, for messages.

    Raises:
        ConfigError: it is neither text nor a `kind`, or text that `read` refuses.
    """
    value = getattr(settings, name)
    if isinstance(value, str):
        object.__setattr__(settings, name, read(value))
    elif not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; expected text such as '{example}'{otherwise and f' or {otherwise}'}.")


def check_kind(value: Any, kind: type, name: str = "settings") -> None:
    """Refuse settings that are none, such as a dict or a recipe's name.

    Raises:
        ConfigError: `value` is no `kind`.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; expected {kind.__name__}(…), with the settings by name.")


def read_whole(settings: Any, *names: str) -> None:
    """Make attributes of a frozen dataclass integers; None is what was not given, where that is the default.

    Raises:
        ConfigError: one that is no whole number.
    """
    for name in names:
        if (value := getattr(settings, name)) is not None or getattr(type(settings), name) is not None:
            if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:
                raise ConfigError(f"{name} is {value!r}; expected a whole number.")
            object.__setattr__(settings, name, int(getattr(settings, name)))


def read_fields(settings: Any) -> None:
    """Check every attribute of a frozen dataclass by its annotation; text, numbers and lists become what it says.

    Raises:
        ConfigError: one of another kind.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(hint):
            check_kind(value, typing.cast(type[Any], hint), name)
        object.__setattr__(settings, name, _parse(hint, _plain(value), name))


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a (nested) frozen dataclass into what JSON can hold; tuples become lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(kind: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from plain data, refusing unknown keys and wrong types.

    Keys left out take their defaults. `where` is the dotted path named in errors.

    Raises:
        ConfigError: a key that `kind` does not have, a value of the wrong type, or one its checks refuse.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or kind.__name__}: expected settings by name, got {data!r}.")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            hint = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            also = f"Did you mean '{hint[0]}'?" if hint else f"It has: {', '.join(sorted(known))}."
            raise ConfigError(f"'{_join(where, key)}' is not a setting of {kind.__name__}. {also}")
    values = {key: _parse(hints[key], value, _join(where, key)) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}.") from error


def with_settings(config: T, settings: Mapping[str, str]) -> T:
    """Copy `config` with some settings replaced, by dotted path and text: 'synthesis.channels' → '32'.

    Raises:
        ConfigError: a path that leads nowhere or a value of the wrong type.
    """
    data = to_dict(config)
    for path, text in settings.items():
        *parents, last = path.split(".")
        node: Any = data
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or isinstance(node.get(last), dict):
            raise ConfigError(f"'{path}' is not a setting; settings look like 'synthesis.channels=32'.")
        node[last] = text
    return from_dict(type(config), data)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Read `value` (JSON data, or text from a command line) as the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return _parse(next(kind for kind in arguments if kind is not type(None)), value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} is {value!r}; it may be one of: {', '.join(map(str, arguments))}.")
    if origin is tuple:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and (arguments[-1] is ... or len(items) == len(arguments)):
            kinds = [arguments[0]] * len(items) if arguments[-1] is ... else arguments
            return tuple(_parse(kind, item, where) for kind, item in zip(kinds, items, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _parse(arguments[1], item, _join(where, str(key))) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
    elif hint is str:
        if isinstance(value, str):
            return value
    elif hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = hint(value)
            if math.isfinite(number) and (isinstance(value, str) or number == value):
                return number
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', str(hint))}.")
