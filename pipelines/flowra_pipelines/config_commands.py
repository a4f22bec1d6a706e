"""``flowra config``: every key of a configuration explained, and its JSON Schema. Imports nothing heavy.

The schema is the one source: what ``explain`` says of types, choices and ranges is read off it.
"""

import difflib
import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowra_pipelines.errors import UserError
from flowra_pipelines.whole_files import replacing

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Key", "app", "composition_schema", "config_schema", "keys", "schema_text"]

app = typer.Typer(name="config", help="Explain the keys of a run configuration.", no_args_is_help=True)

REQUIRED = object()
"""The default of a key that has none."""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key of the configuration."""

    name: str
    """With its section, such as ``training.steps``."""
    values: str
    """Type, and choices or range."""
    default: object
    """As in YAML; :data:`REQUIRED` if there is none."""
    description: str
    """What it is for."""


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A section or a key, such as training or training.steps.")] = "",
    file: Annotated[Path | None, typer.Option("--file", help="Show what this file sets, beside the defaults.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the file. Repeatable.")
    ] = None,
) -> None:
    """Say what keys mean, which values they take, and their defaults."""
    from rich.console import Console

    if overrides and file is None:
        raise UserError(f"--set must come with --file, got {overrides[0]!r} alone. Add --file my.yaml.")
    schema = config_schema()
    known = {each.name: each for each in keys(schema)}
    sections = {name: _resolve(node, schema) for name, node in schema["properties"].items() if "$ref" in node}
    chosen = [each for name, each in known.items() if not key or name == key or name.startswith((f"{key}.", f"{key}["))]
    if not chosen:
        near = difflib.get_close_matches(key, [*sections, *known], n=1, cutoff=0.0)[0]
        raise UserError(f"key must be a section or a key of the configuration, got {key!r}; nearest: {near}")
    given = {} if file is None else _given(file, overrides or [])
    console = Console(highlight=False, emoji=False)
    if key in known:
        _print_in_full(console, known[key], given)
        for each in chosen[1:]:
            _print_briefly(console, each, given)
        return
    before = None
    for each in chosen:
        section = each.name.partition(".")[0] if "." in each.name else ""
        if section != before:
            title = sections[section]["description"] if section else str(schema["description"])
            _print_heading(console, section or "top level", title, first=before is None)
        _print_briefly(console, each, given)
        before = section
    if given:
        console.print(f"\nValues are those of {file}{' with --set' if overrides else ''}.", style="dim", soft_wrap=True)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", help="File to write; by default it is printed.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="Of a configuration of several tasks.")] = False,
) -> None:
    """Print the JSON Schema of a run configuration, for editors and other tools."""
    text = schema_text(composition_schema() if tasks else config_schema())
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with replacing(output) as (file,):
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output must be a file that can be written, got {output}: {error.strerror}") from None


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a run configuration.

    What it cannot say are rules between keys; ``flowra run --dry-run`` checks those.

    Returns:
        The schema; a description for every key, and no key beside those described.
    """
    from flowra_pipelines.run_config import RunConfig

    made = RunConfig.model_json_schema()
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "run_config.schema.json",
        "title": "run configuration of flowra",
    }
    return {**described, **_tidy(made)}


def composition_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration of several tasks.

    Every key of a run may stand at the top, for all tasks, or in a task; so none of them is required in one place, and
    that each task has what a run needs is for ``flowra run --dry-run`` to say.

    Returns:
        The schema; a description for every key, and no key beside those described.
    """
    from flowra_pipelines.composition_config import HERE, CompositionConfig

    run = _optional(config_schema())
    whole = _tidy(CompositionConfig.model_json_schema())
    of_tasks = {name: node for name, node in run["properties"].items() if name not in HERE}
    task = whole["$defs"]["ComposedTask"]
    weight = {"weight": task["properties"]["weight"]}
    tasks = whole["properties"].pop("tasks")
    return {
        **{key: run[key] for key in ("$schema", "type", "additionalProperties")},
        "$id": "composition_config.schema.json",
        "title": "configuration of several tasks of flowra",
        "description": whole["description"],
        "required": ["name", "tasks"],
        "properties": {
            **of_tasks,
            **whole["properties"],
            "tasks": {**tasks, "additionalProperties": {"$ref": "#/$defs/ComposedTask"}},
        },
        "$defs": {
            **{name: each for name, each in run["$defs"].items() if name not in {"MergeConfig", "ExtraAdapter"}},
            "TaskMergeConfig": whole["$defs"]["TaskMergeConfig"],
            "ComposedTask": {**task, "properties": {**weight, **of_tasks}, "required": []},
        },
    }


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as the text of a file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def keys(schema: Mapping[str, Any]) -> list[Key]:
    """List the keys that a schema describes, in its order; keys in the items of a list are named ``list[].key``."""
    return list(_keys(schema, schema, ""))


def _keys(node: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    for name, described in node["properties"].items():
        inner = _resolve(described, schema)
        path = f"{prefix}{name}"
        if "properties" in inner:
            yield from _keys(inner, schema, f"{path}.")
            continue
        yield Key(
            name=path,
            values=_values(inner, schema),
            default=inner.get("default", REQUIRED),
            description=inner["description"],
        )
        items = _resolve(inner.get("items", {}), schema)
        if "properties" in items:
            yield from _keys(items, schema, f"{path}[].")


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference; what stands beside it counts too."""
    if "$ref" not in node:
        return node
    return {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node}


