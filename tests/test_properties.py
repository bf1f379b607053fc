"""What completing keeps, whatever the image is like: drawn by hypothesis, the same draws each time."""

import gzip
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import save_untrained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import crossmr
from crossmr.completion.study import Completed
from crossmr.data.nifti import write_volume
from crossmr.networks import inference
from crossmr.networks.model import read_model

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
GEOMETRY = (
    *("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""The fields of a header that say where its voxels lie."""
DTYPES = ("u1", "i2", "u2", "i4", "f4", "f8")
ORIENTATIONS = [
    np.stack([axes, signs], axis=1)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Grid:
    """Where a scan's voxels lie, and how its file says so."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    codes: tuple[int, int]
    """Of sform and qform; where both are 0 the file says nothing but the spacing."""


@dataclass(frozen=True)
class Form:
    """How a file stores numbers."""

    dtype: str
    order: str
    slope: float
    inter: float
    version: int
    zipped: bool


@st.composite
def grids(draw) -> Grid:
    """Odd sides, anisotropic voxels, turned by any angles, axes in any order and direction."""
    shape = draw(st.tuples(*[st.integers(12, 30)] * 3))
    spacing = draw(st.tuples(*[st.sampled_from([0.5, 0.9375, 1.0, 1.2, 3.3, 5.0])] * 3))
    turned = Rotation.from_euler("xyz", draw(st.tuples(*[st.integers(-90, 90)] * 3)), degrees=True).as_matrix()
    axes = draw(st.sampled_from(ORIENTATIONS))
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.eye(3)[:, axes[:, 0]] @ np.diag(axes[:, 1] * spacing)
    affine[:3, 3] = draw(st.tuples(*[st.floats(-200, 200, width=32)] * 3))
    return Grid(shape, affine, draw(st.tuples(*[st.integers(0, 4)] * 2)))


@st.composite
def forms(draw) -> Form:
    """Any number type, scaled by the header or not, either byte order, NIfTI-1 or -2, gzipped or not."""
    return Form(
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from("<>")),
        draw(st.sampled_from([1.0, 0.5, 1e-3, 37.0, 1e5])),
        draw(st.sampled_from([0.0, -1000.0, 3.5])),
        draw(st.sampled_from([1, 2])),
        draw(st.booleans()),
    )


@st.composite
def studies(draw, most: int = 3) -> dict[str, tuple[np.ndarray, Form]]:
    """One to three modalities in any order, stripped or in noise, each with intensities of its own."""
    chosen = draw(st.lists(st.sampled_from(MODALITIES), min_size=1, max_size=most, unique=True))
    return {m: (draw(st.sampled_from(SCALES)), draw(forms())) for m in chosen}


def plain(data: np.ndarray) -> np.ndarray:
    return data


def faint(data: np.ndarray) -> np.ndarray:
    return data * 1e-3


def bright(data: np.ndarray) -> np.ndarray:
    return data * 1e5


def raised(data: np.ndarray) -> np.ndarray:
    return data + 1000


def z_scored(data: np.ndarray) -> np.ndarray:
    head = data > 30
    return np.where(head, (data - data[head].mean()) / data[head].std(), 0)


SCALES = (plain, faint, bright, raised, z_scored)
"""What intensities may be like."""


def head(shape: tuple[int, int, int], seed: int, *, air: bool) -> np.ndarray:
    """A rounded box of tissue, 60 to 140, no two corners alike, in noisy air or in zeros: float64 (X, Y, Z)."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = x**4 + y**4 + z**4 < 0.7
    rng = np.random.default_rng(seed)
    tissue = 100 + 20 * np.sin(3 * x + 2 * y + z + seed) + 15 * x + rng.normal(0, 2, shape)
    return np.where(inside, tissue, np.abs(rng.normal(0, 3, shape)) if air else 0)


def stored(data: np.ndarray, form: Form) -> np.ndarray:
    """The numbers that a file holds: whole ones use a part of their type's range."""
    dtype = np.dtype(form.dtype)
    if dtype.kind == "f":
        return data.astype(dtype)
    low, high = data.min(), data.max()
    most = min(np.iinfo(dtype).max, 30_000)
    return np.rint((data - low) / (high - low) * most).astype(dtype)


def write(path: Path, voxels: np.ndarray, grid: Grid, form: Form) -> Path:
    """A file whose header says exactly this, which nibabel alone would not write."""
    kind, header = {1: (nib.Nifti1Image, nib.Nifti1Header), 2: (nib.Nifti2Image, nib.Nifti2Header)}[form.version]
    said = header(endianness=form.order)
    said.set_data_dtype(voxels.dtype.newbyteorder(form.order))
    image = kind(voxels, None, said)
    image.header["pixdim"][1:4] = np.linalg.norm(grid.affine[:3, :3], axis=0)
    image.set_sform(grid.affine if grid.codes[0] else None, grid.codes[0])
    image.set_qform(grid.affine if grid.codes[1] else None, grid.codes[1])
    image.header.set_xyzt_units("mm", "sec")
    content = image.to_bytes()
    fields = header(content[: header.template_dtype.itemsize])
    fields["scl_slope"], fields["scl_inter"] = form.slope, form.inter
    content = fields.binaryblock + content[len(fields.binaryblock) :]
    path = path.with_name(path.name + (".nii.gz" if form.zipped else ".nii"))
    path.write_bytes(gzip.compress(content, 1) if form.zipped else content)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Any subset of the four in, the rest out; learnt nothing."""
    both = {"sources": MODALITIES, "targets": MODALITIES}
    return read_model(save_untrained(tmp_path_factory.mktemp("model"), guidance="last", uncertainty=True, **both))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scans")


def scans(folder: Path, grid: Grid, study: Mapping[str, Any], air: bool) -> dict[str, Path]:
    """The study's files."""
    made = {}
    for modality, (scale, form) in study.items():
        data = scale(head(grid.shape, MODALITIES.index(modality), air=air))
        made[modality] = write(folder / modality, stored(data, form), grid, form)
    return made


def complete(model, study: Mapping[str, Any], case: str = "study", **changes: Any) -> Completed:
    return crossmr.complete(study, model, crossmr.InferenceSettings(precision="float32", **changes), case=case)


def arrays(completed: Completed) -> dict[str, np.ndarray]:
    """Every volume, images and standard deviations."""
    return {
        f"{modality} {kind}": np.asanyarray(image.dataobj)
        for kind, images in (("image", completed.images), ("std", completed.stds))
        for modality, image in images.items()
    }


@few
@given(grid=grids(), study=studies(), air=st.booleans())
def test_what_is_written_lies_on_the_reference_grid_bit_for_bit(model, folder, grid, study, air):
    given_files = scans(folder, grid, study, air)
    missing = sorted(set(MODALITIES) - set(study))
    result = complete(model, given_files, targets=missing)  # named, since noise may look like one image twice
    assert set(result.images) == set(missing)
    first = next(m for m in MODALITIES if m in study)
    reference = nib.load(given_files[first])
    for modality, image in result.images.items():
        write_volume(image, folder / "out.nii.gz")
        written = nib.load(folder / "out.nii.gz")
        assert type(written) is type(reference)
        assert written.header.endianness == reference.header.endianness
        assert written.shape == grid.shape
        np.testing.assert_array_equal(written.affine, reference.affine)
        for name in GEOMETRY:
            assert written.header[name].tobytes() == reference.header[name].tobytes(), name
        assert written.get_data_dtype().newbyteorder("=") == np.float32
        assert written.header["descrip"].item().startswith(f"SYNTHETIC {modality} by crossmr".encode())
        data = np.asanyarray(written.dataobj)
        assert np.isfinite(data).all()
        assert data.min() >= 0
        assert data.max() <= 1
        assert data.std() > 0
        std = np.asanyarray(result.stds[modality].dataobj)
        assert np.isfinite(std).all()
        assert std.min() >= 0


@few
@given(grid=grids(), study=studies(), air=st.booleans(), data=st.data())
def test_the_order_of_the_volumes_and_of_the_studies_changes_nothing(model, folder, grid, study, air, data):
    guidance = data.draw(st.sampled_from(["none", "sample"]))
    options = {"guidance": guidance, "ddim_steps": 2, "case": "A"}
    files = scans(folder, grid, study, air)
    first = arrays(complete(model, files, **options))
    complete(model, dict(list(files.items())[:1]), **{**options, "case": "B"})  # another study in between
    order = data.draw(st.permutations(list(files)))
    second = arrays(complete(model, {m: files[m] for m in order}, **options))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@settings(few, max_examples=12)
@given(grid=grids(), study=studies(), air=st.booleans(), guidance=st.sampled_from(["none", "sample", "unconditional"]))
def test_the_size_of_the_batch_changes_nothing(model, folder, grid, study, air, guidance):
    files = scans(folder, grid, study, air)
    made = []
    for size in (1, 3, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inference, "BATCH", size)
            made.append(arrays(complete(model, files, guidance=guidance, ddim_steps=2)))
    for other in made[1:]:
        for name, volume in made[0].items():
            np.testing.assert_allclose(other[name], volume, rtol=1e-4, atol=1e-5)


@few
@given(grid=grids(), study=studies(), air=st.booleans(), turn=st.sampled_from(ORIENTATIONS))
def test_reorienting_the_input_reorients_the_output(model, folder, grid, study, air, turn):
    """Bit for bit: both copies are read into one array, along the closest RAS+ axes."""
    images = {m: nib.load(path) for m, path in scans(folder, grid, study, air).items()}
    turned = {m: image.as_reoriented(turn) for m, image in images.items()}
    one, other = complete(model, images, guidance="none"), complete(model, turned, guidance="none")
    for made, again in ((one.images, other.images), (one.stds, other.stds)):
        assert made.keys() == again.keys()
        for modality, image in made.items():
            back = again[modality].as_reoriented(inverse(turn))
            np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(image.dataobj))
            np.testing.assert_allclose(back.affine, image.affine, rtol=0, atol=1e-4)


def inverse(turn: np.ndarray) -> np.ndarray:
    """The reorientation that undoes another."""
    undone = np.empty_like(turn)
    for axis, (to, flip) in enumerate(turn):
        undone[to] = axis, flip
    return undone


@pytest.mark.parametrize("offset", [-1000, 1e6, -1e9])
def test_intensities_that_float32_hardly_resolves_are_completed(model, offset):
    """Drawn above once: numpy makes no histogram of a range narrower than 256 of float32's steps."""
    data = head((20, 24, 16), 0, air=True) * 1e-8 * abs(offset) + offset
    result = complete(model, {"t1n": nib.Nifti1Image(data.astype(np.float32), np.eye(4))})
    assert set(result.images) == set(MODALITIES) - {"t1n"}
    assert all(np.isfinite(volume).all() and volume.std() > 0 for volume in arrays(result).values())
