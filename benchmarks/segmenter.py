"""What users care about: does a segmenter of whole tumour, core and enhancing part work as well where one contrast is
synthetic as where it is real?

Two segmenters (tumours.py) are trained on the labelled training studies, all contrasts shown ("all four") or random
ones dropped in half of the samples ("dropout"). Test studies are segmented with each contrast missing, and with T1ce
and FLAIR missing: real (the ceiling), dropped, replaced by trivial predictors, by the shipped weights ("ours"), by
other models, and by all images that other experiments kept in OUT/images (replacements.py). Dice of the 3D study; 1
where truth and prediction are empty, 0 where one is, as BraTS has it. Pieces under 0.5 cm³ are left out. Seeds are the
segmenter's. What is finished is kept; a training that is stopped begins again.

MS lesions: one patient to learn from and one to test cannot make a segmenter. FLAIR's lesions are instead found by a
threshold within the brain: the best one on the real FLAIR of the training patient, of the same patient, and of each
image itself.

python benchmarks/segmenter.py runs/default -o runs/evidence                     # trains, measures, prints the table
python benchmarks/segmenter.py runs/default -o runs/evidence --model before=OLD --only before     # one predictor more
python benchmarks/segmenter.py runs/default -o runs/evidence --table             # from kept rows alone
python benchmarks/segmenter.py --apply runs/evidence/segmenter STUDY LABELS.nii.gz   # labels 1, 2, 3 of one study
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from grid import DIFFERENCES, PUBLISHED, Kept, Row, arguments, column, four_contrasts, parser, patients_in, seconds
from replacements import Maker, by_baseline, by_images, by_model, sources_known
from scans import cohort_of
from tumours import (
    CONTRASTS,
    FILTERS,
    REGIONS,
    Array,
    Lessons,
    Segmenter,
    dice,
    hausdorff_95,
    keep,
    kept_segmenter,
    learn,
    masks_of,
    new_segmenter,
    segment,
)

from crossmr.data.dataset import Case
from crossmr.data.naming import DISPLAY_NAMES, find_studies
from crossmr.data.nifti import write_volume
from crossmr.data.study import load_study
from crossmr.data.volume import on_grid
from crossmr.device import choose_device
from crossmr.display import Display
from crossmr.errors import CrossmrError, StudyError
from crossmr.evaluation.subjects import Subject, subject_of_case
from crossmr.networks.scale import RANGE
from crossmr.registry import load_model

STEPS = 1200
"""Of a segmenter's training, BATCH slices each."""
SEGMENTERS = {"all four": False, "dropout": True}
"""Name → whether contrasts are dropped in its training."""
MISSING = (*((m,) for m in CONTRASTS), PUBLISHED[1])
PASS_IN_STEPS = 4.0
"""What a segmentation of a study takes, in steps of a training: 9 batches of 16 slices, forward only, and the rest."""
MS = "MS lesions"
LARGE, LARGE_ML = "large ET", 1.0
"""Of true enhancing tumour; Dice of less is a matter of a few voxels."""
COLUMNS = {
    "Dice WT": ("WT", "dice", 3),
    "Dice TC": ("TC", "dice", 3),
    "Dice ET": ("ET", "dice", 3),
    "Dice ET of 1 ml or more": (LARGE, "dice", 3),
    "95 % Hausdorff WT, mm": ("WT", "hausdorff_95", 1),
}
"""Heading → region, value of a row, and digits."""


