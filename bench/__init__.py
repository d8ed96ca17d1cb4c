"""Benchmarks, one question a file; each measures its limit or its peer in the same run."""
