"""The parts that models are made of. Each knows its shard of the weights; none knows requests."""
