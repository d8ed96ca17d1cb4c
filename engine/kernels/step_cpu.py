"""Calls step_cpu.cpp: a decoding step through all layers, in one parallel region.

Owns what the compiled code may take for granted, and its room. Legend: as engine.kernels.step; P
pairs of a token and an expert, I inner size.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.kernels import decode_native
from engine.kernels.attention_native import CPU_FLAGS, HEAD_SIZES
from engine.kernels.experts_cpu import NativeExperts
from engine.kernels.linear_cpu import NativeProduct
from engine.kernels.step import (
    DenseWeights,
    EndWeights,
    LayerWeights,
    Product,
    SparseWeights,
    Step,
)
from engine.kvcache import KVCache
from engine.step_watch import ATTENTION, DENSE, EXPERTS, HEAD
from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("step_cpu.cpp")
_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LINE = 64
_HALF = 32  # as kHalf in step_cpu.cpp
_PARTS = (ATTENTION, DENSE, EXPERTS, HEAD)  # as Part in step_cpu.cpp


class _Weight(ctypes.Structure):
    """TwinpoolWeight of step_cpu.cpp."""

    _fields_ = (("panels", _POINTER), ("inner", _SIZE), ("outputs", _SIZE))


class _Layer(ctypes.Structure):
    """TwinpoolLayer of step_cpu.cpp."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("qkv", _Weight * 2),
        ("qkv_bias", _POINTER),
        ("qk_norm", _POINTER),
        ("out", _Weight),
        ("mlp_norm", _POINTER),
        ("gate_up", _Weight),
        ("down", _Weight),
        ("router", _POINTER),
        ("expert_gate_up", _POINTER),
        ("expert_down", _POINTER),
        ("cells", _POINTER),
    )


class _Step(ctypes.Structure):
    """TwinpoolStep of step_cpu.cpp."""

    _fields_ = (
        ("layers", _POINTER),
        ("count", _SIZE),
        ("x", _POINTER),
        ("tokens", _SIZE),
        ("hidden", _SIZE),
        ("norm_floor2", _FLOAT),
        ("head_floor2", _FLOAT),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("slots", _POINTER),
        ("attention", decode_native.Problem),
        ("values_after", _SIZE),
        ("experts", _SIZE),
        ("top_k", _SIZE),
        ("inner", _SIZE),
        ("normalise", _SIZE),
        ("end_norm", _POINTER),
        ("head", _Weight),
        ("wanted", _POINTER),
        ("head_logits", _POINTER),
        ("normed", _POINTER),
        ("qkv", _POINTER),
        ("wide", _POINTER),
        ("between", _POINTER),
        ("more", _POINTER),
        ("logits", _POINTER),
        ("y", _POINTER),
        ("seconds", _POINTER),
    )


