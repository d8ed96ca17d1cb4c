"""The ways of computing prompts that `bench.prefill` compares, and how they are measured alike.

`works` says what is computed, `side` drives a process for each way, one of them at a time.
`limit` counts a pass's matrix products and `ring` says what context-parallel ranks should send;
both are arithmetic. Modules that end in `_side` are run as a process of their own.
"""
