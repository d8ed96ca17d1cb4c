"""The peer vLLM, its CPU build; runs under its interpreter, see `answers`.

Offline `LLM.generate` with the defaults of its CPU backend, but for prefix caching, which is off.
"""

import importlib
import time
from typing import Any

# What vLLM itself has to measure decode with: contexts are there at once, of random content that
# is written when the engine is made, so that no step but a decode step is run.
_FILLED = {
    "kv_connector": "DecodeBenchConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"startup_fill": True, "fill_mean": 0.0, "fill_std": 1.0},
}


class Vllm:
    """An engine in this process."""

    def open(self, *, model: str, max_model_len: int, filled: bool = False) -> dict[str, Any]:
        """Make the engine, which compiles and warms up; `filled` lets it take prompts as cached."""
        self._vllm = importlib.import_module("vllm")
        options: dict[str, Any] = {"kv_transfer_config": _FILLED} if filled else {}
        self._llm = self._vllm.LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=max_model_len,
            **options,
        )
        self._watch_steps()
        return {"version": f"vLLM {self._vllm.__version__}"}

    def run(self, *, prompts: list[list[int]], new_tokens: int = 1) -> dict[str, Any]:
        """Answer with the seconds from the prompts to the last token of all, and the first of each.

        Also with the steps: when each was over, and how many tokens it gave.
        """
        self._steps.clear()
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = self._vllm.SamplingParams(
            max_tokens=new_tokens, temperature=0.0, detokenize=False, ignore_eos=True
        )
        began = time.perf_counter()
        made = self._llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = [each.outputs[0].token_ids[0] for each in made]
        return {"seconds": seconds, "tokens": tokens, "steps": self._steps}

    def _watch_steps(self) -> None:
        """Note of each step of `LLM.generate` what comes out of the engine's core."""
        core = self._llm.llm_engine.engine_core
        get_output = core.get_output
        self._steps: list[tuple[float, int]] = []

        def watched() -> Any:
            given = get_output()
            tokens = sum(len(each.new_token_ids) for each in given.outputs)
            self._steps.append((time.perf_counter(), tokens))
            return given

        core.get_output = watched


if __name__ == "__main__":
    side = Vllm()
    # Beside this file: its interpreter does not know this project.
    importlib.import_module("answers").serve({"open": side.open, "run": side.run})
