"""What the prefill benchmark computes, counts and makes of its figures."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.prefills import limit, ring
from bench.prefills.figures import Computed, Prompts, RingRounds, attention_row, variant_rows
from bench.prefills.limit import Product
from bench.prefills.works import WORKS, Span, Work, block_table, blocks, passes, prompts
from engine.config import ModelConfig, MoeConfig
from engine.rope import Rope

SHORT = Work(tokens=128, count=16)
UNEVEN = Work(tokens=100, count=3)
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
        mlp_only_layers=(),
    ),
)


@pytest.mark.parametrize("work", [*WORKS, UNEVEN])
@pytest.mark.parametrize("budget", [64, 2048])
def test_passes_have_every_token_once_in_order_and_keep_to_the_budget(
    work: Work, budget: int
) -> None:
    made = passes(work, budget)
    found = [(s.prompt, i) for spans in made for s in spans for i in range(s.start, s.end)]
    assert found == [(prompt, i) for prompt in range(work.count) for i in range(work.tokens)]
    *full, last = (sum(span.end - span.start for span in spans) for spans in made)
    assert set(full) <= {budget}
    assert 0 < last <= budget


def test_prompts_have_blocks_of_their_own_within_the_cache() -> None:
    tables = [block_table(UNEVEN, prompt, 32) for prompt in range(UNEVEN.count)]
    assert [block for table in tables for block in table] == list(range(12))
    assert blocks([UNEVEN, SHORT], 32) == 64


def test_rounds_differ_and_everybody_gets_the_same() -> None:
    assert prompts(UNEVEN, 50, 1) == prompts(UNEVEN, 50, 1)
    assert prompts(UNEVEN, 50, 1) != prompts(UNEVEN, 50, 2)
    assert [len(prompt) for prompt in prompts(UNEVEN, 50, 1)] == [100] * 3


def test_products_of_a_prompt_are_those_of_the_model() -> None:
    found = limit.products(DENSE, Work(tokens=64, count=1), 2048)
    assert found == {
        Product(1, 64, 64, 4 * 32 + 2 * 2 * 32, weighted=True): 1,
        Product(1, 64, 4 * 32, 64, weighted=True): 1,
        Product(2, 128, 32, 64, weighted=False): 1,
        Product(2, 128, 64, 32, weighted=False): 1,
        # Of the last layer, keys and values of all tokens; the rest and the head of the last one.
        Product(1, 64, 64, 2 * 2 * 32, weighted=True): 1,
        Product(1, 1, 64, 4 * 32, weighted=True): 1,
        Product(1, 1, 4 * 32, 64, weighted=True): 1,
        Product(2, 2, 32, 64, weighted=False): 1,
        Product(2, 2, 64, 32, weighted=False): 1,
        Product(1, 64, 64, 192, weighted=True): 1,
        Product(1, 64, 96, 64, weighted=True): 1,
        Product(1, 1, 64, 192, weighted=True): 1,
        Product(1, 1, 96, 64, weighted=True): 1,
        Product(1, 1, 64, 500, weighted=True): 1,
    }


def test_only_chosen_experts_are_counted_and_share_the_tokens_evenly() -> None:
    found = limit.products(MOE, Work(tokens=64, count=1), 2048)
    assert found[Product(1, 64, 64, 8, weighted=True)] == 1  # the router
    assert found[Product(1, 64 * 2 // 8, 64, 96, weighted=True)] == 8
    assert found[Product(1, 1, 64, 96, weighted=True)] == 2  # of the last token
    assert Product(1, 64, 64, 192, weighted=True) not in found


def test_a_chunk_in_the_middle_of_a_prompt_has_no_head_and_no_last_mlp() -> None:
    work = Work(tokens=192, count=1)
    found = limit.products(DENSE, work, 64)
    assert found[Product(1, 1, 64, 500, weighted=True)] == 1
    assert found[Product(1, 64, 64, 192, weighted=True)] == 3


def test_attention_is_half_of_all_pairs_and_a_diagonal_however_it_is_chunked() -> None:
    whole = limit.flops(limit.attention(DENSE, [Span(0, 0, 4096)]))
    parts = [span for spans in passes(Work(tokens=4096, count=1), 1024) for span in spans]
    assert limit.flops(limit.attention(DENSE, parts)) == whole
    all_pairs = 4 * DENSE.num_heads * DENSE.head_size * 4096**2
    assert whole == all_pairs * (4096 + limit.SLICE_QUERIES) // (2 * 4096)


def test_seconds_are_those_of_each_product_as_often_as_it_is_needed() -> None:
    one, other = (Product(1, rows, 2, 2, weighted=True) for rows in (1, 2))
    assert limit.seconds(Counter({one: 3, other: 2}), {one: 10.0, other: 1.0}) == 32.0


def test_pass_kv_and_pass_q_bytes_are_counted_as_chosen_for_each_chunk() -> None:
    kv_bytes, q_bytes = 2 * 2 * 32 * 2, 4 * (32 * 2 + 33 * 4)
    chunks = [Span(0, 0, 100), Span(0, 10_000, 10_100)]
    assert ring.expected_bytes(DENSE, chunks) == 2 * 100 * (kv_bytes + q_bytes)


def test_chosen_crossing_is_where_both_variants_send_the_same() -> None:
    kv_bytes, q_bytes = 2 * 2 * 32 * 2, 4 * (32 * 2 + 33 * 4)
    found = ring.chosen_crossing(DENSE, cached=1000, most=4096)
    assert found is not None
    assert found * q_bytes >= (found + 1000) * kv_bytes
    assert (found - 1) * q_bytes < (found + 999) * kv_bytes
    assert ring.chosen_crossing(DENSE, cached=1000, most=found - 1) is None


def test_measured_crossing_lies_between_the_counts_where_the_times_do() -> None:
    q_s = {16: 1.0, 64: 1.0, 256: 1.0}
    assert ring.measured_crossing({16: 4.0, 64: 2.0, 256: 0.5}, q_s) == pytest.approx(128)
    assert ring.measured_crossing({16: 4.0, 64: 1.0, 256: 0.5}, q_s) == pytest.approx(64)


def test_measured_crossing_is_at_the_ends_where_one_variant_always_wins() -> None:
    q_s = {16: 1.0, 64: 1.0}
    assert ring.measured_crossing({16: 0.5, 64: 0.5}, q_s) == 16
    assert ring.measured_crossing({16: 2.0, 64: 2.0}, q_s) is None


def test_one_odd_figure_does_not_move_the_crossing_past_others() -> None:
    q_s = {1 << power: 1.0 for power in range(8)}
    kv_s = {new: 2.0 if new < 8 else 0.5 for new in q_s} | {64: 1.1}
    assert ring.measured_crossing(kv_s, q_s) == pytest.approx(4 * 2**0.5)


def computed(name: str, seconds: float, mib: int) -> Computed:
    return Computed(name=name, seconds=[seconds] * 3, peak_bytes=mib << 20)


def test_each_peer_has_a_row_of_speed_and_of_a_long_prompt_one_of_memory() -> None:
    one = Prompts(
        name="dense, long",
        work=WORKS[-1],
        limit_s=0.5,
        ours=computed("ours", 1.0, 100),
        peers=[computed("transformers 5", 2.0, 300), computed("vLLM 0", 4.0, 200)],
    )
    speed, _, memory, of_vllm = one.rows()
    assert speed.row == "dense, long, beside transformers"
    assert (speed.ours, speed.limit, speed.peer) == (32_768, 65_536, 16_384)
    assert (speed.unit, speed.higher_is_better, speed.spread) == ("tokens/s", True, 0)
    assert (memory.ours, memory.peer, memory.unit) == (100, 300, "MiB")
    assert (of_vllm.peer, of_vllm.peer_name, of_vllm.higher_is_better) == (200, "vLLM 0", False)
    assert len(replace(one, work=SHORT).rows()) == 2


def test_attention_is_given_in_operations_that_it_needs() -> None:
    row = attention_row("attention", 10**9, 0.25, [0.5] * 3, [1.0] * 3)
    assert (row.ours, row.limit, row.peer, row.unit) == (2.0, 4.0, 1.0, "GFLOP/s")


def test_a_ring_that_waits_longer_than_its_messages_take_hides_less_than_nothing() -> None:
    one = RingRounds(
        name="ring",
        tokens=100,
        expected_bytes=1 << 20,
        ring_s=[2.0, 2.0],
        one_rank_s=[1.0, 1.0],
        waited_s=[0.75, 0.75],
        alone_s=[0.5, 0.5],
        sent_bytes=[1 << 20, 1 << 20],
    )
    speed, sent, hidden = one.rows()
    assert (speed.ours, speed.peer) == (50, 100)
    assert (sent.ours, sent.limit) == (1, 1)
    assert hidden.ours == -50


def test_variants_have_a_row_for_each_count_of_new_tokens() -> None:
    kv_s, q_s = {16: [1.0, 1.0], 1024: [2.0, 2.0]}, {16: [3.0, 3.0], 1024: [4.0, 4.0]}
    rows = variant_rows("ring", kv_s, q_s)
    assert [(row.row, row.ours, row.peer) for row in rows] == [
        ("ring, 16 new, pass-KV", 1000, 3000),
        ("ring, 1,024 new, pass-KV", 2000, 4000),
    ]
