"""The peer in this project's environment: Hugging Face transformers, one forward for all prompts.

With its defaults on a CPU (attention by torch's SDPA) and what its own generate does in a prefill:
the cache filled, and logits of the last token alone.
"""

import time
from typing import Any

import torch
import transformers

from bench.sides.answers import serve


class Transformers:
    """A model as AutoModelForCausalLM gives it."""

    def open(self, *, model: str) -> dict[str, Any]:
        """Load the model."""
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(model, dtype=torch.bfloat16)  # comes ready for inference
        return {"version": f"transformers {transformers.__version__}"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds from the prompts to the first token of all."""
        began = time.perf_counter()
        with torch.inference_mode():
            made = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            tokens = made.logits[:, -1].argmax(-1).tolist()
        return {"seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    side = Transformers()
    serve({"open": side.open, "run": side.run})
