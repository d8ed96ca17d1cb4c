"""What splitting a prompt costs is measured once, kept, and measured anew where that is no use."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch

from engine.config import load_config
from engine.parallel import Layout
from engine.ring.comm import Wire
from engine.ring.model import SplitCosts
from service.calibration import Calibration, read, write
from tests.unit.engine.checkpoints import make_checkpoint
from tests.unit.engine.ring.threads import LoopbackComm, Meeting, on_ranks

COSTS = SplitCosts(
    token_s=1e-4, pair_s=1e-7, layers=4, hop_s=1e-3, token_bytes=1024, bytes_per_s=1e9
)


@dataclass
class Starts:
    """Starts of an instance of two ranks, which say whether they have measured."""

    folder: Path
    trials: list[int] = field(default_factory=list)

    def start(self, dtype: torch.dtype = torch.float32, tp: int = 1) -> tuple[int, bool]:
        """Return the grain, and whether passes were timed for it."""
        meeting = Meeting(2)
        self.trials.clear()

        def run(comm: LoopbackComm) -> int:
            calibration = Calibration(
                folder=self.folder,
                config=load_config(self.folder),
                dtype=dtype,
                device=torch.device("cpu"),
                layout=Layout(cp=2, cp_rank=comm.rank, tp=tp),
                wire=Wire(comm),
                greatest=meeting.greatest,
                is_first=comm.rank == 0,
            )
            return calibration.choose_grain(self._trial, block_size=16, most=512)

        [grain, other] = on_ranks(2, run)
        assert grain == other
        return grain, bool(self.trials)

    def _trial(self, tokens: int, wire: Wire) -> Callable[[], object]:
        return lambda: self.trials.append(tokens)

    @staticmethod
    def files(root: Path) -> Sequence[Path]:
        return list((root / "twinpool" / "calibration").iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM")


@pytest.fixture
def starts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Starts(model)


def test_second_start_takes_the_figures_of_the_first(starts: Starts, tmp_path: Path) -> None:
    grain, timed = starts.start()
    assert timed
    assert starts.start() == (grain, False)
    assert len(starts.files(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"tp": 2}])
def test_another_layout_or_type_is_measured_for_itself(
    starts: Starts, tmp_path: Path, change: dict[str, object]
) -> None:
    starts.start()
    _, timed = starts.start(**change)  # type: ignore[arg-type]
    assert timed
    assert len(starts.files(tmp_path)) == 2
    assert not starts.start()[1]


def test_kept_figures_decide_the_grain(starts: Starts, tmp_path: Path) -> None:
    starts.start()
    [path] = starts.files(tmp_path)
    write(path, replace(COSTS, hop_s=1.0))
    assert starts.start() == (512, False)
    write(path, replace(COSTS, hop_s=0.0, bytes_per_s=1e15))
    assert starts.start() == (64, False)


def test_choice_is_logged_once_with_its_reasons(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    grain, _ = starts.start()
    starts.start()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"a grain is {grain} tokens: ")
    assert first.endswith("measured")
    assert second.endswith("known from an earlier start")
    for unit in ("us a token", "ns a pair", "us a hop", "GB/s"):
        assert unit in first


GOOD = json.dumps(asdict(COSTS))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        GOOD[:-1].encode(),
        b"[1, 2]",
        b"{}",
        GOOD.replace("token_s", "tokens").encode(),
        GOOD.replace("0.0001", "-1").encode(),
        GOOD.replace("0.0001", "NaN").encode(),
        GOOD.replace("0.0001", '"fast"').encode(),
    ],
)
def test_damaged_file_is_reported_measured_anew_and_replaced(
    content: bytes, starts: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts.start()
    [path] = starts.files(tmp_path)
    path.write_bytes(content)
    _, timed = starts.start()
    assert timed
    assert f"{path} is of no use" in caplog.text
    assert read(path) is not None


def test_missing_file_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path / "none.json") is None
    assert not caplog.records


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.json"
    write(path, COSTS)
    assert read(path) == COSTS
    assert list(path.parent.iterdir()) == [path]


def test_start_goes_on_where_nothing_can_be_kept(
    starts: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "twinpool").write_text("a file where a folder should be")
    for _ in range(2):
        _, timed = starts.start()
        assert timed
    assert "cannot be kept" in caplog.text


def test_start_goes_on_where_there_is_no_home(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    _, timed = starts.start()
    assert timed
    assert "measured at each start: no home" in caplog.text
