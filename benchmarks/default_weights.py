"""The weights that crossmr ships: one model of any subset of T1, T1ce, T2 and FLAIR, from whatever data is at hand.

LGG (three modalities, with skull), BraTS, HiNet's BraTS 2018 and openms (four), cubes around the tumours of BraTS 2020
(four, as mosaics), and phantoms. Two BraTS cases are left out: their patients occur, or may occur, in LGG; so are the
cubes of low-grade gliomas, for the same reason, and of the patients held out from HiNet's. The split is by patient; its
seed was taken by names alone, so that each cohort has patients who are never trained on.

python benchmarks/default_weights.py ../shared/data -o runs/default --minutes 240
python benchmarks/default_weights.py ../shared/data -o runs/default --measure   # every subset of the held-out patients
python benchmarks/default_weights.py -o runs/default --card                     # the model card's tables of that
python benchmarks/default_weights.py ../shared/data -o runs/default --ship      # into src/crossmr/weights
"""

import argparse
import csv
import math
import shutil
import statistics
from pathlib import Path

import nibabel as nib
import numpy as np
from einops import rearrange
from scipy.ndimage import zoom

from crossmr.cohort import complete_cohort
from crossmr.config import with_settings
from crossmr.data.dataset import PreparedSet
from crossmr.data.naming import SPOKEN
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.data.study import MEDIANS
from crossmr.data.volume import content_sha256
from crossmr.display import Display
from crossmr.errors import SetError
from crossmr.evaluation import DEVIATION, INTENSITY, evaluate, sureness_table, tables
from crossmr.files import digest, read_json, write_json
from crossmr.model import load_model
from crossmr.phantom import write_cohort
from crossmr.recipes import ANY
from crossmr.report import report_completion, report_evaluation
from crossmr.training import train

LEFT_OUT = ("TCGA-DU-7294", "TCGA-FG-6692")
CUBES_LEFT_OUT = frozenset({143, 147, *range(260, 336)})
"""Numbers in BraTS 2020: hinet_train_08 and _01 (normalised correlation with their scans .92 and .74, the next .60 and
.57), and the low-grade gliomas, 65 of whom are TCGA-LGG's. BraTS-GLI-00000-000 is not among the cubes (.51 at best, far
from its tumour)."""
MOSAICS_LEFT_OUT = ("CUBES-28",)
"""Would be held out, but two of its patients (137, 139) are hinet_train_04 and _03, who are trained on."""
CUBE_UNIT = 1000.0
CUBE_OUTSIDE = 73
"""The code of a z-score of 0, which fills what is not brain."""
CUBE_SCALE = {"t1n": (0.66, 0.16, 2.2), "t1c": (0.42, 0.10, 5.5), "t2w": (0.38, 0.16, 3.9), "t2f": (0.45, 0.15, 3.9)}
"""Mean and standard deviation of the brain where its 99.9th percentile is 1, and that percentile's z-score: typical of
whole stripped scans."""
SPLIT = Split.parse("75/7/18", 451)
PHANTOMS = 20
SHAPE, SPACING_MM = (104, 124, 44), (1.875, 1.875, 4.0)
SETTINGS = {
    "crop": "128,128",
    "augmentation.probability": "0.15",
    "representation.channels": "12",
    "representation.multipliers": "1,2,3,4",
    "representation.patch_size": "8",
    "representation_fit.batch_size": "8",
    "representation_fit.learning_rate": "1e-3",
    "representation_fit.ema_decay": "0.99",
    "distribution.width": "64",
    "distribution_fit.learning_rate": "1e-3",
    "distribution_fit.batch_size": "64",
    "distribution_fit.ema_decay": "0.99",
    "synthesis.channels": "16",
    "synthesis.multipliers": "1,2,3,4",
    "synthesis_fit.batch_size": "4",
    "synthesis_fit.learning_rate": "1e-3",
    "synthesis_fit.ema_decay": "0.998",
    "guidance_fit.batch_size": "4",
    "guidance_fit.share": "0.1",
    "uncertainty_fit.batch_size": "4",
    "uncertainty_fit.share": "0.1",
}
RECIPE = with_settings(ANY, SETTINGS)
WEIGHTS = Path(__file__).parents[1] / "src" / "crossmr" / "weights" / "default"
LARGEST_MIB = 16.0
FOUR = ("BraTS", "Brats", "CompImg", "modelhub", "hinet", "patient")
COHORTS = {
    "LGG": ("TCGA-",),
    "BraTS, HiNet, openms": FOUR,
    "BraTS 2020 cubes, four patients in each": ("CUBES",),
    "phantoms": ("PHANTOM",),
}
"""How the cases of each are called."""


