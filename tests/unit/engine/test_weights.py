"""Loading checkpoints: what is read, what is refused, and what a fingerprint sees."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import load_config
from engine.errors import ConfigError, WeightError
from engine.runner import ModelRunner
from engine.weights import Reader, WeightSlot, fingerprint, resolve_dtype
from tests.unit.engine.checkpoints import ARCHITECTURES, make_checkpoint
from tests.unit.engine.conftest import MakeRunner

Tensors = dict[str, torch.Tensor]
MOE = ARCHITECTURES[1]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", MOE, num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", MOE, num_hidden_layers=2, max_shard_size="40KB")


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path) -> ModelRunner:
    return ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=1,
        block_size=1,
    )


def test_progress_rises_to_the_size_of_the_weights(sharded: Path) -> None:
    steps: list[tuple[int, int]] = []
    ModelRunner(
        folder=sharded,
        config=load_config(sharded),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        num_blocks=1,
        block_size=1,
        progress=lambda done, total: steps.append((done, total)),
    )
    tensors = [load_file(path) for path in sharded.glob("*.safetensors")]
    total = sum(tensor.nbytes for file in tensors for tensor in file.values())
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
    with pytest.raises(WeightError, match=r"no tensor model\.layers\.1\.mlp\.experts\.5\.up_proj"):
        load(folder)


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(WeightError, match=r"model\.norm\.weight has shape \[63\].*asks for \[64\]"):
        load(folder)


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(WeightError, match=r"q_proj\.weight has dtype I8; supported are BF16"):
        load(folder)


def test_tensors_that_the_model_would_leave_out_are_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(128)}))
    with pytest.raises(WeightError, match=r"1 tensors that the model does not use.*q_proj\.bias"):
        load(folder)


def test_a_tied_head_may_be_stored_all_the_same(tmp_path: Path, make_runner: MakeRunner) -> None:
    folder = make_checkpoint(tmp_path / "tied", MOE, tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(128, 64)}))
    make_runner(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 100, 8, 3, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightError, match=r"model\.safetensors: is truncated"):
            load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_named(folder: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightError, match=r"model\.safetensors: has a damaged"):
        load(folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match="only safetensors are read"):
        load(folder)


def test_a_file_that_only_the_index_knows_is_named(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(WeightError, match=f"{missing.name}: no such file"):
        load(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../model.safetensors"}, "must be a plain file name"),
        ({"x": 3}, "must be a plain file name"),
        ({}, "must be an object"),
        (None, "must be an object"),
    ],
)
def test_a_bad_index_is_refused(sharded: Path, weight_map: object, message: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError, match=rf"index\.json: .*{message}"):
        load(sharded)


def test_an_index_that_names_the_wrong_file_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightError, match=r"says that model\.norm\.weight is in"):
        load(sharded)


def test_dtype_auto_is_the_checkpoints_own(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, MOE, dtype=torch.bfloat16))
    assert resolve_dtype("auto", config) == torch.bfloat16
    assert resolve_dtype("float32", config) == torch.float32
    with pytest.raises(ConfigError, match="is 'int8'; it must be one of auto, bfloat16"):
        resolve_dtype("int8", config)


def test_fingerprint_does_not_see_how_a_model_is_stored(folder: Path, sharded: Path) -> None:
    assert fingerprint(folder) == fingerprint(sharded)
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "9", "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) == fingerprint(sharded)


def test_fingerprint_sees_other_weights_and_another_config(folder: Path) -> None:
    before = fingerprint(folder)

    def nudge(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][-1, -1] += 1

    edit(folder, nudge)
    nudged = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert len({before, nudged, fingerprint(folder)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reader_fills_slots_as_loading_does(sharded: Path, dtype: torch.dtype) -> None:
    tensors: Tensors = {}
    for file in sharded.glob("*.safetensors"):
        tensors |= load_file(file)
    paused: list[float] = []
    reader = Reader(sharded, paused.append)
    parts = ((), (slice(2, 5),), (slice(None), slice(1, 4)))
    for name, part in zip(sorted(n for n in tensors if "experts" in n), parts, strict=False):
        whole = tensors[name]
        target = torch.empty(whole[part].shape, dtype=dtype)
        reader.fill([WeightSlot(name=name, shape=tuple(whole.shape), part=part, target=target)])
        assert torch.equal(target, whole[part].to(dtype))
    assert len(paused) == len(parts)


def test_reader_refuses_a_file_that_has_changed_and_a_tensor_that_is_missing(
    folder: Path,
) -> None:
    reader = Reader(folder)
    file = folder / "model.safetensors"
    name, whole = max(load_file(file).items(), key=lambda item: item[1].nbytes)
    slot = WeightSlot(name=name, shape=tuple(whole.shape), part=(), target=torch.empty_like(whole))
    with pytest.raises(WeightError, match="has no tensor other"):
        reader.fill([replace(slot, name="other")])
    file.write_bytes(file.read_bytes())
    with pytest.raises(WeightError, match="has changed since the model was loaded"):
        reader.fill([slot])
    file.unlink()
    with pytest.raises(WeightError, match=r"cannot be read: .*No such file"):
        reader.fill([slot])
