"""What the decode benchmark asks for, counts and makes of its figures."""

import itertools
from dataclasses import replace

import pytest

from bench.decodes import limit
from bench.decodes.figures import (
    Gaps,
    Given,
    gaps_s,
    latency_rows,
    limit_speed,
    overhead_row,
    speed,
    speed_rows,
    step_s,
)
from bench.decodes.works import LOAD, WORKS, Work, prompts, together
from bench.prefills.works import BLOCK_SIZE
from engine.config import ModelConfig, MoeConfig
from engine.rope import Rope

DENSE = ModelConfig(
    architecture="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    intermediate_size=96,
    vocab_size=500,
    rms_norm_eps=1e-6,
    rope=Rope(theta=1e6),
    qk_norm=True,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
    dtype="bfloat16",
    eos_token_ids=(2,),
    moe=None,
)
MOE = replace(
    DENSE,
    moe=MoeConfig(
        num_experts=8,
        top_k=2,
        intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=(0,),
    ),
)
ATTENTION = 64 * (4 + 2 * 2) * 32 + 4 * 32 * 64
HEAD = 64 * 500


def test_a_step_reads_each_weight_once_and_each_sequences_keys_and_values() -> None:
    found = limit.step_bytes(DENSE, element_bytes=2, batch=3, cached_tokens=10.5)
    weights = 2 * (ATTENTION + 3 * 64 * 96) + HEAD
    assert found == 2 * (weights + 3 * 10.5 * 2 * 2 * 2 * 32)


def test_of_a_sparse_layer_the_chosen_experts_are_read_and_of_a_dense_one_all() -> None:
    asked = {"element_bytes": 2, "batch": 1, "cached_tokens": 0}
    found = limit.step_bytes(MOE, experts=3.5, **asked)
    router, expert, dense = 64 * 8, 3 * 64 * 48, 3 * 64 * 96
    assert found == 2 * (2 * ATTENTION + dense + router + 3.5 * expert + HEAD)


def test_the_limit_is_the_batch_over_the_time_of_reading() -> None:
    work = Work(batch=4, context=100)
    assert limit_speed(work, 50.0, [100.0, 1000.0, 200.0]) == 4 * 200 / 50


def test_works_are_all_batches_by_all_contexts_with_room_for_their_last_token() -> None:
    found = {(work.batch, work.context) for work in WORKS}
    assert found == set(itertools.product((1, 4, 16, 32), (128, 1024, 4096)))
    work = Work(batch=3, context=2 * BLOCK_SIZE - 2, steps=1)
    assert work.blocks == 3 * 2
    assert replace(work, steps=2).blocks == 3 * 3


def test_a_step_looks_at_its_own_token_and_all_before_it() -> None:
    # After 10 tokens three steps look at 11, 12 and 13.
    assert Work(batch=1, context=10, steps=3).mean_cached == 12


def test_rounds_differ_and_everybody_gets_the_same() -> None:
    work = Work(batch=2, context=5)
    assert prompts(work, 50, 1) == prompts(work, 50, 1)
    assert prompts(work, 50, 1) != prompts(work, 50, 2)
    asked = prompts(work, 50, 1)
    assert together(work, asked) == [(prompt, work.steps + 1) for prompt in asked]


def test_a_load_is_random_but_the_same_for_everybody() -> None:
    made = LOAD.requests(50, 1)
    assert made == LOAD.requests(50, 1)
    assert made != LOAD.requests(50, 2)
    assert [len(prompt) for prompt, _ in made] == [LOAD.prompt] * LOAD.count
    assert {LOAD.least_tokens, LOAD.most_tokens} <= {
        tokens for number in range(5) for _, tokens in LOAD.requests(50, number)
    }
    assert all(LOAD.least_tokens <= tokens <= LOAD.most_tokens for _, tokens in made)


def test_steps_are_timed_between_two_of_the_whole_batch() -> None:
    steps = [(0.0, 1), (5.0, 3), (6.0, 3), (7.5, 3), (8.5, 3), (20.0, 2), (30.0, 3)]
    assert step_s(steps, 3) == 1.0
    with pytest.raises(ValueError, match="no two in a row of all 4 sequences"):
        step_s(steps, 4)


def test_a_clients_speed_is_that_of_the_time_in_which_all_get_tokens() -> None:
    arrivals = [[0.0, 1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5]]
    assert speed(arrivals) == (2 + 2) / 2
    with pytest.raises(ValueError, match="2 sequences that never got tokens at the same time"):
        speed([[0.0, 1.0], [2.0, 3.0]])


def test_gaps_are_within_a_request_while_a_steady_number_is_under_way() -> None:
    first, second = [0.0, 1.0, 2.0], [0.5, 1.5, 3.5, 4.0]
    third, last = [3.0, 5.0, 9.0], [7.0, 8.0]
    assert gaps_s([first, second, third, last], in_flight=2) == [0.5, 2.0]


def test_each_peer_has_a_row_of_speed_beside_the_same_limit() -> None:
    ours = Given(name="ours", speeds=[2.0, 2.0])
    peers = [Given(name=name, speeds=[1.0, 1.0]) for name in ("transformers 5", "vLLM 0")]
    rows = speed_rows("dense", ours, peers, 4.0)
    assert [row.row for row in rows] == ["dense, beside transformers", "dense, beside vLLM"]
    assert {(row.ours, row.peer, row.limit, row.unit) for row in rows} == {(2, 1, 4, "tokens/s")}
    [alone] = speed_rows("dense", ours, [], None)
    assert (alone.row, alone.peer, alone.limit) == ("dense", None, None)


def test_overhead_is_in_milliseconds() -> None:
    row = overhead_row("overhead", [0.5e-3, 0.5e-3])
    assert (row.ours, row.unit, row.higher_is_better) == (0.5, "ms", False)


def test_latencies_are_percentiles_of_each_round_and_their_ratio() -> None:
    even = [0.010] * 300
    uneven = [0.010] * 290 + [0.020] * 10
    ours, peer = Gaps(name="ours", rounds=[even, even]), Gaps(name="vLLM", rounds=[uneven, uneven])
    ratio, p50, p99 = latency_rows("load", ours, peer)
    assert (ratio.row, ratio.unit) == ("load, p99/p50", "x")
    assert [ratio.ours, ratio.peer] == pytest.approx([1, 2])
    assert [p50.ours, p50.peer] == pytest.approx([10, 10])
    assert [p99.ours, p99.peer] == pytest.approx([10, 20])
    assert (p50.row, p50.unit) == ("load, p50", "ms")
    assert latency_rows("load", ours, None)[0].peer is None
