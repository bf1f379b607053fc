"""Training on several processes: the same curve as on one, no crash at the end, and kills that lose nothing.

The curve: twelve whole studies are prepared, and recipe `tiny` is trained on them by torchrun with one process and with
two, same seed, float32. Their losses and validations are printed side by side, with the largest differences, those of
the weights, and the time.

With `--exits N`: a training of seconds on phantoms, N times on two processes; how often did torchrun report a failure?
With `--kills N`: the same, and at N random moments a random one of the processes is killed and the command given again;
in the end all weights must be, byte for byte, those of an undisturbed training on two processes.

python benchmarks/many_devices.py ../shared/data -o runs/many_devices --steps 100 --exits 20 --kills 10
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
from scans import unpacked

from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.phantom import write_cohort

STUDIES = (
    *("Brats18_2013_11_1", "Brats18_2013_20_1", "Brats18_CBICA_ABM_1", "Brats18_CBICA_AME_1", "Brats18_TCIA01_201_1"),
    *("Brats18_TCIA02_135_1", "Brats18_TCIA03_265_1", "BraTS-SSA-00007-000", "BraTS-SSA-00010-000"),
    *("BraTS-SSA-00011-000", "BraTS2021_00002", "BraTS2021_00006"),
)
TASK = ["--sources", "t1n,t2w", "--targets", "t1c,t2f", "--recipe", "tiny", "--precision", "float32"]
SECONDS = [
    f"--set={setting}"
    for setting in (
        *("crop=32,32", "representation.channels=4", "representation.multipliers=1,2", "distribution.width=16"),
        *("distribution.blocks=1", "synthesis.channels=4", "synthesis.multipliers=1,2", "guidance=last"),
        *(f"{stage}_train.batch_size=4" for stage in ("representation", "distribution", "synthesis", "guidance")),
    )
]
"""A training of seconds."""


def command(processes: int, prepared: Path, out: Path, *options: str) -> list[str]:
    """The training as it would be typed, without torchrun for one process."""
    one = [sys.executable, "-c", "from crossmr.cli import main; main()", "train", str(prepared), "-o", str(out)]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*([*several, "--no-python"] if processes > 1 else []), *one, *TASK, *options]


def run(processes: int, prepared: Path, out: Path, *options: str) -> float:
    """Train; returns the seconds of the whole command."""
    begin = time.monotonic()
    with (out.parent / f"{out.name}.txt").open("w") as said:
        subprocess.run(command(processes, prepared, out, *options), stdout=said, stderr=said, check=True)
    return time.monotonic() - begin


def weights(out: Path) -> dict[str, safetensors.torch.torch.Tensor]:
    """All tensors of a model."""
    files = sorted((out / "model").glob("*.safetensors"))
    return {f"{f.stem}.{name}": t for f in files for name, t in safetensors.torch.load_file(f).items()}


def curves(prepared: Path, out: Path, counts: list[int], options: list[str]) -> dict[str, object]:
    """The curves of so many processes side by side."""
    seconds, lines, models = {}, {}, {}
    for count in counts:
        folder = out / f"processes-{count}"
        seconds[count] = run(count, prepared, folder, *options)
        lines[count] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        models[count] = weights(folder)
    first, *others = counts
    print("| stage | step | value |", " | ".join(f"{count} process{'es' * (count > 1)}" for count in counts), "|")
    print("|---|---|---|", "---|" * len(counts), sep="")
    largest = dict.fromkeys(others, 0.0)
    for index, record in enumerate(lines[first]):
        for name in [key for key in record if key == "loss" or key.startswith("val_")]:
            values = [lines[count][index][name] for count in counts]
            for count, value in zip(others, values[1:], strict=True):
                largest[count] = max(largest[count], abs(value - values[0]) / max(abs(values[0]), 1e-3))
            if "val_loss" in record or any(key.startswith("val_corr") for key in record):
                print(f"| {record['stage']} | {record['step']} | {name} |", " | ".join(f"{v:.6f}" for v in values), "|")
    apart = {
        count: max(float((models[first][k].float() - t.float()).abs().max()) for k, t in models[count].items())
        for count in others
    }
    print("largest relative difference of a loss or validation:", {k: f"{v:.1e}" for k, v in largest.items()})
    print("largest difference of a weight:", {k: f"{v:.1e}" for k, v in apart.items()})
    pace = {
        count: sorted(line["steps_per_second"] for line in lines[count] if "steps_per_second" in line)
        for count in counts
    }
    print("steps per second, median:", {count: round(p[len(p) // 2], 2) for count, p in pace.items()})
    print("seconds of the whole command:", {count: round(s) for count, s in seconds.items()})
    return {"seconds": seconds, "losses": largest, "weights": apart}


def phantoms(out: Path) -> Path:
    """A set that is read in no time."""
    if not (out / "set" / "manifest.json").exists():
        write_cohort(out / "cohort", 6, seed=3, shape=(40, 48, 32), spacing_mm=(4.5, 4.5, 5.5))
        prepare(out / "cohort", out / "set", PrepareSettings(split=Split(0.5, 0.25, 0.25)))
    return out / "set"


def exits(prepared: Path, out: Path, times: int) -> dict[str, int]:
    """How often two processes, and torchrun, end with 0."""
    codes = []
    for number in range(times):
        with (out / f"exit-{number}.txt").open("w") as said:
            two = command(2, prepared, out / f"exit-{number}", *SECONDS, "--steps", "3")
            codes.append(subprocess.run(two, stdout=said, stderr=said, timeout=300).returncode)
    print(f"{sum(code != 0 for code in codes)} of {times} crashed")
    return {"crashed": sum(code != 0 for code in codes), "of": times}


def killed(prepared: Path, out: Path, kills: int, seed: int = 0) -> dict[str, object]:
    """Kill a random process at random moments; compare what comes of it with an undisturbed training."""
    options, rng = [*SECONDS, "--steps", "150"], random.Random(seed)
    seconds = run(2, prepared, out / "undisturbed", *options)
    os.environ["CROSSMR_SECONDS_BETWEEN_CHECKPOINTS"] = "0.5"
    took, codes, done, rounds = [], [], 0, 0
    while done < kills:
        rounds += 1
        for attempt in range(5):
            said = (out / f"killed-{rounds}-{attempt}.txt").open("w")
            torchrun = subprocess.Popen(
                command(2, prepared, out / f"killed-{rounds}", *options), stdout=said, stderr=said
            )
            if attempt == 4 or done == kills:
                if torchrun.wait(600):
                    raise SystemExit(f"{said.name}: the last attempt failed")
                break
            time.sleep(rng.uniform(0.2, 1.0) * seconds)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            if torchrun.poll() is not None or not children:
                torchrun.wait(600)
                continue
            os.kill(int(rng.choice(children)), signal.SIGKILL)
            begin, done = time.monotonic(), done + 1
            codes.append(torchrun.wait(300))
            took.append(time.monotonic() - begin)
            left = [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()]
            if codes[-1] == 0 or left:
                raise SystemExit(f"{said.name}: exit code {codes[-1]}, still running: {left}")
        first, second = weights(out / "undisturbed"), weights(out / f"killed-{rounds}")
        if not all(tensor.equal(second[name]) for name, tensor in first.items()):
            raise SystemExit(f"{out / f'killed-{rounds}'}: other weights than an undisturbed training's")
    print(f"{kills} kills in {rounds} trainings: all ended within {max(took):.0f} s, weights equal to the bit")
    return {"kills": kills, "trainings": rounds, "seconds_to_end": took}


def main() -> None:
    """Run what is asked for; leaves the numbers in many_devices.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100, help="0 leaves the curves out")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--exits", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {}
    if options.steps:
        if not (options.out / "real" / "manifest.json").exists():
            studies = unpacked(options.data, options.out / "studies", STUDIES)
            prepare(studies, options.out / "real", PrepareSettings(split=Split(0.75, 0.25, 0.0)))
        unguided = ["--steps", str(options.steps), "--set", "guidance=none"]
        found["curves"] = curves(options.out / "real", options.out, options.processes, unguided)
    if options.exits or options.kills:
        prepared = phantoms(options.out / "phantoms")
        found["exits"] = exits(prepared, options.out, options.exits)
        if options.kills:
            found["kills"] = killed(prepared, options.out, options.kills)
    (options.out / "many_devices.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
