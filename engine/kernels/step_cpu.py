"""Calls step_cpu.cpp: a decoding step through all layers, in one parallel region.

Owns what the compiled code may take for granted, and its room. Legend: as engine.kernels.step; P
pairs of a token and an expert, I inner size.
"""

import ctypes
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.kernels import decode_native
from engine.kernels.attention_native import CPU_FLAGS, HEAD_SIZES
from engine.kernels.experts_cpu import NativeExperts
from engine.kernels.linear_cpu import NativeProduct
from engine.kernels.step import DenseWeights, LayerWeights, Product, SparseWeights, Step
from engine.step_watch import ATTENTION, DENSE, EXPERTS
from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("step_cpu.cpp")
_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LINE = 64
_HALF = 32  # as kHalf in step_cpu.cpp
_PARTS = (ATTENTION, DENSE, EXPERTS)  # as Part in step_cpu.cpp


class _Weight(ctypes.Structure):
    """TwinpoolWeight of step_cpu.cpp."""

    _fields_ = (("panels", _POINTER), ("inner", _SIZE), ("outputs", _SIZE))


class _Layer(ctypes.Structure):
    """TwinpoolLayer of step_cpu.cpp."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("qkv", _Weight * 2),
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
    """step_cpu.cpp for some layers, which must outlive it, with as many threads as torch."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[LayerWeights]) -> None:
        self._run = library.twinpool_step
        self._run.argtypes, self._run.restype = (_POINTER, ctypes.c_int), None
        self._kept = layers
        self._layers = (_Layer * len(layers))(*map(_described, layers))
        first = layers[0]
        self._heads, self._head_size = _heads(first)
        self._hidden = first.attention_norm.weight.shape[0]
        self._floors = first.attention_norm.floor_squared, first.attention.qk_norm.floor_squared
        dense = [each.mlp for each in layers if isinstance(each.mlp, DenseWeights)]
        self._dense_inner = _native(dense[0].down).inner if dense else 0
        self._sparse = next(
            (each.mlp for each in layers if isinstance(each.mlp, SparseWeights)), None
        )

    def __call__(
        self, x_TD: Tensor, rows: DecodeRows, slots_TX: Tensor, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> Mapping[str, float]:
        """See `Step`; there is at least one row. The seconds are its first thread's."""
        for tensor, dtype in ((x_TD, torch.float32), (slots_TX, torch.int64)):
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
        assert cos_T1H.is_contiguous()
        assert sin_T1H.is_contiguous()
        cache, tokens = rows.cache, len(x_TD)
        assert tokens == len(rows)
        for layer, weights in zip(self._layers, self._kept, strict=True):
            layer.cells = cache.cells[weights.number].data_ptr()
        # A layer's cells are its keys, then as many for its values.
        values_after = len(cache.cells[self._kept[0].number]) // 2 * self._head_size
        step = _Step(
            layers=ctypes.addressof(self._layers),
            count=len(self._layers),
            x=x_TD.data_ptr(),
            tokens=tokens,
            hidden=self._hidden,
            norm_floor2=self._floors[0],
            head_floor2=self._floors[1],
            cos=cos_T1H.data_ptr(),
            sin=sin_T1H.data_ptr(),
            slots=slots_TX.data_ptr(),
            values_after=values_after,
        )
        room = self._give_room(step, rows)
        seconds = (ctypes.c_double * len(_PARTS))()
        step.seconds = ctypes.addressof(seconds)
        self._run(ctypes.addressof(step), torch.get_num_threads())
        del room
        return dict(zip(_PARTS, seconds, strict=True))

    def _give_room(self, step: _Step, rows: DecodeRows) -> Tensor:
        """Return memory that must last while the step does."""
        tokens, half, whole = len(rows), 2, 4
        row = (self._heads + 2 * rows.cache.num_heads) * self._head_size
        pairs = inner = experts = 0
        if self._sparse is not None:
            found = self._sparse.experts
            assert isinstance(found, NativeExperts)
            experts, top_k = len(self._sparse.router_ED), self._sparse.top_k
            pairs, inner = tokens * top_k, found.inner
            step.experts, step.top_k, step.inner = experts, top_k, inner
            step.normalise = self._sparse.normalise
        padded = -(-inner // _HALF) * _HALF
        partial = decode_native.room(rows, self._heads, self._head_size)
        sizes = {
            "normed": half * tokens * self._hidden,
            "qkv": half * tokens * row,
            "wide": half * tokens * 2 * self._dense_inner,
            "between": half * max(tokens * self._dense_inner, pairs * padded),
            "more": half * tokens * self._hidden,
            "logits": whole * tokens * experts,
            "y": half * pairs * self._hidden,
            "out": half * tokens * self._heads * self._head_size,
            "partial": whole * partial,
        }
        ends = list(accumulate(-(-size // _LINE) * _LINE for size in sizes.values()))
        room = torch.empty(ends[-1], dtype=torch.uint8)
        starts = dict(zip(sizes, (room.data_ptr() + at for at in [0, *ends]), strict=False))
        out, partials = starts.pop("out"), starts.pop("partial")
        for name, at in starts.items():
            setattr(step, name, at)
        step.attention = decode_native.problem(
            rows,
            q=(starts["qkv"], row),
            heads=self._heads,
            head_size=self._head_size,
            out=out,
            partial=partials if partial else 0,
        )
        return room


def step(layers: Sequence[LayerWeights]) -> Step | None:
    """Return the step through these layers, or None where not all of them are compiled code's."""
    if not layers or not all(map(_fits, layers)):
        return None
    otherwise = "the layers of a decoding step are run one by one"
    compiled = load_if_possible(_SOURCE, CPU_FLAGS, OPENMP, otherwise)
    return None if compiled is None else NativeStep(compiled, layers)


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


def _described(layer: LayerWeights) -> _Layer:
    def weight(product: Product) -> _Weight:
        made = _native(product)
        return _Weight(made.panels_PIC.data_ptr(), made.inner, made.outputs)

    attention, mlp = layer.attention, layer.mlp
    described = _Layer(
        attention_norm=layer.attention_norm.weight.data_ptr(),
        qkv=(_Weight * 2)(*map(weight, attention.qkv)),
        qk_norm=attention.qk_norm.weight.data_ptr(),
        out=weight(attention.out),
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
    )
    if isinstance(mlp, DenseWeights):
        described.gate_up, described.down = weight(mlp.gate_up), weight(mlp.down)
    else:
        assert isinstance(mlp.experts, NativeExperts)
        assert mlp.router_ED.is_contiguous()
        described.router = mlp.router_ED.data_ptr()
        described.expert_gate_up = mlp.experts.gate_up.data_ptr()
        described.expert_down = mlp.experts.down.data_ptr()
    return described
