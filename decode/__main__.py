"""`python -m decode MODEL`: the decode launcher."""

import os

from decode import member
from decode.config import DecodeConfig
from service.config import launcher
from service.threads import set_thread_env


def start(config: DecodeConfig) -> None:
    """Run one decode instance until it is stopped, or the rank of one that torchrun wants."""
    if int(os.environ.get("RANK", "0")) > 0:
        member.start(config)
        return
    set_thread_env(config.rank_threads)  # before torch is imported, or it has no effect
    from decode.instance import main
    from service.lifecycle import run

    run(lambda: main(config), role="decode")


app = launcher("decode", DecodeConfig, start, help="Run a decode instance that joins a router.")

if __name__ == "__main__":
    app()
