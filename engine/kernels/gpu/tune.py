"""Which tile a kernel uses for a shape: measured once, kept on disk by the GPU's name.

Owns the file and the buckets; measures nothing and runs no kernel: `python -m bench.kernels --tune`
does, and writes what won. A shape that was never measured gets the first tile that fits, so that no
request waits for a measurement.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from native.cache import own_folder
from native.errors import NativeError

_FOLDER = "kernels"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a program's work is cut. `rows` is 0 where the shape alone says how many there are."""

    keys: int
    warps: int
    stages: int
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The tiles that a kernel can use for the shapes of a bucket, the usual one first."""

    name: str
    tiles: Sequence[Tile]


def bucket(kernel: str, dtype: torch.dtype, size: int, shared: int, keys: int) -> str:
    """Return the name of the shapes that share a tile; keys to the next power of four."""
    most = 256
    while most < keys:
        most *= 4
    return f"{kernel} {str(dtype).removeprefix('torch.')} h{size} r{shared} l{most}"


def tuned(device: torch.device, choices: Choices) -> Tile:
    """Return the tile measured best for a bucket, else the first that fits."""
    if not choices.tiles:
        raise ValueError(f"no tile of this kernel fits the shape {choices.name}")
    if device.type == "cuda":
        kept = _kept(torch.cuda.get_device_name(device)).get(choices.name)
        # Only one of ours: a file of another version may name others.
        if kept is not None and kept in choices.tiles:
            return kept
    return choices.tiles[0]


def keep(gpu: str, best: Mapping[str, Tile]) -> Path:
    """Add what was measured on a GPU to its file; raises NativeError where there is no place."""
    own_folder(_FOLDER)
    path = _path(gpu)
    merged = {**load(path), **best}
    content = json.dumps({name: asdict(tile) for name, tile in sorted(merged.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(content + "\n")
    os.replace(file.name, path)
    _kept.cache_clear()
    return path


def load(path: Path) -> dict[str, Tile]:
    """Return a file's tiles; none where it is missing or is not such a file."""
    try:
        found = json.loads(path.read_text())
        return {str(name): Tile(**tile) for name, tile in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@functools.cache
def _kept(gpu: str) -> dict[str, Tile]:
    try:
        own_folder(_FOLDER)
        return load(_path(gpu))
    except (NativeError, OSError):
        return {}


def _path(gpu: str) -> Path:
    return own_folder(_FOLDER) / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"