def _values(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Say in words which values a key takes."""
    node = _resolve(node, schema)
    if "anyOf" in node:
        return " or ".join(_values(each, schema) for each in node["anyOf"])
    if "enum" in node or "const" in node:
        choices = node.get("enum", [node.get("const")])
        return "one of " + ", ".join(map(str, choices))
    if node["type"] == "array":
        items = _resolve(node["items"], schema)
        if "properties" in items:
            return f"list of {{{', '.join(items['properties'])}}}"
        return f"list of {_values(items, schema)}"
    if "additionalProperties" in node and node["type"] == "object":
        return f"mapping of text to {_values(node['additionalProperties'], schema)}"
    limits = ", ".join(f"{sign} {node[bound]}" for bound, sign in BOUNDS.items() if bound in node)
    pattern = f"matching {node['pattern']}" if "pattern" in node else ""
    return " ".join(each for each in (KINDS[node["type"]], limits, pattern) if each)


def _tidy(node: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out generated titles and the defaults of whole sections, and put descriptions on one line."""
    kept = {key: value for key, value in node.items() if key != "title" and not (key == "default" and "$ref" in node)}
    for key in ("properties", "$defs"):
        if key in kept:
            kept[key] = {name: _tidy(each) for name, each in kept[key].items()}
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].replace("``", "`").split())
    return kept


def _optional(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with no key of the top or of its sections required; items of lists keep theirs."""
    sections = {node["$ref"].rpartition("/")[2] for node in schema["properties"].values() if "$ref" in node}
    kept = {name: node | ({"required": []} if name in sections else {}) for name, node in schema["$defs"].items()}
    return {**schema, "required": [], "$defs": kept}


def _given(file: Path, overrides: Sequence[str]) -> dict[str, tuple[object, str]]:
    """Return the value in force of every key, and where it comes from: ``default``, ``file`` or ``--set``."""
    from flowra_pipelines.composition_config import is_composition
    from flowra_pipelines.config_file import read_content
    from flowra_pipelines.run_config import load_config

    if is_composition(file):
        raise UserError(
            f"file must be the configuration of one run, got several tasks; in {file}. "
            f"`flowra run {file} --dry-run` shows what each task comes to."
        )
    config = load_config(file, overrides).model_dump(mode="json")
    content = read_content(file, overrides)
    known = {each.name for each in keys(config_schema())}
    changed = [each.partition("=")[0].strip() for each in overrides]
    found: dict[str, tuple[object, str]] = {}

    def walk(values: Mapping[str, Any], given: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            path, own = f"{prefix}{name}", given.get(name, {})
            if isinstance(value, dict) and path not in known:
                walk(value, own or {}, f"{path}.")
            elif name not in given:
                found[path] = (value, "default")
            else:
                by_hand = any(path == key or path.startswith(f"{key}.") for key in changed)
                found[path] = (value, "--set" if by_hand else "file")

    walk(config, content, "")
    return found


def _default(key: Key) -> str:
    return "none, it must be given" if key.default is REQUIRED else _yaml(key.default)


def _yaml(value: object) -> str:
    """Write a value in one line of YAML."""
    import yaml

    dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return str(dumped).strip().removesuffix("...").strip()


def _print_heading(console: "Console", name: str, description: str, *, first: bool) -> None:
    from rich.text import Text

    heading = Text.assemble("" if first else "\n", (name, "bold underline"), ("  " + description, "dim"))
    console.print(heading, soft_wrap=True)


def _print_briefly(console: "Console", key: Key, given: Mapping[str, tuple[object, str]]) -> None:
    """Print a key on two lines: name, value and type, then what it is for."""
    from rich.text import Text

    section, _, name = key.name.rpartition(".")
    line = Text.assemble("  ", (f"{section}." if section else "", "dim"), (name, "bold cyan"))
    if key.name in given:
        value, source = given[key.name]
        changed = source != "default"
        line.append(f" = {_yaml(value)}", "bold yellow" if changed else "green")
        line.append(f"  from {source}, default {_default(key)}" if changed else "  default", "magenta")
    else:
        line.append(f" = {_default(key)}", "green")
    line.append(f"  ({key.values})", "dim")
    console.print(line, soft_wrap=True)
    _print_text(console, key.description, indent=6)


def _print_in_full(console: "Console", key: Key, given: Mapping[str, tuple[object, str]]) -> None:
    """Print all there is to say of one key."""
    from rich.text import Text

    console.print(Text(key.name, "bold cyan"))
    _print_text(console, key.description, indent=2)
    value, source = given.get(key.name, (key.default, ""))
    shown = "..." if value is REQUIRED else _yaml(value)
    rows = {"values": key.values, "default": _default(key)}
    if source:
        rows["in force"] = f"{shown}, {'the default' if source == 'default' else f'from {source}'}"
    if "[]" not in key.name:
        *sections, name = key.name.split(".")
        rows["in YAML"] = "".join(f"{section}: {{" for section in sections) + f"{name}: {shown}" + "}" * len(sections)
        rows["option"] = f"--set {shlex.quote(f'{key.name}={shown}')}"
    for label, text in rows.items():
        console.print(Text.assemble(f"  {label:<9}", (text, "green")), soft_wrap=True)


def _print_text(console: "Console", text: str, *, indent: int) -> None:
    """Print a text indented: wrapped on a terminal, on one line elsewhere, for ``grep``."""
    space = " " * indent
    if console.is_terminal:
        text = textwrap.fill(text, console.width - indent, break_long_words=False, break_on_hyphens=False)
    console.print(textwrap.indent(text, space), soft_wrap=True, markup=False)
