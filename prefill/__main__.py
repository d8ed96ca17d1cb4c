"""`python -m prefill MODEL`: the prefill launcher."""

import os

from prefill import member
from prefill.config import PrefillConfig
from service.config import launcher
from service.priority import give_way
from service.threads import set_thread_env


def start(config: PrefillConfig) -> None:
    """Run one prefill instance until it is stopped, or the rank of one that torchrun wants."""
    give_way(config.nice)
    if int(os.environ.get("RANK", "0")) > 0:
        member.start(config)
        return
    set_thread_env(config.rank_threads)  # before torch is imported, or it has no effect
    from prefill.instance import main
    from service.lifecycle import run

    run(lambda: main(config), role="prefill")


app = launcher("prefill", PrefillConfig, start, help="Run a prefill instance that joins a router.")

if __name__ == "__main__":
    app()
