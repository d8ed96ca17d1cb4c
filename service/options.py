"""How one field of a launcher's configuration shows on the command line: name, type, help.

Knows nothing of values: those are `service.config`'s.
"""

import inspect
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Positional:
    """Marks a field as an argument instead of an option: `Annotated[Path, Positional("MODEL")]`."""

    metavar: str


@dataclass(frozen=True)
class Flag:
    """Marks a field whose flag has another name, which no field can have: `Flag("--json")`."""

    name: str


def flag_name(model: type[BaseModel], field: str) -> str:
    """Returns how the command line calls a field: --port, or MODEL for an argument."""
    for rule in model.model_fields[field].metadata:
        if isinstance(rule, Positional):
            return rule.metavar
        if isinstance(rule, Flag):
            return rule.name
    return f"--{field.replace('_', '-')}"


def parameter(model: type[BaseModel], name: str) -> inspect.Parameter:
    """Returns a field as a parameter of the command's function, annotated for typer."""
    # Values stay text here: pydantic is the one place that parses and judges them.
    field = model.model_fields[name]
    bare = bare_type(field.annotation)
    kind: Any = bool if bare is bool else Path if bare is Path else str
    if is_list(field):
        kind = list[str]
    info = _argument(field) if _positional(field) else _option(flag_name(model, name), field, bare)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _argument(field: FieldInfo) -> Any:
    positional = _positional(field)
    assert positional is not None
    return typer.Argument(metavar=positional.metavar, help=_help(field), show_default=False)


def _option(flag: str, field: FieldInfo, bare: Any) -> Any:
    if bare is bool:
        declaration = f"{flag}/--no-{flag[2:]}"
        return typer.Option(declaration, help=_help(field), show_default=False)
    choices = [str(value) for value in get_args(bare)] if get_origin(bare) is Literal else []

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        flag,
        help=_help(field),
        show_default=False,
        metavar="|".join(choices) or _metavar(field, bare),
        autocompletion=complete if choices else None,
    )


def _metavar(field: FieldInfo, bare: Any) -> str:
    if is_mapping(field):
        return "NAME=VALUE"
    if is_list(field):
        return "TEXT"
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH", SecretStr: "SECRET"}
    return names.get(bare, "TEXT")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    bounds = _bounds(field)
    if bounds:
        text += f" {bounds.capitalize()}."
    if field.is_required():
        return f"{text} Required."
    default = field.get_default(call_default_factory=True)
    if default is None or default in ("", [], {}):
        return text
    if isinstance(default, dict):
        default = [f"{name}={value}" for name, value in default.items()]
    shown = "yes" if default is True else "no" if default is False else default
    shown = ", ".join(map(str, shown)) if isinstance(shown, list | tuple) else shown
    return f"{text} Default: {shown}."


def _bounds(field: FieldInfo) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [
        f"{word} {getattr(rule, key)}"
        for rule in field.metadata
        for key, word in words.items()
        if getattr(rule, key, None) is not None
    ]
    return ", ".join(found)


def _positional(field: FieldInfo) -> Positional | None:
    return next((rule for rule in field.metadata if isinstance(rule, Positional)), None)


def bare_type(annotation: Any) -> Any:
    """Returns an optional type without its None."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def is_list(field: FieldInfo) -> bool:
    """Whether a field takes several values."""
    return get_origin(bare_type(field.annotation)) in (list, tuple) or is_mapping(field)


def is_mapping(field: FieldInfo) -> bool:
    """Whether a field takes values by name, each as NAME=VALUE."""
    return get_origin(bare_type(field.annotation)) is dict
