"""A configuration as it is given: YAML, each key once, with ``key=value`` overrides; and what is wrong with it."""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flowra_pipelines.errors import UserError

__all__ = ["explained", "read_content"]

# What pydantic says of Python, said of YAML.
SAID_OF_YAML = {
    "model_type": "must be a section of keys",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be ranks by pattern, such as {query: 8}",
    "invalid_key": "must be a word",
}
UNION = {"str", "int"}
RANK_STEPS = "vllm, or ranks ≥ 1 such as [4, 8, 16]"


def read_content(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read what a configuration gives, overrides applied; nothing is checked but that it is a mapping.

    Returns:
        The keys that are given, and no others.

    Raises:
        UserError: if the file is unreadable, is not YAML, gives a key twice, or an override cannot be applied.
    """
    content: object
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        try:
            content = yaml.load(Path(source).read_text(encoding="utf-8"), Loader=_UniqueKeys)
        except OSError as error:
            raise UserError(f"configuration must be a readable file, got {source}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError) as error:
            problem = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
            raise UserError(f"configuration must be YAML, got {problem}; in {source}") from None
    if not isinstance(content, dict):
        raise UserError(f"configuration must be a mapping of sections, got {type(content).__name__}; in {source}")
    for override in overrides:
        content = _override(content, override)
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping after a look at its keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _override(content: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override must be key=value, got {override!r}. Example: --set training.steps=400")
    path = key.strip().split(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override must have a YAML value, got {override!r}") from None
    return _with(content, path, parsed, key)


def _with(content: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:  # noqa: ANN401 - YAML
    head, *rest = path
    if not rest:
        return {**content, head: value}
    inner = content.get(head) or {}
    if not isinstance(inner, dict):
        raise UserError(f"override must name a section, got {key!r}: {head!r} is a value")
    return {**content, head: _with(inner, rest, value, key)}


def explained(error: ValidationError, root: type[BaseModel]) -> str:
    """Say all that is wrong with what should have been a ``root``, in one line."""
    lines = dict.fromkeys(
        _explain(dict(problem), root) for problem in error.errors() if not _said_before(problem["loc"])
    )
    return "; ".join(lines)


def _explain(problem: dict[str, Any], root: type[BaseModel]) -> str:
    """Say what is wrong with one key, in one line."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], root)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"{key} must be a known key; nearest: {near[0] if near else 'none'}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key} must be given"
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    given = repr(problem["input"])
    given = given if len(given) <= 80 else f"{given[:77]}..."
    if "literal['vllm']" in location:
        return f"{'.'.join(location[:-1])} must be {RANK_STEPS}, got {given}"
    if "literal['auto']" in location or location[-2:-1] == ["learning_rate"]:  # a part of a union, each on its own
        return f"{'.'.join(location[:-1])} must be a number greater than 0, or auto, got {given}"
    if location[-1] in UNION:  # pydantic reports each part of a union on its own
        return f"{key.rpartition('.')[0]} must be text or a whole number, got {given}"
    message = SAID_OF_YAML.get(problem["type"]) or re.sub(r"^\w+ should ", "must ", str(problem["msg"]))
    return f"{key} {message}, got {given}"


def _said_before(location: tuple[int | str, ...]) -> bool:
    """Tell whether this is about a list where a word could be, too: that is said with the word, once."""
    return any(str(part).startswith("tuple[") for part in location)


def _fields_at(location: list[str], section: type[BaseModel]) -> list[str]:
    for name in location:
        field = section.model_fields.get(name)
        if field is None:
            continue  # an index into a list of sections
        for candidate in _unpack(field.annotation):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)


def _unpack(annotation: Any) -> list[Any]:  # noqa: ANN401 - a type annotation
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [part for each in get_args(annotation) for part in _unpack(each)]
    return [annotation]
