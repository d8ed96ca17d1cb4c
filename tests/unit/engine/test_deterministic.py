"""A deterministic runner's logits: a sequence's bits in random company are those of it alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import load_config
from engine.dispatch import ExpertMap
from engine.errors import UnsupportedError
from engine.parallel import Layout
from engine.runner import Chunk, ModelRunner
from engine.sampling import Sampled, SamplingParams, SequenceState, sample, sample_apart
from tests.unit.engine.checkpoints import ARCHITECTURES, DEEPSEEK_V2, DEEPSEEK_V3, make_checkpoint
from tests.unit.engine.dispatch.loopback import LoopbackExperts, Meeting

BLOCK = 16
STEPS = 4
# Lengths where a kernel cuts, pads or chooses another form, and any others.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 1999, 2000]
POOL = 80
BATCHES = 200
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=[*ARCHITECTURES, DEEPSEEK_V2, DEEPSEEK_V3])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sizes that fill no panel and no register, so that the last elements are computed apart.
    heads: dict[str, Any] = {"head_dim": 48} if request.param in ARCHITECTURES else {}
    return make_checkpoint(
        tmp_path_factory.mktemp("model"),
        request.param,
        hidden_size=80,
        intermediate_size=104,
        vocab_size=131,
        **heads,
    )


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def runner(request: pytest.FixtureRequest, folder: Path) -> ModelRunner:
    return make(folder, request.param)


def make(
    folder: Path, dtype: torch.dtype, *, deterministic: bool = True, **more: Any
) -> ModelRunner:
    made = ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=dtype,
        device=torch.device("cpu"),
        num_blocks=3000,
        block_size=BLOCK,
        deterministic=deterministic,
        **more,
    )
    generator = torch.Generator().manual_seed(1)
    made.cache.tensor.copy_(torch.randn(made.cache.tensor.shape, generator=generator).to(dtype))
    return made


@dataclass(kw_only=True)
class Decoded:
    """A sequence whose next steps have been taken alone: their tokens, and what they gave."""

    start: int
    table: Sequence[int]
    token_ids: list[int]
    logits: list[Tensor]
    step: int = 0

    def chunk(self) -> Chunk:
        return Chunk(
            token_ids=[self.token_ids[self.step]],
            start=self.start + self.step,
            block_table=self.table,
        )


def alone(runner: ModelRunner, length: int, table: Sequence[int], seed: int) -> Decoded:
    """Take steps of one sequence with `length` keys in the first one, greedily or seeded."""
    params = SamplingParams(temperature=float(seed % 2), seed=seed)
    state = SequenceState(params, prompt_len=length)
    found = Decoded(start=length - 1, table=table, token_ids=[seed % 128], logits=[])
    for found.step in range(STEPS):
        [logits_V] = runner.forward([found.chunk()])
        found.logits.append(logits_V)
        token_id = sample(logits_V[None], [state])[0].token_id
        state.append(token_id)
        found.token_ids.append(token_id)
    found.step = 0
    return found


def pool(runner: ModelRunner) -> list[Decoded]:
    rng = random.Random(3)
    blocks = list(range(runner.num_blocks))
    rng.shuffle(blocks)
    lengths = LENGTHS + [int(2000 ** rng.random()) for _ in range(POOL - len(LENGTHS))]
    tables = [[blocks.pop() for _ in range(-(-(n + STEPS) // BLOCK))] for n in lengths]
    return [
        alone(runner, length, table, seed)
        for seed, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]


def assert_company_does_not_matter(runner: ModelRunner, batches: int, most: int = 64) -> None:
    rng, sequences = random.Random(4), pool(runner)
    for _ in range(batches):
        batch = rng.sample(sequences, rng.randint(1, most))
        logits_SV = runner.forward([each.chunk() for each in batch])
        for each, logits_V in zip(batch, logits_SV, strict=True):
            assert torch.equal(logits_V, each.logits[each.step]), (each.start, each.step)
            each.step = (each.step + 1) % STEPS


def test_a_decoding_sequence_gives_the_same_bits_in_any_batch(runner: ModelRunner) -> None:
    slow = runner.cache.tensor.dtype == torch.float16  # in torch's operators, on most machines
    assert_company_does_not_matter(runner, BATCHES // 4 if slow else BATCHES)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_that_holds_for_any_number_of_threads(
    tmp_path: Path, threads: int, dtype: torch.dtype
) -> None:
    # Large enough for products and rows to be shared out.
    folder = make_checkpoint(
        tmp_path,
        num_hidden_layers=2,
        hidden_size=320,
        moe_intermediate_size=200,
    )
    assert_company_does_not_matter(make(folder, dtype), 12)


def test_batches_beyond_those_of_one_region_give_the_same_bits(runner: ModelRunner) -> None:
    assert_company_does_not_matter(runner, 8, most=POOL)


TOKENS = [(5 * i * i + i) % 128 for i in range(700)]


def prompt_logits(runner: ModelRunner, length: int, cuts: Sequence[int], first: int) -> Tensor:
    table = range(first, first + 50)
    logits_SV = None
    for start, end in pairwise([0, *cuts, length]):
        part = Chunk(token_ids=TOKENS[start:end], start=start, block_table=table, is_prompt=True)
        logits_SV = runner.forward([part])
    assert logits_SV is not None
    return logits_SV[0]


@pytest.mark.parametrize("length", [1, 2, 31, 33, 257, 700])
def test_a_prompt_gives_the_same_bits_however_it_is_cut(runner: ModelRunner, length: int) -> None:
    rng = random.Random(length)
    expected_V = prompt_logits(runner, length, [], 0)
    expected_cells = cells_of(runner, range(50), length)
    # Cut before the last token too: its chunk is one token, as a decoding sequence's.
    for cuts in ([length - 1], *[rng.sample(range(1, length), min(5, length - 1)) for _ in "123"]):
        cuts = sorted(cut for cut in cuts if 0 < cut < length)
        assert torch.equal(prompt_logits(runner, length, cuts, 50), expected_V), cuts
        assert torch.equal(cells_of(runner, range(50, 100), length), expected_cells), cuts


def cells_of(runner: ModelRunner, table: range, length: int) -> Tensor:
    """Return the keys and values of a sequence's tokens, [layers, 2, G, length, H]."""
    cells = runner.cache.tensor[:, :, table.start : table.stop].transpose(2, 3)
    return cells.flatten(3, 4)[:, :, :, :length].clone()


