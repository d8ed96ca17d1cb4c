"""Fills a model's tensors from a checkpoint, and names a checkpoint by its content.

Owns reading. Each layer says which tensors it wants and where they go (`WeightSlot`), so
that fused and stacked weights are built in place: the peak is the weights and one tensor.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import quantized
from engine.checkpoint import TensorInfo, read_checkpoint
from engine.config import ModelConfig, load_config
from engine.errors import ConfigError, WeightError

Progress = Callable[[int, int], None]

_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_STORED = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    quantized.FP8: torch.float8_e4m3fn,
}
_LOADABLE = tuple(_STORED)
_SAMPLED_TENSORS = 4096
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class WeightSlot:
    """One checkpoint tensor that a layer wants.

    `shape` is the whole tensor's shape, `part` the slices of it that this rank reads, and
    `target` the view, of the slices' shape, that they are copied into.
    """

    name: str
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    target: Tensor


Fill = Callable[[Sequence[WeightSlot]], None]


def resolve_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Return the dtype called `name`; "auto" is the checkpoint's own.

    Raises ConfigError where there is no such dtype.
    """
    resolved = config.dtype if name == "auto" else name
    if resolved not in _TORCH_DTYPES:
        known = ", ".join(("auto", *_TORCH_DTYPES))
        raise ConfigError(Path("dtype"), f"is {name!r}; it must be one of {known}")
    return _TORCH_DTYPES[resolved]


def load_weights(
    folder: Path,
    slots: Sequence[WeightSlot],
    *,
    ignored: Callable[[str], bool],
    progress: Progress | None = None,
) -> None:
    """Copy the checkpoint's tensors into their slots, converting the dtype where it differs.

    `progress` gets the bytes read so far and in all, after each tensor. Raises WeightError
    where a tensor is missing or of another shape or dtype, or where the checkpoint holds one
    that no slot wants and that is not `ignored`: the model would compute something else.
    """
    tensors = read_checkpoint(folder)
    wanted = defaultdict(list)
    for slot in slots:
        _check(folder, slot, tensors)
        wanted[tensors[slot.name].file].append(slot)
    names = {slot.name for slot in slots}
    surplus = [
        name
        for name in tensors
        if name not in names and not ignored(name) and not quantized.is_scale(name, tensors)
    ]
    if surplus:
        raise WeightError(
            tensors[surplus[0]].file,
            f"holds {len(surplus)} tensors that the model does not use, such as {surplus[0]}; "
            "does config.json belong to these weights?",
        )
    total = sum(tensors[name].end - tensors[name].begin for name in names)
    done = 0
    for file, file_slots in wanted.items():
        file_slots.sort(key=lambda slot: tensors[slot.name].begin)  # disks like it in order
        for slot in _copy(file, file_slots, tensors):
            done += tensors[slot.name].end - tensors[slot.name].begin
            if progress is not None:
                progress(done, total)


def _check(folder: Path, slot: WeightSlot, tensors: Mapping[str, TensorInfo]) -> None:
    tensor = tensors.get(slot.name)
    if tensor is None:
        raise WeightError(folder, f"has no tensor {slot.name}; is the checkpoint complete?")
    if tensor.shape != slot.shape:
        raise WeightError(
            tensor.file,
            f"{slot.name} has shape {list(tensor.shape)}; config.json asks for {list(slot.shape)}",
        )
    if tensor.dtype not in _LOADABLE:
        raise WeightError(
            tensor.file,
            f"{slot.name} has dtype {tensor.dtype}; supported are {', '.join(_LOADABLE)}",
        )
    quantized.scale_of(tensor, tensors)


def _copy(
    file: Path, slots: Iterable[WeightSlot], tensors: Mapping[str, TensorInfo]
) -> Iterable[WeightSlot]:
    try:
        with safe_open(file, framework="pt") as opened:
            for slot in slots:
                _put(opened.get_slice(slot.name)[slot.part], slot, tensors)
                yield slot
    except (SafetensorError, OSError) as exc:
        raise WeightError(file, f"cannot be read: {exc}") from exc


def _put(part: Tensor, slot: WeightSlot, tensors: Mapping[str, TensorInfo]) -> None:
    """Copy what was read of a tensor into its slot; raises OSError."""
    scale = quantized.scale_of(tensors[slot.name], tensors)
    if scale is not None:
        part = quantized.widened(part, _read(scale), slot.part)
    slot.target.copy_(part)


class Reader:
    """Reads some tensors of a checkpoint beside other threads, which it leaves the interpreter to.

    Args:
        pause: Called with the seconds that a tensor took, after each: how it is kept from taking
            what the others need.

    What it reads is what was there when it was made: a file that is another one since is refused,
    since a model must not be of two checkpoints. Raises WeightError for a folder that is none.
    """

    def __init__(self, folder: Path, pause: Callable[[float], None] = lambda seconds: None) -> None:
        self._folder = folder
        self._tensors = read_checkpoint(folder)
        self._versions = {each.file: _version(each.file) for each in self._tensors.values()}
        self._pause = pause

    def fill(self, slots: Sequence[WeightSlot]) -> None:
        """Copy tensors into their slots as `load_weights` does; raises WeightError likewise."""
        for slot in slots:
            began_s = time.perf_counter()
            _check(self._folder, slot, self._tensors)
            tensor = self._tensors[slot.name]
            try:
                if _version(tensor.file) != self._versions[tensor.file]:
                    raise WeightError(tensor.file, "has changed since the model was loaded")
                _put(_read(tensor)[slot.part], slot, self._tensors)
            except OSError as exc:
                raise WeightError(tensor.file, f"cannot be read: {exc}") from exc
            self._pause(time.perf_counter() - began_s)


def _version(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to or replaced."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(tensor: TensorInfo) -> Tensor:
    """Return a whole tensor. The file's own reader would hold the interpreter until it is there."""
    data = bytearray(tensor.end - tensor.begin)
    with tensor.file.open("rb", buffering=0) as opened:
        opened.seek(tensor.begin)
        view, done = memoryview(data), 0
        while done < len(data):
            more = opened.readinto(view[done:])
            if not more:
                raise OSError(f"{tensor.name} ends after {done} of {len(data)} bytes")
            done += more
    return torch.frombuffer(data, dtype=_STORED[tensor.dtype]).view(tensor.shape)


def fingerprint(folder: Path) -> str:
    """Return a hex SHA-256 that is equal for equal models, however their files are split.

    Covers what the configuration means (not how it is written), every tensor's name, shape
    and dtype, and samples of the content: three of 1 KiB from each of up to 4096 tensors.
    Raises ConfigError and WeightError as loading does.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(asdict(load_config(folder)), sort_keys=True).encode())
    tensors = sorted(read_checkpoint(folder).values(), key=lambda tensor: tensor.name)
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
    step = -(-len(tensors) // _SAMPLED_TENSORS)
    samples = defaultdict(list)
    for tensor in tensors[:: step or 1]:
        samples[tensor.file].append(tensor)
    contents: dict[str, bytes] = {}
    for file, sampled in samples.items():
        with file.open("rb") as opened:
            for tensor in sampled:
                last = max(tensor.begin, tensor.end - _SAMPLE_BYTES)
                for begin in (tensor.begin, (tensor.begin + last) // 2, last):
                    opened.seek(begin)
                    sample = opened.read(min(_SAMPLE_BYTES, tensor.end - begin))
                    contents[tensor.name] = contents.get(tensor.name, b"") + sample
    for name in sorted(contents):
        digest.update(contents[name])
    return digest.hexdigest()
