"""Strict conversion between plain mappings (YAML, JSON) and frozen dataclasses.

Supported field types: bool, int, float, str, Path, Any, None, dataclasses, Optional and other unions, Literal, Enum,
`tuple[X, ...]`, `tuple[X, Y]`, `list[X]`, `Sequence[X]`, `dict[str, X]` and `Mapping[str, X]`. Nothing is coerced
except int to float, str to Path and a list to a tuple; an unknown key is an error, never ignored.

A union of several dataclasses is told apart by a tag: the one field that each of them declares as a `Literal` of its
own single value. Without the tag a mapping is read as the class of the default.
"""

from __future__ import annotations

import collections.abc
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from verl.errors import SearchAgentError

REQUIRED: Any = MISSING
"""Stands for the default of a field that has none."""

_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_SCALARS = {bool: "true or false", int: "int", float: "float", str: "str", Path: "path"}
_PLAIN = frozenset((bool, int, str, types.NoneType))
"""What JSON holds as it is."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One settable key of a schema: its dotted name, its type, and its default or `REQUIRED`."""

    key: str
    kind: Any
    default: Any


def leaves(schema: type, prefix: str = "", base: Any = REQUIRED) -> Iterator[Leaf]:
    """Yield every key of a dataclass, nested ones with dotted names, in the order of declaration."""
    for item, kind in _schema_fields(schema):
        key = f"{prefix}{item.name}"
        default = getattr(base, item.name) if is_dataclass(base) else default_of(item)
        nested = _only_dataclass(kind) or (type(default) if is_dataclass(default) else None)
        if nested is None or default is None:
            yield Leaf(key, kind, default)
        else:
            yield from leaves(nested, f"{key}.", default)


