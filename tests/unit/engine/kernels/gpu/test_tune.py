"""Tiles that are kept on disk by GPU and shape."""

from pathlib import Path

import pytest
import torch

from engine.kernels.gpu import tune
from engine.kernels.gpu.tune import Choices, Tile, bucket, keep, load, tuned

CUDA = torch.device("cuda")
SMALL, LARGE = Tile(keys=16, warps=4, stages=2), Tile(keys=128, warps=8, stages=3, rows=64)
CHOICES = Choices(name="decode here", tiles=(SMALL, LARGE))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (80/2)")
    tune._kept.cache_clear()
    return tmp_path / "twinpool" / "kernels"


def test_a_shape_that_was_never_measured_gets_the_usual_tile() -> None:
    assert tuned(CUDA, CHOICES) == SMALL


def test_what_was_measured_is_found_again_and_added_to(folder: Path) -> None:
    path = keep("NVIDIA H200 (80/2)", {"decode here": LARGE})
    assert path.parent == folder
    assert "/" not in path.name
    assert keep("NVIDIA H200 (80/2)", {"block": SMALL}) == path
    assert load(path) == {"decode here": LARGE, "block": SMALL}
    assert tuned(CUDA, CHOICES) == LARGE
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_another_gpu_has_a_file_of_its_own() -> None:
    keep("NVIDIA B200", {"decode here": LARGE})
    assert tuned(CUDA, CHOICES) == SMALL


def test_a_cpu_never_reads_the_file() -> None:
    keep("NVIDIA H200 (80/2)", {"decode here": LARGE})
    assert tuned(torch.device("cpu"), CHOICES) == SMALL


def test_a_kept_tile_that_is_no_longer_offered_is_left_alone() -> None:
    keep("NVIDIA H200 (80/2)", {"decode here": Tile(keys=999, warps=4, stages=1)})
    assert tuned(CUDA, CHOICES) == SMALL


@pytest.mark.parametrize("content", ["", "[1]", '{"decode here": {"keys": 1}}', '{"a": 5}'])
def test_a_file_that_is_no_such_file_is_as_none(folder: Path, content: str) -> None:
    path = keep("NVIDIA H200 (80/2)", {})
    path.write_text(content)
    tune._kept.cache_clear()
    assert tuned(CUDA, CHOICES) == SMALL


def test_a_folder_that_others_can_write_to_is_not_read(folder: Path) -> None:
    keep("NVIDIA H200 (80/2)", {"decode here": LARGE})
    folder.chmod(0o777)
    tune._kept.cache_clear()
    assert tuned(CUDA, CHOICES) == SMALL


def test_shapes_of_like_length_share_a_tile() -> None:
    def named(keys: int) -> str:
        return bucket("decode", torch.bfloat16, 128, 4, keys)

    assert named(1) == named(256) != named(257) == named(1024) != named(1025)


def test_no_tile_that_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tile"):
        tuned(CUDA, Choices(name="huge", tiles=()))
