"""How full a pipeline of stages is. Pure."""


def utilisation(stages: int, micro_batches: int) -> float:
    """Return the share of a stage's time that is work, of so many micro-batches one after another.

    Filling and draining leave each stage without work for stages - 1 of them (GPipe,
    arXiv 1811.06965, section 2.3).
    """
    return micro_batches / (micro_batches + stages - 1)
