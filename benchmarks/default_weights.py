"""The weights that crossmr ships: one model of any subset of T1, T1ce, T2 and FLAIR, and its tables for the model card.

Trained on whole skull-stripped studies (BraTS, BraTS-Africa, openms), LGG (with skull, no T2) and phantoms. The split
is fixed below, by patient: who is named in neither list is trained on, and so are all studies of a patient with more.

python benchmarks/default_weights.py ../shared/data -o runs/default --minutes 240    # resumes where it was stopped
python benchmarks/default_weights.py ../shared/data -o runs/second --minutes 240 --start runs/default/run/model
python benchmarks/default_weights.py ../shared/data -o runs/gpu --minutes 9 --set synthesis_train.batch_size=32
python benchmarks/default_weights.py -o runs/default --measure    # the held-out patients, in Markdown
python benchmarks/default_weights.py -o runs/default --ship       # into src/crossmr/weights
"""

import argparse
import csv
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scans import COHORTS, cohort_of, lgg, unpacked, write_set

from crossmr.completion.study import complete
from crossmr.config import with_settings
from crossmr.data.dataset import PreparedDataset
from crossmr.data.head import bounding_box
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.data.prepare import PrepareSettings, default_workers, prepare
from crossmr.display import Display
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.measures import KEPT, STD
from crossmr.evaluation.tables import BASELINE
from crossmr.files import read_json
from crossmr.networks.model import CrossConditionedModel, read_model, save_model
from crossmr.networks.trained_on import PHANTOM, PatientList, count_seen, names_of, remember
from crossmr.phantom import write_cohort
from crossmr.registry import find_model
from crossmr.training.recipes import RECIPES, recipe_of
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings
from crossmr.typical import describe, summarise

TEST = (
    *("Brats18_2013_23_1", "Brats18_CBICA_AME_1", "Brats18_TCIA02_135_1", "Brats18_TCIA03_265_1", "BraTS2021_00002"),
    *("BraTS2021_01476", "BraTS-GLI-00000-000", "TCGA-DU-7294", "BraTS-SSA-00007-000", "BraTS-SSA-00026-000"),
    *("BraTS-SSA-00050-000", "BraTS-SSA-00110-000", "BraTS-SSA-00116-000", "patient19"),
    *("TCGA-DU-5849", "TCGA-DU-5872", "TCGA-DU-8163", "TCGA-HT-7608", "TCGA-HT-7680", "TCGA-HT-7686", "TCGA-HT-7693"),
    *("TCGA-HT-7694", "TCGA-HT-7860", "TCGA-HT-8018", "TCGA-HT-8106", "PHANTOM-00018-000", "PHANTOM-00019-000"),
)
VALIDATION = (
    *("Brats18_2013_2_1", "Brats18_TCIA01_378_1", "BraTS2021_00006", "BraTS2021_01485", "BraTS-SSA-00014-000"),
    *("BraTS-SSA-00117-000", "TCGA-DU-8167", "TCGA-HT-8107"),
)
PHANTOMS, SHAPE, SPACING_MM = 20, (104, 124, 44), (1.875, 1.875, 4.0)
WHOLE = ("BraTS", "BraTS-Africa")
WEIGHTS = Path(__file__).parents[1] / "src" / "crossmr" / "weights" / "default"
LARGEST_MIB = 16.0


