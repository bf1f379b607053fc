"""Every stage on a real GPU: trained in bfloat16 for a few steps, completed, evaluated, and compared with the CPU.

Recipe 'standard' with guidance learnt last, small, on phantoms. The study that is completed on the GPU is completed on
the CPU in float32 too, unguided and guided by a sample; no voxel may differ by more than 1e-2. Ends with exit code 1
where one does, or where the whole takes more than three minutes on a GPU.

python benchmarks/gpu_smoke.py -o runs/gpu-smoke
python benchmarks/gpu_smoke.py -o runs/gpu-smoke --device cpu --tiny     # a rehearsal without a GPU
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from crossmr.completion.cohort import complete_cohort
from crossmr.config import with_settings
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.data.volume import read_volume
from crossmr.device import choose_device
from crossmr.display import Display
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.networks.inference import InferenceSettings
from crossmr.phantom import write_cohort
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

TASK = {"sources": ("t1n", "t2w"), "targets": ("t1c", "t2f")}
LARGE = {
    "shape": (160, 192, 64),
    "spacing_mm": (1.2, 1.2, 2.6),
    "crop": "160,128",
    "channels": "32",
    "batch": "24",
    "steps": 60,
}
TINY = {
    "shape": (48, 56, 40),
    "spacing_mm": (3.8, 3.8, 4.5),
    "crop": "32,32",
    "channels": "4",
    "batch": "4",
    "steps": 4,
}
TOLERANCE, SECONDS = 1e-2, 180


def memory(device: torch.device) -> str:
    """The most memory of the card since the last call."""
    if device.type != "cuda":
        return "–"
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak:.0f}"


def largest_difference(one: Path, other: Path) -> float:
    """Between all volumes of two outputs."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.nii.gz"))
    if not names:
        raise SystemExit(f"{one} holds no volume.")
    return max(float(np.abs(read_volume(one / name).data - read_volume(other / name).data).max()) for name in names)


def main() -> None:
    """Train, complete, evaluate and compare; a row of the table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/gpu-smoke"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    out, device, size, start = (
        options.out,
        choose_device(options.device),
        TINY if options.tiny else LARGE,
        time.monotonic(),
    )
    shutil.rmtree(out, ignore_errors=True)
    form = {"shape": size["shape"], "spacing_mm": size["spacing_mm"]}
    write_cohort(out / "cohort", 6, seed=1, **form)
    write_cohort(out / "incomplete", 1, seed=2, missing={0: TASK["targets"]}, **form)
    prepare(out / "cohort", out / "set", PrepareSettings(split=Split(0.5, 0.25, 0.25)))
    settings = {"guidance": "last", "crop": size["crop"], "representation.patch_size": "8", "distribution.width": "64"}
    settings |= {f"{network}.channels": size["channels"] for network in ("representation", "synthesis")}
    settings |= {f"{network}.multipliers": "1,2,3" for network in ("representation", "synthesis")}
    stages = replace(RECIPES["standard"], guidance="last").model_config(**TASK).stages
    settings |= {f"{stage}_train.batch_size": size["batch"] for stage in stages}
    recipe = with_settings(replace(RECIPES["standard"], by_set=()), settings)
    print(
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, PyTorch {torch.__version__}"
    )
    print(f"made and prepared in {time.monotonic() - start:.1f} s")
    print("\n| | s | peak memory of the card, MiB |\n|---|---|---|")

    def row(name: str, begun: float) -> None:
        print(f"| {name} | {time.monotonic() - begun:.1f} | {memory(device)} |", flush=True)

    model = out / "run" / "model"
    form = {"device": options.device, "precision": "bfloat16", "steps": size["steps"], **TASK}
    for stage in stages:
        begun = time.monotonic()
        train(out / "set", out / "run", TrainingSettings(recipe, stages=(stage,), **form), display=Display(quiet=True))
        row(f"train {stage}, {size['steps']} steps", begun)
    differences = {}
    for guidance in ("none", "sample"):
        for where, precision in ((options.device, "bfloat16"), ("cpu", "float32")):
            begun, folder = time.monotonic(), out / f"{guidance}-{precision}"
            wish = InferenceSettings(guidance=guidance, ddim_steps=10, device=where, precision=precision)
            summary = complete_cohort(out / "incomplete", folder, model, settings=wish)
            if summary.failed or not summary.completed:
                raise SystemExit(f"not completed: {summary.failed or summary.not_filled}")
            row(f"complete on {where} in {precision}, guidance {guidance}", begun)
        differences[guidance] = largest_difference(out / f"{guidance}-bfloat16", out / f"{guidance}-float32")
    begun = time.monotonic()
    wanted = EvaluationSettings(inference=InferenceSettings(device=options.device))
    result = evaluate(model, out / "set", out / "evaluation", wanted)
    row(f"evaluate {len(result['cases'])} studies", begun)
    seconds, worst = time.monotonic() - start, max(differences.values())
    shown = ", ".join(f"guidance {name} {value:.1e}" for name, value in differences.items())
    print(f"\nlargest difference to the CPU in float32: {shown} (allowed {TOLERANCE:g}); {seconds:.0f} s in all")
    if result["failed"]:
        raise SystemExit(f"failed: {result['failed']}")
    if worst > TOLERANCE or (device.type == "cuda" and seconds > SECONDS):
        raise SystemExit(f"failed: wanted at most {TOLERANCE:g} and {SECONDS} s.")


if __name__ == "__main__":
    main()
