import gzip
from pathlib import Path

import pytest

from planner.errors import TraceError
from planner.traces import Request, read_trace
from planner.workload import of_trace, steady

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2225670,879,55"
)
MOONCAKE = (
    '{"timestamp": 500, "input_length": 1000, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3500, "input_length": 7322, "output_length": 490, "hash_ids": []}\n'
)


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode())
    return path


def test_azures_columns_are_read_with_all_their_digits(tmp_path: Path) -> None:
    requests = read_trace(write(tmp_path, "trace.csv", AZURE))
    assert [request.prompt_tokens for request in requests] == [374, 396, 879]
    assert [request.output_tokens for request in requests] == [44, 109, 55]
    assert [request.at_s for request in requests] == pytest.approx([0, 4.314579, 4.541977])


def test_mooncakes_lines_are_read_and_begin_at_zero(tmp_path: Path) -> None:
    requests = read_trace(write(tmp_path, "trace.jsonl", MOONCAKE))
    assert requests == [
        Request(at_s=0.0, prompt_tokens=1000, output_tokens=500, blocks=(0, 1)),
        Request(at_s=3.0, prompt_tokens=7322, output_tokens=490),
    ]


def test_a_gzipped_trace_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    assert read_trace(path) == read_trace(write(tmp_path, "trace.csv", AZURE))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens\n1,2\n", "no column GeneratedTokens; found TIMESTAMP"),
        ("t.csv", "", "no column TIMESTAMP.*; found nothing"),
        ("t.csv", AZURE.splitlines()[0], "has no requests"),
        ("t.csv", AZURE.replace("18:15:50", "18:15:40"), "line 3: goes 5.68542 s back in time"),
        ("t.csv", AZURE.replace(",396,", ",many,"), "line 3: .*ContextTokens 'many'"),
        ("t.csv", AZURE.replace("2023-11-16 18:15:50", "yesterday"), "line 3: TIMESTAMP 'yester"),
        ("t.csv", AZURE.replace(",396,109", ",396"), "line 3: .*GeneratedTokens None"),
        ("t.csv", AZURE.replace(",396,", ",0,"), "line 3: 0 prompt and 109 output tokens"),
        ("t.jsonl", MOONCAKE.replace("output_length", "out", 1), "line 1: has no field output_le"),
        ("t.jsonl", MOONCAKE.replace("3500", "100"), "line 2: goes 0.4 s back in time"),
        ("t.jsonl", MOONCAKE.replace("7322", "[]"), r"line 2: .*input_length \[\]"),
        ("t.jsonl", MOONCAKE.replace("7322", "7.5"), "line 2: .*input_length 7.5"),
        ("t.jsonl", "nonsense\n", "line 1: is no JSON"),
        ("t.jsonl", "[1]\n", "line 1: has no field timestamp, input_length, output_length"),
        ("t.jsonl", MOONCAKE.replace("3500", "NaN"), "line 2: timestamp nan"),
        ("t.jsonl", MOONCAKE.replace("[0, 1]", "[0]"), "line 1: 1000 prompt tokens are 2 blocks"),
        ("t.jsonl", MOONCAKE.replace("[0, 1]", '["x", 1]'), "line 1: hash_ids: .*'x'"),
        ("t.jsonl", MOONCAKE.replace("[0, 1]", "7"), "line 1: hash_ids: "),
        ("t.txt", AZURE, r"neither \.csv"),
        ("t.csv.gz", AZURE, "cannot be read: Not a gzipped file"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, name, content))


def test_only_the_first_requests_are_read_where_no_more_are_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, "trace.jsonl", MOONCAKE + "nonsense")
    assert [request.prompt_tokens for request in read_trace(path, 2)] == [1000, 7322]


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.csv: cannot be read"):
        read_trace(tmp_path / "none.csv")


def requests(count: int, gap_s: float) -> list[Request]:
    return [
        Request(at_s=at * gap_s, prompt_tokens=100 + at, output_tokens=10) for at in range(count)
    ]


def test_a_trace_becomes_its_rate_and_sizes() -> None:
    load = of_trace(requests(1001, 0.5))
    assert load.rate_per_s == pytest.approx(2.0)
    assert load.gap_scv == pytest.approx(0.0)
    assert load.prompt_tokens == pytest.approx(600, rel=0.01)
    assert len(load.prompts) == 128
    assert list(load.prompts) == sorted(load.prompts)
    assert (load.output_tokens, load.decode_steps) == (10, 9)
    assert load.decode_context == pytest.approx(605)
    assert (load.longest, load.longest_prompt) == (1110, 1100)


def test_long_answers_weigh_more_in_what_decode_holds() -> None:
    pair = [
        Request(at_s=0, prompt_tokens=1000, output_tokens=1),
        Request(at_s=1, prompt_tokens=10, output_tokens=999),
    ]
    load = of_trace(pair)
    assert load.decode_context == pytest.approx((1000.5 + 999 * (10 + 499.5)) / 1000, abs=1)


def test_requests_at_one_time_need_a_rate() -> None:
    with pytest.raises(TraceError, match="come at one time, which is no rate; give --rate"):
        of_trace(requests(5, 0.0))
    assert of_trace(requests(5, 0.0), rate_per_s=3.0).rate_per_s == 3.0


def test_burstiness_can_be_said_instead() -> None:
    assert of_trace(requests(5, 1.0), gap_scv=4.0).gap_scv == 4.0
    assert steady(100, 10, 1.0).gap_scv == 1.0
