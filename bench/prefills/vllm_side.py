"""The peer vLLM, its CPU build; runs under its interpreter and imports nothing of this project.

Offline `LLM.generate` with the defaults of its CPU backend, but for prefix caching, which is off.
`side` says what each line means.
"""

import importlib
import json
import os
import sys
import time
from typing import Any


class Vllm:
    """An engine in this process."""

    def open(self, *, model: str, max_model_len: int) -> dict[str, Any]:
        """Make the engine, which compiles and warms up."""
        vllm = importlib.import_module("vllm")
        self._llm = vllm.LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=max_model_len,
        )
        self._params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True
        )
        return {"version": f"vLLM {vllm.__version__}"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds from the prompts to the first token of all."""
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        made = self._llm.generate(asked, self._params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": [each.outputs[0].token_ids[0] for each in made]}


def main() -> None:
    """Answer lines until there are no more, then end at once."""
    # vLLM prints to standard output; nothing but answers may be read there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Vllm()
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(side, arguments.pop("do"))(**arguments)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
