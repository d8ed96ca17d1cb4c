import subprocess
import sys
from pathlib import Path

MODULES = (
    *("config", "errors", "lifecycle", "logs", "metrics", "prefix_keys", "registration"),
    *("status", "threads"),
)


def test_what_the_router_needs_of_service_loads_neither_torch_nor_engine() -> None:
    imports = "; ".join(f"import service.{name}" for name in MODULES)
    heavy = "{'torch', 'engine', 'kvtransfer', 'numpy', 'ucxx'}"
    source = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", source],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout == "[]\n"
