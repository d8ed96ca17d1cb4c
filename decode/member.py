"""`python -m decode.member`: a rank that an instance's first one has started on its host.

Its settings come on standard input, as JSON, and its place in the environment.
"""

import sys
from functools import partial

from decode.config import DecodeConfig
from service.parent import exit_with_supervisor
from service.threads import set_thread_env


def start(config: DecodeConfig) -> None:
    """Be one of an instance's ranks, but not the first, until the first lets go."""
    set_thread_env(config.rank_threads)  # before torch is imported, or it has no effect
    from decode.follower import make_follower
    from service.lifecycle import run
    from service.ranks.follower import FirstRankLost, follow

    make = partial(make_follower, config)
    run(lambda: follow(config, make), role="decode", expected=(FirstRankLost,))


if __name__ == "__main__":
    exit_with_supervisor()
    start(DecodeConfig.model_validate_json(sys.stdin.read()))
