"""Pools on a virtual clock, run by the router's and the schedulers' own code."""
