"""A caller's trace is taken, shown in logs, and passed on; what is no valid one is left alone."""

import json
import logging
import re

import pytest

from service.logs import JsonFormatter, PlainFormatter
from service.trace import begin_trace, current_trace, read_trace, trace_metadata

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


def test_callers_trace_goes_on_under_a_span_of_ours() -> None:
    trace = read_trace([("traceparent", PARENT), ("tracestate", "a=1,b=2")])
    assert trace is not None
    assert (trace.trace_id, trace.flags, trace.state) == (TRACE_ID, "01", "a=1,b=2")
    assert trace.span_id != PARENT_ID
    assert trace.metadata == (
        ("traceparent", f"00-{TRACE_ID}-{trace.span_id}-01"),
        ("tracestate", "a=1,b=2"),
    )


@pytest.mark.parametrize(
    "parent",
    [
        "",
        PARENT.upper(),
        PARENT[:-1],
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"{PARENT}-more",
        f"{PARENT}\nforged=1",
    ],
)
def test_what_is_no_trace_is_not_taken(parent: str) -> None:
    assert read_trace([("traceparent", parent), ("tracestate", "a=1")]) is None


def test_two_parents_are_none() -> None:
    assert read_trace([("traceparent", PARENT), ("traceparent", PARENT)]) is None


def test_later_version_may_say_more() -> None:
    trace = read_trace([("traceparent", f"01-{TRACE_ID}-{PARENT_ID}-03-more")])
    assert trace is not None
    assert (trace.trace_id, trace.flags) == (TRACE_ID, "01")


@pytest.mark.parametrize("state", ["x" * 513, "a=\n"])
def test_state_that_cannot_be_passed_on_is_left_out(state: str) -> None:
    trace = read_trace([("traceparent", PARENT), ("tracestate", state)])
    assert trace is not None
    assert trace.state == ""


async def test_call_without_a_trace_gets_a_new_one_for_all_it_does() -> None:
    assert current_trace() is None
    assert trace_metadata() == ()
    trace = begin_trace()
    assert begin_trace() is trace
    assert re.fullmatch(r"[0-9a-f]{32}", trace.trace_id)
    assert trace_metadata() == (("traceparent", f"00-{trace.trace_id}-{trace.span_id}-00"),)


async def test_log_lines_of_a_call_show_its_trace() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "hello", None, None)
    plain, lines = PlainFormatter(role="r", instance=""), JsonFormatter(role="r", instance="")
    assert "trace_id" not in plain.format(record) + lines.format(record)
    trace = begin_trace()
    assert plain.format(record).endswith(f"hello trace_id={trace.trace_id}")
    assert json.loads(lines.format(record))["trace_id"] == trace.trace_id
