"""What operators see of a request: its line, its trace in the logs of all roles, its metrics."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, wait_until
from tests.integration.conftest import BLOCK

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
METRICS = free_port()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access") / "access.log"


@pytest.fixture(scope="module")
def watched(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    more = ("--access-log", str(log), "--metrics-port", str(METRICS))
    with Cluster(
        MODEL_DIR,
        tmp_path_factory.mktemp("watched"),
        *("--dtype", "float32", "--block-size", str(BLOCK), "--log-level", "debug"),
        router_flags=more,
    ) as cluster:
        yield cluster


def test_request_can_be_followed_by_its_id_and_its_trace(watched: Cluster, log: Path) -> None:
    with watched.client() as client:
        answer = client.complete(
            "A secret rendezvous",
            max_new_tokens=8,
            ignore_eos=True,
            tenant="a team",
            traceparent=f"00-{TRACE_ID}-00f067aa0ba902b7-01",
        )
    wait_until(lambda: '"Generate"' in log.read_text(), "the request's line")
    [line] = [
        entry
        for entry in map(json.loads, log.read_text().splitlines())
        if entry["method"] == "Generate"
    ]
    stats = answer.stats
    assert (line["request_id"], line["trace_id"]) == (answer.request_id, TRACE_ID)
    assert (line["outcome"], line["tenant"]) == ("finished", "a team")
    assert line["output_tokens"] == 8
    assert line["prefill_instance"] == stats.prefill_instance
    assert line["prefill_s"] == pytest.approx(stats.prefill_s, abs=1e-6)
    assert 0 < line["ttft_s"] < line["total_s"]
    assert line["inter_token_s"] > 0
    assert "rendezvous" not in log.read_text()
    told = f"request_id={answer.request_id} trace_id={TRACE_ID}"
    wait_until(lambda: told in watched.log("prefill"), "the trace in prefill's log")
    wait_until(lambda: told in watched.log("decode"), "the trace in decode's log")


def test_metrics_have_the_names_that_dashboards_look_for(watched: Cluster) -> None:
    with watched.client() as client:
        client.complete("Once", max_new_tokens=8, ignore_eos=True)
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as page:
        text = page.read().decode()

    def value(name: str, label: str = "") -> float:
        found = re.search(rf"^{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE)
        assert found is not None, (name, label)
        assert f'model_name="{MODEL_DIR.name}"' in found[0]
        return float(found[1])

    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert value(f"twinpool_{name}_count") >= 1
    assert value("twinpool_inter_token_latency_seconds_count") >= 1
    assert value("twinpool_time_per_output_token_seconds_count") >= 1
    assert value("twinpool_request_generation_tokens_sum") >= 8
    assert value("twinpool_request_prompt_tokens_count") >= 1
    assert value("twinpool_request_success_total", 'finished_reason="length"') >= 1
    assert value("twinpool_num_requests_running") == 0
    assert value("twinpool_num_requests_waiting") == 0
    for hop in ("queue", "reserve", "prefill_queue", "prefill", "handoff", "decode_first_step"):
        assert value("twinpool_hop_seconds_count", f'hop="{hop}"') >= 1
    assert value("twinpool_router_ledger_blocks", 'state="held"') == 0
    assert "twinpool_router_access_log_lost_lines_total 0.0" in text.splitlines()
