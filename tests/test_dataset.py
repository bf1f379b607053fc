"""A prepared set is read as it was written; a batch is a pure function of seed and step."""

import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_study
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmr.data.dataset import (
    Batch,
    Batches,
    Case,
    PreparedSet,
    around,
    as_inputs,
    fit_size,
    seeded,
    to_multiple,
    useful_slices,
)
from crossmr.data.prepare import PARTS, Split, prepare
from crossmr.errors import ConfigError, SetError
from crossmr.files import digest

MODALITIES = ("t1n", "t1c", "t2f")
MIDDLE = [0.5] * 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Five patients, one of them without t1c."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(5):
        modalities = MODALITIES if number != 2 else ("t1n", "t2f")
        write_study(folder / "cohort", f"P-0000{number}-000", modalities, seed=number, lesion=number == 1)
    prepare(folder / "cohort", folder / "set")
    return folder / "set"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """The set, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "set")


def made(folder: Path, name: str, images: np.ndarray, modalities: Sequence[str] = MODALITIES) -> Case:
    """A case of images (Z, M, Y, X), all of it head."""
    (folder / name).mkdir(parents=True)
    np.save(folder / name / "images.npy", images.astype(np.float16))
    head = (images.shape[2] * images.shape[3],) * images.shape[0]
    return Case(name, name, "train", tuple(modalities), head, False, False, folder / name)


def numbered(folder: Path, slices: Sequence[int] = (5, 3, 6)) -> list[Case]:
    """Cases of 4 × 4 voxels, of which every slice holds a number of its own: 1, 2, 3, ..."""
    cases, first = [], 1
    for index, count in enumerate(slices):
        numbers = np.arange(first, first + count, dtype=np.float32)
        cases.append(made(folder, f"N{index}", np.broadcast_to(numbers[:, None, None, None], (count, 3, 4, 4))))
        first += count
    return cases


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "present", "case"))


# ------------------------------------------------------------------------------------------------ reading


def test_a_set_is_what_was_prepared(prepared):
    opened = PreparedSet(prepared)
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert [case.name for case in opened.cases] == [f"P-0000{number}-000" for number in range(5)]
    for case in opened.cases:
        said = manifest["cases"][case.name]
        assert (case.patient, case.part) == (case.name[:-4], said["part"])
        assert case.modalities == tuple(said["modalities"])
        assert case.labelled == (case.name == "P-00001-000")
        assert not case.masked_background
        assert case.head_voxels == tuple(case.masks()[:, 0].sum((1, 2)).tolist())
        assert case.images().shape == (len(case.head_voxels), len(case.modalities), *case.masks().shape[2:])
        volume = case.volume("t2f")
        assert volume.dtype == np.float32
        np.testing.assert_array_equal(volume, case.images()[:, case.modalities.index("t2f")])
    assert (opened.cases[1].masks()[:, 1] == 3).sum() == 4 * 4 * 3


def test_the_parts_share_out_all_cases(prepared):
    opened = PreparedSet(str(prepared))
    parts = [opened.part(part) for part in PARTS]
    assert all(parts)
    assert sorted(case.name for part in parts for case in part) == [case.name for case in opened.cases]
    with pytest.raises(ConfigError, match="'training' is no part of a set; wanted one of train, val, test"):
        opened.part("training")


def test_arrays_are_mapped_and_not_writable(prepared):
    case = PreparedSet(prepared).cases[0]
    for array, dtype in ((case.images(), np.float16), (case.masks(), np.uint8)):
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0, 0] = 1


def test_a_slice_is_read_without_the_volume(tmp_path):
    case = made(tmp_path, "large", np.zeros((100, 3, 160, 160)))  # 15 MB, a slice of which is 0.15 MB
    batches = Batches([case], MODALITIES, size=(160, 160), batch_size=1, seed=0)
    batches.read(0, 0)
    tracemalloc.start()
    try:
        batches.read(0, 99)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        np.array(case.images())
        assert tracemalloc.get_traced_memory()[1] > 15e6  # so this is how reading it whole would show
    finally:
        tracemalloc.stop()


def test_many_cases_do_not_use_up_the_open_files(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of open files are Unix's")
    one = made(tmp_path, "one", np.ones((1, 3, 4, 4)))
    batches = Batches([one] * 400, MODALITIES, size=(4, 4), batch_size=1, seed=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert all(batches.read(index, 0).sum() == 48 for index in range(400))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_fingerprint_is_of_pixels_and_split(prepared, tmp_path):
    cohort = prepared.parent / "cohort"
    prepare(cohort, tmp_path / "again")
    prepare(cohort, tmp_path / "split", split=Split(seed=1))
    wanted = PreparedSet(prepared).fingerprint
    assert PreparedSet(tmp_path / "again").fingerprint == wanted
    assert PreparedSet(tmp_path / "split").fingerprint != wanted
    shutil.copytree(cohort, tmp_path / "cohort")
    write_study(tmp_path / "cohort", "P-00000-000", seed=99)
    prepare(tmp_path / "cohort", tmp_path / "pixels")
    assert PreparedSet(tmp_path / "pixels").fingerprint != wanted


# ----------------------------------------------------------------------------------------------- damage


def test_no_set_at_all(tmp_path):
    with pytest.raises(SetError, match=r"has no manifest\.json\. Make one with: crossmr prepare"):
        PreparedSet(tmp_path)


def test_a_flipped_byte_in_the_manifest(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for position in np.linspace(3, len(content) - 80, 60).astype(int):
        if content[position : position + 1].isspace():
            continue
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(SetError, match=r"manifest\.json (does not match its own SHA-256|is damaged)"):
            PreparedSet(copy)
    path.write_bytes(content)
    PreparedSet(copy)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(SetError, match=r"manifest\.json is damaged"):
        PreparedSet(copy)


@pytest.mark.parametrize(("key", "value"), [("format_version", 1), ("format", "nnunet"), ("format", None)])
def test_another_version(copy, key, value):
    body: dict[str, Any] = json.loads((copy / "manifest.json").read_text())
    del body["sha256"]
    body[key] = value
    (copy / "manifest.json").write_text(json.dumps({**body, "sha256": digest(body)}))
    with pytest.raises(SetError, match=r"another format or version than crossmr-set 2\. Run prepare again"):
        PreparedSet(copy)


@pytest.mark.parametrize("name", ["images.npy", "masks.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "zip", "objects", "flipped"])
def test_a_damaged_array(copy, name, damage):
    case = PreparedSet(copy).cases[3]
    path = case.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "objects":
        np.save(path, np.array([{}, {}]), allow_pickle=True)
    elif damage == "zip":
        np.savez(path.with_suffix(""), content=np.ones(3))
        path.with_suffix(".npz").rename(path)
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage != "missing":
        path.write_bytes({"truncated": content[:-1], "empty": b"", "text": b"not an array"}[damage])
    with pytest.raises(SetError, match=rf"{name} is missing or damaged .*Run prepare again"):
        case.images() if name == "images.npy" else case.masks()


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_a_batch_depends_on_seed_and_step_only(prepared, size):
    cases = PreparedSet(prepared).cases

    def batches(seed: int = 5) -> Batches:
        return Batches(cases, MODALITIES, size=size, batch_size=3, seed=seed)

    steps = range(2 * batches().steps_per_epoch + 1)
    sequential = [batches()[0], *(batches()[step] for step in steps[1:])]
    shared = batches()
    for step in np.random.default_rng(0).permutation(len(steps)).tolist():
        torch.manual_seed(step)
        assert equal(shared[step], sequential[step])
        assert equal(shared[step], sequential[step])
    assert not any(equal(sequential[step], sequential[step + 1]) for step in steps[:-1])
    assert not any(equal(batches(seed=6)[step], sequential[step]) for step in steps)
    state = torch.get_rng_state()
    shared[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_the_shapes_of_a_batch(prepared, size):
    batches = Batches(PreparedSet(prepared).cases, MODALITIES, size=size, batch_size=4, seed=0)
    batch = batches[0].to(torch.device("cpu"))
    assert batch.images.shape == (4, 3, *size)
    assert batch.present.shape == (4, 3)
    assert batch.case.shape == (4,)
    assert (batch.images.dtype, batch.present.dtype, batch.case.dtype) == (torch.float32, torch.float32, torch.int64)
    assert 0 <= batch.images.min() < batch.images.max() <= 1


@pytest.mark.parametrize("batch_size", [1, 4, 5, 20])
def test_every_epoch_sees_every_slice_once(tmp_path, batch_size):
    batches = Batches(numbered(tmp_path), MODALITIES, size=(4, 4), batch_size=batch_size, seed=0)
    assert len(batches.items) == 14
    assert batches.steps_per_epoch == -(-14 // batch_size)
    steps = [batches[step] for step in range(3 * batches.steps_per_epoch)]
    seen = torch.cat([batch.images[:, 0, 0, 0] for batch in steps]).int().tolist()
    owners = torch.cat([batch.case for batch in steps]).tolist()
    epochs = [seen[start : start + 14] for start in (0, 14, 28)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 15))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [0 if n <= 5 else 1 if n <= 8 else 2 for n in seen] == owners


def test_every_epoch_sees_every_volume_once(tmp_path):
    batches = Batches(numbered(tmp_path), MODALITIES, size=(8, 4, 4), batch_size=2, seed=0)
    seen = torch.cat([batches[step].case for step in range(6)]).tolist()
    assert [sorted(seen[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4


def test_slices_with_little_head_are_left_out(prepared):
    cases = PreparedSet(prepared).cases
    batches = Batches(cases, MODALITIES, size=(20, 24), batch_size=1, seed=0)
    assert batches.items == [(i, z) for i, c in enumerate(cases) for z in useful_slices(c.head_voxels)]
    assert len(batches.items) < sum(len(case.head_voxels) for case in cases)


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_what_a_patient_lacks_is_zero_and_flagged(prepared, size):
    cases = PreparedSet(prepared).cases
    batches = Batches(cases, ("t1c", "t2f", "t2w"), size=size, batch_size=40, seed=0)
    batch = batches[0]
    assert {2} < set(batch.case.tolist())
    for images, present, case in zip(batch.images, batch.present, batch.case.tolist(), strict=True):
        assert present.tolist() == [float(case != 2), 1, 0]
        assert [bool(image.any()) for image in images] == [case != 2, True, False]


def test_channels_are_by_name(prepared):
    case = PreparedSet(prepared).cases[2]
    batches = Batches([case], ("t2f", "t1c", "t1n"), size=(20, 24), batch_size=1, seed=0)
    volume = batches.read(0, -1)
    np.testing.assert_array_equal(volume[0], case.volume("t2f"))
    np.testing.assert_array_equal(volume[2], case.volume("t1n"))
    assert not volume[1].any()
    assert torch.equal(batches.read(0, 7), volume[:, 7])


def test_flips_are_left_right_only(tmp_path):
    rng = np.random.default_rng(0)
    case = made(tmp_path, "P", rng.random((4, 3, 5, 6)))
    whole = torch.from_numpy(case.images().astype(np.float32))
    for size, originals in (((5, 6), list(whole)), ((4, 5, 6), [whole.transpose(0, 1)])):
        batches = Batches([case], MODALITIES, size=size, batch_size=8, seed=0)
        images = torch.cat([batches[step].images for step in range(10)])
        plain = [any(torch.equal(image, one) for one in originals) for image in images]
        flipped = [any(torch.equal(image, one.flip(-1)) for one in originals) for image in images]
        assert all(a != b for a, b in zip(plain, flipped, strict=True))
        assert 20 < sum(flipped) < 60
        unflipped = Batches([case], MODALITIES, size=size, batch_size=8, seed=0, flip=False)[0].images
        assert all(any(torch.equal(image, one) for one in originals) for image in unflipped)


def test_crops_reach_every_place(tmp_path):
    grid = np.arange(6 * 7, dtype=np.float32).reshape(1, 1, 6, 7)
    case = made(tmp_path, "P", grid, ("t1n",))
    batches = Batches([case], ("t1n",), size=(4, 4), batch_size=200, seed=0, flip=False)
    images = batches[0].images[:, 0]
    assert set(images[:, 0, 0].int().tolist()) == {7 * y + x for y in range(3) for x in range(4)}
    for image in images:
        assert torch.equal(image - image[0, 0], torch.from_numpy(grid[0, 0, :4, :4]))


def test_crops_and_flips_are_drawn_from_seed_and_step(tmp_path):
    case = made(tmp_path, "P", np.random.default_rng(0).random((1, 3, 40, 40)))

    def images(seed: int, step: int) -> torch.Tensor:
        batches = Batches([case], MODALITIES, size=(4, 4), batch_size=8, seed=seed)
        return batches[step].images

    assert torch.equal(images(0, 0), images(0, 0))
    assert not any(torch.equal(images(0, 0), images(*other)) for other in [(0, 1), (1, 0), (1, 1)])


def test_fixed_items_are_spread_and_central(tmp_path):
    batches = Batches(numbered(tmp_path), MODALITIES, size=(2, 8), batch_size=2, seed=0)
    batch = batches.fixed(5)
    assert batch.images.shape == (5, 3, 2, 8)
    assert batch.images[:, 0, 0, 4].tolist() == [1, 4, 7, 11, 14]
    assert batch.images[0, 0].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 2
    assert batch.case.tolist() == [0, 0, 1, 2, 2]
    assert batch.present.tolist() == [[1, 1, 1]] * 5
    assert equal(batch, batches.fixed(5))
    assert len(batches.fixed(99).images) == 14
    volumes = Batches(batches.cases, MODALITIES, size=(6, 4, 4), batch_size=2, seed=0).fixed(2)
    assert volumes.case.tolist() == [0, 2]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(SetError, match="needs t1n, t2f"):
        Batches([], ("t1n", "t2f"), size=(4, 4), batch_size=2, seed=0)


# -------------------------------------------------------------------------------------------- functions


def test_useful_slices():
    assert useful_slices([0, 9, 10, 50, 100, 30, 5, 0]) == [2, 3, 4, 5]
    assert useful_slices([0, 1, 3, 0]) == [1, 2]
    assert useful_slices([0, 0]) == useful_slices([]) == []


def test_fit_size_crops_and_pads():
    image = torch.arange(1.0, 11).reshape(1, 2, 5)
    assert fit_size(image, (2, 3), (0, 0))[0].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert fit_size(image, (2, 3), (0, 0.5))[0].tolist() == [[2, 3, 4], [7, 8, 9]]
    assert fit_size(image, (1, 3), (0.999, 0.999))[0].tolist() == [[8, 9, 10]]
    assert fit_size(image, (4, 3), (0.9, 0.4))[0].tolist() == [[0] * 3, [2, 3, 4], [7, 8, 9], [0] * 3]
    assert fit_size(image, (2, 5), (0.9, 0.9)) is image
    padded = fit_size(image, (2, 8), (0, 0))
    assert padded.sum() == image.sum()
    assert padded.shape == (1, 2, 8)


@given(sides=st.lists(st.integers(1, 21), min_size=2, max_size=3), divisor=st.sampled_from([1, 2, 4, 5, 8, 16]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_fit_size_undoes_to_multiple(sides, divisor):
    image = torch.rand((2, *sides), generator=seeded("test", *sides)) + 0.1
    padded = to_multiple(image, len(sides), divisor)
    assert all(
        have % divisor == 0 and 0 <= have - side < divisor for have, side in zip(padded.shape[1:], sides, strict=True)
    )
    assert (padded > 0).sum() == image.numel()
    assert torch.equal(fit_size(padded, sides, [0.5] * len(sides)), image)
    for axis, side in enumerate(sides, start=1):  # the image is in the middle
        used = padded.movedim(axis, 0).flatten(1).any(1).nonzero()
        before, after = int(used[0]), padded.shape[axis] - 1 - int(used[-1])
        assert abs(before - after) <= 1
        assert int(used[-1]) - int(used[0]) == side - 1


def test_inputs_of_the_networks_and_back():
    volume = torch.rand((3, 5, 7, 9), generator=seeded("test"))
    slices = [0, 2, 3]
    planes = as_inputs(volume, slices, 2, 4)
    assert planes.shape == (3, 3, 8, 12)
    assert torch.equal(fit_size(planes, (7, 9), MIDDLE[:2]).transpose(0, 1), volume[:, slices])
    whole = as_inputs(volume, (), 3, 4)
    assert whole.shape == (1, 3, 8, 8, 12)
    assert torch.equal(fit_size(whole[0], (5, 7, 9), MIDDLE), volume)


def test_seeds_are_for_ever():
    """A model's results depend on them: they must not change with a version of crossmr, or of anything else."""
    assert seeded("batch", 0, 1).initial_seed() == 94858423089692736
    assert seeded("case", 7, "BraTS-GLI-00000-000").initial_seed() == 824398798850860276
    assert torch.randint(2**31, (2,), generator=seeded("batch", 0, 1)).tolist() == [614543456, 1278740487]


