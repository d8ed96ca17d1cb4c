"""Which device a benchmark measures, and that there is one."""

from typing import Annotated, NoReturn

import torch
import typer

from bench.kernel_timing import CpuTimer, CudaTimer, Timer

Device = Annotated[
    str,
    typer.Option(
        help="cpu, or a GPU: cuda. On one it asks the same question of models that fit one."
    ),
]
_NOTHING_TO_RUN_ON = 2


def found(name: str) -> torch.device:
    """Return the device of an option; ends the command where torch does not find it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        _refuse(f"there is no device {name!r}; give cpu, cuda, or cuda:1 and so on")
    if device.type != "cuda":
        _refuse(f"the device {name} is neither cpu nor a GPU of cuda")
    if not torch.cuda.is_available():
        _refuse("torch finds no CUDA device here; run it on a machine with a GPU and a CUDA build")
    return device


def timer_of(device: torch.device) -> Timer:
    """Return what times on a device; of a CPU only to try programs out."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def name_of(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def _refuse(why: str) -> NoReturn:
    typer.echo(f"cannot measure this: {why}", err=True)
    raise typer.Exit(_NOTHING_TO_RUN_ON)
