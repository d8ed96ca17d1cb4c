"""Chunks, batches and block tables: however a prompt is run, its logits stay the same."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import batch
from engine.config import load_config
from engine.errors import BatchError, UnsupportedError
from engine.kernels import attention_kernel
from engine.parallel import Layout
from engine.runner import Chunk, ModelRunner
from tests.unit.engine.conftest import MakeRunner

TOKENS = [(5 * i * i + i) % 128 for i in range(60)]
TABLE = [9, 3, 30, 31, 32, 0, 63, 17]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


def plain_logits(runner: ModelRunner, token_ids: Sequence[int]) -> torch.Tensor:
    """Run a sequence alone and at once in the last blocks, [T, V]."""
    table = range(40, 48)
    return runner.forward_all([Chunk(token_ids=token_ids, start=0, block_table=table)])[0]


@given(cuts=st.sets(st.integers(1, 59), max_size=8))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_chunked_prefill_equals_one_pass(runner: ModelRunner, cuts: set[int]) -> None:
    expected_TV = plain_logits(runner, TOKENS)
    bounds = [0, *sorted(cuts), len(TOKENS)]
    for start, end in pairwise(bounds):
        chunk = Chunk(token_ids=TOKENS[start:end], start=start, block_table=TABLE)
        logits_SV = runner.forward([chunk])
        assert_same(logits_SV[0], expected_TV[end - 1])


def test_token_by_token_equals_one_pass(runner: ModelRunner) -> None:
    expected_TV = plain_logits(runner, TOKENS)
    for place, token_id in enumerate(TOKENS):
        chunk = Chunk(token_ids=[token_id], start=place, block_table=TABLE)
        assert_same(runner.forward([chunk])[0], expected_TV[place])


def test_a_step_may_be_laid_out_before_its_tokens_are_known(runner: ModelRunner) -> None:
    tables, lengths = ([9, 3], [30, 31, 32], [0, 63]), (12, 17, 3)
    for table, length in zip(tables, lengths, strict=True):
        runner.forward([Chunk(token_ids=TOKENS[:length], start=0, block_table=table)])
    ids = [7, 100, 3]

    def chunks(token_ids: Sequence[int]) -> list[Chunk]:
        return [
            Chunk(token_ids=[token_id], start=length, block_table=table)
            for token_id, length, table in zip(token_ids, lengths, tables, strict=True)
        ]

    expected_SV = runner.forward(chunks(ids))
    inputs = runner.prepare(chunks([0, 0, 0]))
    assert runner.step(inputs, ids, lambda: None).equal(expected_SV)
    with pytest.raises(BatchError, match="vocabulary"):
        runner.step(inputs, [7, 1 << 20, 3], lambda: None)


def test_any_mix_of_chunks_equals_each_alone(runner: ModelRunner) -> None:
    # (tokens in the cache, new tokens): decodes and prefills, long and short, interleaved.
    shapes = [(0, 20), (30, 1), (7, 13), (0, 1), (59, 1), (16, 8), (8, 1), (15, 2)]
    tables = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(8, 8).tolist()
    expected_V = []
    for start, count in shapes:
        chunk = Chunk(token_ids=TOKENS[: start + count], start=0, block_table=TABLE)
        expected_V.append(runner.forward([chunk])[0])
    for (start, _), table in zip(shapes, tables, strict=True):
        if start:
            runner.forward([Chunk(token_ids=TOKENS[:start], start=0, block_table=table)])
    chunks = [
        Chunk(token_ids=TOKENS[start : start + count], start=start, block_table=table)
        for (start, count), table in zip(shapes, tables, strict=True)
    ]
    assert_same(runner.forward(chunks), torch.stack(expected_V))


@pytest.mark.parametrize("most_tokens", [1, 1 << 15])
def test_the_last_tokens_alone_are_as_among_all(
    checkpoint: Path, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, most_tokens: int
) -> None:
    monkeypatch.setattr(batch, "_LAST_TOKENS", most_tokens)
    runner = make_runner(checkpoint)
    runner.cache.tensor.fill_(torch.nan)
    cached = [Chunk(token_ids=TOKENS[:n], start=0, block_table=[at]) for n, at in ((3, 0), (5, 1))]
    runner.forward(cached)
    chunks = [
        Chunk(token_ids=TOKENS[:9], start=0, block_table=[2, 3]),
        Chunk(token_ids=TOKENS[3:4], start=3, block_table=[0]),
        Chunk(token_ids=TOKENS[5:30], start=5, block_table=[1, 4, 5, 6]),
        Chunk(token_ids=TOKENS[:1], start=0, block_table=[7]),
    ]
    expected_SV = torch.stack([logits_TV[-1] for logits_TV in runner.forward_all(chunks)])
    torch.testing.assert_close(runner.forward(chunks), expected_SV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_decode_batches_of_unlike_lengths_equal_each_alone(
    checkpoint: Path, make_runner: MakeRunner, dtype: torch.dtype
) -> None:
    runner = make_runner(checkpoint, dtype=dtype, num_blocks=400)
    runner.cache.tensor.fill_(torch.nan)
    lengths = [1, 400, 380, 33, 7, 64, 250, 8, 255, 120, 16, 500]
    first, chunks = 0, []
    for length in lengths:
        blocks = -(-length // 8)
        table = list(range(first, first + blocks))[::-1]
        first += blocks
        ids = [(length * 31 + i * i) % 128 for i in range(length)]
        if length > 1:
            runner.forward([Chunk(token_ids=ids[:-1], start=0, block_table=table)])
        chunks.append(Chunk(token_ids=ids[-1:], start=length - 1, block_table=table))
    alone_SV = torch.cat([runner.forward([chunk]) for chunk in chunks])
    together_SV = runner.forward(chunks)
    if dtype == torch.float32:
        assert_same(together_SV, alone_SV)
    else:
        assert (together_SV - alone_SV).square().mean().sqrt() < 0.1 * alone_SV.std()


def test_block_tables_may_be_in_any_order_and_longer_than_needed(runner: ModelRunner) -> None:
    expected_SV = plain_logits(runner, TOKENS[:20])[-1:]
    for table in ([0, 1, 2], [50, 2, 31], [7, 6, 5, 4, 3, 2, 1, 0]):
        logits_SV = runner.forward([Chunk(token_ids=TOKENS[:20], start=0, block_table=table)])
        assert_same(logits_SV, expected_SV)


def test_same_result_for_another_block_size(checkpoint: Path, make_runner: MakeRunner) -> None:
    results = []
    for block_size in (1, 5, 16):
        runner = make_runner(checkpoint, num_blocks=64, block_size=block_size)
        table = range(-(-41 // block_size))
        runner.forward([Chunk(token_ids=TOKENS[:40], start=0, block_table=table)])
        results.append(
            runner.forward([Chunk(token_ids=TOKENS[40:41], start=40, block_table=table)])
        )
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_each_layer_is_reported_once_its_keys_and_values_are_cached(runner: ModelRunner) -> None:
    seen: list[int] = []

    def on_layer(layer: int) -> None:
        cached = runner.cache.tensor[layer, :, 5, :, :4]
        assert not cached.isnan().any()
        assert runner.cache.tensor[layer + 1 :, :, 5].isnan().all()
        seen.append(layer)

    runner.forward([Chunk(token_ids=TOKENS[:4], start=0, block_table=[5])], on_layer)
    assert seen == list(range(runner.config.num_layers))


def test_only_the_chunks_own_cells_are_written(runner: ModelRunner) -> None:
    runner.forward([Chunk(token_ids=TOKENS[:10], start=0, block_table=[4, 2])])
    written = ~runner.cache.tensor.isnan().any(-1).any(3).any(0).any(0)  # [blocks, places]
    expected = torch.zeros_like(written)
    expected[4] = True
    expected[2, :2] = True
    assert written.equal(expected)


def test_warm_up_leaves_the_cache_empty(checkpoint: Path, make_runner: MakeRunner) -> None:
    runner = make_runner(checkpoint, num_blocks=3)
    runner.warm_up()
    assert not runner.cache.tensor.any()


def test_block_bytes_are_those_of_the_cache(checkpoint: Path, make_runner: MakeRunner) -> None:
    runner = make_runner(checkpoint, dtype=torch.bfloat16, num_blocks=10)
    block_bytes = ModelRunner.kv_block_bytes(runner.config, torch.bfloat16, 8)
    assert 10 * block_bytes == runner.cache.tensor.nbytes
    config = runner.config
    assert runner.cache.tensor.shape == (
        config.num_layers, config.kv_planes, 10, config.num_kv_heads, 8, config.head_size
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk(token_ids=[], start=0, block_table=[0]), "0 tokens"),
        (Chunk(token_ids=[1], start=-1, block_table=[0]), "from -1"),
        (Chunk(token_ids=[128], start=0, block_table=[0]), "vocabulary of 128"),
        (Chunk(token_ids=[-1], start=0, block_table=[0]), "vocabulary of 128"),
        (Chunk(token_ids=[1] * 9, start=0, block_table=[0]), "need 2 blocks; the table has 1"),
        (Chunk(token_ids=[1], start=0, block_table=[64]), "outside the cache's 64"),
        (Chunk(token_ids=[1], start=0, block_table=[-1]), "outside the cache's 64"),
    ],
)
def test_a_chunk_that_cannot_run_is_refused_before_anything_is_written(
    runner: ModelRunner, chunk: Chunk, message: str
) -> None:
    good = Chunk(token_ids=[1], start=0, block_table=[1])
    with pytest.raises(BatchError, match=message):
        runner.forward([good, chunk])
    assert runner.cache.tensor.isnan().all()


def test_an_empty_pass_is_refused(runner: ModelRunner) -> None:
    with pytest.raises(BatchError, match="at least one chunk"):
        runner.forward([])


def test_more_stages_than_layers_are_refused_with_what_would_do(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"pp=4 needs a layer.*has 3: use pp=1 to 3$"):
        Layout(pp=4).check(load_config(checkpoint))


@pytest.mark.parametrize(("layers", "pp"), [(3, 2), (3, 3), (28, 4), (30, 4), (7, 1)])
def test_every_layer_is_one_stages_and_stages_are_alike(layers: int, pp: int) -> None:
    stages = [Layout(pp=pp, pp_rank=rank).layers(layers) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert max(map(len, stages)) == Layout(pp=pp).most_layers(layers) <= min(map(len, stages)) + 1


@pytest.mark.parametrize("tp", [3, 8])
def test_tp_that_divides_no_heads_is_refused_with_what_would_do(checkpoint: Path, tp: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"tp={tp} does not divide.*use tp=1, 2, 4$"):
        Layout(tp=tp).check(load_config(checkpoint))


@pytest.mark.parametrize(
    ("tp", "heads"),
    [(1, [(0, 4)]), (2, [(0, 2), (2, 4)]), (8, [(i // 2, i // 2 + 1) for i in range(8)])],
)
def test_kv_heads_are_split_and_then_shared(tp: int, heads: list[tuple[int, int]]) -> None:
    parts = [Layout(tp=tp, tp_rank=rank).kv_part(4) for rank in range(tp)]
    assert [(part.start, part.stop) for part in parts] == heads


@pytest.mark.parametrize("vocab", [1, 5, 8, 211])
def test_every_token_of_the_vocabulary_is_one_ranks(vocab: int) -> None:
    parts = [Layout(tp=4, tp_rank=rank).ragged_part(vocab) for rank in range(4)]
    assert [i for part in parts for i in range(vocab)[part]] == list(range(vocab))


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="meta; there are: cpu"):
        attention_kernel(torch.device("meta"))
