"""Draws the training log: `python -m launch.builtin.loss_curve LOG.csv PICTURE.png`.

Owns the picture's looks only.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOSSES = {
    "loss_recall": "recall",
    "loss_short": "copy and small talk (with sums in the first phase)",
    "loss_sums": "sums alone",
}


def rolling_mean(values: list[float], window: int = 7) -> list[float]:
    """Return the mean of each value and its neighbours, fewer of them at the ends."""
    half = window // 2
    spans = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def draw(log: Path, picture: Path) -> None:
    """Draw the losses, with rolling means, above the share of right tokens and the lengths."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    column = {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
    minutes = [seconds / 60 for seconds in column["seconds"]]

    figure, (losses, shares) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    for name, label in LOSSES.items():
        points = losses.semilogy(minutes, column[name], ".", markersize=3, alpha=0.5)
        losses.semilogy(
            minutes, rolling_mean(column[name]), color=points[0].get_color(), label=label
        )
    losses.set_ylabel("loss of an answer's token")
    losses.legend()
    shares.plot(minutes, column["right_recall"], label="right tokens of recall answers")
    shares.set_ylim(0, 1.02)
    shares.set_ylabel("share right")
    shares.set_xlabel("minutes of training (2 CPU cores)")
    lengths = shares.twinx()
    lengths.plot(minutes, column["context"], ".", color="tab:gray", markersize=3)
    lengths.set_yscale("log", base=2)
    lengths.set_ylabel("tokens in a recall row (dots)")
    shares.legend(loc="center right")
    for axes in (losses, shares):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(args.log, args.picture)


if __name__ == "__main__":
    main()
