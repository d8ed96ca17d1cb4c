"""What is done to rows on a CPU: rows_cpu.cpp for bf16 where it can be compiled, else torch's.

Owns the foreign functions' types and checks what they take for granted. They run on as many
threads as torch does.

Legend: as engine.kernels.rows.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kernels.fixed import FixedRows
from engine.kernels.rows import NormWeight, Routes, RowKernels, SortedPairs, TorchRows
from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("rows_cpu.cpp")
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
Foreign = Callable[..., Any]
_MOST_HEAD = 1024  # as in rows.h
_OTHERWISE = "torch's operators do what is done to rows"


class NativeRows:
    """rows_cpu.cpp, for models in bf16; its tensors must be contiguous but where it is said."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        def function(name: str, *types: Any, result: Any = None) -> Foreign:
            found = compiled[f"twinpool_{name}"]
            found.argtypes, found.restype = (*types, _INT), result
            return found

        sizes = (_SIZE, _SIZE)
        self._norm = function("norm", *[_POINTER] * 3, *sizes, _FLOAT)
        self._add_norm = {
            torch.bfloat16: function("add_norm", *[_POINTER] * 4, *sizes, _FLOAT),
            torch.float32: function("add_norm_fp32", *[_POINTER] * 4, *sizes, _FLOAT),
        }
        self._norm_rotate = function("norm_rotate", *[_POINTER] * 4, *sizes, *sizes, _FLOAT)
        self._insert = function(
            "insert", _POINTER, _SIZE, *[_POINTER] * 2, *sizes, *sizes, result=_SIZE
        )
        self._gated = function("gated", *[_POINTER] * 2, *sizes)
        self._scores = function("scores", *[_POINTER] * 3, *sizes, _SIZE)
        self._route = function("route", _POINTER, *sizes, _SIZE, _INT, *[_POINTER] * 5)

    def norm(self, x_TD: Tensor, more_TD: Tensor | None, norm: NormWeight) -> Tensor:
        """See `RowKernels`."""
        _check(x_TD, torch.float32)
        out_TD = torch.empty_like(x_TD, dtype=torch.bfloat16)
        last = (norm.weight.data_ptr(), out_TD.data_ptr(), *x_TD.shape, norm.floor_squared)
        threads = torch.get_num_threads()
        if more_TD is None:
            self._norm(x_TD.data_ptr(), *last, threads)
        else:
            _check(more_TD, more_TD.dtype)
            add_norm = self._add_norm[more_TD.dtype]
            add_norm(x_TD.data_ptr(), more_TD.data_ptr(), *last, threads)
        return out_TD

    def norm_rotate(
        self, x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> None:
        """See `RowKernels`; each token's heads must lie side by side."""
        tokens, heads, size = x_TMH.shape
        _check(x_TMH[:1], torch.bfloat16)
        assert size % 2 == 0
        assert size <= _MOST_HEAD
        self._norm_rotate(
            x_TMH.data_ptr(),
            norm.weight.data_ptr(),
            cos_T1H.data_ptr(),
            sin_T1H.data_ptr(),
            *(tokens, heads, x_TMH.stride(0), size),
            norm.floor_squared,
            torch.get_num_threads(),
        )

    def insert(self, cells: Tensor, slots_TX: Tensor, x_TXH: Tensor) -> None:
        """See `RowKernels`; each token's heads must lie side by side."""
        tokens, heads, size = x_TXH.shape
        _check(x_TXH[:1], torch.bfloat16)
        _check(cells, torch.bfloat16)
        _check(slots_TX, torch.int64)
        wrong = self._insert(
            *(cells.data_ptr(), len(cells), slots_TX.data_ptr(), x_TXH.data_ptr()),
            *(tokens, heads, x_TXH.stride(0), size),
            torch.get_num_threads(),
        )
        if wrong:
            raise IndexError(f"{wrong} slots are outside the {len(cells)} cells")

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `RowKernels`."""
        _check(gate_up, torch.bfloat16)
        *rows, both = gate_up.shape
        out = gate_up.new_empty(*rows, both // 2)
        count = gate_up.numel() // both
        self._gated(gate_up.data_ptr(), out.data_ptr(), count, both // 2, torch.get_num_threads())
        return out

    def scores(self, x_TD: Tensor, router_ED: Tensor) -> Tensor:
        """Return a router's fp32 scores, [T, E], summed as in a step through all layers."""
        _check(x_TD, torch.bfloat16)
        _check(router_ED, torch.float32)
        out_TE = x_TD.new_empty(len(x_TD), len(router_ED), dtype=torch.float32)
        last = (*x_TD.shape, len(router_ED), torch.get_num_threads())
        self._scores(x_TD.data_ptr(), router_ED.data_ptr(), out_TE.data_ptr(), *last)
        return out_TE

    def route(self, logits_TE: Tensor, top_k: int, normalise: bool) -> Routes:
        """See `RowKernels`."""
        _check(logits_TE, torch.float32)
        tokens, experts = logits_TE.shape
        weights_TK = logits_TE.new_empty(tokens, top_k)
        experts_TK = torch.empty(tokens, top_k, dtype=torch.int64)
        place_TK, tokens_P = torch.empty_like(experts_TK), experts_TK.new_empty(tokens * top_k)
        loads = (_SIZE * experts)()
        self._route(
            *(logits_TE.data_ptr(), tokens, experts, top_k, normalise),
            *(each.data_ptr() for each in (weights_TK, experts_TK, tokens_P, place_TK)),
            loads,
            torch.get_num_threads(),
        )
        pairs = SortedPairs(tokens_P=tokens_P, place_TK=place_TK, loads=list(loads))
        return Routes(weights_TK, experts_TK, experts, pairs)

    def choose(self, logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """See `RowKernels`."""
        routes = self.route(logits_TE, top_k, normalise)  # sorting the pairs costs next to nothing
        return routes.weights_TK, routes.experts_TK


def rows(dtype: torch.dtype, *, deterministic: bool = False) -> RowKernels:
    """Return the fastest form for models of this dtype; see `RowKernels`.

    With `deterministic` of those that give a row the same whatever other rows there are.
    """
    if dtype == torch.bfloat16:
        compiled = load_if_possible(_SOURCE, frozenset(), OPENMP, _OTHERWISE)
        if compiled is not None:
            return NativeRows(compiled)
    return FixedRows(dtype) if deterministic else TorchRows(dtype)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == dtype
    assert x.is_contiguous()
