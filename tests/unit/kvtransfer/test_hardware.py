"""What is said of RDMA devices, and which GPU memory is refused."""

from pathlib import Path

import pytest

from kvtransfer import ucx_settings
from kvtransfer.hardware import SlowMemory, check_device_memory, describe_rdma


@pytest.mark.parametrize(
    ("devices", "driven", "said"),
    [
        ([], False, "no InfiniBand"),
        (["mlx5_0"], True, "in use for KV, through UCX: mlx5_0"),
        (["mlx5_0", "mlx5_1"], False, "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true"),
    ],
)
def test_the_start_up_line_says_what_is_used(
    devices: list[str], driven: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in devices:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(ucx_settings, "_DEVICES", tmp_path)
    assert said in describe_rdma(driven=driven)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_refused_with_what_to_set(name: str) -> None:
    with pytest.raises(SlowMemory, match=rf"{name}.*expandable_segments:False"):
        check_device_memory({name: "max_split_size_mb:64, expandable_segments:True"})


@pytest.mark.parametrize("value", ["", "expandable_segments:False", "max_split_size_mb:64"])
def test_other_allocator_settings_pass(value: str) -> None:
    check_device_memory({"PYTORCH_CUDA_ALLOC_CONF": value})
