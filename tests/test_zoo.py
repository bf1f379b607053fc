"""A zoo of broken inputs, one row a kind: each is refused in one line, and leaves nothing half-written behind.

PATIENTS lie in one folder with a healthy one, which every verb must finish. CALLS are broken as a whole.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dicoms
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHAPE, image, make_head, save_untrained, write_study
from safetensors.torch import load, save

from crossmr.cli import main
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.files import PARTIAL, digest
from crossmr.networks.model import FORMAT_VERSION

AFFINE = np.diag([6.0, 6.0, 7.0, 1.0])
HEALTHY = "zz-healthy"
"""The last of its folder, so that it comes after every failure."""
ADVICE = re.compile(
    r"(?:^|: |, (?:and|or|so) )(?:add|check|choose|compare|complete|convert|copy|correct|did you mean|do not use|"
    r"download|export|fetch|give|keep|leave|look|make|measure|name|narrow|prepare|register|rename|repair|resample|run|split|"
    r"stack|threshold|train|unpack|update|use)\b|use recipe 'any'|\bexpected |"
    r"^(?:it has|it may be|it was trained for|settings look like|the models are|these are)\b|"
    r"(?:are positive|are counts of at least 1|have only: \w+)\.$",
    re.IGNORECASE,
)
"""How the last clause of a message says what to do: a verb first; or what was expected, or what there is."""


def advises(message: str) -> bool:
    """Whether it ends with what to do, whatever is quoted in brackets before."""
    told = re.sub(r"\([^()]*\)", "", message.removeprefix("crossmr: "))
    return bool(ADVICE.search(re.split(r"[.;] ", told)[-1]))


@dataclass(frozen=True)
class Result:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it complained of."""
        return [line for line in self.err.splitlines() if line.strip()]


STREAMS = ("strict", "backslashreplace")
"""What Python's stdout and stderr do with what they cannot encode."""


