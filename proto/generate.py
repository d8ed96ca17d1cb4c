"""Generates client/twinpool/v1 from the IDL, or checks that what is committed is up to date."""

import argparse
import filecmp
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

IDL = Path(__file__).parent
OUT = IDL.parent / "client"


def generate(out: Path) -> None:
    """Write the wire types for every .proto file below `out`."""
    scripts = Path(sys.executable).parent
    os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"  # protoc-gen-mypy
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    outputs = [f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}" for kind in kinds]
    files = sorted(str(path.relative_to(IDL)) for path in IDL.rglob("*.proto"))
    if protoc.main(["protoc", f"--proto_path={IDL}", *outputs, *files]):
        raise SystemExit("protoc refused the IDL")


def stale() -> list[str]:
    """Names of committed files that differ from what the IDL gives."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = sorted(path.relative_to(folder) for path in Path(folder).rglob("*.py*"))
        _, differing, missing = filecmp.cmpfiles(folder, OUT, map(str, fresh), shallow=False)
        committed = {path.relative_to(OUT) for path in (OUT / "twinpool/v1").glob("*_pb2*")}
        return sorted({*differing, *missing, *map(str, committed - set(fresh))})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    if not parser.parse_args().check:
        generate(OUT)
    elif files := stale():
        raise SystemExit(f"out of date, run `make proto`: {', '.join(files)}")


if __name__ == "__main__":
    main()
