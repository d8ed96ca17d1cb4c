"""Latent attention and the choice of experts beside it: what whole models do not show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Chunk, make_batch
from engine.config import load_config
from engine.config_deepseek import Gate, LatentConfig
from engine.errors import WeightError
from engine.kernels import latent_cpu, latent_prompts
from engine.kernels.gpu import latent_torch
from engine.kernels.latent_prompts import LatentWeights
from engine.kvcache import KVCache
from engine.layers.expert_router import choose
from engine.parallel import Layout
from tests.unit.engine.checkpoints import DEEPSEEK_V3, make_checkpoint
from tests.unit.engine.conftest import MakeRunner

CPU = torch.device("cpu")
BLOCK, BLOCKS = 4, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("latent"), DEEPSEEK_V3)


@pytest.fixture(scope="module")
def cache(folder: Path) -> KVCache:
    made = KVCache(
        config=load_config(folder),
        dtype=torch.float64,
        device=CPU,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        layout=Layout(),
    )
    made.tensor.copy_(torch.randn(made.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return made


@given(
    pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=4),
    slice_scores=st.sampled_from([1, 60, 1 << 24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_prompts_and_steps_are_attended_as_plainly_as_can_be(
    cache: KVCache, pieces: list[tuple[int, int]], slice_scores: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(BLOCKS, generator=generator).tolist()
    if seed % 2:
        blocks.sort()  # side by side, as a view of the cache
    chunks = []
    for start, tokens in pieces:
        count = -(-(start + tokens) // BLOCK)
        chunks.append(Chunk([1] * tokens, start, [blocks.pop(0) for _ in range(count)]))
    batch = make_batch(chunks, cache, 128)
    size, heads, rank = cache.tensor.shape[-1], 3, cache.value_size
    q_TNX = torch.randn(len(batch.token_ids_T), heads, size, generator=generator).double()
    kept, latent_cpu._SLICE_SCORES = latent_cpu._SLICE_SCORES, slice_scores
    found = latent_cpu.LatentAttention(rank)(q_TNX, cache.runs[0], batch, heads)
    latent_cpu._SLICE_SCORES = kept
    for chunk, rows in zip(chunks, batch.rows_of, strict=True):
        ends = torch.arange(chunk.start, chunk.end) + 1
        tables = torch.tensor([chunk.block_table]).expand(len(ends), -1)
        cells_BPX = cache.runs[0].view(BLOCKS, BLOCK, size)
        wanted, _ = latent_torch.attend(q_TNX[rows], cells_BPX, rank, tables, ends, chunk.end)
        torch.testing.assert_close(found[rows], wanted.flatten(1))


@given(
    tokens=st.integers(1, 40),
    before=st.integers(0, 60),
    most_bytes=st.sampled_from([1, 20_000, 1 << 26]),
    slice_scores=st.sampled_from([1, 200, 1 << 24]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_prompts_with_keys_and_values_made_first_attend_alike(
    tokens: int, before: int, most_bytes: int, slice_scores: int, dtype: torch.dtype, seed: int
) -> None:
    """As by the definition: each head's keys and values of all tokens, and a softmax over them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    heads, rank, plain, turned, value = 3, 24, 8, 8, 12
    cells, q = random(before + tokens, rank + turned), random(tokens, heads, plain + turned)
    weights = LatentWeights(random(heads, plain, rank), random(heads, rank, value), 0.3)
    k = 0.3 * torch.einsum("lc,nec->lne", cells[:, :rank].double(), weights.keys_NEC.double())
    v = torch.einsum("lc,ncv->lnv", cells[:, :rank].double(), weights.values_NCV.double())
    k = torch.cat((k, cells[:, None, rank:].double().expand(-1, heads, -1)), -1)
    scores = torch.einsum("qnk,lnk->nql", q.double(), k)
    at = torch.arange(before, before + tokens)
    scores = scores.masked_fill(torch.arange(before + tokens) > at[:, None], -torch.inf)
    wanted = torch.einsum("nql,lnv->qnv", scores.softmax(-1), v)

    kept, latent_cpu._SLICE_SCORES = latent_cpu._SLICE_SCORES, slice_scores
    found = latent_prompts.attend(q, cells, weights, latent_cpu._attend_heads, most_bytes)
    latent_cpu._SLICE_SCORES = kept
    assert found.dtype == dtype
    limit = 1e-12 if dtype == torch.float64 else 0.03
    assert (found.double() - wanted).norm() <= limit * wanted.norm()


def test_keys_are_made_where_enough_queries_look_at_them() -> None:
    deepseek = LatentConfig(
        query_rank=None, rank=512, turned_size=64, plain_size=128, value_size=128, scale=0.1
    )
    assert deepseek.makes_keys(2, 2)  # a prompt from its beginning: each token's are made once
    assert deepseek.makes_keys(2048, 2048)
    assert deepseek.makes_keys(2048, 32_768)
    assert not deepseek.makes_keys(16, 32_768)  # a piece of one, when most is cached
    assert not deepseek.makes_keys(2, 3)
    assert not replace(deepseek, value_size=256).makes_keys(2048, 2048)  # no kernel takes it


def plain_choice(
    scores: list[float], bias: list[float], top_k: int, how: Gate
) -> tuple[set[int], dict[int, float]]:
    """What the paper says, expert by expert."""
    ranked = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = len(scores) // how.groups
    groups = [range(i * size, (i + 1) * size) for i in range(how.groups)]
    worth = [sum(sorted(ranked[e] for e in group)[-how.best_of_group :]) for group in groups]
    best = sorted(range(how.groups), key=lambda i: worth[i])[-how.chosen_groups :]
    able = [e for i in best for e in groups[i]]
    chosen = set(sorted(able, key=lambda e: ranked[e])[-top_k:])
    total = sum(scores[e] for e in chosen)
    return chosen, {e: how.scale * scores[e] / total for e in chosen}


@given(
    groups=st.sampled_from([1, 2, 4]),
    sigmoid=st.booleans(),
    best=st.integers(1, 2),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_experts_are_chosen_group_by_group(
    groups: int, sigmoid: bool, best: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(5, 16, generator=generator)
    bias_E = 0.3 * torch.randn(16, generator=generator)
    how = Gate(
        sigmoid=sigmoid,
        biased=True,
        groups=groups,
        chosen_groups=max(1, groups // 2),
        best_of_group=best,
        scale=1.5,
    )
    weights_TK, experts_TK = choose(logits_TE, bias_E, 3, True, how)
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    for token in range(5):
        chosen, weights = plain_choice(scores_TE[token].tolist(), bias_E.tolist(), 3, how)
        found = experts_TK[token].tolist()
        assert set(found) == chosen
        assert weights_TK[token].tolist() == pytest.approx([weights[e] for e in found], rel=1e-5)


def test_layers_that_predict_further_tokens_are_left_in_the_file_and_others_refused(
    folder: Path, tmp_path: Path, make_runner: MakeRunner
) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for layer, is_read in ((3, True), (4, False)):
        more = {f"model.layers.{layer}.eh_proj.weight": torch.zeros(2, 2)}
        save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
        if is_read:
            make_runner(tmp_path)
        else:
            with pytest.raises(WeightError, match=r"layers\.4\.eh_proj"):
                make_runner(tmp_path)
