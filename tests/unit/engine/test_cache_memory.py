"""Memory for transfers beside a GPU's cache: what is computed or arrives comes over in time."""

import threading
from pathlib import Path

import pytest
import torch

from engine.boxes import Boxes
from engine.cache_memory import CacheItself, CacheOnGpu, HostCopy, cache_memory
from engine.config import ModelConfig, load_config
from engine.kvcache import KVCache
from engine.parallel import Layout
from tests.late_lane import LateLane
from tests.unit.engine.checkpoints import ARCHITECTURES, DEEPSEEK_V3, make_checkpoint

BLOCKS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURES[0]))


def make_cache(config: ModelConfig, layout: Layout | None = None) -> KVCache:
    return KVCache(
        config=config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=BLOCKS,
        block_size=4,
        layout=layout or Layout(),
    )


class Apart:
    """A cache full of 1, and its copy full of 2."""

    def __init__(self, config: ModelConfig, layout: Layout | None = None) -> None:
        self.cache = make_cache(config, layout)
        self.cache.tensor.fill_(1)
        self.lane = LateLane()
        self.memory = HostCopy(self.cache, torch.full_like(self.cache.tensor, 2), self.lane)

    def settle(self) -> None:
        self.lane.mark()()


def of_blocks(tensor: torch.Tensor, layer: int) -> list[float]:
    """What a layer's blocks are full of; each is full of one number."""
    found = []
    for block in tensor[layer].unbind(1):
        number = float(block.flatten()[0])
        assert bool((block == number).all())
        found.append(number)
    return found


def test_memory_of_a_cpu_is_the_cache(config: ModelConfig) -> None:
    cache = make_cache(config)
    memory = cache_memory(cache, None)
    assert isinstance(memory, CacheItself)
    assert memory.tensor is cache.tensor
    called = []
    memory.then(lambda: called.append(threading.current_thread()))
    assert called == [threading.current_thread()]


@pytest.mark.parametrize("way", ["save", "load"])
def test_blocks_come_over_and_no_others(config: ModelConfig, way: str) -> None:
    apart = Apart(config)
    getattr(apart.memory, way)(range(1, 2), [6, 3, 4, 5, 0])
    apart.settle()
    there = apart.memory.tensor if way == "save" else apart.cache.tensor
    new, old = (1.0, 2.0) if way == "save" else (2.0, 1.0)
    assert of_blocks(there, 0) == [old] * BLOCKS
    assert of_blocks(there, 1) == [new, old, old, new, new, new, new, old]
    # K and V, of three runs of blocks.
    assert apart.lane.copies == 2 * 3


def test_cells_of_latents_are_one_plane(tmp_path: Path) -> None:
    apart = Apart(load_config(make_checkpoint(tmp_path, DEEPSEEK_V3)))
    apart.memory.save(range(2, 3), [1, 2])
    apart.settle()
    assert of_blocks(apart.memory.tensor, 2)[:4] == [2, 1, 1, 2]
    assert apart.lane.copies == 1


def test_layers_are_the_models_numbers(config: ModelConfig) -> None:
    apart = Apart(config, Layout(pp=2, pp_rank=1))
    first = apart.memory.layers[0]
    assert first > 0
    apart.memory.save(range(first, first + 1), [2])
    apart.settle()
    assert of_blocks(apart.memory.tensor, 0)[2] == 1


def test_no_blocks_are_no_copies(config: ModelConfig) -> None:
    apart = Apart(config)
    apart.memory.save(range(2), [])
    apart.settle()
    assert apart.lane.copies == 0


def test_what_follows_a_save_waits_for_it_and_keeps_its_order(config: ModelConfig) -> None:
    apart = Apart(config)
    seen: list[list[float]] = []
    over = threading.Event()
    for block in range(3):
        apart.memory.save(range(1), [block])
        apart.memory.then(lambda: seen.append(of_blocks(apart.memory.tensor, 0)[:3]))
    apart.memory.then(over.set)
    assert over.wait(5)
    assert [found[: n + 1] for n, found in enumerate(seen)] == [[1], [1, 1], [1, 1, 1]]


def test_pass_waits_for_what_was_loaded(config: ModelConfig) -> None:
    apart = Apart(config)
    apart.memory.load(apart.memory.layers, range(BLOCKS))
    apart.memory.before_pass()
    assert bool((apart.cache.tensor == 2).all())


def test_block_with_a_new_owner_is_loaded_for_it_last(config: ModelConfig) -> None:
    apart = Apart(config)
    apart.memory.load(range(1), [3])
    apart.memory.before_pass()
    apart.cache.tensor[:, :, 3].fill_(7)  # a pass of the new owner
    apart.memory.before_pass()
    apart.settle()
    assert of_blocks(apart.cache.tensor, 0)[3] == 7


def test_error_of_what_follows_ends_the_next_pass(config: ModelConfig) -> None:
    apart = Apart(config)

    def fail() -> None:
        raise OSError("gone")

    apart.memory.then(fail)
    apart.memory._saved._thread.join(5)
    with pytest.raises(RuntimeError, match="could not be saved") as caught:
        apart.memory.before_pass()
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_of_a_gpu_without_a_copy_is_the_cache_itself(config: ModelConfig) -> None:
    cache, lane = make_cache(config), LateLane()
    memory = CacheOnGpu(cache, lane, Boxes(torch.device("cpu")))
    assert memory.tensor is cache.tensor
    memory.save(range(1), [3])
    memory.load(range(1), [3])
    memory.before_pass()
    called: list[str] = []
    done = threading.Event()
    for name in ("first", "second"):
        memory.then(lambda name=name: called.append(name))  # type: ignore[misc]
    memory.then(done.set)
    assert done.wait(5)
    assert called == ["first", "second"]
    assert lane.copies == 0