def prepare_all(data: Path, out: Path, display: Display) -> None:
    """Prepare all cohorts into one set, split as listed above."""
    whole = unpacked(data, out / "whole")
    write_cohort(out / "phantoms", PHANTOMS, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    folders = [whole, data / "brats", data / "openms", *lgg(data), out / "phantoms"]
    prepare(folders, out / "set", PrepareSettings(workers=default_workers()), display=display)
    if absent := {*TEST, *VALIDATION} - PreparedDataset(out / "set").manifest["cases"].keys():
        raise SystemExit(f"{', '.join(sorted(absent))} could not be prepared.")
    split_as_listed(out / "set")


def split_as_listed(prepared: Path) -> None:
    """Give a set the split of TEST and VALIDATION, as far as it has these studies."""
    manifest = PreparedDataset(prepared).manifest
    parts = {case: "test" if case in TEST else "val" if case in VALIDATION else "train" for case in manifest["cases"]}
    cases = {case: {**entry, "part": parts[case]} for case, entry in manifest["cases"].items()}
    write_set(prepared, manifest, cases)


def card(evaluation: Path) -> None:
    """Markdown tables: of every cohort each contrast from all others, and of the whole studies every subset.

    Means over patients of the model, then of the linear regression of the same sources.
    """
    rows = [
        row
        for name in ("metrics", "contrasts", "uncertainty")
        for row in csv.DictReader((evaluation / f"{name}.csv").open())
    ]
    for row in rows:
        row["cohort"] = cohort_of(row["case"])
    whole = [row for row in rows if row["cohort"] in WHOLE]
    most = {
        case: max(row["sources"].count("+") for row in rows if row["case"] == case)
        for case in {r["case"] for r in rows}
    }
    for cohort in COHORTS:
        own = [row for row in rows if row["cohort"] == cohort and row["sources"].count("+") == most[row["case"]]]
        if own:
            print_table(f"{cohort}, each contrast from all others", own, by_sources=False)
    if any(row["sources"].count("+") < most[row["case"]] for row in whole):
        print_table(f"{' and '.join(WHOLE)}, every subset", whole, by_sources=True)


def print_table(title: str, rows: list[dict[str, str]], *, by_sources: bool) -> None:
    """One table of the rows of some cases."""

    def mean(metric: str, digits: int, **properties: str) -> str:
        chosen = [row for row in own if all(row.get(key) == value for key, value in properties.items())]
        patients: dict[str, list[float]] = {}
        for row in chosen:
            if row.get(metric) not in ("", "nan", None):
                patients.setdefault(row["patient"], []).append(float(row[metric]))
        return f"{statistics.mean(map(statistics.mean, patients.values())):.{digits}f}" if patients else "–"

    def kept(predictor: str) -> str:
        shares: dict[str, list[float]] = {}
        for row in own:
            lesion = (row.get("structure"), row.get("predictor")) == ("lesion", predictor)
            if lesion and row["kept"] not in ("", "nan"):
                shares.setdefault(row["patient"], []).append(float(row["kept"]))
        inside = [KEPT[0] <= statistics.mean(share) <= KEPT[1] for share in shares.values()]
        return f"{sum(inside)} of {len(inside)}" if inside else "–"

    heads = [
        "correlation, deep",
        "PSNR, brain",
        "SSIM, brain",
        "PSNR, tumour",
        "lesions kept",
        "std : error, lesion over rest",
    ]
    print(f"\n### {title}: {len({row['patient'] for row in rows})} patients\n")
    print("|", " | ".join(["sources"] * by_sources + ["target", *heads]), "|")
    print("|---" * (by_sources + 1 + len(heads)) + "|")
    tasks = {(row["sources"] if by_sources else "", row["target"]) for row in rows}
    for sources, target in sorted(tasks, key=lambda task: (task[1], task[0].count("+"), task[0])):
        own = [row for row in rows if row["target"] == target and (not by_sources or row["sources"] == sources)]
        cells = [" + ".join(DISPLAY_NAMES.get(source, "") for source in sources.split("+"))] * by_sources
        cells.append(DISPLAY_NAMES[target])
        for metric, region, digits in (
            ("correlation", "deep", 3),
            ("psnr", "brain", 2),
            ("ssim", "brain", 3),
            ("psnr", "tumour", 2),
        ):
            cells.append(" / ".join(mean(metric, digits, region=region, predictor=p) for p in ("unguided", BASELINE)))
        cells.append(" / ".join(kept(predictor) for predictor in ("unguided", BASELINE)))
        cells.append(" : ".join(mean(metric, 2, uncertainty=STD) for metric in ("std_ratio", "error_ratio")))
        print("|", " | ".join(cells), "|")


def patients_in(prepared: Path) -> PatientList:
    """The patients of a set on whom weights are trained and validated; phantoms, which anybody can make, are none."""
    cases = PreparedDataset(prepared).manifest["cases"].values()
    known = [entry for entry in cases if not entry["patient"].startswith(PHANTOM)]
    train, val = (
        [
            name
            for entry in known
            if entry["part"] == part
            for name in names_of(entry["patient"], entry["scans"].values())
        ]
        for part in ("train", "val")
    )
    return remember(train, val)


def seen(prepared: Path) -> dict[str, Any]:
    """What the record of the weights says of the studies that they were trained on."""
    cases = read_json(prepared / "manifest.json")["cases"].items()
    return count_seen(
        (name, entry["modalities"], entry["masked_background"]) for name, entry in cases if entry["part"] == "train"
    )


def typical(prepared: Path, model: CrossConditionedModel) -> dict[str, Any]:
    """What the patients that the weights were trained on look like; see `crossmr.typical`."""
    described = []
    for name, entry in read_json(prepared / "manifest.json")["cases"].items():
        if entry["part"] == "train" and not name.startswith(PHANTOM):
            images, masks = (np.load(prepared / "cases" / name / f"{what}.npy") for what in ("images", "masks"))
            head = masks[:, 0] > 0
            box = bounding_box(head, 0)
            volumes = {m: images[:, channel].astype(np.float32)[box] for channel, m in enumerate(entry["modalities"])}
            numbers = describe(volumes, head[box], entry["spacing_mm"], model.baselines, model.config.modalities)
            described.append((entry["masked_background"], numbers))
    return summarise(described)


def ship(folder: Path, study: Path, prepared: Path, display: Display) -> None:
    """Put a finished model into the package in half precision, if it is small enough, and say what that changes."""
    model = read_model(folder)
    record = {**model.record["training"], "seen": seen(prepared), "typical": typical(prepared, model)}
    whole = complete(study, model)
    for network in model.networks().values():
        network.half()
    with tempfile.TemporaryDirectory() as temporary:
        half = Path(temporary) / "default"
        own = patients_in(prepared)  # of all rounds, which learn from this set: those before have nobody else
        save_model(half, model, record, [own, *(PatientList(own.salt) for _ in model.patients[1:])])
        size = sum(path.stat().st_size for path in half.iterdir()) / 2**20
        if size > LARGEST_MIB:
            raise SystemExit(f"{folder} has {size:.1f} MiB; wanted at most {LARGEST_MIB:g}.")
        shipped = complete(study, half)
        shutil.rmtree(WEIGHTS, ignore_errors=True)
        shutil.copytree(half, WEIGHTS)
    for target, image in whole.images.items():
        change = np.abs(np.asanyarray(shipped.images[target].dataobj) - np.asanyarray(image.dataobj))
        display.say(
            f"{target} of {study.name} in half precision: changed by {change.mean():.1e}, at most {change.max():.1e}"
        )
    display.say(f"{WEIGHTS}: {read_model(WEIGHTS).record['sha256'][:12]}, {size:.1f} MiB")


def main() -> None:
    """Prepare and train, or measure, or ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument(
        "--start", type=find_model, help="a model, folder or name, whose weights this training starts from"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--every-subset", action="store_true", help="measured; else each contrast from all others")
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args()
    out, display, model = options.out, Display(), options.out / "run" / "model"
    if not (options.measure or options.ship):
        prepare_all(options.data, out, display)
        recipe = replace(RECIPES["any"], by_set=()) if options.start is None else recipe_of(read_model(options.start))
        recipe = with_settings(recipe, dict(pair.split("=", 1) for pair in options.set))
        wish = TrainingSettings(recipe=recipe, minutes=options.minutes, device=options.device, seed=options.seed)
        train(out / "set", out / "run", wish, initial_model=options.start, display=display)
    if options.measure:
        evaluate(
            model,
            out / "set",
            out / "evaluation",
            EvaluationSettings(every_subset=options.every_subset),
            display=display,
        )
        card(out / "evaluation")
    if options.ship:
        write_cohort(out / "one", 1, seed=99, shape=SHAPE, spacing_mm=SPACING_MM, missing={0: ("t1c", "t2f")})
        ship(model, next((out / "one").iterdir()), out / "set", display)


if __name__ == "__main__":
    main()
