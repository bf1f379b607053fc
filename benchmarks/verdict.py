"""How often each verdict is right: on whole studies that nothing was trained on, on copies that were broken on purpose,
and on syntheses whose lesion was lost.

python benchmarks/verdict.py ../shared/data -o runs/verdict --part val     # what the thresholds were chosen on
python benchmarks/verdict.py ../shared/data -o runs/verdict                # the test patients: docs/checks.md

Of each study one contrast is hidden, another one from study to study, and the others are acquired. Syntheses are kept
in OUT, and not made again.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from default_weights import TEST, VALIDATION
from scans import unpacked

from crossmr.completion.checks import Finding, check
from crossmr.completion.lesions import find_lesions
from crossmr.completion.verdict import VERDICTS, judge, refusals
from crossmr.data.head import fit_normalisation
from crossmr.data.naming import find_studies
from crossmr.data.study import Study, load_study
from crossmr.evaluation.measures import LOST, STANDS_OUT
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import CrossConditionedModel
from crossmr.registry import load_model

WHOLE = {"test": TEST[:14], "val": VALIDATION[:6]}
HIDDEN = ("t2f", "t1c", "t2w", "t1n")
WITH_SYNTHETIC = "nothing, with what is found in the synthetic volume"
Array = npt.NDArray[np.float32]


def find(data: Path, out: Path, name: str) -> Study:
    """A whole study, its volumes cut to the head."""
    places = [data / "brats" / name, data / "openms" / name, out / "whole" / name]
    folder = next((place for place in places if place.is_dir()), None) or unpacked(data, out / "whole", (name,)) / name
    (files,) = find_studies(folder)
    study = load_study(files)
    box = study.box(8)
    volumes = {m: replace(volume, data=np.ascontiguousarray(volume.data[box])) for m, volume in study.volumes.items()}
    labels = None if study.labels is None else study.labels[box]
    return replace(study, case=name, volumes=volumes, mask=study.mask[box], labels=labels)


def with_volumes(study: Study, changed: Mapping[str, Array], mask: npt.NDArray[np.bool_] | None = None) -> Study:
    """A study whose volumes were changed, and perhaps its head."""
    head = study.mask if mask is None else mask
    volumes = {m: replace(study.volumes[m], data=np.where(head, data, np.float32(0))) for m, data in changed.items()}
    normalisation = {m: fit_normalisation(volume.data, head) for m, volume in volumes.items()}
    return replace(study, volumes=volumes, mask=head, normalisation=normalisation)


def broken(study: Study, stranger: Study) -> Iterator[tuple[str, Study]]:
    """What is done to a study of which one contrast is hidden, and the result."""
    real = {m: volume.data for m, volume in study.volumes.items()}
    first, one, last = real
    data, head = real[one], study.mask
    shape = data.shape
    _, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    spread = study.normalisation[one].high - study.normalisation[one].low

    def of_one(change: npt.ArrayLike) -> Study:
        return with_volumes(study, {**real, one: np.asarray(change, np.float32)})

    yield "nothing", study
    yield "first two contrasts exchanged", with_volumes(study, {**real, first: data, one: real[first]})
    yield "first and last contrast exchanged", with_volumes(study, {**real, first: real[last], last: real[first]})
    yield "one moved by 5 mm", of_one(np.roll(data, 5, 1))
    yield "one moved by 10 mm", of_one(np.roll(data, 10, 1))
    lost = data.copy()
    lost[int(0.4 * shape[0]) : int(0.5 * shape[0])] = 0
    yield "a tenth of one's slices lost", of_one(lost)
    yield "ghosts of 30 % in one", of_one(0.7 * data + 0.3 * np.roll(data, shape[1] // 3, 1))
    yield "strong bias field in one", of_one(data * (1 + 0.6 * x + 0.4 * y))
    yield (
        "noise of 1.5 robust deviations in one",
        of_one(data + spread / 10 * np.random.default_rng(0).normal(0, 1, shape)),
    )
    yield "motion in one", of_one((data + np.roll(data, 3, 1) + np.roll(data, -3, 1) + np.roll(data, 6, 2)) / 4)
    other = stranger.volumes[one].data
    yield "one of another patient", of_one(fitted(other, shape))
    yield "one upside down", of_one(data[::-1, ::-1])
    yield "all upside down", with_volumes(study, {m: v[::-1, ::-1].copy() for m, v in real.items()}, head[::-1, ::-1])
    cut = head.copy()
    cut[:, : shape[1] // 3] = False
    yield "a third of the head cut off", with_volumes(study, real, cut)
    yield "one image under two names", with_volumes(study, {**real, first: data})


def fitted(volume: Array, shape: tuple[int, ...]) -> Array:
    """A volume in the middle of another shape."""
    made = np.zeros(shape, np.float32)
    there, here = [], []
    for new, old in zip(shape, volume.shape, strict=True):
        side = min(new, old)
        there.append(slice((new - side) // 2, (new - side) // 2 + side))
        here.append(slice((old - side) // 2, (old - side) // 2 + side))
    made[tuple(there)] = volume[tuple(here)]
    return made


def hide(study: Study, target: str) -> Study:
    """A study without one contrast."""
    return replace(study, volumes={m: volume for m, volume in study.volumes.items() if m != target})


def verdict_on(study: Study, target: str, model: CrossConditionedModel, made: Array | None) -> tuple[str, list[str]]:
    """The verdict by what is acquired, and by the synthetic volume if there is one, and the kinds of what was found."""
    findings = check(study, model.baselines, model.config.modalities, model.record["training"])
    if made is not None:
        findings += lost_in(study, within_box(study), target, made)
    refused = refusals(findings, [target])
    judged = judge(findings, refused, [] if refused else [target], refused)
    return judged["verdict"], sorted({one.kind for one in findings if one.severity != "note"})


def within_box(study: Study) -> dict[str, Array]:
    """The normalised volumes within the head's box."""
    box = study.box()
    return {m: study.normalised(m, box) for m in study.volumes}


