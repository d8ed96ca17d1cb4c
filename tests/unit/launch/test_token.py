import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from launch.cli import app
from service.security.rights import Right
from service.security.tokens import TokenFile, WorkerToken


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["token", "new", *arguments])


def test_printed_token_and_line_fit_each_other(tmp_path: Path) -> None:
    options = ("--tenant", "acme", "--rights", "inference", "--rights", "admin")
    result = invoke(*options, "--max-new-tokens", "100", "--max-priority", "-2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    path = tmp_path / "tokens"
    path.write_text(f"tokens:\n{lines[3]}\n")
    caller = TokenFile(path).find(lines[1])
    assert caller is not None
    assert caller.tenant == "acme"
    assert caller.rights == frozenset({Right.INFERENCE, Right.ADMIN})
    assert (caller.max_new_tokens, caller.max_priority) == (100, -2)
    assert caller.max_concurrent_requests is None


def test_token_can_go_to_a_file_of_its_own_that_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "worker.token"
    result = invoke("--rights", "worker", "--out", str(path))
    assert result.exit_code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert WorkerToken(path).shown() not in result.output
    assert yaml.safe_load(result.stdout.splitlines()[-1])[0]["rights"] == ["worker"]
    again = invoke("--rights", "worker", "--out", str(path))
    assert again.exit_code == 2
    assert "File exists" in again.output


@pytest.mark.parametrize(
    ("options", "flag"),
    [(("--max-new-tokens", "0"), "--max-new-tokens"), (("--tenant", "t" * 200), "--tenant")],
)
def test_unusable_values_are_told_by_their_flag(options: tuple[str, ...], flag: str) -> None:
    result = invoke(*options)
    assert result.exit_code == 2
    assert flag in result.output
