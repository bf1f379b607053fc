"""What a model of any subset is worth, on patients that it was not trained on. Six questions, one flag each:

  --patterns EVALUATION   do more sources ever hurt? From what `crossmr evaluate MODEL SET --every-subset` wrote
  --reference             whose real scan guides best: the patient's own three slices away, another patient's of the
                          same site (TCGA's code in the name), or a stranger's? PSNR of the held-out LGG patients
  --jitter                do neighbouring slices agree? Second differences through the plane, against the truth's
  --samples               what do 16 samples cost against one?
  --steps                 how few DDIM steps will do? PSNR and time of one guided sample
  --spread                how far samples of so few steps still deviate from one another

python benchmarks/any_subset.py ../shared/data -o runs/default --model runs/default/run/model --reference
"""

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from crossmr import metrics
from crossmr.completion import Settings, synthesise
from crossmr.data.dataset import PreparedSet
from crossmr.evaluation import Subject, predict_all, subject_from_set
from crossmr.files import write_json
from crossmr.model import CrossConditionedModel, load_model
from crossmr.store import find_model

Array = npt.NDArray[np.float32]
STEPS = (50, 20, 10, 5, 2)
"""Of DDIM; the first is the usual number."""
FAR = 3
"""Slices between a patient's own reference and where it guides."""


def patterns(folder: Path, out: Path) -> None:
    """PSNR over the brain by the number of sources, and every pair of nested subsets of which the larger is worse."""
    table: dict[tuple[str, frozenset[str]], dict[str, float]] = defaultdict(dict)
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["predictor"] == "unguided" and row["region"] == "brain":
                table[row["target"], frozenset(row["sources"].split("+"))][row["case"]] = float(row["psnr"])
    worse, pairs = [], 0
    for (target, small), (other, large) in combinations(sorted(table, key=lambda k: len(k[1])), 2):
        if target == other and small < large:
            both = [
                (table[target, small][c], table[target, large][c])
                for c in table[target, small]
                if c in table[target, large]
            ]
            if len(both) > 1:
                pairs += 1
                gain = statistics.mean(b - a for a, b in both)
                p = metrics.paired_wilcoxon(*zip(*both, strict=True))
                if gain < 0:
                    worse.append(
                        {
                            "target": target,
                            "from": "+".join(sorted(small)),
                            "to": "+".join(sorted(large)),
                            "gain": round(gain, 3),
                            "p": round(p, 4),
                        }
                    )
    sizes: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (target, sources), cases in table.items():
        sizes[target, len(sources)] += list(cases.values())
    for (target, size), values in sorted(sizes.items()):
        print(f"{target} from {size}: {statistics.mean(values):.2f} dB over {len(values)}")
    print(f"{len(worse)} of {pairs} additions of sources lower the mean")
    for entry in worse:
        print(", ".join(f"{key} {value}" for key, value in entry.items()))
    write_json(out / "patterns.json", {"pairs": pairs, "worse": worse})


def subjects(prepared: Path, start: str = "") -> Iterator[Subject]:
    """The held-out patients of a set whose names start so."""
    for case in PreparedSet(prepared).part("test"):
        if case.name.startswith(start):
            yield subject_from_set(case)


def guided(model: CrossConditionedModel, subject: Subject, target: str, reference: Array | None) -> float:
    """PSNR over the brain of one target from all else, guided by a volume or by nothing."""
    given = {m: volume for m, volume in subject.volumes.items() if m != target}
    settings = Settings() if reference is None else Settings(guidance="reference", reference=Path())
    known = None if reference is None else {target: reference}
    head = subject.head.sum((1, 2)).tolist()
    made = synthesise(model, given, head, subject.name, settings, reference=known)
    image = made.images[model.config.targets.index(target)][None]
    truth = torch.from_numpy(subject.volumes[target])[None]
    return float(metrics.psnr(*metrics.scale_by_truth(image, truth), 1.0, torch.from_numpy(subject.head)[None]))


