"""Checkpoints in fp8: what is loaded is each element times its square's factor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import load_config
from engine.errors import ConfigError, WeightError
from engine.runner import Chunk
from engine.weights import Reader, WeightSlot, load_weights
from tests.unit.engine.checkpoints import DEEPSEEK_V3, make_checkpoint
from tests.unit.engine.conftest import MakeRunner

BLOCK, GREATEST = 128, 448.0
PUBLISHED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
# Sizes that squares do not divide.
SIZES: dict[str, Any] = {"hidden_size": 200, "intermediate_size": 300, "num_hidden_layers": 2}
NAME = "model.layers.0.mlp.gate_proj.weight"


def narrowed(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight in fp8, and the factors of its squares."""
    small_OI = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn)
    rows, columns = (range(0, size, BLOCK) for size in weight_OI.shape)
    scale = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            square = weight_OI[row : row + BLOCK, column : column + BLOCK]
            scale[i, j] = square.abs().max() / GREATEST
            there = small_OI[row : row + BLOCK, column : column + BLOCK]
            there.copy_((square / scale[i, j]).to(torch.float8_e4m3fn))
    return small_OI, scale


def widened(small_OI: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers that are meant, square by square."""
    wide_OI = small_OI.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            square = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            wide_OI[square] *= scale[i, j]
    return wide_OI


def write_config(folder: Path, source: Path, **more: object) -> None:
    folder.mkdir(exist_ok=True)
    fields = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in fp8, as they are published, and one of the numbers that are meant."""
    root = tmp_path_factory.mktemp("quantized")
    made = make_checkpoint(root / "made", DEEPSEEK_V3, **SIZES)
    small: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, tensor in load_file(made / "model.safetensors").items():
        small[name] = wide[name] = tensor
        if name.endswith("_proj.weight") or "_proj_with" in name:
            small[name], scale = narrowed(tensor)
            small[f"{name}_scale_inv"] = scale
            wide[name] = widened(small[name], scale)
    write_config(root / "small", made, quantization_config=PUBLISHED)
    write_config(root / "wide", made)
    save_file(small, root / "small" / "model.safetensors")
    save_file(wide, root / "wide" / "model.safetensors")
    return root / "small", root / "wide"


def test_a_model_in_fp8_computes_what_its_wide_numbers_do(
    folders: tuple[Path, Path], make_runner: MakeRunner
) -> None:
    chunk = Chunk(token_ids=list(range(40)), start=0, block_table=range(5))
    small, wide = (make_runner(folder).forward([chunk]) for folder in folders)
    assert torch.equal(small, wide)


@pytest.mark.parametrize("by_reader", [False, True])
@pytest.mark.parametrize(
    "part", [(), (slice(100, 300),), (slice(130, 131), slice(0, 200)), (slice(None), slice(5, 129))]
)
def test_a_ranks_part_has_the_factors_of_its_place(
    folders: tuple[Path, Path], part: tuple[slice, ...], by_reader: bool
) -> None:
    small, wide = folders
    wanted = load_file(wide / "model.safetensors")[NAME]
    target = torch.empty_like(wanted[part])
    slot = WeightSlot(name=NAME, shape=(300, 200), part=part, target=target)
    if by_reader:
        Reader(small).fill([slot])
    else:
        load_weights(small, [slot], ignored=lambda name: True)
    assert torch.equal(target, wanted[part])


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (None, "_scale_inv is missing"),
        (torch.ones(3, 1), r"is F32 \[3, 1\]; it must be F32 \[3, 2\]"),
        (torch.ones(3, 2, dtype=torch.bfloat16), r"is BF16 \[3, 2\]"),
    ],
)
def test_wrong_factors_are_refused(
    folders: tuple[Path, Path],
    tmp_path: Path,
    make_runner: MakeRunner,
    scale: Tensor | None,
    said: str,
) -> None:
    tensors = load_file(folders[0] / "model.safetensors")
    del tensors[f"{NAME}_scale_inv"]
    if scale is not None:
        tensors[f"{NAME}_scale_inv"] = scale
    write_config(tmp_path, folders[0])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=f"gate_proj.weight is in fp8, but .*{said}"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    "other",
    [{"quant_method": "gptq"}, {"weight_block_size": [64, 64]}, {"fmt": "e5m2"}],
    ids=str,
)
def test_other_formats_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, other: dict[str, object]
) -> None:
    write_config(tmp_path, folders[0], quantization_config=PUBLISHED | other)
    with pytest.raises(ConfigError, match=r"quantization_config.*blocks of 128 x 128"):
        load_config(tmp_path)
