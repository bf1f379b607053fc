"""The published task, T1 + T2 → T1ce + FLAIR, from BraTS file names, end to end, in minutes.

Trains on the `brats` and `hinet_brats18` studies but for the held-out ones, then completes a whole 240 × 240 × 155
case and checks its geometry byte by byte. These are twelve studies and a few minutes: it shows that everything works
at full size, not what quality the method reaches.

python benchmarks/published_task.py ../shared/data -o runs/published
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib

from crossmr.config import with_settings
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.display import Display
from crossmr.evaluation import evaluate, tables
from crossmr.recipes import PAPER
from crossmr.training import train

SETTINGS = {
    "crop": "192,160",
    "representation.channels": "16",
    "representation.multipliers": "1,2,3,4",
    "representation_fit.batch_size": "8",
    "representation_fit.learning_rate": "5e-4",
    "representation_fit.ema_decay": "0.99",
    "distribution.width": "256",
    "distribution.blocks": "6",
    "distribution_fit.learning_rate": "3e-4",
    "synthesis.channels": "16",
    "synthesis.multipliers": "1,2,3,4",
    "synthesis_fit.batch_size": "4",
    "synthesis_fit.learning_rate": "1e-3",
    "synthesis_fit.ema_decay": "0.99",
}
SOURCES = ("t1n", "t2w")
GEOMETRY = ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
            "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")  # fmt: skip


def main() -> None:
    """Prepare, train, evaluate, and complete one case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/published"))
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    out, display = options.out, Display()
    manifest = prepare(
        [options.data / "brats", options.data / "hinet_brats18"],
        out / "set",
        split=Split.parse("70/10/20"),
        workers=default_workers(),
        display=display,
    )
    model = train(
        out / "set",
        out / "run",
        recipe=with_settings(PAPER, SETTINGS),
        sources=SOURCES,
        targets=("t1c", "t2f"),
        twin=True,
        minutes=options.minutes,
        display=display,
    )
    result = evaluate(model, out / "set", out / "evaluation", display=display)
    display.print_tables(tables(result["summary"], intervals=display.wide))
    held_out = [
        c for c, v in manifest["cases"].items() if v["part"] == "test" and (options.data / "brats" / c).exists()
    ]
    case = held_out[0] if held_out else "BraTS-GLI-00000-000"
    display.say(f"completing {case} ({'held out' if held_out else 'trained on'}), 240 × 240 × 155, from T1 and T2")
    folder = out / "hole" / case
    folder.mkdir(parents=True, exist_ok=True)
    for modality in SOURCES:
        shutil.copy(options.data / "brats" / case / f"{case}-{modality}.nii.gz", folder)
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "from crossmr.cli import main; main()", "complete", str(folder),
         "-o", str(out / "completed"), "--model", str(model), "--overwrite"],
        check=True,
    )  # fmt: skip
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    reference = nib.load(folder / f"{case}-t1n.nii.gz")
    for target in ("t1c", "t2f"):
        image = nib.load(out / "completed" / case / f"{case}-{target}_synthetic.nii.gz")
        same = all(image.header[key].tobytes() == reference.header[key].tobytes() for key in GEOMETRY)
        display.say(f"{target}: shape {image.shape}, geometry equal bit for bit: {same}")
    display.say(f"{seconds:.1f} s from start to end of the command, peak memory of a child process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
