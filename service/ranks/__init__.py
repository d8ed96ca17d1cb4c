"""Instances of several ranks: how ranks start, find each other, and stay in step.

Knows the processes and the streams between them; what ranks do with a model is the roles'.
"""
