"""Chooses layouts and pool sizes before anything runs: sizing, cost model, layout search.

Owns arithmetic over published and measured figures; loads no weights, no torch, asks no machine.
"""
