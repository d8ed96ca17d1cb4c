import json
import logging
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Counter

from service.errors import StartError
from service.logs import configure_logging, request_log
from service.metrics import MetricsEndpoint, new_registry


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_plain_line_has_level_instance_message_and_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(role="decode", instance="decode-1")
    logger = request_log(logging.getLogger("test"), "00ff")
    logger.warning("took %d blocks", 3, extra={"rank": 2})
    _, _, rest = capsys.readouterr().err.partition(" ")
    assert rest == "warning decode-1: took 3 blocks rank=2 request_id=00ff\n"


def test_json_line_has_the_same_as_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(role="decode", instance="decode-1", as_json=True)
    request_log(logging.getLogger("test"), "00ff").info('a "quoted"\nmessage')
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time") > 0
    assert line == {
        "level": "info",
        "role": "decode",
        "instance": "decode-1",
        "logger": "test",
        "message": 'a "quoted"\nmessage',
        "request_id": "00ff",
    }


def test_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(role="router", level="warning")
    logging.getLogger("test").info("quiet")
    assert capsys.readouterr().err == ""


def test_metrics_are_served_on_loopback_from_their_own_registry() -> None:
    registry = new_registry()
    Counter("twinpool_requests", "Requests.", registry=registry).inc(3)
    with MetricsEndpoint(registry, port=0) as endpoint:
        url = f"http://127.0.0.1:{endpoint.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        with pytest.raises(StartError, match="--metrics-port"):
            MetricsEndpoint(new_registry(), port=endpoint.port)
    assert "twinpool_requests_total 3.0" in text
    assert "process_resident_memory_bytes" in text
