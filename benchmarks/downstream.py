r"""Does a synthesised contrast help a segmenter that was trained on real ones?

A MONAI U-Net learns the tumour from all modalities of the training patients. In the test patients the targets, each
alone and all together, are left as they are (real, the ceiling) or replaced by
  dropped      zeros: the floor
  mean         the channel's mean within the heads of training, 0 outside: a kinder floor
  linear mix   the least-squares mix of the sources and a constant, fitted within the heads of training, 0 outside
  NAME         a file's `prediction`, float16 (N, T, Y, X) in [0, 1], of all test samples in the order of load_task:
               what `ablation.py --every 1 --keep` writes
There are two segmenters: `plain` has only seen complete slices, `robust` each target zeroed in half of them. A robust
segmenter that lacks a contrast is the rival that synthesis has to beat.

Dice is of all a patient's slices together; slices that lack a modality are neither trained on nor scored. The mean over
seeds is averaged over the patients who have the region, and compared patient by patient with `dropped`, in the same
segmenter and in the robust one (Wilcoxon; p is not corrected for the many rows).

python benchmarks/ablation.py ../shared/data -o runs/kept --task cubes-2d --steps 500 --batch 16 --every 1 --seeds 0 \
    --arms longer unconditional --keep
K=runs/kept/cubes-2d/500-steps/seed-0
python benchmarks/downstream.py ../shared/data -o runs/downstream --task cubes-2d \
    --predictions published=$K/unconditional-unconditional-1.safetensors \
    --predictions crossmr=$K/longer-none-1.safetensors
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from safetensors.torch import load_file
from tasks import Samples, Steps, Task, fabric, fit_network, flipped, in_chunks, initialised, load_task
from torch import Tensor, nn

from crossmr.display import SILENT
from crossmr.metrics import bootstrap_interval, paired_wilcoxon
from crossmr.recipes import FitConfig

REGIONS = {"lgg-t1": {"WT": tuple(range(1, 256))}, "cubes-2d": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}}
"""Task → region → its labels."""
GAINS = ("gain_on_dropped", "gain_on_robust_dropped")
"""Mean difference and p of an arm against `dropped`, in its own segmenter and in the robust one."""
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all segmenters of one task share; the samples have every modality."""

    task: Task
    train: Samples
    test: Samples
    folder: Path
    runner: Fabric
    steps: int
    batch: int

    def regions(self, labels: Tensor) -> Tensor:
        """Labels (B, Y, X) to one mask a region, bool (B, R, Y, X)."""
        return torch.stack([torch.isin(labels, torch.tensor(own)) for own in REGIONS[self.task.name].values()], 1)

    def to_device(self, images: Tensor) -> Tensor:
        return images.float().to(self.runner.device).contiguous(memory_format=torch.channels_last)


class Segmenter(UNet):  # type: ignore[misc]
    """MONAI's U-Net of 400 k parameters, one logit a region."""

    def __init__(self, modalities: int, regions: int):
        # instance norm, since the averaged weights do not carry the running statistics of a batch norm
        form = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
        super().__init__(2, modalities, regions, **form, norm=("INSTANCE", {"affine": True}))

    def loss(self, images: Tensor, truth: Tensor) -> Tensor:
        """Dice + cross-entropy of images (B, M, Y, X) and masks (B, R, Y, X).

        Region by region, since the cross-entropy of several channels is a softmax's in MONAI, whatever `sigmoid` says.
        """
        criterion = DiceCELoss(sigmoid=True, batch=True)
        pairs = zip(self(images).float().unbind(1), truth.unbind(1), strict=True)
        return torch.stack([criterion(x[:, None], y[:, None]) for x, y in pairs]).mean()


