"""The ways of giving tokens that `bench.decode` compares, and how they are measured alike.

`works` says what is decoded, `limit` counts the bytes that a step must read, `figures` makes rows;
all three are pure. `batches` and `served` drive a process for each way, one of them at a time.
Modules that end in `_side` are run as a process of their own.
"""
