"""Trains the built-in checkpoint: `python -m launch.builtin.train --out DIR --seed 0`.

Owns the schedule and the training log (`training.csv` in the folder of `--log`). Lists are
short at first, until recall appears; the second phase brings full lengths and sums,
and a short third one settles the longest lists.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from launch.builtin.batches import (
    IGNORED,
    Batch,
    Row,
    build_batch,
    echo_row,
    recall_row,
    short_rows,
    sum_rows,
)
from launch.builtin.export import check_export, export
from launch.builtin.muon import Muon
from launch.builtin.network import Network, NetworkConfig
from launch.builtin.structured_start import apply_structured_start
from launch.builtin.tokenizer import build_tokenizer

LOG_FIELDS = (
    "step",
    "seconds",
    "context",
    "loss_recall",
    "right_recall",
    "loss_short",
    "loss_sums",
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps at one range of lengths.

    Positions of recall rows spread over up to `span`. `echo_share` of the recall rows are
    echoes. `single_recall` and `single_short` are the shares of rows with one question only.
    `sums` rows of single sums make a batch of their own in each step.
    """

    steps: int
    shortest: int
    longest: int
    span: int
    step_tokens: int = 4096
    echo_share: float = 0.0
    single_recall: float = 0.0
    single_short: float = 0.0
    short_sum_share: float = 0.5
    singles: int = 24
    sums: int = 0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Stages under one learning-rate schedule, which falls from one step towards another."""

    stages: tuple[Stage, ...]
    fall_from: float
    fall_to: float
    peak: float = 1.0


LOOK_UP = Phase(
    stages=(
        Stage(steps=300, shortest=48, longest=192, span=1024, echo_share=0.5),
        Stage(
            steps=199,
            shortest=128,
            longest=1024,
            span=8192,
            echo_share=0.2,
            single_recall=0.4,
            single_short=0.7,
        ),
    ),
    fall_from=467.5,
    fall_to=850.0,
)
LENGTHEN_AND_ADD = Phase(
    stages=(
        Stage(
            steps=300,
            shortest=256,
            longest=4608,
            span=8192,
            step_tokens=4608,
            single_recall=0.5,
            single_short=0.8,
            short_sum_share=0.0,
            singles=32,
            sums=128,
        ),
    ),
    fall_from=140.0,
    fall_to=300.0,
)
POLISH = Phase(
    stages=(
        Stage(
            steps=70,
            shortest=3072,
            longest=6144,
            span=8192,
            step_tokens=1,  # one row
            single_recall=0.2,
            single_short=0.8,
            short_sum_share=0.0,
            singles=16,
            sums=64,
        ),
    ),
    fall_from=30.0,
    fall_to=70.0,
    peak=0.25,
)
PHASES = (LOOK_UP, LENGTHEN_AND_ADD, POLISH)
PEAK_MUON_LR = 0.02
PEAK_ADAM_LR = 4e-3
WARMUP_STEPS = 30
BALANCE_WEIGHT = 0.02
SHORT_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class Losses:
    total: Tensor
    answer: float
    right: float
    context: int


def masked_loss(network: Network, batch: Batch) -> Losses:
    """Return the mean loss of the answers' tokens and the share predicted right."""
    hidden, balance = network(batch.tokens_BT, batch.positions_BT)
    learned = batch.targets_BT != IGNORED
    logits = network.logits(hidden[learned])
    targets = batch.targets_BT[learned]
    loss = F.cross_entropy(logits, targets)
    right = (logits.argmax(dim=-1) == targets).float().mean().item()
    return Losses(
        total=loss + BALANCE_WEIGHT * balance,
        answer=loss.item(),
        right=right,
        context=batch.tokens_BT.shape[1],
    )


