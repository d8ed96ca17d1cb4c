"""What every gRPC process of Twinpool shares: errors, lifecycle, registration, config, logs.

The router imports this package and must start at once: what it needs of it loads no torch.

A role's launcher, for example `router/__main__.py`, reads:

    from router.config import RouterConfig
    from service.config import launcher
    from service.lifecycle import run
    from service.logs import configure_logging

    def start(config: RouterConfig) -> None:
        configure_logging(role="router", level=config.log_level, as_json=config.log_json)
        from router.server import main

        run(lambda: main(config), role="router")

    app = launcher("router", RouterConfig, start, help="Admits requests and sends them on.")

    if __name__ == "__main__":
        app()

Roles that import torch call `service.threads.set_thread_env(n)` in `start` before that import.
"""

import os

# gRPC's core reads these once, when it is first imported. Its own log lines carry no role and no
# level that we know; its fork handlers only warn where a process with gRPC starts a child.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
