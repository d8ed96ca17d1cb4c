"""Machine code that is compiled where it is to run. Owns building, keeping and loading it.

Knows nothing of what the code does, nor of what is to be done where there can be none.
"""

from native.cache import cache_folder
from native.errors import NativeError
from native.library import OPENMP, cpu_flags, load, load_if_possible

__all__ = ["OPENMP", "NativeError", "cache_folder", "cpu_flags", "load", "load_if_possible"]
