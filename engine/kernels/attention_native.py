"""Calls attention_cpu.cpp: bf16 attention of some queries over keys of which each sees a range.

Owns what the compiled code may take for granted, and the room it packs keys and values in. Legend:
T tokens, N query heads, G KV heads, X = 2G (the K heads, then the V heads), L keys, H head size.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from native import OPENMP, load_if_possible

_SOURCE = Path(__file__).with_name("attention_cpu.cpp")
CPU_FLAGS = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"))
HEAD_SIZES = range(16, 257, 16)
# Packed K and V that there are at once, unless one head has more.
_PACKED_BYTES = 32 << 20
# Multiplications below which waking another thread costs more than it brings: about 0.1 ms. To
# pack an element takes as long as some of them.
_THREADED = 1 << 21
_PACKING = 4

Rows = NDArray[np.int64]


class Cached(NamedTuple):
    """The first `tokens` keys, in runs of one head: `run_indices` of `runs`, [2 * G * blocks]."""

    runs: Tensor
    run_indices: Tensor
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Queries of one sequence, scaled already, its keys, and where the outcome is to be.

    Attributes:
        kv_LXH: The keys and values after the cached ones.
        out_TNH: Contiguous; bf16 where there is no lse, fp32 where there is one.
        lse_TN: For natural logarithms of the sums of exp(score), fp32, contiguous.
        seen: Query t sees the keys from `seen[0][t]` to `seen[1][t]`, neither of which may fall;
            keys are counted from the first cached one on. None: the queries are the last tokens,
            and see all keys up to their own.
    """

    q_TNH: Tensor
    kv_LXH: Tensor
    out_TNH: Tensor
    lse_TN: Tensor | None = None
    seen: tuple[Rows, Rows] | None = None
    cached: Cached | None = None

    def extent(self) -> tuple[int, int]:
        """Return how many keys are to be packed, and about how many pairs are to be multiplied."""
        tokens = len(self.q_TNH)
        if self.seen is None:
            start = self.cached.tokens if self.cached is not None else 0
            return start + tokens, tokens * (start + tokens // 2)
        low_T, high_T = self.seen
        return int(high_T[-1] - low_T[0]), int((high_T - low_T).sum())


class _Problem(ctypes.Structure):
    """TwinpoolAttention of attention_cpu.cpp."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
        ("run_indices", ctypes.c_void_p),
        ("runs_per_head", ctypes.c_int64),
        ("run_tokens", ctypes.c_int64),
        ("cached", ctypes.c_int64),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("kv_stride", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    )


class NativeAttention:
    """The compiled kernel. It computes with as many threads as torch, which are torch's own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend = library.twinpool_attend
        self._attend.argtypes = (pointer, number, pointer, number, ctypes.c_int)
        self._attend.restype = None
        self._packed = library.twinpool_attention_packed
        self._packed.argtypes, self._packed.restype = (number, number), number

    def __call__(self, pieces: Sequence[Piece]) -> None:
        """Attend all pieces, which have queries and which `fits` is true of.

        A query that sees nothing has an output of 0 and an lse of -inf. Keys that nobody sees are
        not read.
        """
        all_heads = most = work = 0
        problems = (_Problem * len(pieces))()
        for problem, piece in zip(problems, pieces, strict=True):
            _describe(piece, problem)
            keys, pairs = piece.extent()
            room = self._packed(keys, problem.head_size)
            all_heads += problem.kv_heads * room
            most = max(most, room)
            work += problem.heads * problem.head_size * pairs
        size = max(most, min(all_heads, _PACKED_BYTES // torch.bfloat16.itemsize))
        packed = torch.empty(size, dtype=torch.bfloat16)
        assert packed.data_ptr() % 64 == 0
        work += _PACKING * all_heads
        threads = torch.get_num_threads() if work > _THREADED else 1
        self._attend(problems, len(pieces), packed.data_ptr(), size, threads)


def _describe(piece: Piece, problem: _Problem) -> None:
    """Fill in a piece, which must outlive the problem."""
    q_TNH, kv_LXH, cached = piece.q_TNH, piece.kv_LXH, piece.cached
    tokens, heads, head_size = q_TNH.shape
    kv_heads = kv_LXH.shape[1] // 2
    wanted = torch.bfloat16 if piece.lse_TN is None else torch.float32
    assert piece.out_TNH.dtype == wanted
    problem.q, problem.q_stride = q_TNH.data_ptr(), q_TNH.stride(0)
    problem.tokens, problem.heads = tokens, heads
    problem.kv_heads, problem.head_size = kv_heads, head_size
    problem.k = kv_LXH.data_ptr()
    problem.v = problem.k + kv_heads * head_size * kv_LXH.element_size()
    problem.kv_stride = kv_LXH.stride(0)
    problem.out = piece.out_TNH.data_ptr()
    if piece.lse_TN is not None:
        problem.lse = piece.lse_TN.data_ptr()
    if piece.seen is not None:
        low_T, high_T = piece.seen
        assert len(low_T) == len(high_T) == tokens
        problem.low, problem.high = low_T.ctypes.data, high_T.ctypes.data
    if cached is not None:
        problem.runs, problem.run_indices = cached.runs.data_ptr(), cached.run_indices.data_ptr()
        problem.runs_per_head = len(cached.run_indices) // (2 * kv_heads)
        problem.run_tokens = cached.runs.shape[1] // head_size
        problem.cached = cached.tokens


def fits(*tensors: Tensor) -> bool:
    """Return whether the compiled kernel can take such queries or keys and values, [., ., H]."""
    return all(
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[2] in HEAD_SIZES
        and x.stride()[1:] == (x.shape[2], 1)
        for x in tensors
    )


@cache
def attention() -> NativeAttention | None:
    """Return the kernel, compiled if it has to be, or None where there can be none."""
    otherwise = "attention is computed with torch's operators"
    compiled = load_if_possible(_SOURCE, CPU_FLAGS, OPENMP, otherwise)
    return None if compiled is None else NativeAttention(compiled)