def trained(bench: Bench, name: str, seed: int) -> nn.Module:
    """The segmenter `plain` or `robust`; training goes on where an earlier call stopped."""
    train, first, regions = bench.train, len(bench.task.sources), len(REGIONS[bench.task.name])

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        images = flipped(train.images[chosen], flips)
        truth = flipped(bench.regions(train.labels[chosen]), flips).float().to(bench.runner.device)
        if name == "robust":
            images[:, first:] *= torch.rand(*images[:, first:].shape[:2], 1, 1, generator=generator) < 0.5
        return network.loss(bench.to_device(images), truth)  # type: ignore[operator, no-any-return]

    config = FitConfig(batch_size=bench.batch, learning_rate=1e-3, ema_decay=0.99)
    folder, data = bench.folder / f"seed-{seed}", Steps(len(train), bench.batch, seed)
    network = initialised(seed, lambda: Segmenter(train.images.shape[1], regions), 2)
    return fit_network(bench.runner, folder, name, network, data, loss, config, bench.steps, SILENT)


def trivial(bench: Bench) -> dict[str, Tensor]:
    """The targets (N, T, Y, X) of the test slices, zeroed, as means and as a linear mix."""
    first, head = len(bench.task.sources), bench.test.head[:, None]

    def columns(samples: Samples) -> tuple[Tensor, Tensor]:
        voxels = samples.images.movedim(1, -1)[samples.head].double()
        return torch.cat([voxels[:, :first], torch.ones(len(voxels), 1)], 1), voxels[:, first:]

    x, y = columns(bench.train)
    mixed = torch.zeros_like(bench.test.images[:, first:], dtype=torch.float32)
    weights = torch.linalg.solve(x.T @ x, x.T @ y)
    mixed.movedim(1, -1)[bench.test.head] = (columns(bench.test)[0] @ weights).clamp(0, 1).float()
    means = y.mean(0).float()[:, None, None] * head
    return {"dropped": torch.zeros_like(mixed), "mean": means, "linear mix": mixed}


def read_prediction(path: Path, task: Task) -> Tensor:
    """The targets of all test samples, float32 (N, T, Y, X)."""
    found, images = load_file(path), task.test.images
    wanted = (len(images), len(task.targets), *images.shape[2:])
    prediction = found.get("prediction", torch.empty(0)).float()
    if prediction.shape != wanted or not 0 <= prediction.min() <= prediction.max() <= 1:  # nan fails too
        raise SystemExit(f"{path}: prediction is {tuple(prediction.shape)}; wanted {wanted}, clipped to [0, 1].")
    return prediction  # type: ignore[no-any-return]


def dice(predicted: Tensor, truth: Tensor, patient: Tensor, patients: int) -> tuple[Tensor, Tensor]:
    """Dice and true voxels of each patient and region, (P, R), of masks (N, R, Y, X); 1 where both are empty."""

    def voxels(masks: Tensor) -> Tensor:
        counts = masks.flatten(2).sum(-1)  # (N, R)
        return torch.zeros(patients, counts.shape[1], dtype=counts.dtype).index_add(0, patient, counts)

    both, true = voxels(predicted) + voxels(truth), voxels(truth)
    return torch.where(both > 0, 2 * voxels(predicted & truth) / both, 1.0), true


