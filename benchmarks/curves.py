"""Learning curves of patients.py: the fit of a curve, its tables, and what would reach what is wanted."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from grid import Row, by_patient, column, kept_share

from crossmr.data.naming import DISPLAY_NAMES
from crossmr.files import read_lines

WANTED = {"t1n": 0.92, "t1c": 0.75, "t2w": 0.90, "t2f": 0.88}
"""Correlation with the truth that is wanted of each target."""
FIRST = 0.05
"""Fraction of a run's steps before which a validation does not count: the rate still grows."""
MEASURES = {"correlation, deep": ("correlation_deep", 3), "PSNR, brain": ("psnr_brain", 2)}
"""Heading → value of a row and its digits."""


def fitted(x: Sequence[float], y: Sequence[float]) -> tuple[float, Callable[[float], float]]:
    """Least squares of y = a + b·x^-c, b <= 0, a <= 1, .1 <= c <= 2.

    Returns a, the limit, and a function from a wanted y to the x that reaches it: infinity where none does.
    """
    values, fits = np.asarray(y, float), []
    for c in np.linspace(0.1, 2, 39):
        basis = np.asarray(x, float) ** -c
        b, a = (float(number) for number in np.polyfit(basis, values, 1))
        if a > 1:
            a, b = 1.0, float(((values - 1) * basis).sum() / (basis**2).sum())
        if b > 0:
            a, b = float(values.mean()), 0.0
        fits.append((float(((a + b * basis - values) ** 2).sum()), a, b, float(c)))
    _, a, b, c = min(fits)
    return a, lambda wanted: float((-b / (a - wanted)) ** (1 / c)) if a > wanted else float("inf")


def extrapolated(unit: str, x: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """Markdown: each target's points, the fit's limit, and the x that reaches what is wanted.

    Beside the fit of all points stand the extremes of the fits that leave out one each.
    """
    heads = ["target", f"correlation after {', '.join(f'{v:g}' for v in x)} {unit}", "limit", "wanted", unit]
    lines = ["", f"| {' | '.join(heads)} to reach it |", "|---" * len(heads) + "|"]
    for target, y in curves.items():
        fits = [fitted(x, y), *(fitted([*x[:k], *x[k + 1 :]], [*y[:k], *y[k + 1 :]]) for k in range(len(x)))]
        limits, needed = [limit for limit, _ in fits], [f(WANTED[target]) for _, f in fits]
        points = ", ".join(f"{value:.3f}" for value in y)
        said = (f"{limits[0]:.3f} ({min(limits):.3f}–{max(limits):.3f})", f"{WANTED[target]:g}")
        reach = f"{_number(needed[0])} ({_number(min(needed))}–{_number(max(needed))})"
        lines.append(f"| {DISPLAY_NAMES[target]} | {points} | {' | '.join(said)} | {reach} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    if value < 1e8:
        return f"{value:.2g}" if value < 1e4 else f"{value:.0e}"
    return "never" if value == float("inf") else "more than 1e8"


def over_steps(runs: Sequence[Path]) -> str:
    """Markdown of the validations of runs, each of which goes on with the one before.

    They are of slices of the validation patients, from random sources.
    """
    steps, curves = list[float](), dict[str, list[float]]()
    before = 0
    for run in runs:
        logged = read_lines(run / "metrics.jsonl")
        last = max(line["step"] for line in logged)
        for line in logged:
            if "val_correlation_t1n" in line and line["step"] >= FIRST * last:
                steps.append(before + line["step"])
                for target in WANTED:
                    curves.setdefault(target, []).append(line[f"val_correlation_{target}"])
        before += last
    return extrapolated("steps", steps, curves) if len(steps) > 3 else f"{len(steps)} validations are too few to fit."


def over_patients(rows: Sequence[Row], predictor: str) -> str:
    """Markdown of the rows of one start, by the number of patients: each contrast from the three others."""
    counts = sorted({row["patients"] for row in rows if row["start"] == predictor and row["patients"]})
    if len(counts) < 4:
        return ""

    def mean(target: str, count: int) -> float:
        own = [r for r in rows if (r["start"], r["target"], r["patients"]) == (predictor, target, count)]
        return float(np.mean(list(by_patient(own, "correlation_deep").values())))

    return extrapolated("patients", counts, {target: [mean(target, n) for n in counts] for target in WANTED})


def starts(rows: Sequence[Row], measure: str, against: tuple[str, int] | None = None) -> str:
    """Markdown of one measure: own patients below each other, starts beside each other, a table for each target.

    A star: it differs from `against`, (start, own patients), or, without, from the first column on as many patients.
    """
    columns = list(dict.fromkeys(row["start"] for row in rows))
    value, digits = MEASURES.get(measure, ("", 0))
    parts = []
    for target in WANTED:
        own = [row for row in rows if row["target"] == target]
        if not by_patient(own, value or "lesion_kept"):
            continue
        parts += [f"\n**{DISPLAY_NAMES[target]}, {measure}**, {len({r['patient'] for r in own})} test patients\n"]
        parts += ["| own patients | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        counts = sorted({row["patients"] for row in own})
        groups = {
            (start, count): [row for row in own if (row["start"], row["patients"]) == (start, count)]
            for count in counts
            for start in columns
        }
        cells = column(groups, against, value, digits) if against else {}
        for count in counts:
            line = {key: some for key, some in groups.items() if key[1] == count}
            cells |= {} if against else column(line, (columns[0], count), value, digits)
            shown = (cells[key] if value else kept_share(some) if some else "–" for key, some in line.items())
            parts.append(f"| {count} | {' | '.join(shown)} |")
    return "\n".join(parts)
