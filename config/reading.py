"""From TOML text to a checked model: every problem becomes one line with key, value and cure."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from meshd.config.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Table = dict[str, Any]


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return every key of *model* by its dotted name; tables are entered, not listed."""
    keys: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys.update({f"{name}.{key}": value for key, value in keys_of(inner).items()})
        else:
            keys[name] = field
    return keys


def parse_toml(text: str, source: str) -> Table:
    """Return the table that TOML *text* holds; raises ConfigError naming *source* and line."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not TOML: {error}: correct it there") from error


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every key in *table* and the tables inside it."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nest(flat: Mapping[str, Any]) -> Table:
    """Return the nested table of dotted keys; the keys are known ones."""
    table: Table = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        inner = table
        for step in path:
            inner = inner.setdefault(step, {})
        inner[name] = value
    return table


def unknown_key(source: str, key: str, known: Mapping[str, Any], shown: str | None = None) -> str:
    """Return the line that refuses *key* and suggests the nearest of *known*."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong table
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    cure = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{source}: unknown key {(shown or key)[:80]!r}: {cure}"


def check_keys(model: type[BaseModel], table: Mapping[str, Any], source: str) -> list[str]:
    """Return a line for every key of *table* that *model* does not have."""
    known = keys_of(model)
    tables = {key.partition(".")[0] for key in known if "." in key}
    problems = []
    for key, value in flatten(table):
        if key in tables:
            problems.append(f"{source}: {key} = {show(value)}: it is a table: write [{key}]")
        elif key not in known:
            problems.append(unknown_key(source, key, known))
    return problems


def build(model: type[Model], flat: Mapping[str, Any], source_of: Callable[[str], str]) -> Model:
    """Return the *model* that the dotted keys of *flat* describe.

    Raises ConfigError with one line for every value that is wrong; *source_of* says where a
    key came from.
    """
    try:
        return model.model_validate(nest(flat))
    except ValidationError as error:
        known = keys_of(model)
        lines: dict[str, str] = {}  # the first for each key: the others follow from it
        for problem in error.errors(include_url=False):
            place = [str(part) for part in problem["loc"]]
            key = next(
                (
                    name
                    for end in range(len(place), 0, -1)
                    if (name := ".".join(place[:end])) in known
                ),
                ".".join(place),
            )
            lines.setdefault(key, _line(key, problem, known.get(key), source_of))
        raise ConfigError("\n".join(lines.values())) from error


def _line(key: str, problem: Any, field: FieldInfo | None, source_of: Callable[[str], str]) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    if field is None:  # a rule about several keys, which its own text names
        return f"{source_of(key)}: {text}"
    hint = f"; {key} is {field.description}"
    if problem["type"] == "missing":
        return f"{source_of(key)}: {key} is missing{hint}"
    if problem["type"] == "value_error":
        hint = ""  # our own texts carry their cure
    else:
        text = text[:1].lower() + text[1:]
    return f"{source_of(key)}: {key} = {show(problem['input'])}: {text}{hint}"


def show(value: Any) -> str:
    """Return *value* as TOML would write it, cut to a line's worth."""
    return json.dumps(value, default=str, ensure_ascii=False)[:120]