def learning_rate_share(step: int, phase: Phase) -> float:
    """Return the share of the peak rate: a linear warm-up, flat, then a linear fall."""
    fall = (phase.fall_to - step) / (phase.fall_to - phase.fall_from)
    return phase.peak * min((step + 1) / WARMUP_STEPS, 1.0, max(0.02, fall))


def recall_rows(rng: Random, stage: Stage) -> list[Row]:
    length = int(math.exp(rng.uniform(math.log(stage.shortest), math.log(stage.longest))))
    count = max(1, stage.step_tokens // length)
    echoes = round(stage.echo_share * count)
    rows = [echo_row(rng, length) for _ in range(echoes)]
    return rows + [recall_row(rng, length, stage.single_recall) for _ in range(count - echoes)]


def step_batches(rng: Random, tokenizer: Tokenizer, stage: Stage) -> list[Batch]:
    """Return one step's batches: recall first, then the short tasks, then any sums."""

    def shorts() -> list[Row]:
        return short_rows(rng, stage.single_short, stage.short_sum_share, stage.singles)

    rows = recall_rows(rng, stage)
    if not stage.sums:
        recall_batch = build_batch(rng, tokenizer, rows, span=stage.span)
        return [recall_batch, build_batch(rng, tokenizer, shorts(), span=0)]
    # The phases draw in different orders (gaps are drawn by `build_batch`): the shipped
    # weights were trained so, and another order would be another seed.
    short = build_batch(rng, tokenizer, shorts(), span=0)
    recall_batch = build_batch(rng, tokenizer, rows, span=stage.span)
    return [recall_batch, short, build_batch(rng, tokenizer, sum_rows(rng, stage.sums), span=0)]


def optimizers(network: Network) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices, and AdamW for the embedding, routers and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in network.named_parameters():
        is_matrix = param.ndim >= 2 and "embed" not in name and not name.endswith("gate.weight")
        (matrices if is_matrix else others).append(param)
    return [
        Muon(matrices, lr=PEAK_MUON_LR, weight_decay=0.02),
        torch.optim.AdamW(others, lr=PEAK_ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_phase(network: Network, phase: Phase, rng: Random) -> Iterator[list[Losses]]:
    """Run the phase; after each step, yield the losses of the step's batches."""
    tokenizer = build_tokenizer()
    opts = optimizers(network)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    stages = (stage for stage in phase.stages for _ in range(stage.steps))
    for step, stage in enumerate(stages):
        share = learning_rate_share(step, phase)
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * share
            opt.zero_grad()
        losses = []
        for index, batch in enumerate(step_batches(rng, tokenizer, stage)):
            loss = masked_loss(network, batch)
            torch.autograd.backward(loss.total * (1.0 if index == 0 else SHORT_WEIGHT))
            losses.append(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for opt in opts:
            opt.step()
        yield losses


def train(network: Network, seed: int, log_path: Path) -> None:
    """Run all phases, and write one line of the log every ten steps."""
    started = time.monotonic()
    step = 0
    with log_path.open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(LOG_FIELDS)
        for index, phase in enumerate(PHASES):
            for losses in train_phase(network, phase, Random(seed + index)):
                if step % 10 == 0:
                    seconds = round(time.monotonic() - started, 1)
                    log.writerow((step, seconds, *log_figures(losses)))
                    file.flush()
                step += 1


def log_figures(losses: list[Losses]) -> tuple[int | str, ...]:
    """Return a log line's fields after the time; there may be no sums of their own."""
    recall, short, *sums = losses
    figures = (recall.answer, recall.right, short.answer, *(loss.answer for loss in sums))
    return (recall.context, *(f"{figure:.5f}" for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--log", type=Path, default=Path("training.csv"), help="loss curve (CSV)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    network = Network(NetworkConfig())
    apply_structured_start(network, torch.Generator().manual_seed(args.seed))
    train(network, args.seed, args.log)
    export(network, args.out)
    print(f"logits agree with Hugging Face's to {check_export(network, args.out):.1e}")


if __name__ == "__main__":
    main()
