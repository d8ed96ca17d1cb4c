"""A step through all layers at once against the layers' own kernels, and on its own."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import load_config
from engine.kernels import step_cpu
from engine.kernels.step import STEP_ROWS
from engine.runner import Chunk, ModelRunner
from engine.step_watch import ATTENTION, DENSE, EXPERTS, HEAD, REST
from tests.unit.engine.checkpoints import ARCHITECTURES, LLAMA, QWEN2, make_checkpoint

BLOCKS, BLOCK = 1200, 16


@pytest.fixture(scope="module", params=(*ARCHITECTURES, LLAMA, QWEN2))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Hidden and inner sizes that fill no panel, and heads of an odd multiple of 16.
    return make_checkpoint(
        tmp_path_factory.mktemp("model"),
        request.param,
        hidden_size=80,
        head_dim=48,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    made = make(folder, torch.bfloat16)
    if made._model._step is None:
        pytest.skip("there is no C++ compiler, or no AVX512-BF16")
    return made


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def make(folder: Path, dtype: torch.dtype) -> ModelRunner:
    made = ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=dtype,
        device=torch.device("cpu"),
        num_blocks=BLOCKS,
        block_size=BLOCK,
    )
    random = torch.Generator().manual_seed(1)
    made.cache.tensor.copy_(torch.randn(made.cache.tensor.shape, generator=random).to(dtype))
    return made


@pytest.fixture(autouse=True)
def restored(runner: ModelRunner) -> Iterator[None]:
    before = runner.cache.tensor.clone()
    yield
    runner.cache.tensor.copy_(before)


def chunks(lengths: Sequence[int]) -> list[Chunk]:
    """One new token after as many others each, in scattered blocks."""
    blocks = iter(torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2)).tolist())
    return [
        Chunk(
            token_ids=[(7 * number + 3) % 128],
            start=length,
            block_table=[next(blocks) for _ in range(length // BLOCK + 1)],
        )
        for number, length in enumerate(lengths)
    ]


def by_layers(runner: ModelRunner, passed: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
    step = runner._model._step
    runner._model._step = None
    try:
        return runner.forward(passed), runner.cache.tensor.clone()
    finally:
        runner._model._step = step


LENGTHS = [[0], [15], [16, 700], [300, 2, 1100, 64, 0, 511, 512, 513, 17]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_logits_are_as_near_to_those_in_fp32_as_the_layers_own(
    folder: Path, runner: ModelRunner, lengths: list[int]
) -> None:
    exact = make(folder, torch.float32)
    exact.cache.tensor.copy_(runner.cache.tensor)
    exact_SV = exact.forward(chunks(lengths))
    plain_SV, _ = by_layers(runner, chunks(lengths))
    step_SV = runner.forward(chunks(lengths))
    allowed = 1.2 * (plain_SV - exact_SV).square().mean().sqrt() + 1e-3
    assert (step_SV - exact_SV).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_same_keys_and_values_are_cached_and_nothing_else_is_written(
    runner: ModelRunner, lengths: list[int]
) -> None:
    before = runner.cache.tensor.clone()
    runner.forward(chunks(lengths))
    found = runner.cache.tensor.clone()
    runner.cache.tensor.copy_(before)
    _, expected = by_layers(runner, chunks(lengths))
    # The first layer's follow from the tokens alone; later ones from sums in another order.
    assert found[0].equal(expected[0])
    torch.testing.assert_close(found, expected, rtol=2**-5, atol=2**-5)
    for chunk in chunks(lengths):
        cell = (chunk.block_table[chunk.start // BLOCK], slice(None), chunk.start % BLOCK)
        assert not found[:, :, *cell].equal(before[:, :, *cell])
        found[:, :, *cell] = before[:, :, *cell]
    assert found.equal(before)


def test_sequence_depends_neither_on_its_company_nor_on_threads(
    runner: ModelRunner, two_threads: None
) -> None:
    passed = chunks([300, 2, 1100, 64, 0, 511, 512, 513, 17] * 2)
    both = runner.forward(passed)
    torch.set_num_threads(1)
    assert runner.forward(passed).equal(both)
    for chunk, logits_V in zip(passed, both, strict=True):
        assert runner.forward([chunk])[0].equal(logits_V)


def test_many_threads_with_little_to_do_agree(runner: ModelRunner) -> None:
    alone = runner.forward(chunks([40]))
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for _ in range(20):
            assert runner.forward(chunks([40])).equal(alone)
    finally:
        torch.set_num_threads(threads)


def test_it_is_used_for_passes_of_a_few_decoding_sequences_alone(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    step = runner._model._step
    assert step is not None

    def noted(x_TD: Tensor, *rest: object) -> object:
        used.append(len(x_TD))
        return step(x_TD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(runner._model, "_step", noted)
    runner.forward(chunks([3] * STEP_ROWS))
    assert used == [STEP_ROWS]
    runner.forward(chunks([3] * (STEP_ROWS + 1)))
    runner.forward([*chunks([3, 40]), Chunk(token_ids=[1, 2], start=0, block_table=[0])])
    runner.forward(chunks([3, 40]), on_layer=lambda _: None)
    assert used == [STEP_ROWS]


def test_something_else_may_be_done_while_a_step_runs(runner: ModelRunner) -> None:
    passed = chunks([3, 40])
    done: list[str] = []
    inputs = runner.prepare(passed)
    runner.step(inputs, [3, 10], lambda: done.append("other"))
    assert done == ["other"]


def test_other_models_have_none(folder: Path) -> None:
    assert make(folder, torch.float32)._model._step is None
    assert step_cpu.step([], None) is None


def test_parts_of_a_step_are_told_to_the_watch(runner: ModelRunner) -> None:
    before = runner.watch.seconds
    runner.watch.begin()
    runner.forward(chunks([40, 3]))
    runner.watch.end()
    after = runner.watch.seconds
    grown = {part for part, seconds in after.items() if seconds > before[part]}
    mlp = EXPERTS if runner.experts.held(0) is not None else DENSE
    assert grown == {ATTENTION, mlp, HEAD, REST}
    assert all(seconds >= 0 for seconds in after.values())
