"""One page that shows what was done: report.html, which needs no network, no server and no other file.

It is made from what `complete` and `evaluate` wrote, so it can be made again at any time, and be deleted.
"""

import base64
import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crossmr.completion import DISCLAIMER, ENHANCEMENT
from crossmr.data.naming import SPOKEN, in_usual_order
from crossmr.errors import OutputError
from crossmr.evaluation import COLUMNS, HEADINGS
from crossmr.files import read_json, write_atomically
from crossmr.picture import BRIGHTEST, COLOURS, WHITE
from crossmr.profiles import records_of

NAME = "report.html"
SHOWN = 200
"""Cases of which a page has pictures; the rest stands in its tables."""
RIVAL = "linear mix"
"""The predictor that a model's own is drawn against."""


@dataclass(frozen=True)
class Plot:
    """Points in a square of 100 by 100, y upwards, and what stands along its axes."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float, str]]]
    """Name → points (x, y, what each is), within the square."""
    ticks: Sequence[tuple[float, str]]
    """Of both axes, which share one scale: the diagonal is where the two are equal."""
    joined: bool
    """Whether a line runs through the points of a series."""


def report_completion(out: Path) -> Path:
    """Write report.html of a completed cohort: its cases, their pictures, and where all of it comes from.

    It lies in OUT, or among the records of another profile.

    Raises:
        OutputError: OUT holds no completed cohort, or cannot be written.
    """
    out = records_of(out)
    cohort = read_json(out / "manifest.json", OutputError)
    if not cohort.get("finished"):
        raise OutputError(f"{out} holds no completed cohort. Run crossmr complete again.")
    known = {*cohort["completed"], *cohort["skipped"], *cohort["whole"], *cohort["not_filled"]}
    cases = [read_json(out / case / "manifest.json", OutputError) for case in sorted(known)]
    synthesised = {modality for case in cases for modality in case["synthetic"]}
    body = {
        "title": "Completed studies",
        "counts": {
            "completed": sum(bool(case["synthetic"]) for case in cases),
            "lacking nothing": sum(not case["synthetic"] and not case["not_filled"] for case in cases),
            "with gaps left": sum(bool(case["not_filled"]) for case in cases),
            "failed": len(cohort["failed"]),
        },
        "warnings": [DISCLAIMER, *([ENHANCEMENT] if "t1c" in synthesised else [])],
        "cases": cases,
        "cohort": cohort,
        "picture": _reader(out, (case.get("picture", {}).get("file") for case in cases)),
    }
    return _write(out, "completion.html.j2", body)


def report_evaluation(out: Path) -> Path:
    """Write OUT/report.html of an evaluation: tables, each case against the linear mix, deviations, pictures.

    Raises:
        OutputError: OUT holds no evaluation, or cannot be written.
    """
    result = read_json(out / "metrics.json", OutputError)
    if not result.get("finished"):
        raise OutputError(f"{out} holds no finished evaluation. Run crossmr evaluate again.")
    by_case: dict[str, list[dict[str, Any]]] = {}
    for picture in result["pictures"]:
        by_case.setdefault(picture["case"], []).append(picture)
    body = {
        "title": "Evaluation",
        "counts": {
            "cases": len(result["cases"]),
            "failed": len(result["failed"]),
            "trained on": len(result["trained_on"]),
        },
        "warnings": [DISCLAIMER],
        "result": result,
        "tables": _tables(result["summary"]),
        "patterns": _patterns(result["summary"], result["own"]),
        "plots": [*_scatter(_rows(out / "metrics.csv"), result["own"]), *_calibration(result["calibration"])],
        "headings": [(region, HEADINGS[metric], metric, digits) for region, metric, digits in COLUMNS],
        "by_case": by_case,
        "picture": _reader(out, (picture["file"] for picture in result["pictures"])),
    }
    return _write(out, "evaluation.html.j2", body)


def _write(out: Path, template: str, body: Mapping[str, Any]) -> Path:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["spoken"] = lambda modality: SPOKEN.get(modality, modality)
    pages.filters["all_spoken"] = lambda text: " + ".join(SPOKEN.get(m, m) for m in text.split("+"))
    page = pages.get_template(template).render(
        **body,
        version=version("crossmr"),
        shown=SHOWN,
        white=WHITE,
        brightest=BRIGHTEST,
        colours=", ".join(f"rgb{colour}" for colour in COLOURS),
    )
    write_atomically(out / NAME, page.encode(errors="replace"))
    return out / NAME


def _reader(out: Path, files: Iterable[str | None]) -> Callable[[str], str | None]:
    """From a picture's name to its data URL, for as many as a page has; None for the rest, and for what is gone."""
    there = [file for file in dict.fromkeys(files) if file and (out / file).is_file()][:SHOWN]

    def read(file: str) -> str | None:
        if file not in there:
            return None
        return "data:image/webp;base64," + base64.b64encode((out / file).read_bytes()).decode()

    return read


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="replace") as file:
        return list(csv.DictReader(file))


