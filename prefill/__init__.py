"""The prefill pool: computes prompts and streams their KV cache to decode."""
