"""The limit of UCX: its own ucx_perftest, which sends tagged messages from one hot buffer.

On a virtual machine its runs fall into two groups, one about twice as fast as the other, though
nothing else runs. So one run says little: take the median of ten or more, spread over the bench.
"""

import importlib.util
import os
import subprocess
import time
from pathlib import Path

from bench.movers.cores import pinned, sender_and_receiver
from bench.movers.works import MIB, Carrier
from bench.sides import servers
from bench.sides.process import SideFailed

_RUN_BYTES = 512 * MIB
_RUN_S = 30.0
_SERVER_S = 10.0


def tag_bandwidth(message_bytes: int, carrier: Carrier) -> float:
    """Return GB/s of one run over 512 MiB; raises SideFailed where it does not come about."""
    folder = _libucx()
    env = {key: value for key, value in os.environ.items() if key[:4] != "UCX_"}
    env |= carrier.environment() | {"LD_LIBRARY_PATH": _libraries(folder)}
    messages = max(16, _RUN_BYTES // message_bytes)
    port = servers.free_port()
    command = [str(folder / "bin" / "ucx_perftest"), "-e", "-t", "tag_bw", "-f", "-p", str(port)]
    command += ["-s", str(message_bytes), "-n", str(messages), "-w", str(messages // 10)]
    sender, receiver = sender_and_receiver()
    with pinned(receiver):
        server = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    try:
        with pinned(sender):
            return parse(_client([command[0], "127.0.0.1", *command[1:]], env, server))
    finally:
        server.terminate()
        server.wait()


def parse(output: str) -> float:
    """Return GB/s (of 10^9 bytes) from what ucx_perftest -f prints; raises SideFailed."""
    lines = output.strip().splitlines()
    fields = lines[-1].split() if lines else []
    try:
        # Messages, three overheads, then MiB/s lately and over all.
        return float(fields[5]) * MIB / 1e9
    except (IndexError, ValueError) as exc:
        raise SideFailed(f"ucx_perftest printed no figures: {output[-500:]!r}") from exc


def _client(command: list[str], env: dict[str, str], server: "subprocess.Popen[bytes]") -> str:
    """Run the sending side, again and again until the server listens."""
    deadline = time.monotonic() + _SERVER_S
    while True:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=_RUN_S, check=False
        )
        if done.returncode == 0:
            return done.stdout
        if server.poll() is not None or time.monotonic() > deadline:
            raise SideFailed(f"ucx_perftest failed: {(done.stdout + done.stderr)[-500:]}")
        time.sleep(0.05)


def _libucx() -> Path:
    found = importlib.util.find_spec("libucx")
    if found is None or not found.submodule_search_locations:
        raise SideFailed("the package libucx is not installed, though ucxx needs it")
    return Path(found.submodule_search_locations[0])


def _libraries(folder: Path) -> str:
    """The wheel keeps what UCX itself needs in a folder beside its package."""
    beside = sorted(folder.parent.glob("libucx_*.libs"))
    return ":".join(str(path) for path in (folder / "lib", *beside))
