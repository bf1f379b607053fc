"""The numbers as people read them: tables for the terminal, and CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from crossmr.baselines import BASELINES
from crossmr.data.naming import in_usual_order
from crossmr.errors import OutputError
from crossmr.evaluation.measures import METRICS, CalibrationPoint, Metric, Score, UncertaintyScore
from crossmr.evaluation.statistics import Summary, UncertaintySummary
from crossmr.files import write_atomically

BASELINE = "linear regression"
"""The predictor that a model's own is held against."""
HEADINGS: dict[Metric, str] = {"psnr": "PSNR", "ssim": "SSIM", "haarpsi": "HaarPSI"}
COLUMNS: tuple[tuple[str, Metric, int], ...] = (
    ("brain", "psnr", 2),
    ("brain", "ssim", 3),
    ("brain", "haarpsi", 3),
    ("tumour", "psnr", 2),
    ("tumour", "ssim", 3),
    ("slices", "psnr", 2),
    ("slices", "ssim", 3),
)
"""What the tables show: region, metric, digits."""
UNCERTAINTY_COLUMNS: tuple[tuple[str, Literal["error", "error_most_certain_90", "ause", "coverage_95"], int], ...] = (
    ("mean error", "error", 4),
    ("error, most certain 90 %", "error_most_certain_90", 4),
    ("AUSE (0 is perfect)", "ause", 2),
    ("within 1.96 std", "coverage_95", 2),
)
"""What the table of uncertainty shows: heading, measure, digits."""


def tables(summary: Sequence[Summary], *, intervals: bool = True) -> list[Table]:
    """A table for each target: brain and tumour by the protocol 'volume', and the protocol 'slice'.

    Where a target was synthesised from several subsets of sources: two tables for each predictor instead.
    """
    tasks = dict.fromkeys((entry["target"], entry["sources"]) for entry in summary)
    if len(tasks) == len({target for target, _ in tasks}):
        return [_target_table([e for e in summary if e["target"] == target], intervals) for target, _ in tasks]
    predictors = [name for name in dict.fromkeys(entry["predictor"] for entry in summary) if name not in BASELINES]
    shown: tuple[tuple[Metric, int], ...] = (("psnr", 2), ("ssim", 3))
    return [_subsets_table(summary, predictor, *column) for predictor in predictors for column in shown]


def uncertainty_table(summary: Sequence[UncertaintySummary]) -> Table:
    """How well the standard deviations tell where the errors are.

    Of a target that was synthesised from several subsets of sources, the mean over these.
    """
    table = _table("uncertainty: errors within the head")
    table.add_column("target")
    table.add_column("uncertainty")
    for heading, _, _ in UNCERTAINTY_COLUMNS:
        table.add_column(heading, justify="right")
    for target, name in dict.fromkeys((entry["target"], entry["uncertainty"]) for entry in summary):
        entries = [entry for entry in summary if (entry["target"], entry["uncertainty"]) == (target, name)]
        cells = []
        for _, measure, digits in UNCERTAINTY_COLUMNS:
            values = [value for entry in entries if (value := entry[measure]) is not None]
            cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "–")
        table.add_row(target, name, *cells)
    return table


def write_csv(path: Path, rows: Sequence[Score] | Sequence[UncertaintyScore] | Sequence[CalibrationPoint]) -> None:
    """Write one or more rows of one kind; the columns are their fields.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(rows[0]))
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_atomically(path, text.getvalue().encode(errors="surrogatepass"))  # file names may be no Unicode


def read_scores(path: Path) -> list[Score]:
    """Read metrics.csv.

    Raises:
        OutputError: it is missing or damaged.
    """
    try:
        with path.open(newline="", errors="replace") as file:
            rows = [(row[: -len(METRICS)], map(float, row[-len(METRICS) :])) for row in list(csv.reader(file))[1:]]
        return [
            Score(case, sources, target, predictor, protocol, region, *metrics)
            for (case, sources, target, predictor, protocol, region), metrics in rows
        ]
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is missing or damaged ({error}). Run crossmr evaluate again.") from error


def _target_table(entries: Sequence[Summary], intervals: bool) -> Table:
    """Predictor × region and metric, of one target."""
    cases, (target, sources) = max(e["cases"] for e in entries), (entries[0]["target"], entries[0]["sources"])
    intervals = intervals and cases > 1
    table = _table(f"{target} from {sources}: mean{' and 95 % interval' * intervals} over {cases} cases")
    table.add_column("predictor", no_wrap=True)
    for region, metric, _ in COLUMNS:
        table.add_column(f"{HEADINGS[metric]}\n{region}", justify="right", no_wrap=True)
    by_place = {(entry["predictor"], entry["region"]): entry for entry in entries}
    for predictor in dict.fromkeys(entry["predictor"] for entry in entries):
        cells = (_cell(by_place.get((predictor, r)), metric, digits, intervals) for r, metric, digits in COLUMNS)
        table.add_row(escape(predictor), *cells)
    return table


def _subsets_table(summary: Sequence[Summary], predictor: str, metric: Metric, digits: int) -> Table:
    """Sources × target: one metric over the brain, of one predictor and, in brackets, of the linear regression."""
    brain = {(e["sources"], e["target"], e["predictor"]): e for e in summary if e["region"] == "brain"}
    targets = in_usual_order({entry["target"] for entry in summary})
    table = _table(f"{HEADINGS[metric]} over the brain, {predictor} ({BASELINE})")
    table.add_column("from", no_wrap=True)
    table.add_column("cases", justify="right")
    for target in targets:
        table.add_column(target, justify="right", no_wrap=True)
    for sources in dict.fromkeys(entry["sources"] for entry in summary):
        cells = []
        for target in targets:
            pair = (brain.get((sources, target, name)) for name in (predictor, BASELINE))
            own, baseline = (_cell(entry, metric, digits, False) for entry in pair)
            cells.append("" if own == "–" else f"{own} ({baseline})")
        cases = max(entry["cases"] for entry in summary if entry["sources"] == sources)
        table.add_row(sources, str(cases), *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=SIMPLE, padding=(0, 1))


def _cell(entry: Summary | None, metric: Metric, digits: int, interval: bool) -> str:
    if entry is None or (mean := entry[metric]["mean"]) is None:
        return "–"
    low, high = entry[metric]["low"], entry[metric]["high"]
    if not interval or low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}\n{low:.{digits}f}–{high:.{digits}f}"
