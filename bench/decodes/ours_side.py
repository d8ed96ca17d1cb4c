"""Our decode instance without its network: engine, admission, scheduler and step loop as served.

The cache is filled with random numbers instead of prompts' keys and values, and no transfer or
router is waited for: the step loop finds a batch that may run, and runs it to its end.
"""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.prefills.works import BLOCK_SIZE
from bench.sides.answers import serve
from decode.admission import Admission
from decode.compute import RankCompute, Steps
from decode.prefixes import Prefixes
from decode.scheduler import Scheduler
from decode.sequence import Reservation
from decode.worker import Step, Worker
from engine.blocks import BlockPool
from engine.cache_memory import CacheItself
from engine.config import load_config
from engine.kernels.experts import Experts
from engine.kernels.rows import Routes
from engine.layers.moe import SparseMLP
from engine.models.decoder import Decoder
from engine.runner import ModelRunner
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from service.malloc import keep_freed_memory

_RUN_S = 900.0
_TTL_S = 3600.0


class Watched:
    """A runner's model, and the seconds that it has computed since it was last asked."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any) -> Any:
        began = time.perf_counter()
        result = self._model(*args)
        self._seconds += time.perf_counter() - began
        return result

    def take_s(self) -> float:
        """Return the seconds, and begin anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Counted:
    """A layer's experts, and how many of them each call has used, while there is a list for it."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.counts: list[int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        if self.counts is not None:
            self.counts.append(sum(load > 0 for load in routes.pairs.loads))
        return self._experts(x_TD, routes)


class Chosen:
    """How many experts of a sparse layer a pass's tokens have chosen, while asked to count."""

    def __init__(self, model: Decoder) -> None:
        """Stand between each sparse layer of `model` and its experts."""
        self._model = model
        self._layers: list[Counted] = []
        for layer in model._layers:
            if isinstance(layer._mlp, SparseMLP):
                counted: Any = Counted(layer._mlp._experts)
                layer._mlp._experts = counted
                self._layers.append(counted)

    def count(self, run: Callable[[], object]) -> float:
        """Return the mean over layers and passes of what is run; 0 where no layer is sparse.

        Layer by layer: the kernel of a whole step does not say which experts it has used.
        """
        counts: list[int] = []
        for layer in self._layers:
            layer.counts = counts
        step, self._model._step = self._model._step, None
        run()
        self._model._step = step
        for layer in self._layers:
            layer.counts = None
        return sum(counts) / len(counts) if counts else 0.0


class Ours:
    """A runner, and for each run a pool, an admission and a step loop of its own."""

    def open(self, *, model: str, num_blocks: int) -> dict[str, Any]:
        """Load the model and fill the cache."""
        self._runner = ModelRunner(
            folder=Path(model),
            config=load_config(Path(model)),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )
        self._runner.warm_up()
        torch.manual_seed(0)
        self._runner.cache.tensor.normal_()
        self._chosen = Chosen(self._runner._model)
        self._model = Watched(self._runner._model)
        self._runner._model = self._model  # type: ignore[assignment]
        return {"version": "ours"}

    def run(self, *, last_tokens: list[int], context: int, steps: int) -> dict[str, Any]:
        """Decode a sequence for each last token.

        Answers with the steps: when each was over, how many tokens it gave, and the seconds of it
        that were not the model's.
        """
        taken: list[tuple[float, int, float]] = []
        over = threading.Event()
        broken: list[BaseException] = []
        left = len(last_tokens)

        def emit(step: Step) -> None:
            nonlocal left
            tokens = [token for each in step.tokens.values() for token in each]
            taken.append((time.perf_counter(), len(tokens), self._model.take_s()))
            left -= sum(token.finish is not None for token in tokens)
            if not left:
                over.set()

        def on_fatal(error: BaseException) -> None:
            broken.append(error)
            over.set()

        worker = self._worker(last_tokens, context, steps, emit, on_fatal)
        worker.start()
        in_time = over.wait(_RUN_S)
        worker.stop()
        if broken:
            raise broken[0]
        if not in_time:
            raise TimeoutError(f"{left} of {len(last_tokens)} sequences have not ended")
        return {
            "steps": [step[:2] for step in taken],
            "outside": [
                end - began - computed for (began, *_), (end, _, computed) in pairwise(taken)
            ],
        }

    def experts(self, **asked: Any) -> dict[str, Any]:
        """Answer with the experts that a step of a run uses, on average over sparse layers."""
        return {"experts": self._chosen.count(lambda: self.run(**asked))}

    def _worker(
        self,
        last_tokens: list[int],
        context: int,
        steps: int,
        emit: Callable[[Step], None],
        on_fatal: Callable[[BaseException], None],
    ) -> Worker:
        """Return a step loop, not started yet, that has all sequences to run."""
        steps_of = Steps(RankCompute(self._runner, CacheItself(self._runner.cache)))
        admission = Admission(
            prefixes=[
                Prefixes(BlockPool(self._runner.num_blocks), layers=self._runner.config.num_layers)
            ],
            block_size=BLOCK_SIZE,
            max_sequences=len(last_tokens),
            revoke=lambda transfer_id: None,
            on_end=lambda record: steps_of.remove(record.request_id),
        )
        worker = Worker(
            compute=steps_of,
            admission=admission,
            scheduler=Scheduler(max_batch=len(last_tokens)),
            emit=emit,
            on_fatal=on_fatal,
        )
        for request_id, token_id in enumerate(last_tokens):
            record = admission.reserve(
                Reservation(
                    request_id=request_id,
                    router_id="bench",
                    prompt_tokens=context,
                    prompt_ids=(),
                    sampling=SamplingParams(),
                    stop=StopCriteria(max_new_tokens=steps + 1, ignore_eos=True),
                    ttl_s=_TTL_S,
                )
            )
            steps_of.add(record)
            admission.activate(request_id, token_id)
            admission.complete(record.transfer.transfer_id)
            worker.ready(request_id)
        return worker


if __name__ == "__main__":
    keep_freed_memory()
    side = Ours()
    serve({"open": side.open, "run": side.run, "experts": side.experts})
