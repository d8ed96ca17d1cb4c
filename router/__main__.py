"""`python -m router`: the router's launcher."""

from router.config import RouterConfig
from service.config import launcher
from service.lifecycle import run
from service.logs import configure_logging


def start(config: RouterConfig) -> None:
    """Run one router until it is stopped."""
    configure_logging(role="router", level=config.log_level, as_json=config.log_json)
    from router.server import main

    run(lambda: main(config), role="router")


app = launcher("router", RouterConfig, start, help="Run a router: admit requests, send them on.")

if __name__ == "__main__":
    app()