def encode(value: Any, nan_as_null: bool = False) -> Any:
    """Turn a dataclass (or a container of them) into dicts, lists and scalars that YAML and JSON can hold.

    Args:
        nan_as_null: write floats that are not finite as None, because JSON has no name for them.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name), nan_as_null) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(entry, nan_as_null) for key, entry in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        # Token ids and log-probabilities are most of what there is.
        sorts = set(map(type, value))
        if sorts <= _PLAIN or (sorts == {float} and all(map(math.isfinite, value))):
            return list(value)
        return [encode(entry, nan_as_null) for entry in value]
    if nan_as_null and isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, slots=True)
class Decoder:
    """Builds typed values from plain ones.

    Attributes:
        error: the exception class that reports a value which does not fit.
        null_as_nan: read None as NaN where a float is expected (the inverse of `encode(..., nan_as_null=True)`).
    """

    error: type[SearchAgentError]
    null_as_nan: bool = False

    def decode(self, kind: Any, value: Any, path: str = "", base: Any = REQUIRED) -> Any:
        """Return `value` as a `kind`.

        Args:
            path: dotted name of the value, for messages.
            base: a dataclass instance whose fields stand in for the keys that `value` leaves out.

        Raises:
            SearchAgentError: of class `error`; names the key, what came and what was expected.
            TypeError: `kind` is not a supported type (a mistake in the schema, not in the data).
        """
        sort = _sort(kind)
        if sort == "any":
            return value
        if sort == "scalar":
            return self._scalar(kind, value, path)
        if sort == "dataclass":
            return self._dataclass(kind, value, path, base)
        if sort == "union":
            return self._union(kind, value, path, base)
        if sort == "literal":
            return self._choice(kind, get_args(kind), value, path)
        if sort == "sequence":
            return self._sequence(kind, value, path)
        if sort == "mapping":
            return self._mapping(kind, value, path)
        return kind(self._choice(kind, [member.value for member in kind], value, path))

    def _dataclass(self, kind: Any, value: Any, path: str, base: Any) -> Any:
        if type(value) is kind:
            return value
        if not isinstance(value, Mapping):
            raise self._mismatch(kind, value, path)
        known = _schema_fields(kind)
        names = [item.name for item, _ in known]
        for key in value:
            if key not in names:
                raise self.error(_unknown_key(kind, str(key), names, path))
        built = {item.name: self._field(item, sort, value, path, base) for item, sort in known}
        try:
            return kind(**built)
        except ValueError as cause:
            raise self.error(f"{path}: {cause}" if path else str(cause)) from cause

    def _field(self, item: Field, kind: Any, value: Mapping, path: str, base: Any) -> Any:
        key = f"{path}.{item.name}" if path else item.name
        default = getattr(base, item.name) if is_dataclass(base) else default_of(item)
        if item.name in value:
            return self.decode(kind, value[item.name], key, default)
        if default is not REQUIRED:
            return default
        if is_dataclass(kind):
            return self.decode(kind, {}, key)
        raise self.error(f"missing required key {key!r}; expected {describe(kind)}, give it a value")

    def _union(self, kind: Any, value: Any, path: str, base: Any) -> Any:
        members = get_args(kind)
        if value is None and types.NoneType in members:
            return None
        members = [member for member in members if member is not types.NoneType]
        if isinstance(value, Mapping) and (nested := _only_dataclass(kind)):
            return self.decode(nested, value, path, base)
        if isinstance(value, Mapping) and (tag := _tag(kind)):
            return self._tagged(tag, value, path, base)
        if len(members) == 1 and not is_dataclass(members[0]):
            return self.decode(members[0], value, path, base)
        for member in members:
            try:
                return self.decode(member, value, path)
            except self.error:
                continue
        raise self._mismatch(kind, value, path)

    def _tagged(self, tag: _Tag, value: Mapping, path: str, base: Any) -> Any:
        usual = type(base) if type(base) in tag.classes.values() else next(iter(tag.classes.values()))
        key = f"{path}.{tag.name}" if path else tag.name
        name = value.get(tag.name, tag.value_of(usual))
        chosen = tag.classes[self._choice(Literal[tuple(tag.classes)], list(tag.classes), name, key)]
        return self.decode(chosen, value, path, base if type(base) is chosen else REQUIRED)

    def _choice(self, kind: Any, options: Sequence[Any], value: Any, path: str) -> Any:
        for option in options:
            if type(option) is type(value) and option == value:
                return option
        near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
        raise self._mismatch(kind, value, path, f"; did you mean {near[0]!r}?" if near else "")

    def _sequence(self, kind: Any, value: Any, path: str) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._mismatch(kind, value, path)
        container = list if get_origin(kind) is list else tuple
        sorts = get_args(kind)
        if container is list or sorts[-1] is Ellipsis or get_origin(kind) is not tuple:
            if sorts[0] in _SCALARS and set(map(type, value)) <= {sorts[0]}:
                return container(value)
            return container(self.decode(sorts[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
        if len(sorts) != len(value):
            raise self._mismatch(kind, value, path)
        return tuple(self.decode(sorts[i], entry, f"{path}[{i}]") for i, entry in enumerate(value))

    def _mapping(self, kind: Any, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._mismatch(kind, value, path)
        sort = get_args(kind)[1]
        for key in value:
            if not isinstance(key, str):
                raise self.error(f"{path} has the key {key!r} ({type(key).__name__}); expected a str, put it in quotes")
        return {key: self.decode(sort, entry, f"{path}.{key}") for key, entry in value.items()}

    def _scalar(self, kind: Any, value: Any, path: str) -> Any:
        if kind is types.NoneType and value is None:
            return None
        if kind not in _SCALARS:
            raise TypeError(f"{path or 'value'} has the field type {kind}, which verl.typed does not support")
        if kind is float and value is None and self.null_as_nan:
            return math.nan
        if type(value) is kind or (kind is Path and isinstance(value, Path)):
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        wants_quotes = kind is str and isinstance(value, bool | int | float)
        raise self._mismatch(kind, value, path, f"; quote it: \"'{value}'\"" if wants_quotes else "")

    def _mismatch(self, kind: Any, value: Any, path: str, advice: str = "") -> SearchAgentError:
        shown = "null" if value is None else f"{_short(value)} ({type(value).__name__})"
        return self.error(f"{path or 'value'}={shown}: expected {describe(kind)}{advice}")


@cache
def _sort(kind: Any) -> str:
    """Return how values of a type are read; looked at once for each type, since trajectories have many values."""
    origin = get_origin(kind)
    if kind is Any:
        return "any"
    if is_dataclass(kind):
        return "dataclass"
    if origin in (Union, types.UnionType):
        return "union"
    if origin is Literal:
        return "literal"
    if origin in _SEQUENCES:
        return "sequence"
    if origin in _MAPPINGS:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "enum"
    return "scalar"


def default_of(item: Field) -> Any:
    """Return the default of a dataclass field, or `REQUIRED`."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def describe(kind: Any) -> str:
    """Say in words which values a type admits."""
    origin, sorts = get_origin(kind), get_args(kind)
    if kind is types.NoneType:
        return "null"
    if is_dataclass(kind):
        return "a mapping with the keys " + ", ".join(item.name for item, _ in _schema_fields(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(sort) for sort in sorts)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in sorts)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(repr(member.value) for member in kind)
    if origin in _MAPPINGS:
        return f"a mapping of names to {describe(sorts[1])}"
    if origin is tuple and sorts[-1] is not Ellipsis:
        return "a list of exactly [" + ", ".join(describe(sort) for sort in sorts) + "]"
    if origin in _SEQUENCES:
        return f"a list of {describe(sorts[0])}"
    return _SCALARS.get(kind, str(kind))


