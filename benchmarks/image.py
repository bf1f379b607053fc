"""The offline image, run as an unprivileged user without a network, with a read-only root and /tmp alone to write to.

What it may not do is tried first: reach an address, write to its root. Then `demo`, the BIDS-App on one participant of
the dataset of bids_app.py, its `group`, and the challenge's /input → /output on two whole studies that lack a contrast.

podman build -f packaging/Containerfile -t crossmr . && python benchmarks/image.py -o runs/image --image crossmr
"""

import argparse
import os
import subprocess
import time
from pathlib import Path

from bids_app import dataset, validate
from scans import unpacked

USER = 12345
CHALLENGE = {"BraTS-GLI-00027-000": "t1c", "BraTS-GLI-00028-000": "t2f"}
"""Case → the contrast that is taken away."""
REACH = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"


class Image:
    """An image, and how it is run."""

    def __init__(self, engine: str, name: str):
        self.engine, self.name = engine, name

    def run(self, what: str, *arguments: str, mounts: tuple[str, ...] = (), entry: str = "") -> None:
        """Run it and print exit code, seconds and the last line that it said."""
        limits = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "--user", f"{USER}:{USER}"]
        limits += [part for mount in mounts for part in ("-v", mount)] + (["--entrypoint", entry] if entry else [])
        start = time.perf_counter()
        ran = subprocess.run([self.engine, "run", *limits, self.name, *arguments], capture_output=True, text=True)
        last = ((ran.stdout + ran.stderr).strip().splitlines() or [""])[-1]
        print(f"{what}: exit code {ran.returncode}, {time.perf_counter() - start:.0f} s; {last}", flush=True)

    def size(self) -> float:
        """Its size in gigabytes."""
        command = [self.engine, "image", "inspect", self.name, "--format", "{{.Size}}"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9


def folder(path: Path) -> Path:
    """A folder that the container's user may write to."""
    path.mkdir(parents=True, exist_ok=True)
    os.chmod(path, 0o777)
    return path.resolve()


def challenge(data: Path, place: Path) -> Path:
    """The two studies, without the contrasts that are to be made."""
    studies = unpacked(data, place, tuple(CHALLENGE))
    for case, contrast in CHALLENGE.items():
        (studies / case / f"{case}-{contrast}.nii.gz").unlink()
    return studies.resolve()


def main() -> None:
    """Print what each run did."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("-o", "--out", type=Path, required=True)
    arguments.add_argument("--image", default="crossmr")
    arguments.add_argument("--engine", default="podman", help="podman or docker")
    arguments.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    given = arguments.parse_args()
    image = Image(given.engine, given.image)
    print(f"size: {image.size():.2f} GB")
    image.run("an address is reached", "-c", REACH, entry="python3")
    image.run("the root is written to", "-c", "open('/opt/crossmr/new', 'w')", entry="python3")
    image.run("version", "--version")
    image.run("the weights are whole", "models", "verify")
    image.run("demo", "demo", "-o", "/tmp/demo")
    raw, derivative = dataset(given.data, given.out).resolve(), folder(given.out / "derivative")
    mounts = (f"{raw}:/bids:ro", f"{derivative}:/out")
    image.run("participant", "crossmr-bids", "/bids", "/out", "participant", "--participant-label", "01", mounts=mounts)
    image.run("group", "crossmr-bids", "/bids", "/out", "group", mounts=mounts)
    print(f"derivative: validator: {dict(validate(derivative))}")
    studies, out = challenge(given.data, given.out / "input"), folder(given.out / "output")
    image.run("challenge", mounts=(f"{studies}:/input:ro", f"{out}:/output"))
    print(f"output: {sorted(path.name for path in out.iterdir())}")


if __name__ == "__main__":
    main()
