"""Processes that benchmarks drive by lines of JSON, and the ways of serving that they share.

`process` is the driving end, `answers` the other one. Modules that end in `_side` are run as a
process of their own; `answers`, `servers` and those of vLLM run under a peer's interpreter, which
finds this folder and nothing else of this project.
"""
