"""Launcher configuration: a role's pydantic model becomes its command line.

Owns where a value comes from (flag, then environment, then file, then default) and how a bad one
is reported. What the settings mean is the role's business.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import typer
import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from service.errors import StartError
from service.options import Positional, bare_type, flag_name, is_list, is_mapping, parameter
from service.parent import exit_with_supervisor

__all__ = ["ConfigError", "Loaded", "Positional", "env_name", "launcher", "load"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)

# A file with any of these as a section is read by section; another is read flat.
ROLES = ("router", "prefill", "decode", "serve")


class ConfigError(Exception):
    """The settings are not acceptable; `lines` has one sentence for each bad one."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[ConfigT]):
    """A validated configuration and, by field name, where each value came from."""

    config: ConfigT
    sources: Mapping[str, str]

    def as_yaml(self) -> str:
        """Returns the configuration as YAML with sources as comments; secrets are hidden."""
        values = self.config.model_dump(mode="json")
        lines = [_yaml_line(name, value) for name, value in values.items()]
        width = min(60, max(map(len, lines), default=0))
        pairs = zip(lines, values, strict=True)
        return "\n".join(f"{line:{width}}  # {self.sources[name]}" for line, name in pairs)


def _yaml_line(name: str, value: object) -> str:
    # As a list of one, so that only what is inside the value comes out in flow style.
    dumped = yaml.safe_dump([value], default_flow_style=True, width=float("inf"))
    return f"{name}: {dumped.strip()[1:-1]}"


# ---- from sources to a configuration


def load(
    role: str,
    model: type[ConfigT],
    *,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
) -> Loaded[ConfigT]:
    """Merges flags, environment, file and defaults, and validates; `ConfigError` names bad ones.

    `flags` holds what was really given, by field name.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(model.model_fields, "default")
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"file {file}", _file_values(role, model, file) if file is not None else {}),
        ("environment", _env_values(role, model, environ)),
        ("flag", flags),
    ]
    for source, layer in layers:
        for name, value in layer.items():
            sources[name] = (
                f"environment {env_name(role, name)}" if source == "environment" else source
            )
            values[name] = _by_name(model, name, value, sources[name])
    try:
        return Loaded(config=model(**values), sources=sources)
    except ValidationError as exc:
        raise ConfigError(_error_lines(exc, model, sources)) from None


def _by_name(model: type[BaseModel], name: str, value: Any, source: str) -> Any:
    """Returns the NAME=VALUE texts of flags and environment as a mapping, else the value itself."""
    if not is_mapping(model.model_fields[name]) or not isinstance(value, list):
        return value
    pairs = [str(text).partition("=") for text in value]
    for text, (key, sign, _) in zip(value, pairs, strict=True):
        if not (key and sign):
            found = f"{flag_name(model, name)}: found {text!r} ({source})"
            raise ConfigError([f"{found}; must be NAME=VALUE"])
    return {key: text for key, _, text in pairs}


def env_name(role: str, field: str) -> str:
    """Returns the environment variable of a field: TWINPOOL_ROUTER_PORT."""
    return f"TWINPOOL_{role}_{field}".upper()


def _env_values(
    role: str, model: type[BaseModel], environ: Mapping[str, str]
) -> dict[str, str | list[str]]:
    values: dict[str, str | list[str]] = {}
    for name, field in model.model_fields.items():
        text = environ.get(env_name(role, name), "")
        if text:
            values[name] = text.split(",") if is_list(field) else text
    return values


def _file_values(role: str, model: type[BaseModel], file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as exc:
        raise ConfigError([f"--config: cannot read {file}: {exc.strerror}"]) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        where = getattr(exc, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError([f"--config: {file} is not YAML{line}"]) from exc
    content = {} if content is None else content
    if isinstance(content, dict) and any(isinstance(content.get(name), dict) for name in ROLES):
        content = content.get(role) or {}
    if not isinstance(content, dict):
        raise ConfigError([f"--config: {file} must hold settings as 'name: value' lines"])
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = [name for name in values if name not in model.model_fields]
    if unknown:
        raise ConfigError([_unknown_line(file, name, model) for name in unknown])
    return values


def _unknown_line(file: Path, name: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"--config: {file} has an unknown setting '{name}'{hint}"


def _error_lines(
    exc: ValidationError, model: type[BaseModel], sources: Mapping[str, str]
) -> list[str]:
    lines: dict[object, str] = {}
    for error in exc.errors(include_url=False):
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        name = str(error["loc"][0]) if error["loc"] else ""
        if name not in model.model_fields:
            lines.setdefault(name or len(lines), message)
            continue
        flag = flag_name(model, name)
        if error["type"] == "missing":
            lines.setdefault(name, f"{flag}: is required")
            continue
        secret = bare_type(model.model_fields[name].annotation) is SecretStr
        found = "a value that is not shown" if secret else repr(error["input"])
        # A union reports each of its types; the first one is what people mean.
        lines.setdefault(name, f"{flag}: found {found} ({sources[name]}); {message}")
    return list(lines.values())


# ---- from a model to a command


def launcher(
    role: str,
    model: type[ConfigT],
    start: Callable[[ConfigT], None],
    *,
    help: str,
    environ: Mapping[str, str] = os.environ,
) -> typer.Typer:
    """Returns a command with one option for each field of `model`, which calls `start`.

    Adds --config and --print-config. Bad settings are printed one a line, with exit code 2, and
    a `StartError` in one line, with exit code 1.
    """

    def command(**given: Any) -> None:
        exit_with_supervisor()
        file, print_config = given.pop("config"), given.pop("print_config")
        flags = {name: value for name, value in given.items() if value is not None}
        try:
            loaded = load(role, model, flags=flags, environ=environ, file=file)
        except ConfigError as exc:
            for line in exc.lines:
                typer.echo(f"{role}: {line}", err=True)
            raise typer.Exit(2) from None
        if print_config:
            typer.echo(loaded.as_yaml())
            return
        try:
            start(loaded.config)
        except StartError as exc:
            typer.echo(f"{role}: {exc}", err=True)
            raise typer.Exit(1) from None

    parameters = [parameter(model, name) for name in model.model_fields]
    # typer reads the options off the signature and the annotations.
    signature = inspect.Signature([*parameters, *_own_parameters()])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    command.__doc__ = (
        f"{help}\n\nEach option can also be set as {env_name(role, '<OPTION>')} in the"
        " environment or in the file given with --config; flags win over both."
    )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name=role)(command)
    return app


def _own_parameters() -> list[inspect.Parameter]:
    file = typer.Option("--config", help="YAML file with settings.", show_default=False)
    show = typer.Option("--print-config", help="Print the settings and their sources, then exit.")
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, file]),
        inspect.Parameter("print_config", keyword, default=False, annotation=Annotated[bool, show]),
    ]
