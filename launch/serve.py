"""`twinpool serve`: all roles on one machine, until it is told to stop."""

import asyncio

from launch.cluster import Cluster, ClusterConfig
from service.config import launcher
from service.lifecycle import run
from service.logs import configure_logging


async def _until_cancelled(cluster: Cluster) -> None:
    await asyncio.Event().wait()


def start(config: ClusterConfig) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    configure_logging(role="serve", level=config.log_level)

    async def main() -> None:
        await Cluster(config, lambda line: print(line, flush=True)).run(_until_cancelled)

    run(main, role="serve")


app = launcher(
    "serve",
    ClusterConfig,
    start,
    help="Serve a model on this machine: starts a router, a prefill and a decode instance (or, with"
    " --colocated, instances that do both), restarts them when they die, and stops them all at the"
    " end.",
)