def score(bench: Bench, network: nn.Module, arms: Mapping[str, Tensor], common: Row) -> list[Row]:
    """Dice of every arm and pattern, patient by patient."""
    test, targets, first = bench.test, bench.task.targets, len(bench.task.sources)
    truth, rows = bench.regions(test.labels), list[Row]()
    patterns = {target: [index] for index, target in enumerate(targets)} | {"all": list(range(len(targets)))}
    cases: list[tuple[str, list[int], str, Tensor]] = [("none", [], "real", test.images[:, first:])]
    cases += [(*pattern, *arm) for pattern in patterns.items() for arm in arms.items()]
    for pattern, replaced, arm, prediction in cases:
        images = test.images.float()
        images[:, [first + index for index in replaced]] = prediction[:, replaced].float()
        predicted = in_chunks(bench.runner, lambda n, x=images: network(bench.to_device(x[n])), len(images)) > 0  # type: ignore[misc]
        scores, voxels = dice(predicted, truth, test.patient, len(test.names))
        for number, patient in enumerate(test.names):
            for region, value, count in zip(REGIONS[bench.task.name], scores[number], voxels[number], strict=True):
                row = {**common, "arm": arm, "pattern": pattern, "region": region, "patient": patient}
                rows.append({**row, "dice": round(float(value), 5), "truth_voxels": int(count)})
    return rows


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean Dice of each region, pattern, segmenter and arm, and its gain on `dropped`, own and robust."""
    keys = ("region", "pattern", "segmenter", "arm")
    scores: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = row["dice"] if row["truth_voxels"] else np.nan
        scores[tuple(row[key] for key in keys)][row["patient"]].append(value)
    means = {key: np.mean(list(patients.values()), axis=1) for key, patients in scores.items()}
    table = []
    for key, values in means.items():
        absent = int(np.isnan(values).sum())
        row = {**dict(zip(keys, key, strict=True)), "patients": len(values) - absent, "absent": absent}
        row |= {"dice": float(np.nanmean(values)), "interval": bootstrap_interval(values)}
        for gain, floor in zip(GAINS, (key[2], "robust"), strict=True):
            rival = means.get((*key[:2], floor, "dropped"), values)
            if rival is not values:
                row[gain] = float(np.nanmean(values - rival)), paired_wilcoxon(values, rival)
        table.append(row)
    return sorted(table, key=lambda row: (row["region"], row["pattern"]))


def flat(row: Row) -> Row:
    """A row of `summarise` as columns of numbers, four digits each."""
    columns = {key: value for key, value in row.items() if not isinstance(value, tuple)}
    columns["low"], columns["high"] = row["interval"]
    for gain in GAINS:
        columns[gain], columns[f"p_{gain}"] = row.get(gain, (None, None))
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in columns.items()}


def print_table(table: Sequence[Row]) -> None:
    """One line a row of `summarise`."""
    line = "{:7}{:9}{:10}{:16}{:4}{:9}{:22}{:19}{}".format
    print(line("region", "replaced", "segmenter", "by", "n", "lacking", "Dice [95 %]", "on dropped", "on robust's"))
    for row in table:
        names = (str(row[key]) for key in ("region", "pattern", "segmenter", "arm", "patients", "absent"))
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(row["dice"], *row["interval"])]
        cells += ["{:+.3f} p {:.1g}".format(*row[gain]) if gain in row else "" for gain in GAINS]
        print(line(*names, *cells).rstrip())


def main() -> None:
    """Train both segmenters with every seed, score every arm, and draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/downstream"))
    parser.add_argument("--task", choices=list(REGIONS), default="lgg-t1")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--predictions", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    task = load_task(options.task, options.data, options.out, SILENT)
    train, test = (part.select(part.present.amin(1) > 0) for part in (task.train, task.test))
    folder = options.out / task.name / f"{options.steps}-steps-of-{options.batch}"
    bench = Bench(task, train, test, folder, fabric(options.precision), options.steps, options.batch)
    arms = trivial(bench)
    for given in options.predictions:
        name, _, path = given.partition("=")
        if not path or name in ("", "real", *arms):
            raise SystemExit(f"--predictions {given}: wanted NAME=FILE with a name that is not taken yet.")
        arms[name] = read_prediction(Path(path), task)[task.test.present.amin(1) > 0]
    for arm, prediction in arms.items():
        error = (prediction - test.images[:, len(task.sources) :].float()).movedim(1, -1)[test.head].square().mean(0)
        print(f"{arm}:", *(f"{t} {-10 * e.log10():.1f} dB" for t, e in zip(task.targets, error, strict=True)))
    rows: list[Row] = []
    for seed in options.seeds:
        for name in ("plain", "robust"):
            network = trained(bench, name, seed)
            rows += score(bench, network, arms, {"task": task.name, "seed": seed, "segmenter": name})
    table = summarise(rows)
    for name, lines in (("dice", rows), ("table", [flat(row) for row in table])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(lines)
    found = {"settings": vars(options), "slices": [len(train), len(test)], "table": table}
    (folder / "dice.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    print_table(table)


if __name__ == "__main__":
    main()
