"""What each kernel is measured on, and beside whom. Owns the shapes; times nothing.

Legend: as in engine.kernels.gpu's modules.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from engine.kernels.gpu import draw_torch
from engine.kernels.gpu.options import DecodeOptions, Seen, Units, causal
from engine.kernels.gpu.tune import Choices, Tile
from engine.kernels.rows import NormWeight
from engine.kernels.table import PagedKernels

_DTYPE = torch.bfloat16
_EPS = 1e-6
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """How a case runs with each tile that it could have."""

    choices: Choices
    run: Callable[[Tile], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel and shape. Bound by memory if it has `bytes`, else by its `flops`."""

    name: str
    ours: Run
    bytes: int = 0
    flops: int = 0
    peer: Run | None = None
    peer_name: str | None = None
    tunable: Tunable | None = None


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of the measured cases; by default those of an 8-billion model's layer."""

    tokens: int = 8192
    hidden: int = 4096
    inner: int = 12288
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    places: int = 32
    decodes: tuple[tuple[int, int], ...] = ((1, 131072), (16, 8192), (128, 4096))
    prefills: tuple[tuple[int, int], ...] = ((8192, 8192), (2048, 32768))
    # Of a layer with latent attention (DeepSeek-V3).
    latent_heads: int = 128
    latent: int = 512
    turned: int = 64
    latents: tuple[tuple[int, int], ...] = ((1, 131072), (64, 8192))
    # Of a sparse model's layer (30 billion parameters, 3 of them active).
    sparse_hidden: int = 2048
    sparse_inner: int = 768
    experts: int = 128
    choices: int = 8
    sparse: tuple[int, ...] = (1, 32, 8192)
    vocabulary: int = 151936
    drawn: int = 128


def cases(kernels: PagedKernels, device: torch.device, shapes: Shapes) -> Iterator[Case]:
    """Yield the cases one by one, so that one's memory is free when the next is made.

    Their inputs are the same in every run.
    """
    torch.manual_seed(0)
    yield _norm(kernels, device, shapes)
    yield _gated(kernels, device, shapes)
    yield _insert(kernels, device, shapes)
    for sequences, length in shapes.decodes:
        yield _decode(kernels, device, shapes, sequences, length)
    for tokens, keys in shapes.prefills:
        yield from _blocks(kernels, device, shapes, tokens, keys)
    for sequences, length in shapes.latents:
        yield _latent(kernels, device, shapes, sequences, length)
    for tokens in shapes.sparse:
        yield _experts(kernels, device, shapes, tokens)
    yield _draw(kernels, device, shapes)
    yield _merge(kernels, device, shapes)
    yield from _moves(kernels, device, shapes)


def _norm(kernels: PagedKernels, device: torch.device, s: Shapes) -> Case:
    x_TD = torch.randn(s.tokens, s.hidden, device=device)
    more_TD, weight_D = torch.randn_like(x_TD).to(_DTYPE), torch.ones(s.hidden, device=device)
    norm = NormWeight(weight_D * s.hidden**0.5, _EPS)

    def peer() -> Tensor:
        x_TD.add_(more_TD)
        return F.rms_norm(x_TD, (s.hidden,), weight_D, _EPS).to(_DTYPE)

    return Case(
        name=f"add and norm, {s.tokens} x {s.hidden}",
        ours=partial(kernels.rows(_DTYPE).norm, x_TD, more_TD, norm),
        bytes=x_TD.numel() * (4 + 2 + 4 + 2),
        peer=peer,
        peer_name="torch",
    )


def _gated(kernels: PagedKernels, device: torch.device, s: Shapes) -> Case:
    both = torch.randn(s.tokens, 2 * s.inner, device=device).to(_DTYPE)

    def peer() -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Case(
        name=f"SiLU and multiply, {s.tokens} x {s.inner}",
        ours=partial(kernels.rows(_DTYPE).gated, both),
        bytes=s.tokens * s.inner * 3 * 2,
        peer=peer,
        peer_name="torch",
    )