def crossmr(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", how, write_through=True) for how in STREAMS)
    before = sys.argv
    sys.argv = ["crossmr", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main()
    finally:
        sys.argv = before
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return Result(int(stopped.value.code or 0), said, complained)


def leftovers(folder: Path) -> list[str]:
    """Files of an output that only a write that was cut short leaves."""
    return [str(p) for p in folder.rglob("*") if p.name.endswith((PARTIAL, ".tmp")) or p.name.startswith(".import")]


# ------------------------------------------------------------------------------------- one patient's files

Spoil = Callable[[Path], object]
"""Breaks a study's folder, which holds CASE-t1n.nii.gz and CASE-t2w.nii.gz."""


def t1(study: Path) -> Path:
    return study / f"{study.name}-t1n.nii.gz"


def nifti(**fields: Any) -> Spoil:
    """Other header fields, written over the old ones; a dict replaces some of a field's items."""

    def spoil(study: Path) -> None:
        content = bytearray(gzip.decompress(t1(study).read_bytes()))
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in fields.items():
            for index, item in value.items() if isinstance(value, dict) else [((), value)]:
                header[name][index] = item
        t1(study).write_bytes(gzip.compress(header.binaryblock + content[348:], 1))

    return spoil


def bytes_of(change: Callable[[bytes], bytes]) -> Spoil:
    """Other bytes in T1's file."""
    return lambda study: t1(study).write_bytes(change(t1(study).read_bytes()))


def voxels(change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray = AFFINE, description: str = "") -> Spoil:
    """Another T1 image."""
    return lambda study: nib.save(image(change(make_head()), affine, description), t1(study))


def beside(name: str, data: np.ndarray, affine: np.ndarray = AFFINE) -> Spoil:
    """Another file in the study's folder, CASE-NAME."""
    return lambda study: nib.save(image(data, affine), study / f"{study.name}{name}")


def where(value: float, voxel: tuple[int, int, int] = (3, 4, 5)) -> Callable[[np.ndarray], np.ndarray]:
    """One voxel of this value."""

    def change(data: np.ndarray) -> np.ndarray:
        data[voxel] = value
        return data

    return change


def one_voxel(data: np.ndarray) -> np.ndarray:
    lonely = np.zeros_like(data)
    lonely[14, 16, 12] = 100
    return lonely


def pair(study: Path) -> None:
    """The header of a .hdr/.img pair under T1's name."""
    nifti(magic=b"ni1")(study)


def two_slices(study: Path) -> None:
    for path in study.iterdir():
        image = nib.load(path)
        nib.save(image.slicer[:, :, 11:13], path)


def lonely(study: Path) -> None:
    """T1 is all there is, and a single bright voxel is all of it."""
    voxels(one_voxel)(study)
    (study / f"{study.name}-t2w.nii.gz").unlink()


def renamed(new: str) -> Spoil:
    return lambda study: [p.rename(p.with_name(f"{study.name}-{new}{i}.nii.gz")) for i, p in enumerate(study.iterdir())]


def swollen(study: Path) -> None:
    """Unpacks to far more than its header announces."""
    content = gzip.decompress(t1(study).read_bytes())
    t1(study).write_bytes(gzip.compress(content, 1)[:-8] + b"\0" * 8)


def dangling(study: Path) -> None:
    t1(study).unlink()
    t1(study).symlink_to(study / "gone.nii.gz")


TURNED = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE
SHIFTED = AFFINE + np.array([[0, 0, 0, 2.5]] + [[0] * 4] * 3)
COLOUR = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
INVERSE = r"affine has no inverse: .* Correct its header"
GRID = r"Register and resample them to one grid first, or pass --register"
GZIP = r"gzip data is truncated or damaged \(.*\)\. Copy the file again"
BROKEN = r"has a broken NIfTI header \(.*\)\. Export it again"
SPACING = r"spacing is .* mm, expected positive numbers\. Correct its header"
INFINITE = r"t1n has 1 voxels that are NaN or infinite\. Repair them"
NAN = r"t1n has 1 voxels within the head that are NaN\. Repair them"
NO_SCAN = r"no acquired volume to work from.*name them with --map"

PATIENTS: list[tuple[str, Spoil, str]] = [
    # the file
    ("empty file", bytes_of(lambda _: b""), r"is empty \(0 bytes\)"),
    ("one byte", bytes_of(lambda _: b"\x1f"), r"is not a NIfTI file.*Convert it"),
    ("text", bytes_of(lambda _: b"<html>404 Not Found</html>" * 40), r"is a web page, not a volume"),
    ("gzipped text", bytes_of(lambda _: gzip.compress(b"no image" * 400)), r"is not a NIfTI file.*Convert it"),
    (
        "DICOM under NIfTI's name",
        bytes_of(lambda _: bytes(128) + b"DICM" * 99),
        r"is DICOM, not NIfTI. Convert its folder",
    ),
    ("gzip cut in the middle", bytes_of(lambda b: b[: len(b) // 2]), GZIP),
    ("gzip cut in the header", bytes_of(lambda b: b[:60]), GZIP),
    ("gzip without its end", bytes_of(lambda b: b[:-4]), GZIP),
    ("gzip with a flipped bit", bytes_of(lambda b: b[:9000] + bytes([b[9000] ^ 16]) + b[9001:]), GZIP),
    ("gzip with another checksum", swollen, GZIP),
    ("gzip twice", bytes_of(gzip.compress), r"is not a NIfTI file.*Convert it"),
    ("plain cut short", bytes_of(lambda b: gzip.decompress(b)[:-9]), r"is truncated: \d+ bytes, but.*Copy the file"),
    ("unpacked too short", bytes_of(lambda b: gzip.compress(gzip.decompress(b)[:-9])), r"truncated: \d+ bytes once"),
    ("header alone", bytes_of(lambda b: gzip.decompress(b)[:352]), r"is truncated: 352 bytes.*Copy the file again"),
    ("dangling link", dangling, r"t1n\.nii\.gz: is a link to a file that is not there"),
    # the header
    ("hdr of a pair", pair, r"header of a \.hdr/\.img pair.*convert it"),
    ("wrong magic", nifti(magic=b"abc"), r"header of a \.hdr/\.img pair.*convert it|is not a NIfTI file"),
    ("2D", voxels(lambda d: d[:, :, 12]), r"is 2D \(28×32\), expected a 3D volume\. Stack its slices"),
    ("1D", voxels(lambda d: d[:, 0, 0]), r"is 1D \(28\), expected a 3D volume"),
    ("4D", voxels(lambda d: np.stack([d, d], -1)), r"28×32×24×2: 2 volumes, expected one\. Split it"),
    ("5D", voxels(lambda d: np.stack([d] * 3, -1)[:, :, :, None]), r"28×32×24×1×3: 3 volumes, expected one\. Split it"),
    ("side of zero", nifti(dim={2: 0}), r"it has no voxels\. Export it again"),
    ("side below zero", nifti(dim={1: -28}), r"it has no voxels\. Export it again|" + BROKEN),
    ("no dimensions", nifti(dim={0: 0}), r"is 1D \(0\), expected a 3D volume\. Stack its slices"),
    ("nine dimensions", nifti(dim={0: 9}), BROKEN + r"|is not a NIfTI file"),
    (
        "huge sides",
        nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        r"is truncated: .*Copy the file again|needs about \d+\.\d GB of memory",
    ),
    ("other sides", nifti(dim={3: 25}), r"is truncated: .*Copy the file again"),
    ("unknown datatype", nifti(datatype=7777), BROKEN),
    ("datatype and bits disagree", nifti(datatype=64, bitpix=64), r"is truncated: .*Copy the file again"),
    ("complex", voxels(lambda d: d.astype(np.complex64)), r"voxels are complex, expected one real number"),
    ("RGB", voxels(lambda _: COLOUR), r"voxels are RGB, expected one real number"),
    ("spacing NaN", nifti(pixdim={1: np.nan}), SPACING),
    ("spacing infinite", nifti(pixdim={2: np.inf}), SPACING),
    ("spacing zero", nifti(pixdim={3: 0}), SPACING),
    ("affine singular", nifti(srow_y=[0, 0, 0, 0]), INVERSE),
    ("affine flat", nifti(srow_z=[6, 6, 0, 0]), INVERSE),
    ("affine NaN", nifti(srow_x={0: np.nan}), INVERSE),
    ("affine infinite", nifti(srow_x={3: np.inf}), INVERSE),
    ("affine absurd", nifti(srow_x={0: 1e30}), INVERSE),
    ("quaternion too long", nifti(sform_code=0, qform_code=1, quatern_b=2), r"its qform makes no sense.*Correct"),
    ("quaternion NaN", nifti(sform_code=0, qform_code=1, quatern_c=np.nan), r"its qform makes no sense|" + INVERSE),
    ("origin NaN", nifti(sform_code=0, qform_code=1, qoffset_x=np.nan), INVERSE),
    ("offset negative", nifti(vox_offset=-1e6), r"vox_offset|" + BROKEN),
    ("offset absurd", nifti(vox_offset=1e30), r"is truncated: .*Copy the file again"),
    ("offset NaN", nifti(vox_offset=np.nan), BROKEN),
    ("offset beyond the end", nifti(vox_offset=1e5), r"is truncated: .*Copy the file again"),
    ("slope with a bad intercept", nifti(scl_slope=2, scl_inter=np.nan), BROKEN),
    ("slope that overflows", nifti(scl_slope=1e38), r"NaN or infinite\. Repair them"),
    # the intensities
    ("all zero", voxels(np.zeros_like), r"t1n is all zero: it holds no image\. Export it again"),
    ("constant", voxels(lambda d: np.full_like(d, 7)), r"t1n is constant at 7: it holds no image"),
    ("constant below zero", voxels(lambda d: np.full_like(d, -3)), r"t1n is constant at -3: it holds no image"),
    ("constant by its slope", nifti(scl_slope=1e-45, scl_inter=5), r"t1n is constant at 5: it holds no image"),
    ("a NaN", voxels(where(np.nan, (14, 16, 12))), NAN),
    ("an infinity", voxels(where(-np.inf)), INFINITE),
    ("beyond float32", voxels(lambda d: where(1e300)(d.astype(np.float64))), INFINITE),
    ("beyond all scans", voxels(where(-3e38)), r"t1n has intensities of 3e\+38, as no scan has\. Repair them"),
    ("all NaN", voxels(lambda d: np.full_like(d, np.nan)), r"voxels that are NaN or infinite\. Repair them"),
    ("two slices", two_slices, r"28×32×2; a side has 2 of the at least 3 voxels.*Give the whole volumes"),
    ("head of one voxel", lonely, r"no head was found \(0 voxels.*Look at the volumes"),
    ("too small", voxels(lambda d: d[:4, :4]), r"t1n is 4×4×24 .* too small to be a scan.*Export the whole series"),
    ("one row", voxels(lambda d: d[:1, :1]), r"too small to be a scan of a head\. Export the whole series"),
    # the grids
    ("fewer voxels", voxels(lambda d: d[:, 1:]), r"t2w is 28×32×24 .*but t1n is 28×31×24.*" + GRID),
    ("other spacing", voxels(lambda d: d, np.diag([6, 6, 3.5, 1])), r"t1n is 28×32×24 at 6×6×3\.5 mm.*" + GRID),
    ("shifted", voxels(lambda d: d, SHIFTED), r"placed elsewhere \(by up to 2\.5 mm\).*" + GRID),
    ("turned", voxels(lambda d: d, TURNED), r"placed elsewhere.*" + GRID),
    ("left and right exchanged", voxels(lambda d: d, AFFINE @ np.diag([-1, 1, 1, 1])), r"placed elsewhere.*" + GRID),
    # the names
    ("two T1 in two spellings", beside("_T1w.nii.gz", make_head()), r"2 files claim to be t1n: .* Keep one of them"),
    ("plain and gzipped", beside("-t1n.nii", make_head()), r"2 files claim to be t1n: .* Keep one of them"),
    ("nothing recognised", renamed("scan"), NO_SCAN),
    ("unknown modalities", renamed("swi"), NO_SCAN),
]

LABELS: list[tuple[str, Spoil, str]] = [
    (
        "labelled twice",
        lambda s: [beside(f"-{n}.nii.gz", np.ones(SHAPE, "u1"))(s) for n in ("seg", "mask")],
        r"2 files claim",
    ),
    ("label of fractions", beside("-seg.nii.gz", np.full(SHAPE, 0.3, "f4")), r"is not a segmentation: .* Threshold"),
    ("label below zero", beside("-seg.nii.gz", np.full(SHAPE, -1, "i2")), r"is not a segmentation: .* Threshold"),
    ("label with NaN", beside("-seg.nii.gz", np.full(SHAPE, np.nan, "f4")), r"is not a segmentation: .* Threshold"),
    ("label on another grid", beside("-seg.nii.gz", np.ones((28, 32, 23), "u1")), r"Resample the segmentation"),
    ("label elsewhere", beside("-seg.nii.gz", np.ones(SHAPE, "u1"), SHIFTED), r"2\.5 mm elsewhere\. Resample"),
    ("label that is text", lambda s: (s / f"{s.name}-seg.nii.gz").write_text("text"), r"seg\.nii\.gz: is not a NIfTI"),
]
"""Segmentations that 'prepare' refuses; 'complete' reads none."""


def case_of(kind: str) -> str:
    return re.sub(r"\W+", "-", kind)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """T1 + T2 → T1ce + FLAIR, learnt nothing."""
    return save_untrained(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """A cohort of every broken patient, and a healthy one."""
    folder = tmp_path_factory.mktemp("patients")
    for kind, spoil, _ in PATIENTS + LABELS:
        spoil(write_study(folder, case_of(kind), ("t1n", "t2w")))
    write_study(folder, HEALTHY, ("t1n", "t2w"))
    return folder


@pytest.fixture(scope="module")
def runs(patients, model, tmp_path_factory) -> dict[str, tuple[Result, Path]]:
    """What 'complete' and 'prepare' made of that cohort."""
    out = tmp_path_factory.mktemp("out")
    return {
        "complete": (
            crossmr("complete", patients, "-o", out / "complete", "--model", model, "--ddim-steps", 2),
            out / "complete",
        ),
        "prepare": (crossmr("prepare", patients, "-o", out / "prepare", "--workers", 1), out / "prepare"),
    }


def test_the_names_in_the_zoo_are_unique():
    cases = [case_of(kind) for kind, _, _ in PATIENTS + LABELS]
    assert len(set(cases)) == len(cases)
    assert len({kind.name for kind in CALLS}) == len(CALLS)
    assert len(PATIENTS + LABELS) + len(CALLS) >= 70


@pytest.mark.parametrize(
    ("advice", "message"),
    [
        (True, "t1n is all zero: it holds no image. Export it again, or remove the file."),
        (True, "'bogus' is not a split of a prepared dataset; expected one of train, val, test."),
        (False, "t1n is all zero: it holds no image to use, and no name."),
        (False, "images.npy is damaged at least (EOF: expected 8 bytes. Copy it)."),
        (False, "Copy it again. It could not be used."),
    ],
)
def test_advice_is_known_by_its_place_not_by_a_word(advice, message):
    assert advises(message) == advice


REFUSED = [("complete", *one) for one in PATIENTS] + [("prepare", *one) for one in PATIENTS + LABELS]


@pytest.mark.parametrize(("verb", "kind", "_", "message"), REFUSED, ids=[f"{case_of(r[1])}-{r[0]}" for r in REFUSED])
def test_a_broken_patient(runs, verb, kind, _, message):
    result, out = runs[verb]
    case = case_of(kind)
    about = [line for line in result.lines if line.startswith(f"{case} ")]
    assert len(about) == 1, about
    said = about[0].split(": ", 1)[1]
    assert case in said, "it does not say where"
    assert re.search(message, said), said
    assert advises(said), said
    assert not (out / case).exists()
    assert not (out / "cases" / case).exists()
    assert not list(out.rglob(f"{case}*"))


@pytest.mark.parametrize("verb", ["complete", "prepare"])
def test_the_healthy_patient_is_finished(runs, verb):
    result, out = runs[verb]
    assert result.code == 1
    assert "Traceback" not in result.err + result.out
    assert len(result.lines) == sum(of == verb for of, *_ in REFUSED)
    assert not leftovers(out)
    manifest = json.loads((out / "manifest.json").read_bytes())
    if verb == "complete":
        assert sorted(manifest["completed"]) == sorted([*(case_of(kind) for kind, _, _ in LABELS), HEALTHY])
        assert sorted(manifest["failed"]) == sorted(case_of(kind) for kind, _, _ in PATIENTS)
        wanted = [f"{HEALTHY}-{modality}_synthetic.nii.gz" for modality in ("t1c", "t2f")]
        assert sorted(p.name for p in (out / HEALTHY).iterdir()) == ["manifest.json", *wanted]
    else:
        assert list(manifest["cases"]) == [HEALTHY]
        assert [p.name for p in (out / "cases").iterdir()] == [HEALTHY]


# --------------------------------------------------------------------------------------- the call as a whole


class Marker:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass(frozen=True)
class Bench:
    """A folder of its own, and copies of what is to be broken."""

    folder: Path
    model_folder: Path
    set_folder: Path
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        """Where the verb writes."""
        return self.folder / "out"

    @property
    def marker(self) -> Path:
        """Exists when something was unpickled."""
        return self.folder / "unpickled"

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a folder, to break."""
        return Path(shutil.copytree(source, self.folder / name))

    def model(self) -> Path:
        """A whole model."""
        return self.copy(self.model_folder, "model")

    def set(self) -> Path:
        """A whole set."""
        return self.copy(self.set_folder, "set")

    def cohort(self) -> Path:
        """Two patients who lack T1ce and FLAIR."""
        for case in ("P1", HEALTHY):
            write_study(self.folder / "cohort", case, ("t1n", "t2w"))
        return self.folder / "cohort"

    def complete(self, *options: object, cohort: Path | None = None, model: object = None) -> list[object]:
        """The verb, on the cohort unless another one is given."""
        chosen = self.model_folder if model is None else model
        return ["complete", cohort or self.cohort(), "-o", self.out, "--model", chosen, "--ddim-steps", 2, *options]

    def train(self, *options: object, prepared: Path | None = None) -> list[object]:
        """The verb, as short as it gets."""
        sizes = [f"--set={stage}.channels=4" for stage in ("representation", "synthesis")]
        return [
            "train",
            prepared or self.set_folder,
            "-o",
            self.out,
            "--recipe",
            "tiny",
            "--device",
            "cpu",
            *sizes,
            *options,
        ]

    def evaluate(self, *options: object, data: Path | None = None) -> list[object]:
        """The verb."""
        return ["evaluate", self.model_folder, data or self.set_folder, "-o", self.out, "--ddim-steps", 2, *options]


Build = Callable[[Bench], Sequence[object]]


@dataclass(frozen=True)
class Kind:
    """One way for a call to be broken."""

    name: str
    build: Build
    """Breaks something; returns the arguments of the command line."""
    message: str
    left: str = "nothing"
    """What becomes of OUT: 'nothing', it is 'begun' without any result, the 'healthy' patient is finished in it, …"""
    code: int = 1


def sign(folder: Path, **changes: Any) -> Path:
    """Make a model's hashes true again, so that only what it holds tells; `changes` are config.json's own."""
    body = {**json.loads((folder / "config.json").read_text()), **changes}
    body.pop("sha256")
    body["files"] = {p.name: digest(p.read_bytes()) for p in sorted(folder.glob("*.safetensors"))} | (
        changes.get("files") or {}
    )
    (folder / "config.json").write_text(json.dumps({**body, "sha256": digest(body)}))
    return folder


def model_text(content: str) -> Build:
    """config.json holds this."""

    def build(bench: Bench) -> Sequence[object]:
        (model := bench.model()).joinpath("config.json").write_text(content)
        return bench.complete(model=model)

    return build


def config(path: str, value: Any) -> Build:
    """One entry of config.json is another, and its hash is true."""

    def build(bench: Bench) -> Sequence[object]:
        model = bench.model()
        body = json.loads((model / "config.json").read_text())
        *parents, last = path.split(".")
        node = body
        for part in parents:
            node = node[part]
        node[last] = value
        return bench.complete(model=sign(model, **body))

    return build


def weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = "synthesis") -> Build:
    """Other tensors in a file of weights, whose hash is true."""

    def build(bench: Bench) -> Sequence[object]:
        path = (model := bench.model()) / f"{name}.safetensors"
        tensors = load(path.read_bytes()) if path.exists() else {}
        change(tensors)
        path.write_bytes(save(tensors))
        return bench.complete(model=sign(model))

    return build


def raw_weights(change: Callable[[bytes], bytes], *, signed: bool = True) -> Build:
    """Other bytes in a file of weights."""

    def build(bench: Bench) -> Sequence[object]:
        path = (model := bench.model()) / "synthesis.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return bench.complete(model=sign(model) if signed else model)

    return build


def head_of(**tensor: Any) -> bytes:
    """A file of weights of one tensor."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def pickled(bench: Bench) -> Sequence[object]:
    model = bench.model()
    (model / "synthesis.safetensors").write_bytes(pickle.dumps(Marker(bench.marker)))
    return bench.complete(model=sign(model))


def torch_saved(bench: Bench) -> Sequence[object]:
    model = bench.model()
    torch.save({"x": Marker(bench.marker)}, model / "synthesis.safetensors")
    return bench.complete(model=sign(model))


def without_weights(bench: Bench) -> Sequence[object]:
    model = bench.model()
    (model / "distribution.safetensors").unlink()
    return bench.complete(model=model)


def network_left_out(bench: Bench) -> Sequence[object]:
    model = bench.model()
    (model / "distribution.safetensors").unlink()
    return bench.complete(model=sign(model))


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def any_subset(bench: Bench) -> Path:
    """A model whose baselines are looked at before anything is filled."""
    both = ("t1n", "t1c", "t2w", "t2f")
    return save_untrained(bench.folder / "any", guidance="last", sources=both, targets=both)


def baselines_of(**tensors: torch.Tensor) -> Build:
    def build(bench: Bench) -> Sequence[object]:
        model = any_subset(bench)
        (model / "baselines.safetensors").write_bytes(save(tensors))
        return bench.complete(model=sign(model))

    return build


def imported(
    pack: Callable[[Bench, zipfile.ZipFile], object], change: Callable[[bytes], bytes] = bytes, *options: str
) -> Build:
    """`models import` of a zip that `pack` fills, and whose bytes are changed."""

    def build(bench: Bench) -> Sequence[object]:
        path = bench.folder / "mine.zip"
        with zipfile.ZipFile(path, "w") as archive:
            pack(bench, archive)
        path.write_bytes(change(path.read_bytes()))
        return ["models", "import", path, *options]

    return build


def whole(bench: Bench, archive: zipfile.ZipFile, compression: int = zipfile.ZIP_STORED) -> None:
    for path in sorted(bench.model_folder.iterdir()):
        archive.writestr(path.name, path.read_bytes(), compression)


def entry(name: str) -> Callable[[Bench, zipfile.ZipFile], None]:
    """A whole model, and something called so."""

    def pack(bench: Bench, archive: zipfile.ZipFile) -> None:
        whole(bench, archive)
        archive.writestr(name, b"content")

    return pack


def link(bench: Bench, archive: zipfile.ZipFile) -> None:
    """A link to the outside in the place of weights."""
    for path in sorted(bench.model_folder.iterdir()):
        info = zipfile.ZipInfo(path.name)
        if path.name == "synthesis.safetensors":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(path) if info.external_attr else path.read_bytes())


def compressed(kind: int) -> Callable[[Bench, zipfile.ZipFile], None]:
    return lambda bench, archive: whole(bench, archive, kind)


def damaged(content: bytes) -> bytes:
    return content[:200] + bytes(b ^ 0x5A for b in content[200:300]) + content[300:]


def announced(size: int) -> Callable[[bytes], bytes]:
    """The table at the zip's end says that the first file unpacks to so many bytes."""

    def change(content: bytes) -> bytes:
        at = content.index(b"PK\x01\x02") + 24
        return content[:at] + size.to_bytes(4, "little") + content[at + 4 :]

    return change


def not_unicode(content: bytes) -> bytes:
    """The name of the first file is marked as UTF-8, and is none."""
    at = content.index(b"PK\x01\x02")
    content = content[: at + 8] + b"\0\x08" + content[at + 10 :]
    return content[: at + 46] + b"\xff" + content[at + 47 :]


def set_text(name: str, content: str) -> Build:
    def build(bench: Bench) -> Sequence[object]:
        (prepared := bench.set()).joinpath(name).write_text(content)
        return bench.train("--steps", 1, prepared=prepared)

    return build


def set_entry(change: Callable[[dict[str, Any]], object]) -> Build:
    """Another manifest, whose hash is true."""

    def build(bench: Bench) -> Sequence[object]:
        path = (prepared := bench.set()) / "manifest.json"
        body = json.loads(path.read_text())
        body.pop("sha256")
        change(body)
        path.write_text(json.dumps({**body, "sha256": digest(body)}))
        return bench.train("--steps", 1, prepared=prepared)

    return build


def arrays(change: Callable[[Bench, Path], object], verb: str = "train") -> Build:
    """Every images.npy is changed."""

    def build(bench: Bench) -> Sequence[object]:
        for path in sorted((prepared := bench.set()).glob("cases/*/images.npy")):
            change(bench, path)
        return bench.train("--steps", 1, prepared=prepared) if verb == "train" else bench.evaluate(data=prepared)

    return build


def pickled_array(bench: Bench, path: Path) -> None:
    np.save(path, np.array([Marker(bench.marker)], dtype=object), allow_pickle=True)


def emptied(part: str) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        for case in body["cases"].values():
            case["part"] = "train" if part != "train" else "test"

    return change


def failing(number: int, where: str, *, at: str = "replace", times: int = 1_000_000) -> Callable[[Bench], None]:
    """The lowest-level write of files called so fails, as on a full or read-only disk: the first times, or always."""
    real = {name: getattr(os, name) for name in ("replace", "fsync")}

    def fail(bench: Bench) -> None:
        failed: list[str] = []

        def act(*arguments: Any, **others: Any) -> Any:
            name = str(arguments[1]) if at == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            if re.search(where, name) and len(failed) < times:
                failed.append(name)
                raise OSError(number, os.strerror(number), name)
            return real[at](*arguments, **others)

        bench.patch.setattr(os, at, act)

    return fail


def scanned_disk(fail: Callable[[Bench], None]) -> Build:
    def build(bench: Bench) -> Sequence[object]:
        cohort = dicom_cohort(bench)
        fail(bench)
        return bench.complete(cohort=cohort)

    return build


def half_evaluated(bench: Bench) -> Sequence[object]:
    """P1's T1 is all zero, the other is whole."""
    whole = ("t1n", "t1c", "t2w", "t2f")
    write_study(bench.folder / "whole", "P1", whole, replace={"t1n": np.zeros(SHAPE, np.float32)})
    write_study(bench.folder / "whole", HEALTHY, whole)
    return bench.evaluate(data=bench.folder / "whole")


def twice(bench: Bench) -> Sequence[object]:
    return ["prepare", bench.cohort(), bench.copy(bench.folder / "cohort", "again"), "-o", bench.out, "--workers", 1]


def broken_disk(fail: Callable[[Bench], None], verb: str = "complete") -> Build:
    def build(bench: Bench) -> Sequence[object]:
        arguments = {
            "complete": bench.complete,
            "prepare": lambda: ["prepare", bench.cohort(), "-o", bench.out, "--workers", 1],
            "train": lambda: bench.train("--steps", 1),
            "evaluate": bench.evaluate,
            "export": lambda: ["models", "export", bench.model_folder, bench.out / "m.zip"],
            "import": lambda: ["models", "import", bench.model_folder, "--name", "mine"],
        }[verb]()
        fail(bench)
        return arguments

    return build


def with_file(place: str, content: str, build: Build) -> Build:
    """A file lies there before."""

    def made(bench: Bench) -> Sequence[object]:
        path = bench.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return build(bench)

    return made


def without_permission(bench: Bench) -> Sequence[object]:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    bench.out.mkdir(mode=0o555)
    return bench.complete()


def plain(*options: object) -> Build:
    return lambda bench: bench.complete(*options)


def training(*options: object) -> Build:
    return lambda bench: bench.train(*options)


def evaluating(*options: object) -> Build:
    return lambda bench: bench.evaluate(*options)


def preparing(*options: object) -> Build:
    return lambda bench: ["prepare", bench.cohort(), "-o", bench.out, "--workers", 1, *options]


def emptied_folder(verb: str) -> Build:
    def build(bench: Bench) -> Sequence[object]:
        (empty := bench.folder / "empty").mkdir()
        return [verb, empty, "-o", bench.out, *(["--model", bench.model_folder] if verb == "complete" else [])]

    return build


def text_only(bench: Bench) -> Sequence[object]:
    bench.folder.joinpath("texts").mkdir()
    bench.folder.joinpath("texts", "readme.txt").write_text("no scans")
    return bench.complete(cohort=bench.folder / "texts")


def bids_derivatives(bench: Bench) -> Sequence[object]:
    """A BIDS dataset that holds derivatives alone."""
    root = bench.folder / "bids"
    write_study(root / "derivatives" / "somebody", "sub-01", ("t1n",))
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return bench.complete(cohort=root)


def bids_synthetic(bench: Bench) -> Sequence[object]:
    """A BIDS derivative of our own, and nothing acquired."""
    folder = bench.folder / "bids" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    nib.save(image(make_head(), AFFINE, "SYNTHETIC"), folder / "sub-01_desc-synthetic_T1w.nii.gz")
    return bench.complete(cohort=bench.folder / "bids")


def bids_unnamed(bench: Bench) -> Sequence[object]:
    model = save_untrained(bench.folder / "swi", targets=("swi",))
    return bench.complete("--profile", "bids", model=model, cohort=write_study(bench.folder, "P1", ("t1n", "t2w")))


def unguided(*options: object) -> Build:
    """Of a model that nothing guides unless guidance is asked for."""
    return lambda bench: bench.complete(*options, model=save_untrained(bench.folder / "last", guidance="last"))


def called(name: str) -> Build:
    """A patient of that name, whose T1 is all zero, in the place of P1."""

    def build(bench: Bench) -> Sequence[object]:
        cohort = bench.cohort()
        shutil.rmtree(cohort / "P1")
        try:
            write_study(cohort, name, ("t1n", "t2w"), replace={"t1n": np.zeros(SHAPE, np.float32)})
        except (OSError, UnicodeError):
            pytest.skip("no such names on this machine")
        return bench.complete(cohort=cohort)

    return build


def two_claims(bench: Bench) -> Sequence[object]:
    """P1's file number 3 matches two globs."""
    cohort = bench.cohort()
    for case, numbers in (("P1", "3"), (HEALTHY, "12")):
        for path, number in zip(sorted((cohort / case).iterdir()), numbers, strict=False):
            path.rename(path.with_name(f"{case}_{number}.nii.gz"))
    (cohort / "P1" / "P1-t2w.nii.gz").unlink()
    return bench.complete("--map=t1n=*_[13].nii.gz", "--map=t2w=*_[23].nii.gz", cohort=cohort)


def reference_with(modalities: Sequence[str], cases: int = 1) -> Build:
    def build(bench: Bench) -> Sequence[object]:
        for number in range(cases):
            write_study(bench.folder / "reference", f"R{number}", modalities)
        return bench.complete("--guidance", "reference", "--reference", bench.folder / "reference")

    return build


def foreign(bench: Bench) -> Sequence[object]:
    """P1's place in OUT holds another program's manifest."""
    (bench.out / "P1").mkdir(parents=True)
    (bench.out / "P1" / "manifest.json").write_text('{"format": "another"}')
    return bench.complete()


def acquired_in_the_way(bench: Bench) -> Sequence[object]:
    write_study(bench.out, "P1", ("t1c",))
    (bench.out / "P1" / "P1-t1c.nii.gz").rename(bench.out / "P1" / "P1-t1c_synthetic.nii.gz")
    return bench.complete()


def viewing(*options: object, place: str = "out") -> Build:
    return lambda bench: ["view", bench.folder / place, "--no-open", *options]


def nnunet(bench: Bench) -> Sequence[object]:
    (bench.folder / "completed" / "other").mkdir(parents=True)
    (bench.folder / "completed" / "other" / "manifest.json").write_text('{"synthetic": {}}')
    cohort = bench.folder / "cohort"
    return ["nnunet", cohort if cohort.exists() else bench.cohort(), bench.folder / "completed", "-o", bench.out]


def dicom_cohort(bench: Bench, **first: Any) -> Path:
    """Two patients' DICOM, 'bad' and 'good', T1 and T2 each; `first` are other options of the bad one's T1."""
    folder = bench.folder / "dicom"
    for patient in ("bad", "good"):
        for number, modality in enumerate(("t1n", "t2w"), 1):
            head = np.rint(make_head(modality)).astype(int)
            options = first if (patient, modality) == ("bad", "t1n") else {}
            where = {"affine": AFFINE, "modality": modality, "number": number, "patient": patient}
            dicoms.write_series(folder / patient / str(number), head, **where, **options)
    return folder


def scanned(change: Callable[[list[Path]], object], verb: str = "complete", alone: bool = True, **first: Any) -> Build:
    """The bad patient's T1 slices, which are all that patient has where `alone`, are changed."""

    def build(bench: Bench) -> Sequence[object]:
        folder = dicom_cohort(bench, **first)
        if alone:
            shutil.rmtree(folder / "bad" / "2")
        change(sorted((folder / "bad" / "1").iterdir()))
        return bench.complete(cohort=folder) if verb == "complete" else ["convert", folder, "-o", bench.out]

    return build


def tags(**changed: Any) -> Callable[[list[Path]], None]:
    """Other tags in every slice; None deletes one."""

    def change(paths: list[Path]) -> None:
        import pydicom

        for path in paths:
            read = pydicom.dcmread(path)
            for keyword, value in changed.items():
                delattr(read, keyword) if value is None else setattr(read, keyword, value)
            read.save_as(path)

    return change


def cut(count: int) -> Callable[[list[Path]], None]:
    return lambda paths: [path.write_bytes(path.read_bytes()[:-count]) for path in paths]


def no_mr(bench: Bench) -> Sequence[object]:
    folder = dicom_cohort(bench)
    tags(Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")([p for p in folder.rglob("*") if p.is_file()])
    return bench.complete(cohort=folder)


def dicomdir(bench: Bench) -> Sequence[object]:
    bench.folder.joinpath("dicom").mkdir()
    bench.folder.joinpath("dicom", "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return bench.complete(cohort=bench.folder / "dicom")


def two_t1(bench: Bench) -> Sequence[object]:
    beside("_T1w.nii.gz", make_head())(bench.cohort() / "P1")
    return nnunet(bench)


DISK, PROTECTED = errno.ENOSPC, errno.EROFS
FULL, READ_ONLY = r"could not be written: No space left", r"could not be written: Read-only file system"
FORMATS = rf"is other {FORMAT_VERSION}; this crossmr reads crossmr-model {FORMAT_VERSION}"
NO_JSON = r"config\.json is damaged: it is not valid JSON \(.*\)\. Copy or make it again"
NOT_FIT = r"synthesis\.safetensors does not fit config\.json: .*Copy"
NOT_REAL = r"synthesis\.safetensors holds weights that are no real numbers\. Copy it again"
NO_SAFETENSORS = r"synthesis\.safetensors is not a safetensors file that PyTorch reads \(.*\)\. Copy it again"
STRANGE = r"mine\.zip holds .*, which is not a file of a model\. Do not use it"
UNREADABLE = r"mine\.zip cannot be read as an exported model: .*Copy"
NOWHERE, LONG = "/nowhere/at/all", "a" * 300

# fmt: off
CALLS: list[Kind] = [
    # the folder of the scans
    Kind("no folder", lambda b: b.complete(cohort=b.folder / "gone"), r"gone: does not exist\. Expected a folder"),
    Kind("file for a folder", with_file("a.txt", "", lambda b: b.complete(cohort=b.folder / "a.txt")),
         r"is no volume .*Give volumes"),
    Kind("empty folder", emptied_folder("complete"), r"empty: no volume .*Give the folder"),
    Kind("empty folder to prepare", emptied_folder("prepare"), r"empty: no volume .*Give the folder"),
    Kind("texts alone", text_only, r"no volume \(.*\) in it or below \(1 other files\)\. Give the folder"),
    Kind("name too long", lambda b: b.complete(cohort=b.folder / LONG), r"a: (does not exist|cannot).*a folder"),
    Kind("name that is no Unicode", called("P\udcff1"), r"P\\udcff1: t1n is all zero: .*Export it again", "healthy"),
    Kind("name of a line break", called("P\n1"), r"P 1: t1n is all zero: .*Export it again", "healthy"),
    Kind("BIDS derivatives alone", bids_derivatives, r"no volume .*derivatives.*name such a folder itself"),
    Kind("BIDS of synthetic volumes alone", bids_synthetic, r"T1w\.nii\.gz is synthetic: give the", "begun"),
    Kind("BIDS has no such name", bids_unnamed, r"P1: BIDS has no name for swi\. Use --profile labelled", "begun"),
    Kind("challenge on another grid", lambda b: b.complete("--profile", "challenge", cohort=b.cohort() / "P1"),
         r"is 28×32×24 at 6×6×7 mm, but BraSyn's are 240×240×155 .* Use --profile labelled", "begun"),
    Kind("one file of two modalities", two_claims,
         r"P1_3\.nii\.gz claims to be both t1n and t2w\. Narrow the", "healthy"),
    Kind("map without a glob", plain("--map", "t1n"), r"--map is 't1n'; expected KEY=VALUE"),
    Kind("map of no name", plain("--map", "T 1!=*"), r"mapping: 'T 1!' cannot name a modality: expected"),
    # the output
    Kind("output is a file", with_file("out", "in the way", plain()),
         r"could not be written: .*[Nn]ame another folder", "file"),
    Kind("output to prepare is a file", with_file("out", "", preparing()),
         r"out could not be written: .*[Nn]ame another folder", "file"),
    Kind("output to train is a file", with_file("out", "", training("--steps", 1)),
         r"could not be written: .*[Nn]ame", "file"),
    Kind("output to evaluate is a file", with_file("out", "", evaluating()),
         r"could not be written: .*[Nn]ame", "file"),
    Kind("output of convert is a file", with_file("out", "", lambda b: ["convert", dicom_cohort(b), "-o", b.out]),
         r"out could not be written: .*[Nn]ame another folder", "file"),
    Kind("output for nnU-Net is a file", with_file("out", "", nnunet), r"out .*ame another folder", "file"),
    Kind("output for nnU-Net is not empty", with_file("out/a", "", nnunet),
         r"out is not empty; name another folder", "begun"),
    Kind("foreign manifest", with_file("out/manifest.json", '{"a": 1}', plain()),
         r"manifest\.json is not crossmr's, so it is not replaced\. Name another", "begun"),
    Kind("damaged manifest", with_file("out/manifest.json", "{", plain()),
         r"manifest\.json is not crossmr's, .*Name another folder, or move it away", "begun"),
    Kind("foreign set", with_file("out/manifest.json", "{}", preparing()),
         r"manifest\.json is not crossmr's, so it is not replaced\. Name another", "begun"),
    Kind("foreign manifest of a case", foreign, r"is not crossmr's, so it is not replaced\. Name another", "begun"),
    Kind("acquired scan in the way", acquired_in_the_way, r"is not crossmr's, so it is not .*Name", "as it was"),
    Kind("no permission", without_permission, r"could not be written: Permission denied\. Check", "begun"),
    Kind("disk full at once", broken_disk(failing(DISK, "manifest")), FULL + r".*Check free space", "begun"),
    Kind("disk read-only", broken_disk(failing(PROTECTED, ".", at="fsync")), READ_ONLY + r".*Check free", "begun"),
    Kind("disk full at a volume", broken_disk(failing(DISK, "P1-t2f")), FULL + r".*Check free space", "healthy"),
    Kind("disk full while flushing", broken_disk(failing(DISK, r"P1-t1c", at="fsync")), FULL + r".*Check", "healthy"),
    Kind("disk full at a picture", broken_disk(failing(DISK, r"P1\.webp")), FULL + r".*Check free space", "healthy"),
    Kind("disk full at a case's manifest", broken_disk(failing(DISK, r"P1/manifest")), FULL + r".*Check", "healthy"),
    Kind("disk full at the report", broken_disk(failing(DISK, r"report\.html")), FULL + r".*Check free space", "all"),
    Kind("disk full in prepare", broken_disk(failing(DISK, r"images\.npy"), "prepare"), FULL + r".*Check", "begun"),
    Kind("disk full in train", broken_disk(failing(DISK, r"step-.*safetensors"), "train"), FULL + r".*Check", "begun"),
    Kind("disk full in evaluate", broken_disk(failing(DISK, r"metrics\.csv"), "evaluate"), FULL + r".*Check", "begun"),
    Kind("disk full in export", broken_disk(failing(DISK, r"m\.zip"), "export"), FULL + r".*Check", "begun"),
    Kind("disk full in import", broken_disk(failing(DISK, r"mine$"), "import"), FULL + r".*Check"),
    Kind("a broken patient to evaluate", half_evaluated, r"P1 failed: P1: t1n is all zero.*Export it", "evaluated"),
    Kind("one name in two cohorts", twice, r"The cohorts share study names \(P1, zz-healthy\); rename them"),
    # the model
    Kind("model not registered", lambda b: b.complete(model="nonesuch"),
         r"'nonesuch' is neither .*; the models are: default"),
    Kind("model folder missing", lambda b: b.complete(model=NOWHERE),
         r"all is not a model: it has no config\.json\. Train one"),
    Kind("model folder empty", lambda b: b.complete(model=b.folder),
         r"is not a model: it has no config\.json\. Train one"),
    Kind("model is a file", with_file("m", "", lambda b: b.complete(model=b.folder / "m")),
         r"is not a model: .*Train one"),
    Kind("model is a zip", lambda b: b.complete(model="mine.zip"), r"neither|crossmr models import"),
    Kind("config is text", model_text("hello"), NO_JSON),
    Kind("config is empty", model_text(""), NO_JSON),
    Kind("config cut short", model_text('{"format": "crossmr-model", "con'), NO_JSON),
    Kind("config of NaN", model_text('{"format": NaN}'), NO_JSON),
    Kind("config without end", model_text("[" * 100_000), NO_JSON),
    Kind("config is a list", model_text("[]"), r"config\.json is damaged: it holds no JSON object\. Copy"),
    Kind("config without a hash", model_text("{}"), r"config\.json does not match its own SHA-256.*Copy it again"),
    Kind("config of another format", config("format", "other"), FORMATS),
    Kind("config of another version", config("format_version", 99), r"crossmr-model 99; this .*Update crossmr"),
    Kind("config with an unknown key", config("config.colour", "red"),
         r"config\.json: 'colour' is not a setting of ModelConfig\. Did you mean"),
    Kind("config of wrong types", config("config.window", "wide"),
         r"config\.json: window is 'wide'; expected|window\.0? is"),
    Kind("config that is a number", config("config", 3),
         r"config\.json: ModelConfig: expected settings by name, got 3"),
    Kind("config of impossible sizes", config("config.synthesis.channels", -4), r"counts of at least 1"),
    Kind("config of the wrong sizes", config("config.synthesis.channels", 8), NOT_FIT),
    Kind("training record is a number", config("training", 3), r"config\.json.*training"),
    Kind("training record of wrong types", config("training", {"seen": 3, "patients": 4}), r"config\.json.*training"),
    Kind("files that lie outside", config("files", {"../x.safetensors": "0"}),
         r"which lies outside the model\. Do not"),
    Kind("weights missing", without_weights, r"distribution\.safetensors cannot be read: No such file.*Copy the whole"),
    Kind("network missing", network_left_out, r"model holds .*; expected .*distribution"),
    Kind("weights of another hash", raw_weights(lambda b: b[:-1] + bytes([b[-1] ^ 1]), signed=False),
         r"SHA-256.*Copy it"),
    Kind("weights cut short", raw_weights(lambda b: b[:-50]), NO_SAFETENSORS),
    Kind("weights empty", raw_weights(lambda _: b""), NO_SAFETENSORS),
    Kind("weights of a huge header", raw_weights(lambda b: b"\xff" * 8 + b[8:]), NO_SAFETENSORS),
    Kind("weights of a long header", raw_weights(lambda b: (10**8).to_bytes(8, "little") + b[8:]), NO_SAFETENSORS),
    Kind("weights whose header is no JSON", raw_weights(lambda b: b[:8] + b"?" * 40 + b[48:]), NO_SAFETENSORS),
    Kind("weights of an unknown type", raw_weights(lambda _: head_of(dtype="X9")), NO_SAFETENSORS),
    Kind("weights of a type torch lacks", raw_weights(lambda _: head_of(dtype="F4", shape=[8])), NO_SAFETENSORS),
    Kind("weights beyond the file", raw_weights(lambda _: head_of(data_offsets=[0, 400])), NO_SAFETENSORS),
    Kind("weights of a negative shape", raw_weights(lambda _: head_of(shape=[-1])), NO_SAFETENSORS),
    Kind("weights that are a pickle", pickled, NO_SAFETENSORS),
    Kind("weights that torch saved", torch_saved, NO_SAFETENSORS),
    Kind("weights of another shape", weights(lambda t: t.update({first(t): torch.zeros(3, 3)})), NOT_FIT),
    Kind("weights NaN", weights(lambda t: t[first(t)].fill_(np.nan)), r"holds NaN or infinite weights.*Train"),
    Kind("weights infinite", weights(lambda t: t[first(t)].fill_(np.inf)), r"holds NaN or infinite weights.*Train"),
    Kind("weights complex", raw_weights(lambda _: head_of(dtype="C64", shape=[1], data_offsets=[0, 8]) + bytes(4)),
         NOT_REAL + "|" + NO_SAFETENSORS),  # which of them, safetensors decides: 0.6 knows no complex numbers
    Kind("weights of whole numbers", weights(lambda t: t.update({first(t): t[first(t)].long()})), NOT_REAL),
    Kind("one tensor too many", weights(lambda t: t.update(extra=torch.zeros(3))), NOT_FIT),
    Kind("one tensor too few", weights(lambda t: t.pop(first(t))), NOT_FIT),
    Kind("calibration of another shape", weights(lambda t: t.update(variance=torch.zeros(9)), "calibration"),
         r"calibration"),
    Kind("calibration below zero", weights(lambda t: t.update(variance=-torch.ones(2, 2)), "calibration"),
         r"calibration"),
    Kind("baselines of another shape", baselines_of(present=torch.zeros(3)),
         r"baselines\.safetensors.*does not fit config"),
    Kind("baselines incomplete", baselines_of(present=torch.ones(2, 4)),
         r"baselines\.safetensors.*does not fit config"),
    # a model to import
    Kind("zip that climbs", imported(entry("../../evil.safetensors")), STRANGE),
    Kind("zip of an absolute path", imported(entry("/tmp/evil.safetensors")), STRANGE),
    Kind("zip of a drive", imported(entry("C:\\evil.safetensors")), STRANGE),
    Kind("zip with a folder", imported(entry("model/")), STRANGE),
    Kind("zip with a pickle", imported(entry("weights.pkl")), STRANGE),
    Kind("zip with a long name", imported(entry("a" * 5000)), STRANGE),
    Kind("zip in a zip", imported(entry("bomb.zip")), STRANGE),
    Kind("zip with a link", imported(link), r"mine\.zip: synthesis\.safetensors does not match its SHA-256"),
    Kind("zip that unpacks to too much", imported(whole, announced(2**32 - 2)),
         r"unpack to more than 2 GiB\. Do not use"),
    Kind("zip of another size", imported(whole, announced(5)), UNREADABLE + r"|mine.zip: config"),
    Kind("zip cut short", imported(whole, lambda b: b[: len(b) // 2]), UNREADABLE),
    Kind("zip that is text", imported(whole, lambda _: b"text"), UNREADABLE),
    Kind("zip with damaged deflate", imported(compressed(zipfile.ZIP_DEFLATED), damaged), UNREADABLE),
    Kind("zip with damaged bzip2", imported(compressed(zipfile.ZIP_BZIP2), damaged), UNREADABLE),
    Kind("zip with damaged LZMA", imported(compressed(zipfile.ZIP_LZMA), damaged), UNREADABLE),
    Kind("zip of a name that is no Unicode", imported(whole, not_unicode), UNREADABLE),
    Kind("zip of nothing", imported(lambda *_: None), r"mine\.zip: .*is not a model: it has no config\.json"),
    Kind("zip under no name", imported(whole, bytes, "--name", "../mine"),
         r"is not a name for a model; expected"),
    Kind("zip under a name that is taken", imported(whole, bytes, "--name", "default"), r"'default' already; choose"),
    Kind("zip missing", lambda b: ["models", "import", b.folder / "mine.zip"],
         r"cannot be read .*: No such file.*Check|Copy"),
    Kind("remove what is shipped", lambda b: ["models", "remove", "default"], r"an imported model but shipped with"),
    Kind("remove what is not there", lambda b: ["models", "remove", "mine"], r"'mine' is not an imported model"),
    Kind("export over a file", with_file("m", "", lambda b: ["models", "export", b.model_folder, b.folder / "m"]),
         r"m exists; name another file"),
    Kind("export of a broken model", lambda b: ["models", "export", b.folder, b.out / "m.zip"],
         r"is not a model: .*Train one"),
    Kind("verify a broken model", lambda b: ["models", "verify", b.folder], r"failed: .* is not a model: .*Train one"),
    # the prepared set
    Kind("set missing", lambda b: b.train(prepared=b.folder / "set"), r"is not a prepared dataset: .*Make one with"),
    Kind("set without a manifest", lambda b: b.train(prepared=b.folder),
         r"is not a prepared dataset: .*Make one with"),
    Kind("set of a damaged manifest", set_text("manifest.json", "{"), r"manifest\.json is damaged: .*Copy or make it"),
    Kind("set of another hash", set_text("manifest.json", "{}"), r"does not match its own SHA-256.*Run prepare again"),
    Kind("set of another format", set_entry(lambda b: b.update(format_version=1)),
         r"another format .*Run prepare again"),
    Kind("set without cases", set_entry(lambda b: b.pop("cases")), r"manifest\.json .*Run prepare again"),
    Kind("set of damaged cases", set_entry(lambda b: b.update(cases={"P1": {}})),
         r"manifest\.json .*Run prepare again"),
    Kind("set with nobody to train on", set_entry(emptied("train")),
         r"No patient of .* is for training\. Run prepare with"),
    Kind("set without the split", lambda b: b.evaluate("--split", "bogus"),
         r"'bogus' is not a split of a .*; expected one of"),
    Kind("array missing", arrays(lambda _, p: p.unlink()), r"images\.npy is missing or damaged.*Run prepare", "begun"),
    Kind("array cut short", arrays(lambda _, p: p.write_bytes(p.read_bytes()[:-99])),
         r"images\.npy is missing or", "begun"),
    Kind("array that is text", arrays(lambda _, p: p.write_text("text")),
         r"images\.npy is missing or damaged", "begun"),
    Kind("array that is a pickle", arrays(pickled_array), r"images\.npy is missing or damaged.*Run prepare", "begun"),
    Kind("array of other numbers", arrays(lambda _, p: np.save(p, np.load(p) / 2)),
         r"images\.npy is missing or damaged.*SHA-256", "begun"),
    Kind("array of another shape", arrays(lambda _, p: np.save(p, np.zeros((9, 9), "f2"))),
         r"images\.npy is missing or", "begun"),
    Kind("array cut short to evaluate", arrays(lambda _, p: p.write_bytes(b""), "evaluate"),
         r"images\.npy is missing", "begun"),
    # DICOM
    Kind("no MR image", no_mr, r"dicom: no MR image in it or below\. Give the folder", "begun"),
    Kind("DICOMDIR alone", dicomdir, r"dicom: no MR image in it or below\. Give the folder", "begun"),
    Kind("DICOM to prepare", lambda b: ["prepare", dicom_cohort(b), "-o", b.out], r"crossmr convert FOLDER"),
    Kind("a localiser alone", scanned(tags(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
         r"a localiser.*Export", "scanned"),
    Kind("slices missing", scanned(lambda p: p[9].unlink()), r"some are missing\. Export the whole series", "scanned"),
    Kind("few slices", scanned(lambda p: [q.unlink() for q in p[5:]]), r"5 slices only.*Export", "scanned"),
    Kind("no positions", scanned(tags(ImagePositionPatient=None)), r"do not say where they lie.*Export", "scanned"),
    Kind("slices in one place", scanned(tags(ImagePositionPatient=[0, 0, 0])),
         r"several images lie at one.*Export", "scanned"),
    Kind("pixels cut short", scanned(cut(300), alone=False), r"series 1 .*Export it again", "scanned"),
    Kind("JPEG cut short", scanned(cut(300), alone=False, habit="JPEG-LS"), r"series 1 .*Export it again", "scanned"),
    Kind("no pixels", scanned(tags(PixelData=None), alone=False), r"series 1 .*Export it again", "scanned"),
    Kind("JPEG cut short to convert", scanned(cut(300), "convert", False, habit="JPEG-LS"),
         r"failed: .*series 1", "converted"),
    Kind("disk full at a DICOM series", scanned_disk(failing(DISK, "_dicom$", times=1)), FULL + r".*Check", "scanned"),
    # the recipe
    Kind("unknown recipe", training("--recipe", "huge"),
         r"--recipe is 'huge'; expected one of standard, any, paper, tiny"),
    Kind("unknown setting", training("--set", "synthesis.chanels=3"),
         r"'synthesis\.chanels' is not a .*Did you mean 'channels'"),
    Kind("setting of nothing", training("--set", "a.b.c=3"), r"'a\.b\.c' is not a setting; settings look like"),
    Kind("setting of a group", training("--set", "synthesis=3"), r"'synthesis' is not a setting; settings look like"),
    Kind("setting of a wrong type", training("--set", "synthesis.channels=many"), r"channels is 'many'; expected int"),
    Kind("setting without a value", training("--set", "synthesis.channels"), r"expected KEY=VALUE, such as"),
    Kind("no channels", training("--set", "synthesis.channels=0"), r"counts of at least 1"),
    Kind("no batch", training("--set", "synthesis_train.batch_size=0"), r"batch_size, .* are positive"),
    Kind("learning rate NaN", training("--set", "synthesis_train.learning_rate=nan"),
         r"learning_rate is 'nan'; expected float"),
    Kind("crop of another stride", training("--set", "crop=30,30"), r"The crop is \(30, 30\); expected multiples of"),
    Kind("patches of an odd side", training("--set", "synthesis.patch=3"), r"patch is 3; expected 1 or an even number"),
    Kind("no such form", training("--set", "synthesis.form=heavy"), r"form is 'heavy'; it may be one of: published"),
    Kind("lesion weight below zero", training("--set", "synthesis.lesion_weight=-1"), r"lesion_weight is -1"),
    Kind("slices of lesions never drawn", training("--set", "lesion_draws=0"), r"lesion_draws are counts"),
    Kind("crop of nothing", training("--set", "crop=0,0"), r"The crop is \(0, 0\); expected multiples of"),
    Kind("crop of three sides", training("--set", "crop=32,32,32"), r"crop .*expected 2"),
    Kind("uncertainty of what is always guided", training("--set", "guidance=joint"),
         r"which guidance 'joint' does not have; choose 'last' or 'none'"),
    Kind("steps below zero", training("--steps", -3), r"--steps and --minutes are positive"),
    Kind("no steps to train", training("--steps", 0), r"--steps and --minutes are positive"),
    Kind("steps and minutes", training("--steps", 3, "--minutes", 1), r"Give --steps or --minutes, not both"),
    Kind("minutes NaN", training("--minutes", "nan"), r"--steps and --minutes are positive"),
    Kind("minutes infinite", training("--minutes", "inf"), r"--steps and --minutes are positive"),
    Kind("minutes below zero", training("--minutes", -1), r"--steps and --minutes are positive"),
    Kind("steps that are words", training("--steps", "many"), r"Invalid value for '--steps'", code=2),
    Kind("unknown source", training("--sources", "t1x"), r"'t1x' is not a modality: expected one of"),
    Kind("source that the set lacks", training("--sources", "pdw"), r"has pdw; it has"),
    Kind("source that is a target", training("--sources", "t1n", "--targets", "t1n"),
         r"both source and target; .*use recipe"),
    Kind("unknown stage", training("--stage", "stage 4"), r"'stage 4' is not a stage of this training; it has"),
    Kind("stage before its time", training("--set", "guidance=last", "--stage", "synthesis"),
         r"'representation' comes before .*; train it first", "begun"),
    Kind("seed beyond all numbers", training("--seed", 10**30), r"--seed is 10+; expected"),
    Kind("shares of no whole", preparing("--split", "70/40"), r"--split is '70/40'; expected train/val/test"),
    Kind("shares below zero", preparing("--split", "150/-25/-25"), r"--split is .*; expected train/val/test"),
    Kind("shares NaN", preparing("--split", "nan/1/1"), r"--split is .*; expected train/val/test"),
    Kind("nobody to train on", preparing("--split", "0/50/50"), r"--split is .*; expected train/val/test"),
    # how to synthesise
    Kind("unknown guidance", plain("--guidance", "oracle"), r"--guidance is 'oracle'; expected one of sample"),
    Kind("reference of nothing", plain("--guidance", "reference"),
         r"--guidance reference and --reference STUDY go together"),
    Kind("reference unasked for", plain("--reference", "."),
         r"--guidance reference and --reference STUDY go together"),
    Kind("reference missing", plain("--guidance", "reference", "--reference", NOWHERE),
         r"all: does not exist\. Expected"),
    Kind("reference without targets", reference_with(["t1n"]),
         r"has none of t1c, t2f, which guide this model\. Name a study"),
    Kind("two references", reference_with(("t1c", "t2f"), 2), r"holds 2 studies; name one of them"),
    Kind("reference in an evaluation", evaluating("--guidance", "reference"), r"knows no reference; measure sample"),
    Kind("every subset of a pair", evaluating("--every-subset"), r"--every-subset is for models of any subset; this"),
    Kind("no steps", plain("--ddim-steps", 0), r"0 sampling steps.*1 to 1000"),
    Kind("too many steps", plain("--ddim-steps", 1001), r"1001 sampling steps.*1 to 1000"),
    Kind("no samples", plain("--samples", 0), r"--samples is 0; expected at least 1"),
    Kind("samples of nothing", unguided("--samples", 2), r"draws none; add --guidance sample"),
    Kind("guidance of an unguided C-UNet",
         lambda b: b.complete("--guidance", "sample", model=save_untrained(b.folder / "other", guidance="none")),
         r"trained without guidance, .*; use guidance 'none'"),
    Kind("no guidance of a guided C-UNet", plain("--guidance", "none"),
         r"always guided in training; .* train one with .* compare with: crossmr evaluate MODEL --against"),
    Kind("unknown target", plain("--targets", "t1x"), r"'t1x' is not a modality: expected one of"),
    Kind("no target", plain("--targets", ""), r"No modality is named; name one, such as 't2f'"),
    Kind("target never learnt", plain("--targets", "t1n"), r"cannot synthesise t1n; it was trained for t1c, t2f"),
    Kind("unknown profile", plain("--profile", "nice"), r"--profile is 'nice'; expected one of labelled"),
    Kind("unknown device", plain("--device", "tpu"), r"--device is 'tpu'; expected auto, cpu"),
    Kind("device that is not there", plain("--device", "cuda:77"), r"--device is 'cuda:77', but .* have only: cpu"),
    Kind("unknown precision", plain("--precision", "float8"), r"--precision is 'float8'; expected one of auto"),
    Kind("nothing to view", viewing(place="gone"), r"gone does not exist\. Name a folder that 'crossmr"),
    Kind("view of a foreign manifest", with_file("out/P1/manifest.json", "{}", viewing("P1")), r"P1.*crossmr", "begun"),
    Kind("foreign manifest for nnU-Net", with_file("completed/P1/manifest.json", "{}", nnunet),
         r"crossmr complete", "exported"),
    Kind("two T1 for nnU-Net", two_t1, r"P1 excluded: .*2 files claim to be t1n: .* Keep one", "exported"),
    Kind("nothing completed for nnU-Net", lambda b: [*nnunet(b), "--modalities", "t1c"],
         r"it lacks t1c; complete it first"),
]
# fmt: on


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A set of four whole patients: two to train, one to watch, one to test."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(4):
        write_study(folder / "cohort", f"P{number}", ("t1n", "t1c", "t2w", "t2f"), seed=number)
    prepare(folder / "cohort", folder / "set", PrepareSettings(split=Split(0.5, 0.25, 0.25)))
    return folder / "set"


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: case_of(kind.name))
def test_a_broken_call(kind, model, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSMR_HOME", str(tmp_path / "home"))
    bench = Bench(tmp_path, model, prepared, monkeypatch)
    result = crossmr(*kind.build(bench))
    assert result.code == kind.code, result.out + result.err
    assert "Traceback" not in result.err + result.out
    if kind.code == 1:
        assert len(result.lines) == 1, result.lines
        assert advises(result.lines[0]), result.lines[0]
    assert re.search(kind.message, " ".join(result.lines)), result.lines
    assert not bench.marker.exists(), "something was unpickled"
    assert not leftovers(tmp_path)
    assert not list(tmp_path.glob("home/models/*"))
    written = sorted(p.relative_to(bench.out).as_posix() for p in bench.out.rglob("*") if p.is_file())
    results = [name for name in written if re.search(r"_synthetic|_std|images|\.npy|case\.json|model/|\.zip", name)]
    if kind.left == "nothing":
        assert not bench.out.exists()
    elif kind.left == "file":
        assert bench.out.is_file()
    elif kind.left == "begun":
        begun = [name for name in results if name.endswith("case.json")]
        assert results == begun
        assert not any(json.loads((bench.out / name).read_bytes())["signature"] for name in begun)
    elif kind.left == "as it was":
        assert written == ["P1/P1-t1c_synthetic.nii.gz"]
    elif kind.left == "exported":
        assert results == [f"imagesTs/{HEALTHY}_000{number}.nii.gz" for number in range(2)]
    elif kind.left == "evaluated":
        assert json.loads((bench.out / "metrics.json").read_bytes())["cases"] == [HEALTHY]
        assert not [name for name in written if "P1" in name]
    elif kind.left == "converted":
        assert len(list(bench.out.glob("*/series.json"))) == 1
        assert len(list(bench.out.rglob("*.nii.gz"))) == 2
    elif kind.left == "scanned":
        (good,) = json.loads((bench.out / "manifest.json").read_bytes())["completed"]
        assert {name.split("/")[0] for name in results} == {good}
        converted = [p.name for p in (bench.out / "scans").iterdir() if any(p.iterdir())]
        assert good in converted
        assert len(converted) == 1 + ("disk" in kind.name)
    else:
        finished = {"healthy": [HEALTHY], "all": ["P1", HEALTHY]}[kind.left]
        assert list(json.loads((bench.out / "manifest.json").read_bytes())["completed"]) == finished
        for case in finished:
            assert {f"{case}/manifest.json", f"{case}/{case}-t1c_synthetic.nii.gz", f"pictures/{case}.webp"} <= {
                *written
            }
        ours = [n for n in results if not n.startswith(tuple(f"{case}/" for case in finished))]
        assert ours == []