def lost_in(study: Study, volumes: Mapping[str, Array], target: str, made: Array) -> list[Finding]:
    """What the product says of the lesions of a synthetic volume, by the others `within_box`."""
    acquired = {m: volume for m, volume in volumes.items() if m != target}
    head, spacing_mm = study.mask[study.box()], study.reference.spacing_mm
    return find_lesions(acquired, head, spacing_mm, {target: made}, stripped=True)[0]


def synthesised(study: Study, target: str, model: CrossConditionedModel, out: Path) -> Array:
    """One contrast from all others, within the head's box."""
    path = out / "made" / f"{study.case}-{target}.npz"
    if not path.exists():
        box = study.box()
        volumes = {m: study.normalised(m, box) for m in study.volumes if m != target}
        head = HeadVolumes.of(volumes, study.mask[box], study.reference.spacing_mm)
        image = synthesise(model, head, study.case, InferenceSettings(targets=(target,))).images[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, image=image.numpy().astype(np.float16))
    return np.asarray(np.load(path)["image"], np.float32)


def contrast(volume: Array, lesion: npt.NDArray[np.bool_], rest: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Contrast of a lesion, as `evaluation.measures` has it; median and quartile range of the rest."""
    q25, median, q75 = (float(q) for q in np.percentile(volume[rest], (25, 50, 75)))
    return (float(volume[lesion].mean(dtype=np.float64)) - median) / (q75 - q25), median, q75 - q25


def lesions(study: Study, model: CrossConditionedModel, out: Path) -> Iterator[tuple[str, str, bool, bool]]:
    """(target, what was done, whether the lesion is lost, whether that was found) of true lesions that stand out.

    Where no lesion is labelled, none is lost, for all that is known.
    """
    box, volumes = study.box(), within_box(study)
    head, labels = study.mask[box], np.zeros(study.mask[box].shape) if study.labels is None else study.labels[box]
    for target in ("t1c", "t2w", "t2f"):
        made = synthesised(study, target, model, out)
        if study.labels is None:
            yield target, "as synthesised, no labels", False, bool(lost_in(study, volumes, target, made))
            continue
        lesion = head & (labels >= 3 if target == "t1c" else labels > 0)
        if lesion.sum() < 50:
            continue
        volume, rest = volumes[target], head & (labels == 0)
        true, median, spread = contrast(volume, lesion, rest)
        if true <= STANDS_OUT:
            continue
        _, own_median, own_spread = contrast(made, lesion, rest)
        copies = {"as synthesised": made}
        for share in (0.0, 0.3) if target != "t1c" else ():
            faded = own_median + np.float32(share * own_spread / spread) * (volume - np.float32(median))
            copies[f"lesion faded to {share:.0%}"] = np.where(lesion, faded, made).astype(np.float32)
        for what, copy in copies.items():
            lost = contrast(copy, lesion, rest)[0] / true < LOST
            yield target, what, lost, bool(lost_in(study, volumes, target, copy))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/verdict"))
    parser.add_argument("--part", choices=WHOLE, default="test")
    options = parser.parse_args()
    model, names = load_model(), WHOLE[options.part]
    verdicts: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, list[str]] = defaultdict(list)
    told: dict[tuple[str, str], list[tuple[bool, bool]]] = defaultdict(list)
    stranger = find(options.data, options.out, names[-1])
    for number, name in enumerate(names):
        study = find(options.data, options.out, name)
        for target, what, lost, found in lesions(study, model, options.out):
            told[target, what].append((lost, found))
        target = HIDDEN[number % len(HIDDEN)]
        copies: list[tuple[str, Study, Array | None]] = [
            (what, copy, None) for what, copy in broken(hide(study, target), stranger)
        ]
        copies.insert(1, (WITH_SYNTHETIC, hide(study, target), synthesised(study, target, model, options.out)))
        for what, copy, made in copies:
            verdict, kind = verdict_on(copy, target, model, made)
            verdicts[what].append(verdict)
            kinds[what] += kind
        print(f"{name}: {', '.join(f'{what} {v[-1]}' for what, v in verdicts.items())}", flush=True)
        stranger = study
    print(f"\n| what was broken | {' | '.join(VERDICTS)} | found |\n|---|{'---|' * len(VERDICTS)}---|")
    for what, its in verdicts.items():
        said = ", ".join(f"{kind} {kinds[what].count(kind)}" for kind in dict.fromkeys(sorted(kinds[what])))
        print(f"| {what} | {' | '.join(str(its.count(v)) for v in VERDICTS)} | {said} |")
    print("\n| target | synthesis | lesions | lost | lost and found | found, not lost |\n|---|---|---|---|---|---|")
    for (target, what), pairs in sorted(told.items()):
        counts = (len(pairs), sum(lost for lost, _ in pairs), sum(lost and found for lost, found in pairs))
        print(f"| {target} | {what} | {' | '.join(map(str, counts))} | {sum(f and not lost for lost, f in pairs)} |")


if __name__ == "__main__":
    main()
