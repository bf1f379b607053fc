"""crossmr-bids on a BIDS version of ten whole studies: two jobs fill one derivative, then the group's report.

Eight patients with one study and one with two sessions lose one to three contrasts each. Two processes get half of the
participants each, at the same time, into one OUT; `group` writes the report; the official validator reads dataset
and derivative. Then one process does the whole dataset into another OUT: images, sidecars and names must be equal. The
dataset must be untouched.

python benchmarks/bids_app.py -o runs/bids
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from scans import unpacked

STUDIES = {
    "Brats18_2013_2_1": "sub-01",
    "Brats18_CBICA_ABM_1": "sub-02",
    "Brats18_TCIA10_639_1": "sub-03",
    "BraTS2021_01476": "sub-04",
    "BraTS-GLI-00027-000": "sub-05",
    "BraTS-SSA-00010-000": "sub-06",
    "BraTS-SSA-00026-000": "sub-07",
    "TCGA-DU-7294": "sub-08",
    "BraTSReg_002_00_0000": "sub-09_ses-1",
    "BraTSReg_002_01_0262": "sub-09_ses-2",
}
"""Case → its name in BIDS."""
ABSENT = (("t1c",), ("t2f",), ("t2w",), ("t1n",), ("t1c", "t2f"), ("t2w", "t2f"), ("t1n", "t1c", "t2w"))
"""What a study lacks, one after the other."""
ENDS = {"t1n": "T1w", "t1c": "ce-gadolinium_T1w", "t2w": "T2w", "t2f": "FLAIR"}
BIN = Path(sys.executable).parent
OF_A_RUN = ("manifest.json", "status.csv", "report.html", "private_paths.json", "crossmr.log")
"""Records that hold times, or of which run a case was."""


def dataset(data: Path, place: Path) -> Path:
    """Write the BIDS dataset; returns its folder."""
    from crossmr.data.naming import find_studies

    studies = {study.case: study for study in find_studies(unpacked(data, place / "scans", tuple(STUDIES)))}
    root = place / "raw"
    for index, (case, bids) in enumerate(STUDIES.items()):
        for modality, path in studies[case].images().items():
            if modality not in ABSENT[index % len(ABSENT)]:
                target = root.joinpath(*bids.split("_"), "anat", f"{bids}_{ENDS[modality]}.nii.gz")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
    about = {"Name": "Ten whole studies", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "README").write_text("Ten whole studies, each without one to three of its contrasts.\n" * 5)
    shutil.rmtree(place / "scans")
    return root


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder and its SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def command(*arguments: object) -> list[str]:
    """A call of crossmr-bids in a process of its own."""
    return [sys.executable, "-c", "from crossmr.bids_app import main; main()", *map(str, arguments)]


def validate(folder: Path) -> Counter[str]:
    """What the official validator says, by severity."""
    ran = subprocess.run([BIN / "bids-validator-deno", "--json", folder], capture_output=True, text=True)
    return Counter(issue["severity"] for issue in json.loads(ran.stdout)["issues"]["issues"])


def jobs(raw: Path, out: Path) -> None:
    """Half of the participants in each of two processes, at the same time, into one OUT."""
    labels = sorted(path.name for path in raw.glob("sub-*"))
    start = time.perf_counter()
    halves = [command(raw, out, "participant", "--participant-label", *labels[part::2]) for part in range(2)]
    running = [subprocess.Popen(half) for half in halves]
    codes = [job.wait() for job in running]
    print(f"participant: two jobs, exit codes {codes}, {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("-o", "--out", type=Path, required=True)
    arguments.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    given = arguments.parse_args()
    raw = given.out / "raw" if (given.out / "raw").exists() else dataset(given.data, given.out)
    before, out, alone = hashes(raw), given.out / "derivative", given.out / "alone"
    print(f"dataset: {len(list(raw.rglob('*.nii.gz')))} images; validator: {dict(validate(raw))}")
    jobs(raw, out)
    group = subprocess.run(command(raw, out, "group"), capture_output=True, text=True)
    print(f"group: exit code {group.returncode}; {group.stdout.strip()}{group.stderr.strip()}")
    print(f"derivative: {len(list(out.rglob('*_desc-synthetic_*.nii.gz')))} images; validator: {dict(validate(out))}")
    with (out / "crossmr" / "status.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"status.csv: {len(rows)} studies, {dict(Counter(row['verdict'] for row in rows))}")
    page = (out / "crossmr" / "report.html").read_text()
    print(f"report.html: names {sum(row['case'] in page for row in rows)} of them")
    start = time.perf_counter()
    code = subprocess.run(command(raw, alone, "participant")).returncode
    print(f"participant: one job, all studies, exit code {code}, {time.perf_counter() - start:.0f} s")
    one, two = ({name: h for name, h in hashes(f).items() if Path(name).name not in OF_A_RUN} for f in (alone, out))
    print(f"equal to it: {sum(two.get(name) == h for name, h in one.items())} of {len(one)} files; {len(two)} here")
    print(f"dataset untouched: {hashes(raw) == before}")


if __name__ == "__main__":
    main()
