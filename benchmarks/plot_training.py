"""Draws docs/images/training_curves.png from benchmarks/records/train_*.jsonl: records only, nothing is run.

python benchmarks/plot_training.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
PICTURE = ROOT / "docs" / "images" / "training_curves.png"
AR, JOINT, TWIN = "#5f6b7a", "#2f9c76", "#2f6db3"


def rows(name: str) -> list[dict[str, Any]]:
    text = (RECORDS / f"train_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(
    records: list[dict[str, Any]], key: str, tokens_per_step: float, start: float
) -> tuple[list[float], list[float]]:
    """Millions of clean tokens seen since the first step of stage 1, and the values of `key` there."""
    found = [row for row in records if key in row]
    return [start + row["step"] * tokens_per_step for row in found], [row[key] for row in found]


def main() -> None:
    ar, joint, twin = rows("ar"), rows("joint"), rows("twin")
    per_step = ar[0]["clean_tokens"] / ar[0]["step"] / 1e6
    start = 1540 * per_step  # the steps of recipes/bundled/ar.yaml
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110)
    left.plot(*curve(ar, "clean_loss", per_step, 0), color=AR, label="stage 1, AR")
    left.plot(*curve(joint, "clean_loss", per_step, start), color=JOINT, label="joint, clean rows")
    left.plot(*curve(twin, "clean_loss", per_step, start), color=TWIN, label="AR twin")
    masks = curve(joint, "mask_loss", per_step, start)
    left.plot(*masks, color=JOINT, linestyle=":", label="joint, mask rows (soft labels 0.5)")
    left.set_ylim(0.7, 4.0)
    left.set_title("training loss")
    for name, style in (("python", "-"), ("stepmath", "--"), ("arithmetic", ":")):
        key = f"eval/{name}/clean_loss"
        for label, records, colour in (("joint", joint, JOINT), ("twin", twin, TWIN)):
            x, y = curve(records, key, per_step, start)
            right.plot(x, y, style, marker=".", color=colour, label=f"{name}, {label}")
    right.set_title("held-out causal loss")
    right.set_ylim(0.0, 1.8)
    for axis in (left, right):
        axis.set_xlabel("clean tokens since the start of stage 1, millions")
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
