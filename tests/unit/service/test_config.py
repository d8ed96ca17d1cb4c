from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from typer.testing import CliRunner, Result

from service.config import ConfigError, Positional, launcher, load
from service.errors import StartError


class RouterConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[Path, Positional("MODEL")] = Field(description="Folder of the model.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=9000, ge=1, le=65535, description="Port to listen on.")
    log_level: Literal["debug", "info"] = Field(default="info", description="What to log.")
    log_json: bool = Field(default=False, description="Log JSON lines.")
    peers: list[str] = Field(default_factory=lambda: ["a:1"], description="Others.")
    wait_s: float = Field(default=1.5, gt=0, description="Time to wait.")
    weights: dict[str, float] = Field(default_factory=dict, description="Weights.")
    limit: int | None = Field(default=None, ge=1, description="A limit.")
    token: SecretStr | None = Field(default=None, description="A secret.")

    @model_validator(mode="after")
    def _waits_fit(self) -> "RouterConfig":
        if self.limit is not None and self.wait_s > self.limit:
            raise ValueError("--wait-s must not exceed --limit")
        return self


def invoke(
    *args: str, environ: Mapping[str, str] | None = None, start: Any = None
) -> tuple[Result, list[RouterConfig]]:
    seen: list[RouterConfig] = []
    app = launcher(
        "router", RouterConfig, start or seen.append, help="Routes.", environ=environ or {}
    )
    return CliRunner().invoke(app, list(args)), seen


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("host: file\nport: 1\nlog-level: debug\n")
    environ = {"TWINPOOL_ROUTER_PORT": "2", "TWINPOOL_ROUTER_HOST": "environ"}
    result, seen = invoke("m", "--config", str(file), "--port", "3", environ=environ)
    assert result.exit_code == 0, result.output
    config = seen[0]
    assert (config.port, config.host, config.log_level) == (3, "environ", "debug")
    assert config.wait_s == 1.5
    assert config.model == Path("m")


def test_values_by_name_come_as_pairs_or_as_a_mapping(tmp_path: Path) -> None:
    _, seen = invoke("m", "--weights", "a=3", "--weights", "b=1.5")
    assert seen[0].weights == {"a": 3.0, "b": 1.5}
    _, seen = invoke("m", environ={"TWINPOOL_ROUTER_WEIGHTS": "a=1,*=2"})
    assert seen[0].weights == {"a": 1.0, "*": 2.0}
    file = tmp_path / "c.yaml"
    file.write_text("weights: {a: 4}\n")
    _, seen = invoke("m", "--config", str(file))
    assert seen[0].weights == {"a": 4.0}


@pytest.mark.parametrize("text", ["a", "=3", "a=many"])
def test_pair_that_makes_no_sense_is_reported_by_flag(text: str) -> None:
    result, _ = invoke("m", "--weights", text)
    assert result.exit_code == 2
    assert "--weights: found" in result.output


def test_file_with_role_sections_gives_each_role_its_own(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("router: {port: 7}\ndecode: {max_batch: 4}\n")
    _, seen = invoke("m", "--config", str(file))
    assert seen[0].port == 7
    file.write_text("decode: {max_batch: 4}\n")
    _, seen = invoke("m", "--config", str(file))
    assert seen[0].port == 9000


def test_every_kind_of_field_comes_from_flags() -> None:
    args = ("m", "--log-json", "--peers", "x:1", "--peers", "y:2", "--limit", "9", "--wait-s", "2")
    _, seen = invoke(*args, "--token", "hush")
    config = seen[0]
    assert config.log_json is True
    assert config.peers == ["x:1", "y:2"]
    assert (config.limit, config.wait_s) == (9, 2.0)
    assert config.token is not None
    assert config.token.get_secret_value() == "hush"


def test_negated_flag_wins_over_a_true_environment() -> None:
    _, seen = invoke("m", "--no-log-json", environ={"TWINPOOL_ROUTER_LOG_JSON": "true"})
    assert seen[0].log_json is False


def test_lists_in_the_environment_are_split_at_commas() -> None:
    _, seen = invoke("m", environ={"TWINPOOL_ROUTER_PEERS": "x:1,y:2"})
    assert seen[0].peers == ["x:1", "y:2"]


def test_each_bad_value_is_one_line_with_flag_value_source_and_rule() -> None:
    result, seen = invoke(
        "--log-level", "loud", "--wait-s", "0", environ={"TWINPOOL_ROUTER_PORT": "99999"}
    )
    origin = "(environment TWINPOOL_ROUTER_PORT)"
    assert result.exit_code == 2
    assert not seen
    assert result.stderr.splitlines() == [
        "router: MODEL: is required",
        f"router: --port: found '99999' {origin}; must be less than or equal to 65535",
        "router: --log-level: found 'loud' (flag); must be 'debug' or 'info'",
        "router: --wait-s: found '0' (flag); must be greater than 0",
    ]


def test_rule_over_several_fields_is_one_line() -> None:
    result, _ = invoke("m", "--limit", "1", "--wait-s", "5")
    assert result.exit_code == 2
    assert result.stderr == "router: --wait-s must not exceed --limit\n"


def test_bad_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load("router", RouterConfig, flags={"model": "m", "token": ["hush"]}, environ={})
    assert "hush" not in str(caught.value)
    assert "--token" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot: 1", "unknown setting 'prot'; did you mean 'port'?"),
        ("a: [", "is not YAML at line 1"),
        ("- 1", "must hold settings as 'name: value' lines"),
    ],
)
def test_bad_file_is_one_plain_line(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    result, _ = invoke("m", "--config", str(file))
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_file_is_one_plain_line(tmp_path: Path) -> None:
    result, _ = invoke("m", "--config", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "cannot read" in result.stderr


def test_print_config_shows_sources_and_hides_secrets() -> None:
    result, seen = invoke(
        "m", "--print-config", "--token", "hush", environ={"TWINPOOL_ROUTER_PORT": "2"}
    )
    assert result.exit_code == 0
    assert not seen
    lines = [line.split("#") for line in result.stdout.splitlines()]
    shown = {setting.strip(): source.strip() for setting, source in lines}
    assert shown["port: 2"] == "environment TWINPOOL_ROUTER_PORT"
    assert shown["token: '**********'"] == "flag"
    assert shown["peers: ['a:1']"] == "default"
    assert "hush" not in result.output


def test_printed_config_is_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(invoke("m", "--port", "8", "--print-config")[0].stdout)
    _, seen = invoke("--config", str(file))
    assert (seen[0].port, seen[0].limit) == (8, None)


def test_help_shows_type_bounds_default_and_description() -> None:
    text = " ".join(invoke("--help")[0].stdout.split())
    assert "--port INTEGER Port to listen on. At least 1, at most 65535. Default: 9000." in text
    assert "--log-level debug|info What to log. Default: info." in text
    assert "--log-json / --no-log-json Log JSON lines. Default: no." in text
    assert "Folder of the model. Required." in text
    assert "TWINPOOL_ROUTER_<OPTION>" in text


def test_start_error_is_one_line_and_exit_code_1() -> None:
    def start(config: RouterConfig) -> None:
        raise StartError("no model there: give another folder")

    result, _ = invoke("m", start=start)
    assert result.exit_code == 1
    assert result.stderr == "router: no model there: give another folder\n"
