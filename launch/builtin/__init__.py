"""The built-in checkpoint: a small trained Qwen3-MoE model that ships with the repository.

Owns the folder's location only; importing this package imports nothing heavy.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
