"""Which model is meant: a published one by name, a config.json, or the folder that has one."""

import tomllib
from dataclasses import replace
from pathlib import Path

from planner.errors import ShapeError
from planner.read_config import CONFIG_FILE, read_config
from planner.shape import ModelShape

_PUBLISHED = Path(__file__).with_name("models.toml")


def published() -> dict[str, ModelShape]:
    """Return the models that are known by name."""
    tables = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))
    return {name: ModelShape(name=name, **sizes) for name, sizes in tables.items()}


def find_model(
    model: str, weight_bits: float | None = None, kv_bits: float | None = None
) -> ModelShape:
    """Return the shape of `model`, with other widths than its own where they are given.

    Raises ShapeError where there is no such file or name, or the config cannot be planned.
    """
    shape = _found(model, weight_bits)
    return replace(shape, kv_bits=shape.kv_bits if kv_bits is None else kv_bits)


def _found(model: str, weight_bits: float | None) -> ModelShape:
    path = Path(model)
    if path.is_dir():
        path /= CONFIG_FILE
    if path.is_file():
        return read_config(path, weight_bits)
    known = published()
    if model.lower() in known:
        shape = known[model.lower()]
        return replace(shape, weight_bits=weight_bits or shape.weight_bits)
    raise ShapeError(
        f"{path}: no such file; give a {CONFIG_FILE}, the folder that has one, or the name of a "
        f"published model: {', '.join(known)}"
    )