def nearest(name: str, options: Sequence[str]) -> str:
    """Return the option most like `name`; `options` must not be empty."""
    return difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]


def _unknown_key(kind: type, key: str, names: Sequence[str], path: str) -> str:
    dotted = f"{path}.{key}" if path else key
    where = f" of {path!r}" if path else ""
    if not names:
        return f"unknown key {dotted!r}: {path or kind.__name__!r} takes no keys; remove it"
    moved = [leaf.key for leaf in leaves(kind) if leaf.key.rpartition(".")[2] == key]
    near = moved[0] if moved else nearest(key, names)
    near = f"{path}.{near}" if path else near
    return f"unknown key {dotted!r}; did you mean {near!r}? Keys{where}: {', '.join(names)}"


def _only_dataclass(kind: Any) -> Any:
    """Return the one dataclass in `kind` (itself, or a union's only dataclass member), else None."""
    if is_dataclass(kind):
        return kind
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    members = [member for member in get_args(kind) if is_dataclass(member)]
    return members[0] if len(members) == 1 else None


@dataclass(frozen=True, slots=True)
class _Tag:
    """The field that tells the dataclasses of a union apart, and the class of each of its values."""

    name: str
    classes: Mapping[str, type]

    def value_of(self, kind: type) -> str:
        return next(value for value, member in self.classes.items() if member is kind)


@cache
def _tag(kind: Any) -> _Tag | None:
    """Return the tag of a union of dataclasses, None where there is none."""
    members = [member for member in get_args(kind) if member is not types.NoneType]
    if len(members) < 2 or not all(is_dataclass(member) for member in members):
        return None
    literals = [_single_literals(member) for member in members]
    for name in literals[0]:
        values = [found.get(name) for found in literals]
        if None not in values and len(set(values)) == len(values):
            return _Tag(name, dict(zip(values, members, strict=True)))
    return None


def _single_literals(schema: type) -> dict[str, str]:
    found = ((item.name, get_args(kind)) for item, kind in _schema_fields(schema) if get_origin(kind) is Literal)
    return {name: options[0] for name, options in found if len(options) == 1}


@cache
def _schema_fields(schema: type) -> tuple[tuple[Field, Any], ...]:
    hints = get_type_hints(schema)
    return tuple((item, hints[item.name]) for item in fields(schema) if item.init)


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
