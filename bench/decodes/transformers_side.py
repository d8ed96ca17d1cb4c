"""The peer in this project's environment: Hugging Face transformers' own generate, greedy.

With its defaults on a CPU. It computes the prompts first, which is not counted.
"""

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.sides.answers import serve


class Transformers:
    """A model as AutoModelForCausalLM gives it."""

    def open(self, *, model: str) -> dict[str, Any]:
        """Load the model."""
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(Path(model), dtype=torch.bfloat16)  # comes ready for inference
        self._model.generation_config.eos_token_id = None
        return {"version": f"transformers {transformers.__version__}"}

    def run(self, *, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Answer with the steps: when each was over, and how many tokens it gave."""
        steps: list[tuple[float, int]] = []

        def watch(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            steps.append((time.perf_counter(), len(prompts)))
            return torch.zeros(len(ids), dtype=torch.bool)

        asked = torch.tensor(prompts)
        self._model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )
        return {"steps": steps}


if __name__ == "__main__":
    side = Transformers()
    serve({"open": side.open, "run": side.run})
