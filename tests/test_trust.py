"""What users must be able to rely on: nothing unpickled, no connection, stored values met by the shipped weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crossmr.completion.cohort import complete_cohort
from crossmr.data.volume import read_volume
from crossmr.networks.inference import InferenceSettings
from crossmr.phantom import write_cohort

GOLDEN = Path(__file__).with_name("golden.json")
"""Made by `python tests/test_trust.py`, when the weights or the phantom change on purpose."""
TOLERANCE = 2e-3
GUARD = """
import sys
import crossmr.completion.study, crossmr.output.report, crossmr.registry
import safetensors.torch, monai.networks, monai.inferers

def guard(event, arguments):
    if event.startswith(("socket.", "pickle.", "marshal.", "ftplib.", "http.", "urllib.")):
        if event not in ("socket.__new__", "marshal.loads"):  # an unconnected socket; Python's own compiled modules
            raise PermissionError(f"{event} {arguments}")

sys.addaudithook(guard)
from crossmr.cli import main
main()
"""


def guarded(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line where unpickling and connecting are forbidden by an audit hook of the interpreter."""
    command = [sys.executable, "-c", GUARD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return phantom(tmp_path_factory.mktemp("trust") / "cohort")


def phantom(folder: Path) -> Path:
    """One study of T1 and T2, 40 × 48 × 32 voxels."""
    form = {"shape": (40, 48, 32), "spacing_mm": (4.5, 4.5, 5.5)}
    write_cohort(folder, 1, seed=5, lesion=True, missing={0: ("t1c", "t2f")}, **form)
    return folder


def completed(cohort: Path, out: Path) -> dict[str, dict[str, float]]:
    """What the shipped weights make of it, in a few numbers a volume."""
    complete_cohort(cohort, out, None, InferenceSettings(precision="float32"))
    found = {}
    for path in sorted(out.glob("*/*.nii.gz")):
        data = read_volume(path).data
        voxels = data[8:25:8, 12:37:8, 12:29:8].ravel()
        found[path.name] = {
            "mean": float(data.mean()),
            "std": float(data.std()),
            "p99": float(np.percentile(data, 99)),
            **{f"voxel {i}": float(v) for i, v in enumerate(voxels)},
        }
    return found


def test_completing_neither_connects_nor_unpickles(cohort, tmp_path):
    result = guarded("complete", cohort, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((tmp_path / "out").glob("*/*t2f_synthetic.nii.gz"))
    result = guarded("models", "verify")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_guard_guards(tmp_path):
    for forbidden in (
        "import pickle; pickle.loads(pickle.dumps(Path))",
        "import socket; socket.create_connection(('::1', 9))",
    ):
        code = GUARD.replace("main()", "from pathlib import Path; " + forbidden)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "PermissionError" in result.stderr


def test_the_shipped_weights_give_the_stored_values(cohort, tmp_path):
    stored, found = json.loads(GOLDEN.read_text()), completed(cohort, tmp_path)
    assert stored.keys() == found.keys()
    for name, numbers in stored.items():
        assert found[name] == pytest.approx(numbers, abs=TOLERANCE), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = completed(phantom(Path(folder, "cohort")), Path(folder, "out"))
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
