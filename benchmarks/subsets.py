"""Every subset of the sources: how well each contrast comes out, and whether more sources ever make it worse.

Each whole test study of the default weights is given every subset of its four contrasts, by the shipped weights, any
others that are named, and the linear regression of the same sources. Rows stay in OUT/subsets.jsonl.

python benchmarks/subsets.py runs/default -o runs/evidence
python benchmarks/subsets.py runs/default -o runs/evidence --models default before=runs/before/model
python benchmarks/subsets.py runs/default -o runs/evidence --models planes=runs/planes/run/model --fullest
"""

import itertools
import math
import statistics
from collections.abc import Sequence

from grid import (
    Kept,
    Row,
    arguments,
    by_patient,
    four_contrasts,
    kept_share,
    light_measures,
    number,
    parser,
    synthesised,
    table,
)

from crossmr.baselines import predict_baselines
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.display import Display
from crossmr.evaluation.subjects import Subject, patterns, subject_of_case
from crossmr.evaluation.tables import BASELINE
from crossmr.networks.model import CrossConditionedModel
from crossmr.registry import load_model


def rows_of(
    subject: Subject, model: CrossConditionedModel, name: str, *, baseline: bool, every_subset: bool
) -> list[Row]:
    """Rows of the subsets of one study's contrasts, and of the linear regression from the same sources."""
    rows = []
    for sources in patterns(model.config, subject, every_subset=every_subset):
        targets = [m for m in model.config.modalities if m in subject.volumes and m not in sources]
        images = synthesised(model, subject, sources, targets)
        rows += light_measures(subject, sources, images, predictor=name, seed=0)
        if baseline:
            given = {m: subject.volumes[m] for m in sources}
            linear = predict_baselines(model.baselines, model.config.modalities, given, targets)[BASELINE]
            pairs = dict(zip(targets, linear, strict=True))
            rows += light_measures(subject, sources, pairs, predictor=BASELINE, seed=0)
    return rows


def print_tables(rows: Sequence[Row]) -> None:
    """For each target a row for each subset; then what each further source does."""
    predictors = list(dict.fromkeys(row["predictor"] for row in rows))
    for target in dict.fromkeys(row["target"] for row in rows):
        print(f"\n**{DISPLAY_NAMES[target]}**: correlation, deep (smoothed); lesions kept; fluid kept\n")
        print("| from |", " | ".join(predictors), "|\n|---" + "|---" * len(predictors) + "|")
        own = [row for row in rows if row["target"] == target]
        for sources in sorted({row["sources"] for row in own}, key=lambda text: (text.count("+"), text)):
            cells = []
            for predictor in predictors:
                some = [row for row in own if (row["sources"], row["predictor"]) == (sources, predictor)]
                if not some:
                    cells.append("–")
                    continue
                means = (by_patient(some, f"correlation_{name}").values() for name in ("deep", "smooth"))
                sharp, smooth = map(statistics.fmean, means)
                cells.append(f"{sharp:.3f} ({smooth:.3f}); {kept_share(some)}; {kept_share(some, 'fluid')}")
            print("|", " + ".join(DISPLAY_NAMES[m] for m in sources.split("+")), "|", " | ".join(cells), "|")
    print("\n**Lesions from all others**, by contrasts in quartile ranges of the rest and by plain differences\n")
    print("| | target | kept | kept, plain | median share | plain | quartile range |\n|---" + "|---" * 6 + "|")
    for predictor, target in itertools.product(predictors, dict.fromkeys(row["target"] for row in rows)):
        some = [r for r in rows if (r["predictor"], r["target"], r["sources"].count("+")) == (predictor, target, 2)]
        shares = [by_patient(some, f"lesion_{value}") for value in ("kept", "step", "range")]
        if shares[0]:
            middle = " | ".join(f"{statistics.median(s[k] for k in shares[0]):.2f}" for s in shares)
            both = f"{kept_share(some)} | {kept_share(some, value='step')}"
            print(f"| {predictor} | {DISPLAY_NAMES[target]} | {both} | {middle} |")
    fullest = [row for row in rows if row["sources"].count("+") == 2 and row["predictor"] != BASELINE]
    print("\nFrom all others, differences of the correlation to the first model")
    print(table(fullest, predictors[0], {"correlation, deep": ("correlation_deep", 3)}, differences=True))
    for predictor in (p for p in predictors if any("+" not in row["sources"] for row in rows if row["predictor"] == p)):
        print(f"\n{predictor}: {further_sources([row for row in rows if row['predictor'] == predictor])}")


def further_sources(rows: Sequence[Row]) -> str:
    """What one source more does to the correlation: over all patients, targets and subsets; and each in a table."""
    found = {(r["case"], r["target"], frozenset(r["sources"].split("+"))): r["correlation_deep"] for r in rows}
    gains = []
    for (case, target, sources), value in found.items():
        for more in {m for _, _, some in found for m in some} - sources - {target}:
            gain = found.get((case, target, sources | {more}), math.nan) - value
            if math.isfinite(gain):
                gains.append({"case": case, "target": target, "to": sources, "more": more, "gain": gain})

    def of(**key: object) -> list[float]:
        some = [gain for gain in gains if all(gain[name] == value for name, value in key.items())]
        return list(by_patient(some, "gain").values())

    pairs = {(gain["target"], gain["to"], gain["more"]) for gain in gains}
    means = {pair: statistics.fmean(of(target=pair[0], to=pair[1], more=pair[2])) for pair in pairs}
    worse = [f"{t} from {'+'.join(sorted(s))} with {m}: {mean:+.4f}" for (t, s, m), mean in means.items() if mean < 0]
    known = list(dict.fromkeys(row["target"] for row in rows))
    lines = [f"| with | {' | '.join(DISPLAY_NAMES[t] for t in known)} |", "|---" * (len(known) + 1) + "|"]
    for more in known:
        cells = [number(of(target=target, more=more), 3) if target != more else "–" for target in known]
        lines.append(f"| {DISPLAY_NAMES[more]} | {' | '.join(cells)} |")
    return (
        f"one source more changes the correlation by {number(of(), 3)} in the mean; it is lower in "
        f"{sum(gain['gain'] < 0 for gain in gains)} of {len(gains)} images, in the mean over patients in {len(worse)} "
        f"of {len(pairs)} pairs of subsets{': ' if worse else ''}{'; '.join(sorted(worse))}.\n\n" + "\n".join(lines)
    )


def main() -> None:
    """Add the rows that are missing, and print the tables."""
    own = parser(__doc__)
    own.add_argument("--models", nargs="+", default=["default"], metavar="[NAME=]MODEL")
    own.add_argument("--fullest", action="store_true", help="each contrast from all others alone")
    options = arguments(own)
    kept = Kept(options.out, "subsets")
    cases = [] if options.table else four_contrasts(options.base, "test")
    for text in () if options.table else options.models:
        name, _, folder = text.rpartition("=")
        model = load_model(folder, options.device)
        name = name or f"{folder} {str(model.record['sha256'])[:12]}"
        with Display().task(name, len(cases)) as task:
            for case in cases[:1] if options.tiny else cases:
                if not kept.has(predictor=name, case=case.name):
                    baseline = not kept.has(predictor=BASELINE, case=case.name)
                    every = not options.fullest
                    kept.add(rows_of(subject_of_case(case), model, name, baseline=baseline, every_subset=every))
                task.advance(case.name)
    print_tables(kept.rows)


if __name__ == "__main__":
    main()