class Apply(argparse.Action):
    """Segment one study folder, and end."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        """Write LABELS; one line says what went wrong."""
        try:
            apply(*values)
        except CrossmrError as error:
            parser.exit(1, f"segmenter: {error}\n")
        parser.exit()


def apply(segmenters: Path, folder: Path, labels: Path) -> None:
    """Write the labels of a study on its grid: 1 core without enhancement, 2 oedema, 3 enhancing, as BraTS 2023 has it.

    Volumes that are marked as synthetic are read as others are. Where a contrast lacks, the segmenter that was trained
    without is used.
    """
    found = find_studies(folder)
    if len(found) != 1:
        raise StudyError(f"{folder} holds {len(found)} studies; name the folder of one.")
    images = {m: nib.load(path) for m, path in found[0].images().items() if m in CONTRASTS}
    for image in images.values():
        image.header["descrip"] = b""  # where it says SYNTHETIC, a volume would count as missing
    study = load_study(images, found[0].case)
    which = "all four" if len(study.volumes) == len(CONTRASTS) else "dropout"
    if not (files := sorted(segmenters.glob(f"{which.replace(' ', '-')}-*.safetensors"))):
        raise StudyError(f"{segmenters} holds no segmenter of this kind: {which}. Train them first, without --apply.")
    box, whole = study.box(), np.zeros(study.mask.shape, np.uint8)
    volumes = {m: study.normalised(m, box) for m in study.volumes}
    network, spacing_mm = kept_segmenter(files[0], choose_device("auto")), study.reference.spacing_mm
    whole[box] = segment(network, volumes, study.mask[box], spacing_mm)
    write_volume(on_grid(whole, study.reference, description="Labels by a benchmark", dtype=np.uint8), labels)


def tumours(base: Path, split: str) -> list[Case]:
    """The labelled four-contrast studies of a split that have a tumour."""
    return [case for case in four_contrasts(base, split) if case.has_labels and cohort_of(case.name) != "openms"]


def place(out: Path, which: str, seed: int) -> Path:
    """Where a segmenter is kept."""
    return out / "segmenter" / f"{which.replace(' ', '-')}-{seed}.safetensors"


def trained(options: argparse.Namespace, which: str, seed: int) -> Segmenter:
    """A segmenter, read from OUT/segmenter or trained into it."""
    device = choose_device(options.device)
    path = place(options.out, which, seed)
    if not path.exists():
        cases = tumours(options.base, "train")[: 4 if options.tiny else None]
        lessons = Lessons(cases, seed, device, dropping=SEGMENTERS[which])
        fresh = new_segmenter(seed, options.patch, (8, 8, 8, 8) if options.tiny else FILTERS, device)
        keep(path, learn(fresh, lessons, options.steps, f"{which}, seed {seed}", Display()))
    return kept_segmenter(path, device)


def makers(options: argparse.Namespace) -> dict[str, Maker]:
    """Everything that a missing contrast is replaced by; "dropped" by nothing."""
    ours, known = load_model("default", options.device), sources_known(options.out)
    found: dict[str, Maker] = {"dropped": lambda *_: {}}
    found |= {name: by_baseline(ours, name) for name in ("mean image", "linear regression")}
    found["ours"] = by_model(ours)
    found |= {name: by_model(load_model(folder, options.device)) for name, folder in options.model}
    folders = sorted(path for path in (options.out / "images").glob("*") if path.is_dir())
    found |= {folder.name: by_images(folder, known) for folder in folders}
    return {name: maker for name, maker in found.items() if not options.only or name in options.only}


def scored(case: Case, labels: np.ndarray, **facts: Any) -> Iterator[Row]:
    """A row for each region of one segmentation."""
    common = {"case": case.name, "patient": case.patient, "cohort": cohort_of(case.name)}
    truth, made = masks_of(np.asarray(case.masks()[:, 1])), masks_of(labels)
    for region in REGIONS:
        pair = truth[region], made[region]
        distance = hausdorff_95(*pair, case.spacing_mm)
        ml = float(pair[0].sum() * np.prod(case.spacing_mm) / 1000)
        yield {**facts, **common, "region": region, "ml": ml, "dice": dice(*pair), "hausdorff_95": distance}


def measure(options: argparse.Namespace, kept: Kept, replaced: Mapping[str, Maker]) -> None:
    """Keep rows of every study, missing contrasts, predictor, segmenter and seed; those that are kept are left out."""
    networks: dict[tuple[str, int], Segmenter] = {}
    for case, missing, predictor, which in jobs(options, replaced):
        facts = {"predictor": predictor, "segmenter": which, "missing": "+".join(missing)}
        seeds = [seed for seed in options.seeds if not kept.has(**facts, seed=seed, case=case.name)]
        if not seeds:
            continue
        subject = subject_of_case(case)
        sources = [m for m in CONTRASTS if m not in missing]
        images = replaced[predictor](subject, sources, missing) if missing else {}
        for seed in seeds if images is not None else ():
            if (which, seed) not in networks:
                networks[which, seed] = trained(options, which, seed)
            volumes = {**{m: subject.volumes[m] for m in sources}, **(images or {})}
            labels = segment(networks[which, seed], volumes, subject.head, case.spacing_mm)
            kept.add(scored(case, labels, **facts, seed=seed))
        if images is not None:
            print(f"{case.name}, {facts['missing'] or 'nothing'} missing: {predictor}, {which}", flush=True)


def jobs(options: argparse.Namespace, replaced: Iterable[str]) -> Iterator[tuple[Case, Sequence[str], str, str]]:
    """Study, what it misses, what replaces it, and which segmenter reads it."""
    for case in tumours(options.base, options.part)[: 1 if options.tiny else None]:
        for which in options.segmenters:
            yield case, (), "real", which
        for missing in (some for some in MISSING if "+".join(some) in options.missing):
            for predictor in replaced:
                for which in options.segmenters:
                    if predictor == "dropped" or which == "all four":
                        yield case, missing, predictor, which


def say_how_long(options: argparse.Namespace, kept: Kept, replaced: Mapping[str, Maker]) -> None:
    """Time two steps on this machine, and say how long all that is missing takes."""
    device = choose_device(options.device)
    lessons = Lessons(tumours(options.base, "train")[:4], 0, device, dropping=False)
    fresh = new_segmenter(0, options.patch, (8, 8, 8, 8) if options.tiny else FILTERS, device)
    learn(fresh, lessons, 1, "first step", Display())
    step = seconds(lambda: learn(fresh, lessons, 2, "two steps", Display()))[0] / 2
    absent = [not place(options.out, which, seed).exists() for which in options.segmenters for seed in options.seeds]
    passes = sum(
        not kept.has(predictor=p, segmenter=which, missing="+".join(missing), case=case.name, seed=seed)
        for case, missing, p, which in jobs(options, replaced)
        for seed in options.seeds
    )
    minutes = (sum(absent) * options.steps + passes * PASS_IN_STEPS) * step / 60
    print(
        f"{sum(absent)} trainings of {options.steps} steps of {step:.2f} s, and at most {passes} segmentations of "
        f"about {PASS_IN_STEPS * step:.1f} s: about {minutes:.0f} minutes.",
        flush=True,
    )


def find_ms(options: argparse.Namespace, kept: Kept, replaced: Mapping[str, Maker]) -> None:
    """Keep rows of the MS patients: Dice of a threshold on FLAIR, real and synthetic."""
    train, test = (
        [case for case in four_contrasts(options.base, split) if cohort_of(case.name) == "openms" and case.has_labels]
        for split in ("train", "test")
    )
    if not (train and test):
        return
    threshold, _ = best_threshold(subject_of_case(train[0]), None)
    sources = [m for m in CONTRASTS if m != "t2f"]
    for case in test:
        subject = subject_of_case(case)
        real, _ = best_threshold(subject, None)
        for predictor in ("real", *(name for name in replaced if name != "dropped")):
            facts = {"predictor": predictor, "segmenter": "threshold", "missing": "t2f", "seed": 0}
            if kept.has(**facts, case=case.name):
                continue
            images = {} if predictor == "real" else replaced[predictor](subject, sources, ["t2f"])
            if images is not None:
                image = images.get("t2f", subject.volumes["t2f"])
                there, lesion = image[subject.head], subject.tumour[subject.head]
                own, best = best_threshold(subject, image)
                common = {"case": case.name, "patient": case.patient, "cohort": cohort_of(case.name), "region": MS}
                by_others = {"dice": dice(lesion, there >= threshold), "dice_real": dice(lesion, there >= real)}
                kept.add([{**facts, **common, **by_others, "dice_best": best, "threshold": own}])


def best_threshold(subject: Subject, flair: Array | None) -> tuple[float, float]:
    """The threshold on FLAIR, real by default and on [0, 1], that finds a lesion best within the brain; its Dice."""
    inside = (subject.volumes["t2f"] if flair is None else flair)[subject.head]
    lesion = subject.tumour[subject.head]
    # a twentieth of a robust standard deviation apart, from the median to six above it
    found = [(dice(lesion, inside >= t), t) for t in 1 / 3 + np.arange(0, 6, 0.05) / RANGE]
    best, threshold = max(found)
    return float(threshold), best


def table(rows: Sequence[Row], against: str, *, differences: bool = False) -> str:
    """Markdown, a table for each set of missing contrasts; * differs from `against`, by the segmenter of all four."""
    whole = [row for row in rows if not row["missing"]]
    parts = []
    for missing in dict.fromkeys(row["missing"] for row in rows if row["missing"] and row["region"] != MS):
        own = [*whole, *(row for row in rows if row["missing"] == missing and row["region"] != MS)]
        names = " and ".join(DISPLAY_NAMES[m] for m in missing.split("+"))
        parts.append(f"\n**{names} missing**, {patients_in(own)} patients\n")
        parts.append("| replaced by | segmenter | seeds | " + " | ".join(COLUMNS) + " |")
        parts.append("|---" * (len(COLUMNS) + 3) + "|")
        groups = {
            (predictor, which): [row for row in own if (row["predictor"], row["segmenter"]) == (predictor, which)]
            for which, predictor in sorted(
                dict.fromkeys((row["segmenter"], row["predictor"]) for row in own), key=lambda pair: pair[0]
            )
        }
        cells = [
            column(
                {key: of_region(its, region) for key, its in groups.items()},
                (against, "all four"),
                value,
                digits,
                differences=differences,
            )
            for region, value, digits in COLUMNS.values()
        ]
        for (predictor, which), its in groups.items():
            texts = " | ".join(one[predictor, which] for one in cells)
            parts.append(f"| {predictor} | {which} | {len({row['seed'] for row in its})} | {texts} |")
    if parts:
        parts.append(
            "\nImages of the published task are made from T1 and T2, also where one contrast alone is missing."
        )
    if ms := [row for row in rows if row["region"] == MS]:
        parts.append("\n**MS lesions by a threshold on FLAIR**, one patient: no more than an example\n")
        parts.append("| FLAIR | Dice, threshold of the training patient | of the same patient's real FLAIR | its own |")
        parts.append("|---|---|---|---|")
        for row in ms:
            numbers = (f"{row[name]:.3f}" for name in ("dice", "dice_real", "dice_best"))
            parts.append(f"| {row['predictor']} | {' | '.join(numbers)} |")
    return "\n".join(parts)


def of_region(rows: Iterable[Row], region: str) -> list[Row]:
    """The rows of one region; of LARGE those of ET of patients who have so much of it."""
    if region != LARGE:
        return [row for row in rows if row["region"] == region]
    return [row for row in rows if row["region"] == "ET" and row.get("ml", 0.0) >= LARGE_ML]


def pair(text: str) -> tuple[str, Path]:
    """NAME=FOLDER."""
    name, _, folder = text.partition("=")
    return name, Path(folder)


def with_training(known: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser with the options of a segmenter's training, and of whom it is for."""
    known.add_argument("--steps", type=int, default=STEPS, help="of a segmenter's training")
    known.add_argument("--patch", type=int, default=2, choices=(1, 2), help="the segmenter's patches")
    known.add_argument("--part", default="test", choices=("val", "test"), help="whose patients are measured")
    return known


