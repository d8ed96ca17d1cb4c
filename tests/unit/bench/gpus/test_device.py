"""The benchmarks that ask the same of a GPU, where there is none or none of that name."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import decode, prefill, transfer


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("command", [decode.main, prefill.main, transfer.main])
@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "no CUDA device"), ("gpu", "no device 'gpu'"), ("meta", "neither cpu nor")],
)
def test_a_device_that_is_not_there_is_refused_with_2(
    command: object, device: str, said: str
) -> None:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, ["--device", device])
    assert result.exit_code == 2
    assert said in result.output