def _insert(kernels: PagedKernels, device: torch.device, s: Shapes) -> Case:
    turned, cells_of_token = s.heads + s.kv_heads, 2 * s.kv_heads
    qkv = torch.randn(s.tokens, turned + s.kv_heads, s.size, device=device).to(_DTYPE)
    norm = NormWeight(torch.ones(turned, s.size, device=device), _EPS)
    angles = torch.rand(s.tokens, 1, s.size // 2, device=device)
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin()
    sin = torch.cat((-sin, sin), -1)
    cells = torch.zeros(s.tokens * cells_of_token, s.size, dtype=_DTYPE, device=device)
    slots = torch.randperm(len(cells), device=device).view(s.tokens, cells_of_token)
    elements = 2 * turned + s.kv_heads + cells_of_token  # of a token and a place in a head
    return Case(
        name=f"norm, rope and insert, {s.tokens} tokens",
        ours=partial(kernels.rotate_insert, qkv, norm, cos, sin, cells, slots),
        bytes=s.tokens * s.size * elements * 2,
    )


def _decode(
    kernels: PagedKernels, device: torch.device, s: Shapes, sequences: int, length: int
) -> Case:
    counts = -(-length // s.places)
    shape = (2, sequences * counts, s.kv_heads, s.places, s.size)
    k_BGPH, v_BGPH = torch.randn(shape, device=device, dtype=_DTYPE).unbind()
    tables = torch.randperm(sequences * counts, device=device).int().view(sequences, counts)
    lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
    q_SNH = torch.randn(sequences, s.heads, s.size, device=device, dtype=_DTYPE)
    options = DecodeOptions(scale=s.size**-0.5)
    ours = partial(kernels.decode, q_SNH, k_BGPH, v_BGPH, tables, lengths, length, options)
    return Case(
        name=f"decode, {sequences} x {length} keys",
        ours=lambda: ours()[0],
        bytes=2 * sequences * length * s.kv_heads * s.size * 2,
        peer=_sdpa_of_gathered(q_SNH, k_BGPH, v_BGPH, tables, length),
        peer_name="SDPA, gathered before",
        tunable=_tunable_decode(q_SNH, s.kv_heads, length, ours),
    )


def _sdpa_of_gathered(
    q_SNH: Tensor, k_BGPH: Tensor, v_BGPH: Tensor, tables_SB: Tensor, length: int
) -> Run:
    """Return torch's attention over contiguous copies: it has no paged cache to read."""
    k, v = (
        each[tables_SB.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for each in (k_BGPH, v_BGPH)
    )
    q_SN1H = q_SNH[:, :, None]
    return lambda: F.scaled_dot_product_attention(q_SN1H, k, v, enable_gqa=True)[:, :, 0]


def _tunable_decode(
    q_SNH: Tensor, kv_heads: int, seen: int, ours: Callable[..., object]
) -> Tunable:
    from engine.kernels.gpu.decode import choices

    return Tunable(choices=choices(q_SNH, kv_heads, seen), run=lambda tile: ours(tile=tile))


def _blocks(
    kernels: PagedKernels, device: torch.device, s: Shapes, tokens: int, keys: int
) -> Iterator[Case]:
    """Yield a prompt's tokens beside each way of torch's; ours gives fp32 and the LSE as well."""
    q = torch.randn(tokens, s.heads, s.size, device=device, dtype=_DTYPE)
    k, v = torch.randn(2, keys, s.kv_heads, s.size, device=device, dtype=_DTYPE).unbind()
    seen = causal(tokens, keys, keys - tokens, device)
    ours = partial(kernels.block, q, k, v, seen, scale=s.size**-0.5)
    q_1NTH, k_1GLH, v_1GLH = (each.transpose(0, 1)[None] for each in (q, k, v))
    mask = causal_lower_right(tokens, keys)

    def sdpa() -> Tensor:
        attended = F.scaled_dot_product_attention(
            q_1NTH, k_1GLH, v_1GLH, attn_mask=mask, enable_gqa=True
        )
        return attended[0].transpose(0, 1)

    case = Case(
        name=f"prefill, {tokens} tokens over {keys} keys",
        ours=lambda: ours()[0],
        flops=4 * s.heads * s.size * _scores(seen),
        peer=sdpa,
        peer_name="SDPA",
        tunable=_tunable_block(q, s.kv_heads, seen, ours),
    )
    yield case
    yield replace(
        case,
        name=f"{case.name}, beside flex_attention",
        peer=_flex(q_1NTH, k_1GLH, v_1GLH),
        peer_name="flex_attention",
        tunable=None,
    )


def _flex(q_1NTH: Tensor, k_1GLH: Tensor, v_1GLH: Tensor) -> Run:
    """Return torch's attention by a mask of blocks; compiled on a GPU, where it is a kernel."""
    tokens, keys = q_1NTH.shape[2], k_1GLH.shape[2]

    def sees(_batch: Tensor, _head: Tensor, token: Tensor, key: Tensor) -> Tensor:
        return key <= token + (keys - tokens)

    mask = create_block_mask(sees, None, None, tokens, keys, device=q_1NTH.device)
    attend = torch.compile(flex_attention) if q_1NTH.is_cuda else flex_attention

    def run() -> Tensor:
        attended: Any = attend(q_1NTH, k_1GLH, v_1GLH, block_mask=mask, enable_gqa=True)
        made: Tensor = attended[0].transpose(0, 1)
        return made

    return run


def _tunable_block(
    q_TNH: Tensor, kv_heads: int, seen: Seen, ours: Callable[..., object]
) -> Tunable:
    from engine.kernels.gpu.block import choices

    return Tunable(choices=choices(q_TNH, kv_heads, seen.end), run=lambda tile: ours(tile=tile))


def _scores(seen: Seen) -> int:
    """Return how many pairs of a query and a key that it sees there are."""
    return int((seen.high_T - seen.low_T).sum())


def _latent(
    kernels: PagedKernels, device: torch.device, s: Shapes, sequences: int, length: int
) -> Case:
    counts, size = -(-length // s.places), s.latent + s.turned
    shape = sequences * counts, s.places, size
    cells_BPX = torch.randn(shape, device=device, dtype=_DTYPE)
    tables = torch.randperm(len(cells_BPX), device=device).int().view(sequences, counts)
    lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
    q_SNX = torch.randn(sequences, s.latent_heads, size, device=device, dtype=_DTYPE)
    ours = partial(
        kernels.latent,
        *(q_SNX, cells_BPX, s.latent, tables, lengths, length),
        scale=size**-0.5,
    )
    # With so many heads for each cell it is arithmetic that bounds it.
    return Case(
        name=f"latent decode, {sequences} x {length} cells",
        ours=lambda: ours()[0],
        flops=2 * sequences * length * s.latent_heads * (size + s.latent),
        tunable=_tunable_latent(q_SNX, s.latent, length, ours),
    )


def _tunable_latent(
    q_SNX: Tensor, latent: int, length: int, ours: Callable[..., object]
) -> Tunable:
    from engine.kernels.gpu.latent import choices

    return Tunable(choices=choices(q_SNX, latent, length), run=lambda tile: ours(tile=tile))


def _experts(kernels: PagedKernels, device: torch.device, s: Shapes, tokens: int) -> Case:
    shape = s.experts, 2 * s.sparse_inner, s.sparse_hidden
    gate_up = torch.randn(shape, device=device, dtype=_DTYPE) * s.sparse_hidden**-0.5
    shape = s.experts, s.sparse_hidden, s.sparse_inner
    down = torch.randn(shape, device=device, dtype=_DTYPE) * s.sparse_inner**-0.5
    x_TD = torch.randn(tokens, s.sparse_hidden, device=device, dtype=_DTYPE)
    scores = torch.rand(tokens, s.experts, device=device)
    weights_TK, experts_TK = scores.topk(s.choices, sorted=False)
    ours = partial(kernels.experts, x_TD, gate_up, down, experts_TK, weights_TK)
    used = len({*experts_TK.flatten().tolist()}) * (gate_up[0].numel() + down[0].numel())
    is_bound_by_memory = tokens * s.choices < s.experts * 64
    return Case(
        name=f"experts, {tokens} x {s.choices} of {s.experts}",
        ours=ours,
        bytes=used * 2 if is_bound_by_memory else 0,
        flops=0 if is_bound_by_memory else 6 * experts_TK.numel() * down[0].numel(),
        peer=_grouped_products(x_TD, gate_up, down, experts_TK, weights_TK),
        peer_name="torch, grouped_mm",
        tunable=_tunable_experts(x_TD, s, experts_TK.numel(), ours),
    )


def _grouped_products(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Run:
    """Return the same by torch's grouped products; the sorting is a part of it."""
    tokens, choices = experts_TK.shape
    numbers = torch.arange(len(gate_up), device=x_TD.device)

    def run() -> Tensor:
        experts_P, order_P = experts_TK.flatten().sort(stable=True)
        ends = torch.searchsorted(experts_P, numbers, right=True).int()
        both = F.grouped_mm(x_TD[order_P // choices], gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        sorted_PD = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        y_PD = torch.empty_like(sorted_PD).index_copy_(0, order_P, sorted_PD)
        return (y_PD.view(tokens, choices, -1).float() * weights_TK[..., None]).sum(1)

    return run


def _tunable_experts(x_TD: Tensor, s: Shapes, pairs: int, ours: Callable[..., object]) -> Tunable:
    from engine.kernels.gpu.experts import choices_of

    choices = choices_of(x_TD, s.experts, s.sparse_inner, pairs)
    return Tunable(choices=choices, run=lambda tile: ours(tile=tile))


def _draw(kernels: PagedKernels, device: torch.device, s: Shapes) -> Case:
    logits_SV = 3 * torch.randn(s.drawn, s.vocabulary, device=device)
    ones_S = torch.ones(s.drawn, device=device)
    top_k_S = torch.full((s.drawn,), 50, dtype=torch.int32, device=device)
    numbers_S = torch.rand(s.drawn, dtype=torch.float64, device=device)
    asked = logits_SV, 0.8 * ones_S, top_k_S, 0.9 * ones_S, 0 * ones_S, numbers_S
    return Case(
        name=f"draw, {s.drawn} rows of {s.vocabulary}",
        ours=partial(kernels.draw, *asked),
        bytes=logits_SV.numel() * 4,
        peer=partial(draw_torch.draw, *asked),
        peer_name="torch, sorted",
    )


def _merge(kernels: PagedKernels, device: torch.device, s: Shapes) -> Case:
    outs = torch.randn(2, s.tokens, s.heads, s.size, device=device)
    lses = torch.randn(2, s.tokens, s.heads, device=device)
    return Case(
        name=f"merge, {s.tokens} tokens",
        ours=partial(kernels.merge, outs[0], lses[0], outs[1], lses[1]),
        bytes=(outs.numel() + lses.numel()) // 2 * 3 * 4,
    )


def _moves(kernels: PagedKernels, device: torch.device, s: Shapes) -> Iterator[Case]:
    """Yield cached keys and values on their way to a payload, from it, and to another layout."""
    units, places, heads = s.tokens // s.places, s.places, s.kv_heads
    shape = (2, 2, units, heads, places, s.size)
    cache = torch.randn(shape, device=device, dtype=_DTYPE)
    payload = torch.empty_like(cache)
    blocks = torch.randperm(units, device=device)
    box = Units(blocks, torch.zeros_like(blocks), slice(0, heads))
    moved = 2 * cache.numel() * cache.element_size()

    def pack() -> Tensor:
        kernels.move(payload, cache, None, box, places, s.tokens)
        return payload

    yield Case(
        name=f"pack, {units} blocks of 2 layers",
        ours=pack,
        bytes=moved,
        peer=partial(torch.index_select, cache, 2, blocks),
        peer_name="torch",
    )
    into, other = torch.empty_like(cache), torch.empty_like(cache)

    def unpack() -> Tensor:
        kernels.move(into, payload, box, None, places, s.tokens)
        return into

    yield Case(
        name=f"unpack, {units} blocks of 2 layers",
        ours=unpack,
        bytes=moved,
        peer=lambda: other.index_copy_(2, blocks, payload),
        peer_name="torch",
    )
    # To a rank with half of the heads, in blocks half as long.
    half, ours_of = slice(heads // 2, heads), slice(0, heads - heads // 2)
    parts = torch.randperm(2 * units, device=device)
    sides = [
        torch.empty(2, 2, 2 * units, ours_of.stop, places // 2, s.size, dtype=_DTYPE, device=device)
        for _ in range(2)
    ]
    at = Units(blocks.repeat_interleave(2), torch.arange(2, device=device).repeat(units), half)
    to = Units(parts, torch.zeros_like(parts), ours_of)

    def reshard() -> Tensor:
        kernels.move(sides[0], cache, to, at, places // 2, s.tokens)
        return sides[0]

    def reshard_by_torch() -> Tensor:
        picked = cache[:, :, :, half].index_select(2, blocks)
        halves = picked.view(*picked.shape[:4], 2, places // 2, s.size).transpose(3, 4)
        return sides[1].index_copy_(2, parts, halves.flatten(2, 3))

    yield Case(
        name=f"reshard, {units} blocks of 2 layers to half as long ones, half of the heads",
        ours=reshard,
        bytes=moved * ours_of.stop // heads,
        peer=reshard_by_torch,
        peer_name="torch",
    )