def main() -> None:
    """Train what is missing, measure what is missing, print the tables."""
    known = with_training(parser(__doc__))
    known.add_argument("--apply", nargs=3, type=Path, metavar=("SEGMENTERS", "STUDY", "LABELS"), action=Apply)
    known.add_argument(
        "--model", nargs="+", action="extend", type=pair, default=[], metavar="NAME=FOLDER", help="models beside ours"
    )
    known.add_argument("--only", nargs="+", metavar="NAME", help="these predictors")
    known.add_argument("--segmenters", nargs="+", choices=SEGMENTERS, default=list(SEGMENTERS))
    each = ["+".join(some) for some in MISSING]
    known.add_argument("--missing", nargs="+", choices=each, default=each)
    known.add_argument("--against", default="ours", help="whom * compares with, such as dropped")
    known.add_argument("--differences", **DIFFERENCES)
    options = arguments(known)
    if options.tiny:
        options.steps = 3
    kept = Kept(options.out, "segmenter" if options.part == "test" else f"segmenter-{options.part}")
    if not options.table:
        replaced = makers(options)
        say_how_long(options, kept, replaced)
        measure(options, kept, replaced)
        find_ms(options, kept, replaced)
    print(table(kept.of(options.shown), options.against, differences=options.differences))


if __name__ == "__main__":
    main()