def references(model: CrossConditionedModel, prepared: Path, out: Path) -> None:
    """PSNR with each reference, every held-out LGG patient and target."""
    people: list[Subject] = list(subjects(prepared, "TCGA-"))
    rows: list[tuple[str, str, dict[str, float]]] = []
    for index, subject in enumerate(people):
        site = subject.name.split("-")[1]
        others = people[index + 1 :] + people[:index]
        for target in subject.volumes:
            choices: dict[str, Array | None] = {"nothing": None, "own truth": subject.volumes[target]}
            away = np.minimum(np.arange(len(subject.head)) + FAR, len(subject.head) - 1)
            choices["own, three slices away"] = subject.volumes[target][away]
            for name, wanted in (("same site", True), ("stranger", False)):
                found = [o for o in others if (o.name.split("-")[1] == site) == wanted and target in o.volumes]
                if found:
                    choices[name] = found[0].volumes[target]
            scores = {name: guided(model, subject, target, volume) for name, volume in choices.items()}
            rows.append((subject.name, target, scores))
            print(*rows[-1], flush=True)
    for target in dict.fromkeys(target for _, target, _ in rows):
        own = [scores for _, its, scores in rows if its == target]
        for name in ("own truth", "own, three slices away", "same site", "stranger"):
            pairs = [(scores[name], scores["nothing"]) for scores in own if name in scores]
            gain = statistics.mean(a - b for a, b in pairs)
            p = metrics.paired_wilcoxon(*zip(*pairs, strict=True))
            print(f"{target}, {name}: {gain:+.2f} dB over {len(pairs)}, p = {p:.3f}")
    write_json(
        out / "references.json", {"rows": [{"case": case, "target": target, **scores} for case, target, scores in rows]}
    )


def rough(volume: Array, inside: npt.NDArray[np.bool_]) -> float:
    """Mean second difference of a volume (Z, Y, X) through the plane, where `inside` (Z - 2, Y, X)."""
    return float(np.abs(volume[:-2] - 2 * volume[1:-1] + volume[2:])[inside].mean())


