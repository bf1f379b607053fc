"""What reads the batches of a training, beside what a GPU would eat, and on a disk far away.

On a prepared set, for the settings of recipe `any`: the processor's time for one sample, its parts, and what is opened
and read for it; the FLOPs of a training step per sample, counted by PyTorch without a GPU, and the samples per second
at which an H100 of the named rate would ask for them; the samples per second that 0 to 16 reader processes deliver
where each access to the disk takes 0, 1 or 10 ms; and a training on the processor whose batches are read ahead by a
thread, or are not. The latency is slept: three round trips for each file that is opened (look-up, attributes, header)
and one for each piece that is read (less than NFS's 1 MiB). The set is taken for one of far more cases than may stay
open, so every sample opens its files.

python benchmarks/reading.py SET -o runs/reading
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from crossmr.data.dataset import PreparedDataset
from crossmr.display import SILENT
from crossmr.networks.model import CrossConditionedModel
from crossmr.tensors import seeded
from crossmr.training import loop
from crossmr.training.batches import Batches, BatchSettings
from crossmr.training.choices import choose
from crossmr.training.memory import StepMemory
from crossmr.training.plan import Budget, Plan
from crossmr.training.recipes import ANY, TINY
from crossmr.training.shared import Compute, Training
from crossmr.training.stages import SynthesisStage

TRIPS_TO_OPEN = 3
RATES = (100e12, 300e12)
"""Operations per second of an H100 in bfloat16, whose peak is 989e12: as small convolutions, and as large ones, get."""


class Far(Batches):
    """Batches from a disk that answers after so many seconds."""

    latency = 0.0

    def _read_all(self, index: int, z: int) -> torch.Tensor:
        time.sleep(self.latency * 2 * (TRIPS_TO_OPEN + 1))
        self._mapped.pop(index, None)
        return super()._read_all(index, z)


def training_of(prepared: Path) -> tuple[Training, CrossConditionedModel]:
    """Recipe `any`, as it is for this set on a GPU."""
    dataset = PreparedDataset(prepared)
    recipe, reasons = choose(ANY, dataset.split("train"), "cuda", None)
    print(*reasons, sep="\n")
    modalities = tuple(m for m in dataset.modalities)
    config = recipe.model_config(modalities, modalities)
    compute = Compute(torch.device("cpu"), torch.float32, 0, SILENT)
    training = Training(prepared, recipe, config, dataset.split("train"), (), compute, Budget())
    return training, CrossConditionedModel(config)


def processor_time(work: Any, times: int) -> float:
    """Milliseconds of this process for one call, the first not counted."""
    work(0)
    begin = time.process_time()
    for number in range(1, times + 1):
        work(number)
    return 1e3 * (time.process_time() - begin) / times


def per_sample(training: Training, model: CrossConditionedModel, out: dict[str, Any]) -> None:
    """Times, files and bytes of one sample."""
    stage = SynthesisStage(training, model)
    batches, size = stage.data, stage.data.batch_size  # type: ignore[attr-defined]
    for case in training.train:  # so that hashes are checked, and files lie in memory
        case.images().max(), case.masks().max()
    plain = Batches(training.train, training.config.modalities, replace(_settings(training), augmentation=None))
    raw = batches[0]
    rows = {
        "read and crop": processor_time(lambda step: plain[step], 20) / size,
        "augmentation": 0.0,
        "draw": processor_time(lambda step: stage.batch(raw, seeded(step)), 20) / size,
    }
    rows["augmentation"] = processor_time(lambda step: batches[step], 20) / size - rows["read and crop"]
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    batches._mapped.clear()
    batches[30]
    distinct = len({int(i) for i in batches[30].case})
    image, labels = training.train[0].images()[0].nbytes, training.train[0].masks()[0].nbytes
    read = training.recipe.context_slices * (image + labels)
    whole = sum(path.stat().st_size for path in training.train[0].folder.glob("*.npy"))
    print("| processor, ms per sample | |", "|---|---|", sep="\n")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |")
    files = sum(name.endswith(".npy") for name in opened)
    print(f"{files} files opened for {distinct} cases in a batch of {size}, none for a case that is still mapped")
    print(f"{read / 1e6:.2f} MB read per sample; {whole / 1e6:.0f} MB once per process and case, to check its hash")
    out |= {"ms_per_sample": rows, "bytes_per_sample": read, "bytes_of_a_case": whole}


def _settings(training: Training) -> BatchSettings:
    recipe = training.recipe
    return BatchSettings(
        size=recipe.crop,
        batch_size=recipe.synthesis_train.batch_size,
        seed=0,
        lesion_draws=recipe.lesion_draws,
        context=recipe.context_slices,
        augmentation=recipe.augmentation,
    )


def eaten(training: Training, model: CrossConditionedModel, out: dict[str, Any]) -> None:
    """The FLOPs of a sample's step, and at which rate a GPU asks for samples."""
    stage = SynthesisStage(training, model)
    batch = stage.batch(stage.data[0], seeded("flops"))
    one = type(batch)(*(None if part is None else part[:2] for part in batch))
    with FlopCounterMode(display=False) as counter:
        error, _ = stage.loss(stage.network, one)
        error.backward()
    flops = counter.get_total_flops() / 2
    asked = {f"{rate / 1e12:.0f}": rate / flops for rate in RATES}
    print(f"{flops / 1e9:.1f} GFLOP per sample and step")
    for rate, samples in asked.items():
        print(f"an H100 at {rate} TFLOP/s asks for {samples:.0f} samples per second")
    out |= {"flops_per_sample": flops, "asked": asked}


