"""The safetensors files of a model folder: which tensors there are, and where.

Owns finding the files and checking their headers. Reads no tensor; `engine.weights` does.
Source: the safetensors format, 8 bytes of header length, a JSON header, then the tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import WeightError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor on disk. `begin` and `end` are byte offsets in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a model folder by name.

    Raises WeightError naming the file that is missing, truncated or not what the index says.
    """
    index_path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return _read_header(folder / SINGLE_FILE)
    if not index_path.is_file():
        raise WeightError(
            folder,
            f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read, so "
            "download or convert the weights in that format",
        )
    weight_map = _read_index(index_path)
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        if not (folder / file_name).is_file():
            raise WeightError(
                folder / file_name, f"no such file, but {INDEX_FILE} names it; download it again"
            )
        tensors |= _read_header(folder / file_name)
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise WeightError(index_path, f"says that {name} is in {file_name}, but it is not")
    return tensors


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise WeightError(path, f"is not an index with a weight_map: {exc!r}") from exc
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(path, "its weight_map must be an object of tensor and file names")
    for name in weight_map.values():
        # A folder from elsewhere must not make us read outside it.
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightError(path, f"names the file {name!r}; it must be a plain file name")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_begin = _LENGTH_BYTES + header_bytes
        if size < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES or data_begin > size:
            raise WeightError(path, f"is truncated or no safetensors file ({size} bytes)")
        header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path, data_begin, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightError(path, f"has a damaged safetensors header: {exc!r}") from exc
    needed = max((tensor.end for tensor in tensors.values()), default=data_begin)
    if size < needed:
        raise WeightError(
            path, f"is truncated: {size} bytes of {needed}; download or copy the file again"
        )
    return tensors


def _tensor(path: Path, data_begin: int, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"{name} lies from byte {begin} to {end}")
    return TensorInfo(
        name=name,
        file=path,
        dtype=str(entry["dtype"]),
        shape=tuple(entry["shape"]),
        begin=data_begin + begin,
        end=data_begin + end,
    )
