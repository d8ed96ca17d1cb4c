"""Kernels in Triton, each beside the same in torch's operators. Owns no memory and no seam.

`x.py` is the kernel and its launch, `x_torch.py` what it must compute: the form of a CPU, and what
tests compare with. Only `x.py` imports Triton. What a device gets is in `engine.kernels.table`.

Keys and values are read and written where the cache has them (`KVCache.tensor`, a layer's K or V:
[B, G, P, H]). Nothing is read that belongs to no token: what lies there may be NaN.
"""
