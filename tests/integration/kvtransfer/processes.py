"""Starts ranks as processes of their own and talks to them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

WAIT_S = 15.0


class RankProcess:
    """One rank; killed at the end whatever happened."""

    def __init__(self, role: str, **config: Any) -> None:
        defaults: dict[str, Any] = {"tokens": 1000, "layers": 4, "slots": 6}
        defaults |= {"tls": None, "epoch": 7, "lane": "ucx", "heartbeat_s": 0.3}
        full = {**defaults, "instance": "prefill", **config}
        self.role = role
        self.epoch, self.instance = full["epoch"], full["instance"]
        self._bound: list[Any] | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.kvtransfer.rank", role, json.dumps(full)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                self._log.append(said)
                self._heard.put(said)

    def do(self, what: str, **command: Any) -> None:
        """Give a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **command}) + "\n")
        self.process.stdin.flush()

    def ask(self, what: str, **command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.do(what, **command)
        return self.wait(answer=what)

    def wait(self, **wanted: Any) -> dict[str, Any]:
        """Return the next thing said that has these fields; others are dropped."""
        return self.wait_any(wanted)

    def wait_any(self, *alternatives: dict[str, Any]) -> dict[str, Any]:
        """Return the next thing said that has all fields of one of these; others are dropped."""
        while True:
            try:
                said = self._heard.get(timeout=WAIT_S)
            except queue.Empty:
                status = self.process.poll()
                raise AssertionError(
                    f"{alternatives} never came; exit status {status}; heard {self._log}"
                ) from None
            for wanted in alternatives:
                if all(said.get(name) == value for name, value in wanted.items()):
                    return said

    def slots_become(self, **wanted: int) -> None:
        """Wait until the slots are in these states (stats are a moment old)."""
        until = time.monotonic() + WAIT_S
        while (slots := self.ask("stats")["slots"]) != wanted:
            assert time.monotonic() < until, f"slots stay {slots}"
            time.sleep(0.02)

    @property
    def bound(self) -> list[Any]:
        """Where a receiver listens; starts it when asked first."""
        if self._bound is None:
            self._bound = list(self.ask("start")["bound"])
        return self._bound

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill -9 and reap."""
        self.process.kill()
        self.process.wait(WAIT_S)

    def close(self) -> None:
        """End the process, politely or not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
        try:
            self.process.stdin.close()
            self.process.wait(5.0)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.kill()
        self._reader.join(5.0)
        self.process.stdout.close()


def join(sender: RankProcess, receiver: RankProcess) -> None:
    """Connect a started sender to a started receiver."""
    sender.do("connect", bound=receiver.bound, epoch=receiver.epoch)
    sender.wait(event="PeerUp")
    receiver.wait(event="PeerUp")


def begin(sender: RankProcess, receiver: RankProcess, transfer_id: int) -> None:
    """Open the grant, then begin; nothing is ready yet."""
    receiver.ask("open", id=transfer_id, epoch=receiver.epoch, source=sender.instance)
    sender.ask("open", id=transfer_id, epoch=receiver.epoch)


def transfer(
    sender: RankProcess, receiver: RankProcess, transfer_id: int, layers: int = 4
) -> dict[str, Any]:
    """Move the whole sequence and check every byte; return the receiver's Completed."""
    begin(sender, receiver, transfer_id)
    sender.do("ready", id=transfer_id, layers=[0, layers])
    sender.wait(event="Completed", id=transfer_id)
    done = receiver.wait(event="Completed", id=transfer_id)
    assert receiver.ask("check") == {"answer": "check", "right": True, "others": True}
    return done