def test_seeds_are_independent():
    torch.manual_seed(1)
    first = torch.rand(4, generator=seeded("case", 0, "P1"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(4, generator=seeded("case", 0, "P1")), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [seeded("case", 0, "P2"), seeded("case", 1, "P1"), seeded("batch", 0, "P1"), seeded("case", 0)]
    assert not any(torch.equal(torch.rand(4, generator=other), first) for other in others)


def test_a_black_slice_is_one_that_was_not_acquired(tmp_path):
    """Of three slices, the middle one lies beyond t1c's field of view."""
    images = np.broadcast_to(np.array([0.2, 0.4, 0.6])[:, None, None, None], (3, 3, 4, 4)).copy()
    images[1, 1] = 0
    case = made(tmp_path, "P", images)
    batches = Batches([case], MODALITIES, size=(4, 4), batch_size=6, seed=0)
    for batch in (batches[0], batches.fixed(3)):
        for image, present in zip(batch.images, batch.present, strict=True):
            middle = abs(float(image[0, 0, 0]) - 0.4) < 1e-3
            assert present.tolist() == [1, float(not middle), 1]
    assert sorted(batches[0].present[:, 1].tolist()) == [0, 0, 1, 1, 1, 1]
    volumes = Batches([case], MODALITIES, size=(3, 4, 4), batch_size=1, seed=0)
    assert volumes[0].present.tolist() == [[1, 1, 1]]


def test_neighbouring_slices_come_along():
    assert around(0, 3, 5) == [0, 0, 1]
    assert around(4, 5, 5) == [2, 3, 4, 4, 4]
    assert around(2, 1, 5) == [2]
    volume = torch.rand(2, 6, 8, 8)
    planes = as_inputs(volume, [0, 3], 2, 4, 3)
    assert planes.shape == (2, 6, 8, 8)
    for row, chosen in enumerate(([0, 0, 1], [2, 3, 4])):
        for modality in (0, 1):
            assert torch.equal(planes[row, 3 * modality : 3 * modality + 3], volume[modality, chosen])


def test_batches_with_context_have_the_same_slices_in_their_middle(prepared):
    cases = PreparedSet(prepared).part("train")
    form = {"size": (16, 12), "batch_size": 5, "seed": 1}
    plain, wide = Batches(cases, MODALITIES, **form), Batches(cases, MODALITIES, context=3, **form)
    for step in (0, 3):
        one, three = plain[step], wide[step]
        assert torch.equal(one.images, three.images)
        assert torch.equal(one.present, three.present)
        assert three.around.shape == (5, 3 * len(MODALITIES), 16, 12)
        assert torch.equal(three.around[:, 1::3], one.around)
        assert torch.equal(one.around, one.images)
    fixed = wide.fixed(4)
    index, z = wide.items[0]
    whole = wide.read(index, -1)
    padded = fit_size(whole, (16, 12), [0.5, 0.5])
    assert torch.equal(fixed.around[0], padded[:, around(z, 3, whole.shape[1])].flatten(0, 1))