def test_a_prompt_gives_the_same_bits_beside_any_others(runner: ModelRunner) -> None:
    rng = random.Random(5)
    lengths = [1, 2, 30, 64, 65, 200, 513, 700]
    expected = {n: prompt_logits(runner, n, [], 0) for n in lengths}
    for _ in range(15):
        company = rng.sample(lengths, rng.randint(1, len(lengths)))
        chunks, places = [], []
        for place, length in enumerate(company):
            table = range(50 * place, 50 * place + 50)
            start = rng.randrange(length)
            if start:
                first = Chunk(token_ids=TOKENS[:start], start=0, block_table=table, is_prompt=True)
                runner.forward([first])
            chunks.append(
                Chunk(
                    token_ids=TOKENS[start:length],
                    start=start,
                    block_table=table,
                    is_prompt=True,
                )
            )
            places.append(length)
        for length, logits_V in zip(places, runner.forward(chunks), strict=True):
            assert torch.equal(logits_V, expected[length]), (company, length)


def test_decoding_sequences_give_the_same_bits_beside_prompts(runner: ModelRunner) -> None:
    rng, sequences = random.Random(6), pool(runner)
    used = {block for each in sequences for block in each.table}
    free = [block for block in range(runner.num_blocks) if block not in used]
    for _ in range(10):
        batch = rng.sample(sequences, rng.randint(1, 20))
        prompt = Chunk(
            token_ids=TOKENS[: rng.randint(1, 300)], start=0, block_table=free[:20], is_prompt=True
        )
        logits_SV = runner.forward([prompt, *(each.chunk() for each in batch)])[1:]
        for each, logits_V in zip(batch, logits_SV, strict=True):
            assert torch.equal(logits_V, each.logits[each.step]), (each.start, each.step)


def test_a_step_in_one_region_gives_the_bits_of_single_kernels(folder: Path) -> None:
    runner = make(folder, torch.bfloat16)
    if runner._model._step is None:
        pytest.skip("there is no C++ compiler, or no AVX512-BF16")
    chunks = [each.chunk() for each in pool(runner)[:40]]
    expected_SV = runner.forward(chunks)
    runner._model._step = None
    assert torch.equal(runner.forward(chunks), expected_SV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_any_runner_does(folder: Path, dtype: torch.dtype) -> None:
    runner, usual = make(folder, dtype), make(folder, dtype, deterministic=False)
    chunks = [Chunk(token_ids=TOKENS[:300], start=0, block_table=range(20), is_prompt=True)]
    for step in range(2):
        expected_SV = usual.forward(chunks)
        error = (runner.forward(chunks) - expected_SV).square().mean().sqrt()
        assert error < (1e-5 if dtype == torch.float32 else 0.05) * expected_SV.std()
        chunks = [Chunk(token_ids=TOKENS[:1], start=300 + step, block_table=range(20))]


def test_what_cannot_be_deterministic_is_refused(folder: Path) -> None:
    ring = Layout(cp=2, cp_grain=BLOCK)
    with pytest.raises(UnsupportedError, match="cp=2 merges attention"):
        make(folder, torch.float32, layout=ring)
    config, layout = load_config(folder), Layout(dp=2)
    if config.moe is None:
        return
    shared = LoopbackExperts(2, 0, Meeting(2))
    for dispatch, maps, why in (
        ("auto", None, "dispatch=auto chooses by timing"),
        ("allgather", {0: ExpertMap.even(8, layout)}, "dispatch=allgather adds up by where"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            make(
                folder,
                torch.float32,
                layout=layout,
                experts=shared,
                dispatch=dispatch,
                expert_maps=maps,
            )


def test_a_drawn_token_and_its_report_do_not_depend_on_other_rows() -> None:
    logits_SV = torch.randn(9, 517, generator=torch.Generator().manual_seed(7))
    params = [
        SamplingParams(temperature=row % 3 / 2, top_p=0.9, top_k=8 * row, seed=row, logprobs=most)
        for row, most in enumerate((None, 2, None, None, 5, None, 0, None, None))
    ]

    def states(rows: Sequence[int]) -> list[SequenceState]:
        return [SequenceState(params[row], prompt_len=1) for row in rows]

    rows = range(9)
    together = sample_apart(sample, logits_SV, states(rows))
    calls: list[int] = []

    def counted(logits_RV: Tensor, states: Sequence[SequenceState]) -> list[Sampled]:
        calls.append(len(states))
        return sample(logits_RV, states)

    for some in ([4], [8, 0, 3], [*reversed(rows)]):
        assert sample_apart(counted, logits_SV[some], states(some)) == [together[r] for r in some]
    assert calls == [1, 2, 1, 2, *[1] * 7]
