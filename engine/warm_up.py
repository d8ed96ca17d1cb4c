"""Which passes make a runner ready, so that no request pays for what is set up at first use.

On a CPU those of typical shapes. A GPU's kernels have several forms, by how many tokens and keys
there are, and each is compiled when it is first launched: there passes go through all of them.
"""

from collections.abc import Iterator, Sequence

from engine.batch import Chunk

_TYPICAL_TOKENS = (256, 16, 1)
# No pass has more new tokens; where one does, its kernels are those of these.
_MOST_TOKENS = 8192
_LEAST_KEYS = 16
_PIECES = (2, 128)


def warm_up_passes(
    most_tokens: int, block_tokens: int, ranks: int, *, all_forms: bool
) -> Iterator[Sequence[Chunk]]:
    """Yield the chunks of each pass, for a cache of so many tokens; blocks are from 0 upwards.

    `ranks` are those that share a prompt's tokens.
    """
    for tokens in _TYPICAL_TOKENS:
        yield [_chunk(min(tokens * ranks, most_tokens), 0, block_tokens)]
    if not all_forms:
        return
    for tokens in _doubled(1, min(_MOST_TOKENS, most_tokens)):
        yield [_chunk(tokens, 0, block_tokens)]
    for keys in _doubled(_LEAST_KEYS, most_tokens):
        step = _chunk(1, keys - 1, block_tokens)
        yield [step]
        for tokens in _PIECES:  # few have their keys split, as steps have, and more have not
            piece = _chunk(min(tokens, keys), max(0, keys - tokens), block_tokens)
            yield [piece]
            yield [step, piece]


def _doubled(least: int, most: int) -> list[int]:
    """Return the least and its doubles up to the most, and that."""
    found = []
    while least < most:
        found.append(least)
        least *= 2
    return [*found, most]


def _chunk(tokens: int, start: int, block_tokens: int) -> Chunk:
    blocks = range(-(-(start + tokens) // block_tokens))
    return Chunk(token_ids=[0] * tokens, start=start, block_table=blocks)
