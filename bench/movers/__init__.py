"""The ways of moving bytes that `bench.transfer` compares, and how they are measured alike.

`works` says what is moved, `pair` drives two pinned processes through rounds, `side` is what a
process of ours needs for that. Each way has a file: `memcpy`, `perftest`, `slices`, `nixl`,
`ours`; those that end in `_side` are run as a process of their own.
"""
