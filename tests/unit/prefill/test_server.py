"""What the worker is given of a request on the wire."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, worker_pb2

from prefill.metrics import Metrics
from prefill.records import Request, RequestFailed
from prefill.server import PrefillService
from service.errors import WorkFailed


class StubWorker:
    """Fails every request at once, and keeps it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.service: PrefillService | None = None

    def blocks_for(self, tokens: int) -> int:
        return 1

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        assert self.service is not None
        failure = RequestFailed(reason="Test", message="enough seen", retryable=False)
        self.service.emit(request.request_id, failure)

    def abort(self, request_id: int) -> None:
        """Nothing is under way."""


async def test_worker_is_told_whose_request_it_is_and_what_it_shares() -> None:
    worker = StubWorker()
    unused: Any = None
    config: Any = SimpleNamespace(vocab_size=10, eos_token_ids=(9,))
    worker.service = PrefillService(
        name="prefill",
        config=config,
        total_blocks=8,
        cp=2,
        max_queue=4,
        worker=worker,  # type: ignore[arg-type]
        transfers=unused,
        peers=unused,
        metrics=Metrics(CollectorRegistry()),
    )

    async def messages() -> AsyncIterator[worker_pb2.PrefillRunRequest]:
        start = worker_pb2.PrefillStart(
            request_id=7,
            prompt_token_ids=[1, 2],
            stop=common_pb2.StopParams(max_new_tokens=2),
            ttl_ms=1000,
            priority=-3,
            tenant="a team",
            cache_salt="a user",
            cp_first=1,
            output_tokens=1,
        )
        yield worker_pb2.PrefillRunRequest(start=start)

    with pytest.raises(WorkFailed, match="enough seen"):
        _ = [outcome async for outcome in worker.service.Run(messages(), None)]
    [request] = worker.requests
    assert (request.prompt, request.priority, request.cp_first) == ([1, 2], -3, 1)
    assert (request.tenant, request.cache_salt) == ("a team", b"a user")
    assert request.output_tokens == 1