def _tables(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One a target and its sources: predictor → (region, metric) → mean, interval and p."""
    tables = []
    for target, sources in dict.fromkeys((entry["target"], entry["sources"]) for entry in summary):
        own = [entry for entry in summary if (entry["target"], entry["sources"]) == (target, sources)]
        rows: dict[str, dict[str, Any]] = {}
        for entry in own:
            rows.setdefault(entry["predictor"], {})[entry["region"]] = entry
        tables.append({"target": target, "sources": sources, "rows": rows, "cases": max(e["cases"] for e in own)})
    return tables


def _patterns(summary: Sequence[Mapping[str, Any]], own: str) -> dict[str, Any] | None:
    """PSNR over the brain by sources and target, the model's and the linear mix's; None of a single task."""
    brain = {(e["sources"], e["target"], e["predictor"]): e for e in summary if e["region"] == "brain"}
    targets = in_usual_order({target for _, target, _ in brain})
    sources = list(dict.fromkeys(name for name, _, _ in brain))
    if len(sources) < 2:
        return None
    means = {
        (name, target, who): entry["psnr"]["mean"]
        for (name, target, predictor), entry in brain.items()
        if (who := {own: "own", RIVAL: "rival"}.get(predictor))
    }
    return {"targets": targets, "sources": sorted(sources, key=lambda name: name.count("+")), "means": means}


def _scatter(rows: Sequence[Mapping[str, str]], own: str) -> list[Plot]:
    """Every case's PSNR over the brain against the linear mix's, a plot a target."""
    brain = {
        (r["target"], r["sources"], r["case"], r["predictor"]): float(r["psnr"])
        for r in rows
        if r["region"] == "brain" and r["predictor"] in (own, RIVAL) and math.isfinite(float(r["psnr"] or "nan"))
    }
    plots = []
    for target in in_usual_order({target for target, *_ in brain}):
        series: dict[str, list[tuple[float, float, str]]] = {}
        for goal, sources, case, predictor in brain:
            rival = brain.get((goal, sources, case, RIVAL))
            if goal == target and predictor == own and rival is not None:
                series.setdefault(sources, []).append((rival, brain[goal, sources, case, own], case))
        if series:
            plots.append(
                _plot(f"{SPOKEN.get(target, target)}: each case", "PSNR of the linear mix, dB", "ours", series)
            )
    return plots


def _calibration(curve: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """What tenths of the voxels are said to be off, against what they are."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for entry in curve:
        point = (entry["deviation"], entry["error"], f"{entry['tenth']} of 10")
        series.setdefault(SPOKEN.get(entry["target"], entry["target"]), []).append(point)
    if not series:
        return []
    return [_plot("How sure, how wrong", "standard deviation", "root mean square of the error", series, origin=True)]


def _plot(
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    origin: bool = False,
) -> Plot:
    values = [value for points in series.values() for point in points for value in point[:2]]
    low, high = 0.0 if origin else min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    low, high = (low if origin else low - margin), high + margin
    step = next((s * 10.0**e for e in range(-6, 6) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 6), high - low)
    first = -int(-low // step)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    placed = {name: [(place(a), place(b), text) for a, b, text in points] for name, points in series.items()}
    ticks = [(place(n * step), f"{n * step:g}") for n in range(first, first + 8) if n * step <= high]
    return Plot(title, x, y, placed, ticks, origin)