def delivered(training: Training, out: dict[str, Any], samples: int) -> None:
    """Samples per second by latency and readers."""
    settings = replace(_settings(training), batch_size=8, augmentation=None)
    print("samples per second, not augmented")
    print("| ms per access |", " | ".join(f"{n} readers" for n in (0, 1, 4, 16)), "|")
    print("|---|---|---|---|---|")
    table: dict[str, dict[int, float]] = {}
    for latency in (0.0, 0.001, 0.01):
        table[f"{1e3 * latency:g}"] = row = {}
        for readers in (0, 1, 4, 16):
            data = Far(training.train, training.config.modalities, settings)
            data.latency = latency
            steps = max(
                2 * readers, samples // settings.batch_size // (10 if latency > 0.005 and readers < 4 else 1), 8
            )
            loader = iter(DataLoader(data, None, sampler=range(steps), num_workers=readers))
            next(loader)
            begin = time.monotonic()
            taken = sum(len(batch.images) for batch in loader)
            row[readers] = taken / (time.monotonic() - begin)
        print(f"| {1e3 * latency:g} |", " | ".join(f"{rate:.0f}" for rate in row.values()), "|", flush=True)
    out["samples_per_second"] = table


def ahead(training: Training, out: dict[str, Any], steps: int = 8) -> None:
    """Seconds per step on the processor, small network, where a thread reads ahead and where none does."""
    loop.step_memory = lambda *_: StepMemory(per_sample=1, fixed=0)
    config = replace(TINY, guidance="none", crop=training.recipe.crop)
    modalities = training.config.modalities
    model_config = config.model_config(modalities[:-1], modalities[-1:])
    small = replace(training, recipe=config, config=model_config)
    print("| ms per access | s per step, read in between | s per step, read ahead |", "|---|---|---|", sep="\n")
    table = {}
    for latency in (0.0, 0.001, 0.01):
        paces: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(3):
            for readers, measured in paces.items():  # in turns: other programs disturb both
                stage = SynthesisStage(small, CrossConditionedModel(model_config))
                stage.data = Far(small.train, modalities, replace(_settings(training), batch_size=8))
                stage.data.latency, stage.readers = latency, readers
                with tempfile.TemporaryDirectory() as folder:
                    trainer = loop.Trainer(
                        Path(folder), stage, config.train_config("synthesis"), small.compute, Budget()
                    )
                    trainer.train(Plan(((0, 1),), validations=0))
                    begin = time.monotonic()
                    trainer.train(Plan(((0, 1 + steps),), validations=0))
                    measured.append((time.monotonic() - begin) / steps)
        row = [sorted(measured)[1] for measured in paces.values()]
        table[f"{1e3 * latency:g}"] = row
        print(f"| {1e3 * latency:g} | {row[0]:.3f} | {row[1]:.3f} |", flush=True)
    out["seconds_per_step"] = table


def main() -> None:
    """Measure a set; leaves the numbers in reading.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, help="a set that 'crossmr prepare' wrote")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=400, help="of each measured rate; 0 leaves these out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    training, model = training_of(options.prepared)
    eaten(training, model, found)
    per_sample(training, model, found)
    if options.samples:
        delivered(training, found, options.samples)
    ahead(training, found)
    (options.out / "reading.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
