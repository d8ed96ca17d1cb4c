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
from tests.unit.engine.checkpoints import hugging_face_logits

TOKENS = [(7 * i * i + 3 * i) % 100 for i in range(45)]
Make = Callable[[Path, torch.dtype], ModelRunner]


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
