"""A whole model by a GPU's kernels, against Hugging Face's; interpreted where there is no GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import kernels
from engine.config import load_config
from engine.errors import UnsupportedError
from engine.kernels import argmax_kernel
from engine.kernels.table import PagedKernels
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, sample
from engine.step_graphs import capture as cuda_graph
from engine.step_graphs import key_sizes, row_sizes
from tests.unit.engine.checkpoints import hugging_face_logits
from tests.unit.engine.conftest import MakeRunner

TOKENS = [(7 * i * i + 3 * i) % 100 for i in range(45)]
Make = Callable[[Path, torch.dtype], ModelRunner]


def run_again(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Stand in for a CUDA graph where there is none: all that may differ is in the same memory."""
    result = run()

    def replay() -> None:
        result.copy_(run())

    return replay, result


RECORD = cuda_graph if torch.cuda.is_available() else run_again


@pytest.fixture
def make(gpu: PagedKernels, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runners whose cache is full of NaN, by a GPU's kernels wherever they are."""
    monkeypatch.setitem(kernels._KERNELS, device.type, kernels._KERNELS["cuda"])

    def made(folder: Path, dtype: torch.dtype) -> ModelRunner:
        runner = ModelRunner(
            folder=folder,
            config=load_config(folder),
            dtype=dtype,
            device=device,
            num_blocks=32,
            block_size=8,
        )
        runner.cache.tensor.fill_(torch.nan)
        return runner

    return made


def test_prompts_in_pieces_and_steps_in_a_batch_equal_hugging_face_in_fp32(
    make: Make, checkpoint: Path
) -> None:
    runner = make(checkpoint, torch.float32)
    wanted_TV = hugging_face_logits(checkpoint, TOKENS)
    blocks, others = [3, 1, 7, 5, 2, 9], [11, 10, 12]
    runner.forward([Chunk(token_ids=TOKENS[:13], start=0, block_table=blocks)])
    piece = Chunk(token_ids=TOKENS[13:43], start=13, block_table=blocks)
    other = Chunk(token_ids=TOKENS[:20], start=0, block_table=others)
    of_prompts_SV = runner.forward([piece, other]).cpu()
    torch.testing.assert_close(of_prompts_SV, wanted_TV[[42, 19]], atol=1e-4, rtol=0)
    step = Chunk(token_ids=TOKENS[43:44], start=43, block_table=blocks)
    third = Chunk(token_ids=TOKENS[:2], start=0, block_table=[20])
    other = Chunk(token_ids=TOKENS[20:21], start=20, block_table=others)
    mixed_SV = runner.forward([other, third, step]).cpu()
    torch.testing.assert_close(mixed_SV, wanted_TV[[20, 1, 43]], atol=1e-4, rtol=0)
    step = Chunk(token_ids=TOKENS[44:], start=44, block_table=blocks)
    other = Chunk(token_ids=TOKENS[21:22], start=21, block_table=others)
    steps_SV = runner.forward([other, step]).cpu()
    torch.testing.assert_close(steps_SV, wanted_TV[[21, 44]], atol=1e-4, rtol=0)


def test_recorded_steps_give_what_others_do(make: Make, checkpoint: Path) -> None:
    wanted_TV = hugging_face_logits(checkpoint, TOKENS)
    runner = make(checkpoint, torch.float32)
    lengths, tables = (11, 30, 3), ([3, 1], [7, 5, 2, 9], [11])
    for length, table in zip(lengths, tables, strict=True):
        runner.forward([Chunk(token_ids=TOKENS[:length], start=0, block_table=table)])
    kept = runner.cache.tensor.clone()
    assert runner.record_steps(max_sequences=3, max_tokens=64, capture=RECORD) == 3
    assert torch.equal(runner.cache.tensor.nan_to_num(-9.0), kept.nan_to_num(-9.0))
    called: list[str] = []
    for rows in ([0, 1, 2], [2], [1, 0], [0, 1, 2]):
        chunks = [
            Chunk(token_ids=[TOKENS[lengths[i]]], start=lengths[i], block_table=tables[i])
            for i in rows
        ]
        inputs = runner.prepare(chunks)
        ids = [chunk.token_ids[0] for chunk in chunks]
        logits_SV = runner.step(inputs, ids, lambda: called.append("meanwhile"))
        wanted_SV = wanted_TV[[lengths[i] for i in rows]]
        torch.testing.assert_close(logits_SV.cpu(), wanted_SV, atol=1e-4, rtol=0)
    assert len(called) == 4


def test_larger_steps_than_were_recorded_are_run(make: Make, checkpoint: Path) -> None:
    wanted_TV = hugging_face_logits(checkpoint, TOKENS)
    runner = make(checkpoint, torch.float32)
    runner.record_steps(max_sequences=1, max_tokens=16, capture=RECORD)
    for tables in ([[3, 1], [4, 2]], [[3, 1, 5]]):  # too many, and one that is too long
        length = 8 * len(tables[0]) - 1
        for table in tables:
            runner.forward([Chunk(token_ids=TOKENS[:length], start=0, block_table=table)])
        chunks = [Chunk(token_ids=[TOKENS[length]], start=length, block_table=t) for t in tables]
        for logits_V in runner.forward(chunks):
            torch.testing.assert_close(logits_V.cpu(), wanted_TV[length], atol=1e-4, rtol=0)


def test_sizes_of_recorded_passes() -> None:
    assert row_sizes(1) == [1]
    assert row_sizes(3) == [1, 2, 3]
    assert row_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert key_sizes(100) == [100]
    assert key_sizes(40_000) == [1024, 4096, 16384, 40_000]


def test_steps_on_a_cpu_are_not_recorded(checkpoint: Path, make_runner: MakeRunner) -> None:
    with pytest.raises(UnsupportedError, match="on the device cpu cannot be recorded"):
        make_runner(checkpoint).record_steps(max_sequences=1, max_tokens=16)


def test_bf16_is_as_near_to_fp32_as_hugging_face_is(make: Make, checkpoint: Path) -> None:
    runner = make(checkpoint, torch.bfloat16)
    exact_TV = hugging_face_logits(checkpoint, TOKENS)
    theirs_TV = hugging_face_logits(checkpoint, TOKENS, torch.bfloat16)
    chunk = Chunk(token_ids=TOKENS, start=0, block_table=range(6))
    (ours_TV,) = runner.forward_all([chunk])
    ours, theirs = ((each.cpu() - exact_TV).square().mean() for each in (ours_TV, theirs_TV))
    assert ours.sqrt() <= 2 * theirs.sqrt()


@pytest.mark.usefixtures("make")
def test_the_greatest_is_the_first_of_equals_or_of_nans(device: torch.device) -> None:
    rows = torch.zeros(4, 50_000, device=device)
    rows[0, [17, 40_000]] = 2.0
    rows[1, [5, 300]] = torch.nan
    rows[1, 2] = torch.inf
    rows[2, :] = -torch.inf
    rows[3, 49_999] = 1e-30
    assert argmax_kernel(device)(rows) == [17, 5, 0, 49_999]


@pytest.mark.usefixtures("make")
def test_tokens_are_drawn_as_by_torch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_SV = 3 * torch.randn(8, 500, generator=torch.Generator().manual_seed(1))
    ways = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "presence_penalty": 1.5},
        {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"presence_penalty": 2.0},
    ]
    states = [
        SequenceState(
            SamplingParams(**way, seed=seed),  # type: ignore[arg-type]
            prompt_len=9,
            prompt_ids=range(9),
            output_ids=(40, 41, 41),
            min_new_tokens=5,
            suppressed_ids=(3, 4),
        )
        for seed, way in enumerate(ways)
    ]
    found = [each.token_id for each in sample(logits_SV.to(device), states)]
    monkeypatch.undo()  # from here on by the CPU's
    assert found == [each.token_id for each in sample(logits_SV, states)]


@pytest.mark.usefixtures("make")
def test_what_is_to_be_deterministic_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match="no deterministic kernels for the device cuda"):
        kernels.attention_kernel(device, deterministic=True)
