"""The model runner: weights, KV cache, batches, models and sampling on one rank.

Knows nothing of gRPC, of transfers or of text. Import the modules themselves: this file
stays empty so that `engine.blocks` and `engine.stopping` load without torch.
"""