def jitter(model: CrossConditionedModel, prepared: Path, out: Path) -> None:
    """Mean second difference through the plane within the head, over the truth's; 1 is as smooth as the truth."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for subject in subjects(prepared):
        inside = subject.head[:-2] & subject.head[1:-1] & subject.head[2:]
        for target in subject.volumes:
            sources = [m for m in subject.volumes if m != target]
            made, _ = predict_all(model, subject, sources, ["none"], Settings())
            ratios[target].append(rough(made["unguided"][target], inside) / rough(subject.volumes[target], inside))
    for target, values in ratios.items():
        print(f"{target}: {statistics.mean(values):.3f} of the truth's, {len(values)} patients")
    write_json(out / f"jitter-{model.config.context_slices}.json", ratios)


def samples(model: CrossConditionedModel, prepared: Path, counts: Sequence[int] = (1, 4, 16)) -> None:
    """Seconds of one study by number of samples, interleaved, medians of three."""
    subject = next(subjects(prepared, "TCGA-"))
    target = next(iter(subject.volumes))
    given = {m: volume for m, volume in subject.volumes.items() if m != target}
    taken: dict[int, list[float]] = defaultdict(list)
    for _ in range(3):
        for count in (0, *counts):
            settings = Settings(guidance="sample", samples=count) if count else Settings(guidance="none")
            start = time.perf_counter()
            synthesise(model, given, subject.head.sum((1, 2)).tolist(), subject.name, settings)
            taken[count].append(time.perf_counter() - start)
    for count, seconds in taken.items():
        middle = statistics.median(seconds)
        print(
            f"{subject.name}, {count} samples: {middle:.1f} s, {middle / statistics.median(taken[counts[0]]):.2f} × one"
        )


def steps(model: CrossConditionedModel, prepared: Path, out: Path) -> None:
    """PSNR over the brain of the held-out LGG patients by DDIM steps, against 50 steps, and medians of the time."""
    rows = []
    for subject in subjects(prepared, "TCGA-"):
        head = subject.head.sum((1, 2)).tolist()
        for target in subject.volumes:
            given = {m: volume for m, volume in subject.volumes.items() if m != target}
            truth = torch.from_numpy(subject.volumes[target])[None]
            for guidance, count in (("none", 0), *(("sample", count) for count in STEPS)):
                start = time.perf_counter()
                settings = Settings(guidance=guidance, steps=count or STEPS[0])
                made = synthesise(model, given, head, subject.name, settings).images
                taken = time.perf_counter() - start
                image = made[model.config.targets.index(target)][None]
                inside = torch.from_numpy(subject.head)[None]
                score = float(metrics.psnr(*metrics.scale_by_truth(image, truth), 1.0, inside))
                rows.append(
                    {
                        "case": subject.name,
                        "target": target,
                        "guidance": guidance,
                        "steps": count,
                        "psnr": score,
                        "seconds": taken,
                    }
                )
        print(subject.name, flush=True)
    kinds = list(dict.fromkeys((row["guidance"], row["steps"]) for row in rows))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    print(f"\n| guidance | steps | s | {' | '.join(targets)} |\n|---|---|---|{'---|' * len(targets)}")
    for guidance, count in kinds:
        own = [row for row in rows if (row["guidance"], row["steps"]) == (guidance, count)]
        cells = []
        for target in targets:
            scores = [row["psnr"] for row in own if row["target"] == target]
            most = [
                row["psnr"]
                for row in rows
                if (row["guidance"], row["steps"], row["target"]) == (guidance, STEPS[0], target)
            ]
            beside = ""
            if count and count != STEPS[0]:
                gain = statistics.mean(a - b for a, b in zip(scores, most, strict=True))
                beside = f" ({gain:+.3f}, p {metrics.paired_wilcoxon(scores, most):.2g})"
            cells.append(f"{statistics.mean(scores):.2f}{beside}")
        middle = statistics.median(row["seconds"] for row in own)
        print(f"| {guidance} | {count or ''} | {middle:.2f} | {' | '.join(cells)} |")
    write_json(out / "steps.json", {"rows": rows})


def spread(
    model: CrossConditionedModel, prepared: Path, target: str = "t2f", patients: int = 2, seeds: int = 4
) -> None:
    """How far samples deviate from one another within the head, by DDIM steps."""
    found: dict[int, list[float]] = defaultdict(list)
    for subject in islice(subjects(prepared, "TCGA-"), patients):
        given = {m: volume for m, volume in subject.volumes.items() if m != target}
        head, inside = subject.head.sum((1, 2)).tolist(), torch.from_numpy(subject.head)
        for count in STEPS:
            wishes = [Settings(guidance="sample", steps=count, seed=seed) for seed in range(seeds)]
            drawn = [synthesise(model, given, head, subject.name, wish, wanted=[target]).images[0] for wish in wishes]
            found[count].append(float(torch.stack(drawn).std(0)[inside].mean()))
    for count, values in found.items():
        print(f"{target}, {count} steps: samples deviate by {statistics.mean(values):.4f}, {patients} patients")


def main() -> None:
    """Answer what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/default"), help="where OUT/set is")
    parser.add_argument("--model", default=None)
    parser.add_argument("--patterns", type=Path)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--jitter", action="store_true")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--spread", action="store_true")
    options = parser.parse_args()
    if options.patterns:
        patterns(options.patterns, options.out)
    if options.reference or options.jitter or options.samples or options.steps or options.spread:
        model, prepared = load_model(find_model(options.model)), options.out / "set"
        if options.reference:
            references(model, prepared, options.out)
        if options.jitter:
            jitter(model, prepared, options.out)
        if options.samples:
            samples(model, prepared)
        if options.steps:
            steps(model, prepared, options.out)
        if options.spread:
            spread(model, prepared)


if __name__ == "__main__":
    main()
