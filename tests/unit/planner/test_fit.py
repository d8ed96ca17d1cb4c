import json
from pathlib import Path

import pytest

from planner.calibration import Calibration, read_calibration, shipped
from planner.errors import HardwareError
from planner.fit import fit, predict
from planner.hardware import find_device
from planner.layout import Layout, Role
from planner.measured import Measured, read_bench
from planner.models import published
from planner.shape import Experts, ModelShape

RESULTS = Path(__file__).parents[3] / "bench/results"
FILES = [RESULTS / f"{name}-2026-11-21.json" for name in ("decode", "prefill")]
CPU = find_device("cpu")
# As bench.checkpoints writes them.
DENSE = ModelShape(
    name="dense",
    layers=8,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_size=128,
    inner=3072,
    vocab=32_000,
    tied=True,
)
SPARSE = ModelShape(
    name="moe",
    layers=8,
    hidden=512,
    heads=8,
    kv_heads=4,
    head_size=64,
    inner=1536,
    vocab=32_000,
    tied=True,
    experts=Experts(count=32, top_k=4, inner=256, layers=8),
)


def bench(shape: ModelShape) -> list[Measured]:
    return [row for file in FILES for row in read_bench(file, shape.name, shape)]


def test_a_known_calibration_is_found_again() -> None:
    device, shape = find_device("h100"), published()["llama-3-8b"]
    known = Calibration(
        gpu="h100",
        compute_efficiency=0.55,
        memory_efficiency=0.75,
        link_efficiency=0.6,
        large_message_efficiency=0.3,
        large_pass_tokens=1024,
        one_shot_max_bytes=0,
        hop_us=4.0,
        overhead_per_step_us=0.0,
        overhead_per_layer_us=30.0,
        overhead_per_sequence_us=7.0,
    )
    passes = [
        Measured(
            role=role, shape=shape, layout=Layout(tp=tp), batch=batch, tokens=tokens, seconds=1.0
        )
        for tp in (1, 2, 8)
        for role, batch, tokens in (
            *((Role.PREFILL, 1, tokens) for tokens in (256, 1024, 2048, 4096, 16384)),
            *((Role.DECODE, batch, 1000) for batch in (1, 8, 64)),
        )
    ]
    rows = [
        Measured(
            role=row.role,
            shape=shape,
            layout=row.layout,
            batch=row.batch,
            tokens=row.tokens,
            seconds=predict(row, device, known),
        )
        for row in passes
    ]
    found = fit(rows, device, "")
    assert found.large_pass_tokens == known.large_pass_tokens
    for name, value in known:
        if isinstance(value, float):
            assert getattr(found, name) == pytest.approx(value, rel=0.02, abs=0.1), name


@pytest.mark.parametrize(("shape", "outside"), [(DENSE, 1), (SPARSE, 0)])
def test_our_own_engine_is_predicted_within_20_percent(shape: ModelShape, outside: int) -> None:
    """Fitted to every other row of the benchmarks' files; the rows between are predicted.

    Outside, at 22%, is the dense model's batch of 4 x 128, which was measured to be faster than
    one of 1 x 128 and has quartiles that are 17% apart.
    """
    rows = bench(shape)
    assert len(rows) == 16
    calibration = fit(rows[::2], CPU, "")
    errors = [abs(predict(row, CPU, calibration) / row.seconds - 1) for row in rows[1::2]]
    assert sum(error > 0.2 for error in errors) == outside
    assert max(errors) < 0.22


@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=lambda shape: shape.name)
def test_shipped_calibration_of_the_cpu_is_the_fit(shape: ModelShape) -> None:
    kept = read_calibration(f"cpu-{shape.name}", CPU.name, "any")
    again = fit(bench(shape), CPU, kept.source)
    assert kept.compute_efficiency == pytest.approx(again.compute_efficiency, rel=0.01)
    assert kept.memory_efficiency == pytest.approx(again.memory_efficiency, rel=0.01)
    assert kept.source == again.source


def test_every_shipped_calibration_is_for_a_known_device() -> None:
    for name, path in shipped().items():
        gpu = json.loads(path.read_text())["gpu"]
        assert read_calibration(name, find_device(gpu).name, "any").source


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(HardwareError, match="3 measured rows are too few"):
        fit(bench(DENSE)[:3], CPU, "")


def test_a_file_that_is_no_benchmarks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("{}")
    with pytest.raises(HardwareError, match=r"rows\.json: is no benchmark's file"):
        read_bench(path, "dense", DENSE)
    with pytest.raises(HardwareError, match="no prefill or decode rows of 'other'"):
        read_bench(FILES[0], "other", DENSE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"gpu": "h100", "compute_efficiency": 1.5}', "compute_efficiency: Input should be less"),
        ('{"gpu": "h100", "speed": 1}', "speed: Extra inputs"),
        ('{"gpu": "h200"}', "is for h200, the plan for h100"),
        ('{"gpu": "h100", "model": "other"}', "is for the model other, the plan for mine"),
    ],
)
def test_a_wrong_calibration_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(HardwareError, match=message):
        read_calibration(str(path), "h100", "mine")


def test_a_missing_calibration_names_those_that_are_shipped() -> None:
    with pytest.raises(HardwareError, match=r"no-such.*splitwise-h100"):
        read_calibration("no-such", "h100", "mine")
