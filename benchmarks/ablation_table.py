"""The table and the figure of what `ablation.py` has run: means over patients and seeds, beside the unguided twin.

Rows that OUT holds from earlier runs stay, but for arms that were run again.

python benchmarks/ablation_table.py runs/ablation -o benchmarks/results
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tasks import MEASURES, write_rows

from crossmr import metrics

Row = dict[str, object]
HEADINGS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "haarpsi": "HaarPSI",
    "tumour_psnr": "PSNR tumour",
    "tumour_ssim": "SSIM tumour",
}
DIGITS = {"psnr": 2, "ssim": 3, "haarpsi": 3, "tumour_psnr": 2, "tumour_ssim": 3}
ARM = ("task", "seed", "steps", "arm")
SURE = ("ause", "correlation", "certain_90", "coverage_95", "nll", "raw_coverage_95")


def main() -> None:
    """Read every finished arm and write rows, tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, certain = (_earlier(options.out / f"{name}.csv") for name in ("ablation", "uncertainty"))
    for path in sorted(options.runs.glob("*/*-steps/seed-*/*.json")):
        found = json.loads(path.read_text())
        rows = _with(rows, found["rows"])
        certain = _with(certain, [row for row in found["uncertainty"] if "uncertainty" in row])
    for name, table in (("ablation", rows), ("uncertainty", certain)):
        write_rows(options.out / f"{name}.csv", table)
    text = quality(rows) + sureness(certain)
    (options.out / "ablation.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    figure(rows, options.out / "ablation.png")


def _earlier(path: Path) -> list[Row]:
    """The rows of an earlier table, numbers as numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    text = ("task", "arm", "completion", "uncertainty", "patient", "target")
    whole = ("seed", "steps", "samples")
    return [{k: v if k in text else int(v) if k in whole else float(v) for k, v in row.items()} for row in found]


def _with(rows: list[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of other arms, and the new ones."""
    arms = {tuple(row[key] for key in ARM) for row in new}
    return [row for row in rows if tuple(row[key] for key in ARM) not in arms] + list(new)


def quality(rows: Sequence[Row]) -> list[str]:
    """A table a task, number of steps and target; * marks p < .01 against the unguided twin.

    The twin is that of the same seeds; that of `cells`, whose C-UNet starts as the twin, is `longer`.
    """
    text = []
    for task, steps, target in _different(rows, ("task", "steps", "target")):
        own = [r for r in rows if (r["task"], r["steps"], r["target"]) == (task, steps, target)]
        seeds, patients = (sorted({str(r[key]) for r in own}) for key in ("seed", "patient"))
        text += [f"### {task}, {target}: {steps} steps, {len(seeds)} seeds, {len(patients)} patients", ""]
        text += ["| trained with | completed with | seeds | " + " | ".join(HEADINGS.values()) + " |"]
        text += ["|---|---|---" + "|---" * len(HEADINGS) + "|"]
        for arm, completion, samples in _different(own, ("arm", "completion", "samples")):
            chosen = [r for r in own if (r["arm"], r["completion"], r["samples"]) == (arm, completion, samples)]
            count = len({r["seed"] for r in chosen})
            cells = [_cell(chosen, own, measure) for measure in MEASURES]
            times = f" × {samples}" if samples != 1 else ""
            text.append(f"| {arm} | {completion}{times} | {count} | " + " | ".join(cells) + " |")
        text.append("")
    return text


def _cell(chosen: Sequence[Row], own: Sequence[Row], measure: str) -> str:
    """Mean, and the difference to the unguided twin of the same seeds, patient by patient."""
    here = _by_patient(chosen, measure)
    if not here:
        return "–"
    mean = f"{np.mean(list(here.values())):.{DIGITS[measure]}f}"
    seeds = {r["seed"] for r in chosen}
    rival = "longer" if chosen[0]["arm"] in ("cells", "late", "last") else "none"
    twin = _by_patient([r for r in own if r["arm"] == rival and r["seed"] in seeds], measure)
    if chosen[0]["arm"] == "none" or not twin or {r["seed"] for r in own if r["arm"] == rival} < seeds:
        return mean
    shared = sorted(set(here) & set(twin))
    p = metrics.paired_wilcoxon([here[k] for k in shared], [twin[k] for k in shared])
    difference = np.mean([here[k] - twin[k] for k in shared])
    return f"{mean} ({difference:+.{DIGITS[measure]}f}{'*' if p < 0.01 else ''})"


def _by_patient(rows: Sequence[Row], measure: str) -> dict[str, float]:
    """Patient → mean over seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row.get(measure), float):
            values.setdefault(str(row["patient"]), []).append(float(row[measure]))  # type: ignore[arg-type]
    return {patient: float(np.mean(v)) for patient, v in values.items()}


def sureness(rows: Sequence[Row]) -> list[str]:
    """A table a task and target of how uncertainty goes with error, calibrated on the validation patients."""
    text = []
    for task, steps, target in _different(rows, ("task", "steps", "target")):
        own = [r for r in rows if (r["task"], r["steps"], r["target"]) == (task, steps, target)]
        text += [f"### {task}, {target}: uncertainty, {steps} steps", ""]
        text += [
            "| network | uncertainty | seeds | " + " | ".join(SURE) + " |",
            "|---|---|---" + "|---" * len(SURE) + "|",
        ]
        for arm, source in _different(own, ("arm", "uncertainty")):
            chosen = [r for r in own if (r["arm"], r["uncertainty"]) == (arm, source)]
            cells = []
            for measure in SURE:
                here = _by_patient(chosen, measure)
                rival = _by_patient([r for r in own if r["arm"] == arm and r["uncertainty"] == "intensity"], measure)
                cell = f"{np.nanmean(list(here.values())):.3f}" if here else "–"
                if source == "deviation" and here and rival:
                    keys = sorted(set(here) & set(rival))
                    p = metrics.paired_wilcoxon([here[k] for k in keys], [rival[k] for k in keys])
                    cell += "*" if p < 0.01 else ""
                cells.append(cell)
            text.append(f"| {arm} | {source} | {len({r['seed'] for r in chosen})} | " + " | ".join(cells) + " |")
        text.append("")
    return text


def _different(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[object, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def figure(rows: Sequence[Row], path: Path) -> None:
    """Each arm's PSNR less its unguided twin's, a dot a seed and target, where the published arm was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = _different([row for row in rows if row["arm"] == "unconditional"], ("task", "steps"))
    if not tasks:
        return
    drawn, axes = pyplot.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 7.2), squeeze=False, sharey=False)
    for axis, (task, steps) in zip(axes[0], tasks, strict=True):
        own = [r for r in rows if (r["task"], r["steps"]) == (task, steps)]
        labels = [key for key in _different(own, ("arm", "completion", "samples")) if key[0] != "none"]
        for place, (arm, completion, samples) in enumerate(reversed(labels)):
            for target, colour in (("t1c", "tab:orange"), ("t2f", "tab:blue")):
                for seed in sorted({str(r["seed"]) for r in own}):
                    of = [r for r in own if str(r["seed"]) == seed and r["target"] == target]
                    here = _by_patient(
                        [r for r in of if (r["arm"], r["completion"], r["samples"]) == (arm, completion, samples)],
                        "psnr",
                    )
                    twin = _by_patient([r for r in of if r["arm"] == "none"], "psnr")
                    if here and twin:
                        difference = np.mean([here[k] - twin[k] for k in here if k in twin])
                        axis.plot(difference, place, "o", color=colour, alpha=0.7, markersize=6)
        axis.axvline(0, color="0.4", linewidth=1)
        axis.set_yticks(
            range(len(labels)), [f"{a} ← {c}" + (f" ×{n}" if n != 1 else "") for a, c, n in reversed(labels)]
        )
        axis.set_xlabel("PSNR less the unguided twin's, dB")
        axis.set_title(f"{task}, {steps} steps\norange T1ce, blue FLAIR; a dot a seed", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