def four_modalities(data: Path) -> list[Path]:
    """The folders of real patients who have T1, T1ce, T2 and FLAIR."""
    brats = sorted(study for study in (data / "brats").iterdir() if study.is_dir() and study.name not in LEFT_OUT)
    return [*brats, data / "hinet_brats18", data / "openms"]


def cohorts(data: Path, out: Path) -> list[Path]:
    """The folders that are prepared together; mosaics and phantoms are made under `out`."""
    write_cohort(out / "phantoms", PHANTOMS, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    return [data / "lgg", *four_modalities(data), mosaics(data, out / "mosaics"), out / "phantoms"]


def mosaics(data: Path, out: Path) -> Path:
    """The cubes as studies: four patients side by side in black, at the size in plane of 1 mm scans.

    Cubes come as z-scores of the brain, 0 outside it, from volumes stretched to 128³ voxels. A patient gives the cube
    that has the most brain, unless that is less than half.
    """
    cubes = []
    for file in sorted((data / "brats20_cubes").glob("*.npz")):
        if int(file.stem.rpartition("_")[2]) not in CUBES_LEFT_OUT:
            with np.load(file) as arrays:
                image, labels = arrays["image"], arrays["seg"]
            brain = ~(image == CUBE_OUTSIDE).all(1)
            best = int(brain.sum((1, 2, 3)).argmax())
            if brain[best].mean() > 0.5:
                cubes.append((image[best] * (14 / 255) - 4, brain[best], labels[best]))
    affine = np.diag([-0.9375, -0.9375, 1.211, 1])
    for start in range(0, len(cubes) - 3, 4):
        name, group = f"CUBES-{start // 4:02d}", cubes[start : start + 4]
        folder = out / name
        if name in MOSAICS_LEFT_OUT:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        brain = np.stack([_large(mask, order=0) for _, mask, _ in group])
        for index, (modality, (mean, deviation, highest)) in enumerate(CUBE_SCALE.items()):
            scores = np.stack([_large(image[index], order=1) for image, _, _ in group])
            intensity = np.where(brain, (mean + deviation * scores.clip(max=highest)).clip(min=0.02), 0)
            picture = np.round(CUBE_UNIT * _tiled(intensity)).astype(np.int16)
            nib.save(nib.Nifti1Image(picture, affine), folder / f"{name}-{modality}.nii.gz")
        labels = np.stack([_large(seg, order=0) for _, _, seg in group])
        nib.save(nib.Nifti1Image(_tiled(labels).astype(np.uint8), affine), folder / f"{name}-seg.nii.gz")
    return out


def _large(cube: np.ndarray, order: int) -> np.ndarray:
    """(32, 32, 32) to (64, 64, 32)."""
    return zoom(cube, (2, 2, 1), order=order, mode="nearest", grid_mode=True)


def _tiled(tiles: np.ndarray) -> np.ndarray:
    """(4, 64, 64, 32) to two by two, with zeros around them."""
    return np.pad(rearrange(tiles, "(a b) x y z -> (a x) (b y) z", a=2), ((4, 4), (4, 4), (2, 2)))


def rescale_mosaics(prepared: Path) -> None:
    """Bring the brain's mean of a prepared mosaic to where the median of whole scans lies.

    Mosaics are tumour for the most part: their own median of FLAIR is a quarter above the brain's.
    """
    manifest = PreparedSet(prepared).manifest
    for name, case in manifest["cases"].items():
        if not name.startswith("CUBES"):
            continue
        folder = prepared / "cases" / name
        images = np.load(folder / "images.npy")
        for index, modality in enumerate(case["modalities"]):
            scale, wanted = case["normalisation"][modality], MEDIANS * CUBE_UNIT * CUBE_SCALE[modality][0]
            images[:, index] *= scale["high"] / wanted
            scale["high"] = wanted
        np.save(folder / "images.npy", images, allow_pickle=False)
        case["files"]["images.npy"] = content_sha256(folder / "images.npy")
        known = read_json(folder / "case.json", SetError)
        write_json(folder / "case.json", {key: case[key] for key in known})
    write_json(prepared / "manifest.json", {**manifest, "sha256": digest(manifest)})


def measure(model: Path, data: Path, out: Path, display: Display) -> None:
    """Every subset of the held-out patients, and the patients whose sequences were never acquired."""
    result = evaluate(model, out / "set", out / "evaluation", every_subset=True, display=display)
    display.print_tables(tables(result["summary"]))
    display.print_tables([sureness_table(result["uncertainty"])])
    display.say(f"to look at: {report_evaluation(out / 'evaluation')}")
    completed = complete_cohort(data / "lgg_incomplete", out / "completed", model, overwrite=True, display=display)
    display.say(f"to look at: {report_completion(out / 'completed')}")
    for case, modalities in completed["completed"].items():
        display.say(f"{case}: synthesised {', '.join(modalities)}")


def card(evaluation: Path) -> None:
    """The tables of every cohort and pattern, in Markdown: ours, then the least-squares mix of the same sources."""
    rows = [row for name in ("metrics", "uncertainty") for row in _read(evaluation / f"{name}.csv")]
    for cohort, cases in COHORTS.items():
        own = [row for row in rows if row["case"].startswith(cases)]
        print(f"\n{cohort}: {len({row['case'] for row in own})} cases\n")
        print("| sources | target | PSNR, brain | SSIM, brain | PSNR, tumour | SSIM, tumour | AUSE | within 95 % |")
        print("|---|---|---|---|---|---|---|---|")
        asked = dict.fromkeys((row["sources"], row["target"]) for row in own)
        for sources, target in sorted(asked, key=lambda pair: (pair[1], pair[0].count("+"))):
            chosen = [row for row in own if (row["sources"], row["target"]) == (sources, target)]
            cells = []
            for region in ("brain", "tumour"):
                for metric, digits in (("psnr", 2), ("ssim", 3)):
                    pair = (_mean(chosen, metric, region=region, predictor=p) for p in ("unguided", "linear mix"))
                    cells.append(" / ".join("–" if math.isnan(value) else f"{value:.{digits}f}" for value in pair))
            pair = (_mean(chosen, "ause", uncertainty=u) for u in (DEVIATION, INTENSITY))
            cells += [" / ".join(f"{value:.2f}" for value in pair)]
            cells += [f"{_mean(chosen, 'coverage_95', uncertainty=DEVIATION):.2f}"]
            names = " + ".join(SPOKEN[source] for source in sources.split("+"))
            print(f"| {names} | {SPOKEN[target]} | {' | '.join(cells)} |")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _mean(rows: list[dict[str, str]], metric: str, **wanted: str) -> float:
    """Over the rows of these properties."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    values = [float(row[metric]) for row in chosen if row[metric] not in ("", "nan")]
    return statistics.mean(values) if values else math.nan


def ship(model: Path, display: Display) -> None:
    """Put a finished model into the package, if it is small enough."""
    record = load_model(model).record
    size = sum(path.stat().st_size for path in model.iterdir()) / 2**20
    if size > LARGEST_MIB:
        raise SystemExit(f"{model} has {size:.1f} MiB; wanted at most {LARGEST_MIB:g}.")
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    shutil.copytree(model, WEIGHTS)
    display.say(f"{WEIGHTS}: {record['sha256'][:12]}, {size:.1f} MiB")


def main() -> None:
    """Prepare and train, or measure, or ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--start", type=Path, help="go on from the weights of this model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args()
    out, display = options.out, Display()
    model = out / "run" / "model"
    if not (options.measure or options.card or options.ship):
        folders = cohorts(options.data, out)
        prepare(folders, out / "set", split=SPLIT, workers=default_workers(), display=display)
        rescale_mosaics(out / "set")
        form = {"minutes": options.minutes, "device": options.device, "seed": options.seed, "start": options.start}
        train(out / "set", out / "run", recipe=RECIPE, display=display, **form)
    if options.measure:
        measure(model, options.data, out, display)
    if options.card:
        card(out / "evaluation")
    if options.ship:
        ship(model, display)


if __name__ == "__main__":
    main()
