"""The costs of splitting a prompt over an instance's ranks, measured once and kept on disk.

Owns the file and what it is named after. Measuring is `engine.ring.calibrate`'s.
"""

import hashlib
import json
import logging
import math
import os
import platform
import socket
import tempfile
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.kvcache import KVCache
from engine.parallel import Layout
from engine.ring.calibrate import Greatest, Stopwatch, Subject, Trial, grain_for, measure, shared
from engine.ring.comm import Wire
from engine.ring.model import SplitCosts
from engine.weights import fingerprint
from native import NativeError, cache_folder

log = logging.getLogger(__name__)

_METHOD = 1  # goes up when figures of an earlier way of measuring are of no more use


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one rank needs to find out what a split costs; all ranks do so together."""

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    wire: Wire
    greatest: Greatest
    is_first: bool

    def choose_grain(self, trial: Trial, block_size: int, most: int) -> int:
        """Return the same grain on all ranks, of whole blocks and of about `most` tokens at most.

        Takes seconds, or next to nothing where the figures are on the first rank's disk. Raises
        WeightError where the model cannot be read, and CommError.
        """
        # Over a network, messages are not what they are on one host.
        host = _number(socket.gethostname())
        low, high = self.greatest(torch.tensor([-host, host], dtype=torch.float64)).tolist()
        path = self._path(one_host=-low == high) if self.is_first else None
        costs = shared(None if path is None else read(path), self.greatest)
        source = "known from an earlier start"
        if costs is None:
            source = "measured"
            costs = measure(trial, self.wire, self._subject(), Stopwatch(self.greatest))
            if path is not None:
                write(path, costs)
        grain = grain_for(costs, self.wire.size, block_size, most)
        if self.is_first:
            log.info("a grain is %d tokens: %s, %s", grain, _described(costs), source)
        return grain

    def _subject(self) -> Subject:
        layers = self.layout.most_layers(self.config.num_layers)
        token_bytes = KVCache.block_bytes(self.config, self.dtype, 1, self.layout) // layers
        return Subject(
            layers=layers,
            token_bytes=token_bytes,
            longest=self.config.max_position_embeddings,
            device=self.device,
        )

    def _path(self, *, one_host: bool) -> Path | None:
        named_after = (
            _METHOD,
            fingerprint(self.folder),
            str(self.dtype),
            (self.layout.tp, self.layout.pp, self.layout.cp, one_host),
            (torch.get_num_threads(), len(os.sched_getaffinity(0)), _processor(self.device)),
            torch.__version__,
        )
        key = hashlib.sha256(json.dumps(named_after).encode()).hexdigest()[:32]
        try:
            return cache_folder("calibration") / f"{key}.json"
        except NativeError as error:
            log.warning("the costs of a split are measured at each start: %s", error)
            return None


def read(path: Path) -> SplitCosts | None:
    """Return the costs that a file holds; None where there is none, or none of any use."""
    try:
        costs = SplitCosts(**json.loads(path.read_bytes()))
        if not all(map(math.isfinite, astuple(costs))):
            raise ValueError(f"not all are numbers: {costs}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is of no use, so the costs of a split are measured: %s", path, error)
        return None
    return costs


def write(path: Path, costs: SplitCosts) -> None:
    """Keep the costs for the next start; where that is not possible, say so and go on."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as making:
            made = Path(making) / path.name
            made.write_text(json.dumps(asdict(costs)))
            made.replace(path)  # at once, whoever else is starting too
    except OSError as error:
        log.warning("the costs of a split cannot be kept: %s", error)


def _number(text: str) -> int:
    """Return a number for a text that a float64 holds exactly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _described(costs: SplitCosts) -> str:
    return (
        f"{costs.token_s * 1e6:.3g} us a token, {costs.pair_s * 1e9:.3g} ns a pair of tokens,"
        f" {costs.hop_s * 1e6:.3g} us a hop and layer, {costs.bytes_per_s / 1e9:.3g} GB/s"
    )