class NativeStep:
    """step_cpu.cpp for some weights, which must outlive it, with as many threads as torch.

    Keeps its room from step to step: most have as many rows as the one before.
    """

    def __init__(
        self, library: ctypes.CDLL, layers: Sequence[LayerWeights], end: EndWeights | None
    ) -> None:
        self._run = library.twinpool_step
        self._run.argtypes, self._run.restype = (_POINTER, ctypes.c_int), None
        self._kept = (layers, end)
        self._numbers = [each.number for each in layers]
        self._layers = (_Layer * len(layers))(*map(_described, layers))
        first = layers[0]
        self._heads, self._head_size = _heads(first)
        self._hidden = first.attention_norm.weight.shape[0]
        dense = [each.mlp for each in layers if isinstance(each.mlp, DenseWeights)]
        self._dense_inner = _native(dense[0].down).inner if dense else 0
        self._cache: KVCache | None = None
        self._room = torch.empty(0, dtype=torch.uint8)
        self._step = _Step(
            layers=ctypes.addressof(self._layers),
            count=len(self._layers),
            hidden=self._hidden,
            norm_floor2=first.attention_norm.floor_squared,
            head_floor2=first.attention.qk_norm.floor_squared,
        )
        sparse = [each.mlp for each in layers if isinstance(each.mlp, SparseWeights)]
        if sparse:
            found = sparse[0].experts
            assert isinstance(found, NativeExperts)
            router = sparse[0].router
            self._step.experts = len(router.weight_ED)
            self._step.top_k, self._step.inner = router.top_k, found.inner
            self._step.normalise = router.normalise
        if end is not None:
            self._step.end_norm = end.norm.weight.data_ptr()
            self._step.head = _weight(end.head)

    def __call__(
        self,
        x_TD: Tensor,
        rows: DecodeRows,
        slots_TX: Tensor,
        cos_T1H: Tensor,
        sin_T1H: Tensor,
        wanted_T: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Tensor | None, Mapping[str, float]]:
        """See `Step`; there is at least one row. The seconds are its first thread's."""
        tokens, step = len(rows), self._step
        for tensor, dtype in (
            (x_TD, torch.float32),
            (cos_T1H, torch.float32),
            (sin_T1H, torch.float32),
            (slots_TX, torch.int64),
            (wanted_T, torch.int64),
        ):
            assert len(tensor) == tokens
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
        self._look_at(rows.cache)
        logits_TV = None
        if step.end_norm:
            logits_TV = torch.empty(tokens, step.head.outputs)
            step.head_logits, step.wanted = logits_TV.data_ptr(), wanted_T.data_ptr()
        step.x, step.tokens, step.slots = x_TD.data_ptr(), tokens, slots_TX.data_ptr()
        step.cos, step.sin = cos_T1H.data_ptr(), sin_T1H.data_ptr()
        out, partial = self._give_room(rows)
        step.attention = decode_native.problem(
            rows,
            q=(step.qkv, self._row(rows.cache)),
            heads=self._heads,
            head_size=self._head_size,
            out=out,
            partial=partial,
        )
        seconds = (ctypes.c_double * len(_PARTS))()
        step.seconds = ctypes.addressof(seconds)
        if meanwhile is not None:
            meanwhile()
        self._run(ctypes.addressof(step), torch.get_num_threads())
        return logits_TV, dict(zip(_PARTS, seconds, strict=True))

    def _look_at(self, cache: KVCache) -> None:
        if cache is self._cache:
            return
        self._cache = cache
        for layer, number in zip(self._layers, self._numbers, strict=True):
            layer.cells = cache.cells[number].data_ptr()
        # A layer's cells are its keys, then as many for its values.
        self._step.values_after = len(cache.cells[self._numbers[0]]) // 2 * self._head_size

    def _row(self, cache: KVCache) -> int:
        """Return the elements of a row's queries, keys and values."""
        row: int = (self._heads + 2 * cache.num_heads) * self._head_size
        return row

    def _give_room(self, rows: DecodeRows) -> tuple[int, int]:
        """Point the step at room for these rows; return where attention's own is."""
        tokens, half, whole, step = len(rows), 2, 4, self._step
        partial = decode_native.room(rows, self._heads, self._head_size)
        pairs, padded = tokens * step.top_k, -(-step.inner // _HALF) * _HALF
        sizes = {
            "normed": half * tokens * self._hidden,
            "qkv": half * tokens * self._row(rows.cache),
            "wide": half * tokens * 2 * self._dense_inner,
            "between": half * max(tokens * self._dense_inner, pairs * padded),
            "more": half * tokens * self._hidden,
            "logits": whole * tokens * step.experts,
            "y": half * pairs * self._hidden,
            "out": half * tokens * self._heads * self._head_size,
            "partial": whole * partial,
        }
        ends = list(accumulate(-(-size // _LINE) * _LINE for size in sizes.values()))
        if ends[-1] > len(self._room):
            self._room = torch.empty(ends[-1], dtype=torch.uint8)
        first = self._room.data_ptr()
        starts = dict(zip(sizes, (first + at for at in [0, *ends]), strict=False))
        out, partials = starts.pop("out"), starts.pop("partial")
        for name, at in starts.items():
            setattr(step, name, at)
        return out, partials if partial else 0


def step(layers: Sequence[LayerWeights], end: EndWeights | None) -> Step | None:
    """Return the step through these, or None where not all of them are compiled code's."""
    if not layers or not all(map(_fits, layers)):
        return None
    if end is not None and not isinstance(end.head, NativeProduct):
        return None
    otherwise = "the layers of a decoding step are run one by one"
    compiled = load_if_possible(_SOURCE, CPU_FLAGS, OPENMP, otherwise)
    return None if compiled is None else NativeStep(compiled, layers, end)


def _fits(layer: LayerWeights) -> bool:
    attention, mlp = layer.attention, layer.mlp
    products = [*attention.qkv, attention.out]
    if isinstance(mlp, DenseWeights):
        products += [mlp.gate_up, mlp.down]
    elif not isinstance(mlp.experts, NativeExperts):
        return False
    whole = all(isinstance(product, NativeProduct) for product in products)
    return whole and _heads(layer)[1] in HEAD_SIZES


def _heads(layer: LayerWeights) -> tuple[int, int]:
    """Return the number of query heads and their size."""
    size = layer.attention.qk_norm.weight.shape[1]
    return _native(layer.attention.out).inner // size, size


def _native(product: Product) -> NativeProduct:
    assert isinstance(product, NativeProduct)
    return product


def _weight(product: Product) -> _Weight:
    made = _native(product)
    return _Weight(made.panels_PIC.data_ptr(), made.inner, made.outputs)


def _described(layer: LayerWeights) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    described = _Layer(
        attention_norm=layer.attention_norm.weight.data_ptr(),
        qkv=(_Weight * 2)(*map(_weight, attention.qkv)),
        qkv_bias=attention.bias.data_ptr() if attention.bias is not None else None,
        qk_norm=attention.qk_norm.weight.data_ptr(),
        out=_weight(attention.out),
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
    )
    if isinstance(mlp, DenseWeights):
        described.gate_up, described.down = _weight(mlp.gate_up), _weight(mlp.down)
    else:
        assert isinstance(mlp.experts, NativeExperts)
        assert mlp.router.weight_ED.is_contiguous()
        described.router = mlp.router.weight_ED.data_ptr()
        described.expert_gate_up = mlp.experts.gate_up.data_ptr()
        described.expert_down = mlp.experts.down.data_ptr()
    return described
