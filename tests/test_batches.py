"""A batch is a pure function of seed and step."""

import pickle
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_study
from torch.utils.data import DataLoader

from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.prepare import prepare
from crossmr.errors import SetError
from crossmr.ranks import Ranks
from crossmr.tensors import PLANES, crop_or_pad, foreground_slices, neighbours
from crossmr.training.augmentation import AugmentationConfig
from crossmr.training.batches import Batches, BatchSettings, ImageBatch, VectorBatch, Vectors, mapped_at_once

MODALITIES = ("t1n", "t1c", "t2f")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Five patients, one of them without t1c."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(5):
        modalities = MODALITIES if number != 2 else ("t1n", "t2f")
        write_study(folder / "cohort", f"P-0000{number}-000", modalities, seed=number, lesion=number == 1)
    prepare(folder / "cohort", folder / "set")
    return folder / "set"


def case_of(
    folder: Path,
    name: str,
    images: np.ndarray,
    modalities: Sequence[str] = MODALITIES,
    labels: np.ndarray | None = None,
    spacing_mm: float = 1.0,
) -> Case:
    """A case of images (Z, M, Y, X), all of it head; with labels (Z, Y, X), where there are any."""
    (folder / name).mkdir(parents=True)
    np.save(folder / name / "images.npy", images.astype(np.float16))
    slices, _, *plane = images.shape
    masks = np.ones((slices, 2, *plane), np.uint8)
    masks[:, 1] = 0 if labels is None else labels
    np.save(folder / name / "masks.npy", masks)
    lesion = () if labels is None else tuple((labels > 0).sum((1, 2)).tolist())
    of_labels = {"has_labels": labels is not None, "lesion_voxels": lesion, "spacing_mm": (spacing_mm, 1.0, 1.0)}
    head = (plane[0] * plane[1],) * slices
    return Case(name, name, "train", tuple(modalities), head, False, folder=folder / name, **of_labels)


def numbered(folder: Path, slices: Sequence[int] = (5, 3, 6)) -> list[Case]:
    """Cases of 4 × 4 voxels, of which every slice holds a number of its own: 1, 2, 3, ..."""
    cases, first = [], 1
    for index, count in enumerate(slices):
        numbers = np.arange(first, first + count, dtype=np.float32)
        cases.append(case_of(folder, f"N{index}", np.broadcast_to(numbers[:, None, None, None], (count, 3, 4, 4))))
        first += count
    return cases


def equal(a: ImageBatch, b: ImageBatch) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_a_slice_is_read_without_the_volume(tmp_path):
    case = case_of(tmp_path, "large", np.zeros((100, 3, 160, 160)))  # 15 MB, a slice of which is 0.15 MB
    batches = Batches([case], MODALITIES, BatchSettings(size=(160, 160), batch_size=1, seed=0))
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
    one = case_of(tmp_path, "one", np.ones((1, 3, 4, 4)))
    batches = Batches([one] * 400, MODALITIES, BatchSettings(size=(4, 4), batch_size=1, seed=0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert all(batches.read(index, 0).sum() == 48 for index in range(400))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("limit", "cases"), [(256, 64), (1024, 256), (2**20, 4096), (-1, 4096)])
def test_half_of_the_open_files_allowed_stay_mapped(monkeypatch, limit, cases):
    resource = pytest.importorskip("resource", reason="limits of open files are Unix's")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert mapped_at_once() == cases


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_a_batch_depends_on_seed_and_step_only(prepared, size):
    cases = PreparedDataset(prepared).cases

    def batches(seed: int = 5) -> Batches:
        return Batches(cases, MODALITIES, BatchSettings(size=size, batch_size=3, seed=seed))

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
def test_processes_that_train_together_read_parts_of_the_same_batch(prepared, size, monkeypatch):
    form = BatchSettings(size, batch_size=5, seed=0, augmentation=AugmentationConfig(probability=0.5))
    cases, read, read_one = PreparedDataset(prepared).cases, [], Batches._read_all
    monkeypatch.setattr(Batches, "_read_all", lambda *given: read.append(given) or read_one(*given))
    whole = Batches(cases, MODALITIES, form)[2]
    del read[:]
    parts = [Batches(cases, MODALITIES, replace(form, shard=Ranks(rank, 3).shard(5)))[2] for rank in range(3)]
    assert [len(part.images) for part in parts] == [1, 2, 2]
    assert len(read) == 5
    assert equal(ImageBatch(*map(torch.cat, zip(*parts, strict=True))), whole)


def test_other_processes_read_the_same_batches(prepared):
    batches = Batches(PreparedDataset(prepared).cases, MODALITIES, BatchSettings(size=(20, 24), batch_size=3, seed=5))
    want = [batches[step] for step in range(4)]
    assert len(pickle.dumps(batches)) < 50_000  # what is mapped stays here
    assert equal(pickle.loads(pickle.dumps(batches))[3], want[3])
    for batch, other in zip(want, DataLoader(batches, None, sampler=range(4), num_workers=2), strict=True):
        assert type(other) is ImageBatch
        assert equal(batch, other)


def test_vectors_are_drawn_from_seed_and_step_only():
    known = VectorBatch(torch.arange(20.0).reshape(10, 1, 2), torch.ones(10, 1))
    vectors = Vectors(known, batch_size=4, seed=0)
    assert vectors.steps_per_epoch == 3
    assert torch.equal(vectors[7].pooled, Vectors(known, batch_size=4, seed=0)[7].pooled)
    drawn = torch.cat([vectors[step].pooled for step in range(30)])
    assert set(drawn[:, 0, 0].tolist()) == {2.0 * n for n in range(10)}
    assert not torch.equal(vectors[7].pooled, vectors[8].pooled)


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_the_shapes_of_a_batch(prepared, size):
    batches = Batches(PreparedDataset(prepared).cases, MODALITIES, BatchSettings(size=size, batch_size=4, seed=0))
    batch = batches[0]
    assert batch.images.shape == (4, 3, *size)
    assert batch.present.shape == (4, 3)
    assert batch.case.shape == (4,)
    assert batch.lesion.shape == (4, 1, *size)
    assert (batch.images.dtype, batch.present.dtype, batch.case.dtype) == (torch.float32, torch.float32, torch.int64)
    assert 0 <= batch.images.min() < batch.images.max() <= 1


@pytest.mark.parametrize("batch_size", [1, 4, 5, 20])
def test_every_epoch_sees_every_slice_once(tmp_path, batch_size):
    batches = Batches(numbered(tmp_path), MODALITIES, BatchSettings(size=(4, 4), batch_size=batch_size, seed=0))
    assert len(batches.items) == 14
    assert batches.steps_per_epoch == -(-14 // batch_size)
    steps = [batches[step] for step in range(3 * batches.steps_per_epoch)]
    numbers = torch.cat([batch.images[:, 0, 0, 0] for batch in steps]).int().tolist()
    owners = torch.cat([batch.case for batch in steps]).tolist()
    epochs = [numbers[start : start + 14] for start in (0, 14, 28)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 15))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [0 if n <= 5 else 1 if n <= 8 else 2 for n in numbers] == owners


def test_every_epoch_sees_every_volume_once(tmp_path):
    batches = Batches(numbered(tmp_path), MODALITIES, BatchSettings(size=(8, 4, 4), batch_size=2, seed=0))
    order = torch.cat([batches[step].case for step in range(6)]).tolist()
    assert [sorted(order[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4


def test_slices_with_little_head_are_left_out(prepared):
    cases = PreparedDataset(prepared).cases
    batches = Batches(cases, MODALITIES, BatchSettings(size=(20, 24), batch_size=1, seed=0))
    assert batches.items == [(i, z) for i, c in enumerate(cases) for z in foreground_slices(c.foreground_voxels)]
    assert len(batches.items) < sum(len(case.foreground_voxels) for case in cases)


@pytest.mark.parametrize("size", [(20, 24), (16, 20, 24)], ids=["2D", "3D"])
def test_what_a_patient_lacks_is_zero_and_flagged(prepared, size):
    cases = PreparedDataset(prepared).cases
    batches = Batches(cases, ("t1c", "t2f", "t2w"), BatchSettings(size=size, batch_size=40, seed=0))
    batch = batches[0]
    assert {2} < set(batch.case.tolist())
    for images, present, case in zip(batch.images, batch.present, batch.case.tolist(), strict=True):
        assert present.tolist() == [float(case != 2), 1, 0]
        assert [bool(image.any()) for image in images] == [case != 2, True, False]


def test_channels_are_by_name(prepared):
    case = PreparedDataset(prepared).cases[2]
    batches = Batches([case], ("t2f", "t1c", "t1n"), BatchSettings(size=(20, 24), batch_size=1, seed=0))
    volume = batches.read(0, -1)
    np.testing.assert_array_equal(volume[0], case.volume("t2f"))
    np.testing.assert_array_equal(volume[2], case.volume("t1n"))
    assert not volume[1].any()
    assert torch.equal(batches.read(0, 7), volume[:, 7])


def test_flips_are_left_right_only(tmp_path):
    rng = np.random.default_rng(0)
    case = case_of(tmp_path, "P", rng.random((4, 3, 5, 6)))
    whole = torch.from_numpy(case.images().astype(np.float32))
    for size, originals in (((5, 6), list(whole)), ((4, 5, 6), [whole.transpose(0, 1)])):
        batches = Batches([case], MODALITIES, BatchSettings(size=size, batch_size=8, seed=0))
        images = torch.cat([batches[step].images for step in range(10)])
        plain = [any(torch.equal(image, one) for one in originals) for image in images]
        flipped = [any(torch.equal(image, one.flip(-1)) for one in originals) for image in images]
        assert all(a != b for a, b in zip(plain, flipped, strict=True))
        assert 20 < sum(flipped) < 60
        unflipped = Batches([case], MODALITIES, BatchSettings(size=size, batch_size=8, seed=0, flip=False))[0].images
        assert all(any(torch.equal(image, one) for one in originals) for image in unflipped)


def test_crops_reach_every_place(tmp_path):
    grid = np.arange(6 * 7, dtype=np.float32).reshape(1, 1, 6, 7)
    case = case_of(tmp_path, "P", grid, ("t1n",))
    batches = Batches([case], ("t1n",), BatchSettings(size=(4, 4), batch_size=200, seed=0, flip=False))
    images = batches[0].images[:, 0]
    assert set(images[:, 0, 0].int().tolist()) == {7 * y + x for y in range(3) for x in range(4)}
    for image in images:
        assert torch.equal(image - image[0, 0], torch.from_numpy(grid[0, 0, :4, :4]))


def test_crops_and_flips_are_drawn_from_seed_and_step(tmp_path):
    case = case_of(tmp_path, "P", np.random.default_rng(0).random((1, 3, 40, 40)))

    def images(seed: int, step: int) -> torch.Tensor:
        batches = Batches([case], MODALITIES, BatchSettings(size=(4, 4), batch_size=8, seed=seed))
        return batches[step].images

    assert torch.equal(images(0, 0), images(0, 0))
    assert not any(torch.equal(images(0, 0), images(*other)) for other in [(0, 1), (1, 0), (1, 1)])


def test_fixed_items_are_spread_and_central(tmp_path):
    batches = Batches(numbered(tmp_path), MODALITIES, BatchSettings(size=(2, 8), batch_size=2, seed=0))
    batch = batches.validation_batch(5)
    assert batch.images.shape == (5, 3, 2, 8)
    assert batch.images[:, 0, 0, 4].tolist() == [1, 4, 7, 11, 14]
    assert batch.images[0, 0].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 2
    assert batch.case.tolist() == [0, 0, 1, 2, 2]
    assert batch.present.tolist() == [[1, 1, 1]] * 5
    assert equal(batch, batches.validation_batch(5))
    assert len(batches.validation_batch(99).images) == 14
    volumes = Batches(batches.cases, MODALITIES, BatchSettings(size=(6, 4, 4), batch_size=2, seed=0)).validation_batch(
        2
    )
    assert volumes.case.tolist() == [0, 2]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(SetError, match="needs t1n, t2f"):
        Batches([], ("t1n", "t2f"), BatchSettings(size=(4, 4), batch_size=2, seed=0))


def test_a_black_slice_is_one_that_was_not_acquired(tmp_path):
    """Of three slices, the middle one lies beyond t1c's field of view."""
    images = np.broadcast_to(np.array([0.2, 0.4, 0.6])[:, None, None, None], (3, 3, 4, 4)).copy()
    images[1, 1] = 0
    case = case_of(tmp_path, "P", images)
    batches = Batches([case], MODALITIES, BatchSettings(size=(4, 4), batch_size=6, seed=0))
    for batch in (batches[0], batches.validation_batch(3)):
        for image, present in zip(batch.images, batch.present, strict=True):
            middle = abs(float(image[0, 0, 0]) - 0.4) < 1e-3
            assert present.tolist() == [1, float(not middle), 1]
    assert sorted(batches[0].present[:, 1].tolist()) == [0, 0, 1, 1, 1, 1]
    volumes = Batches([case], MODALITIES, BatchSettings(size=(3, 4, 4), batch_size=1, seed=0))
    assert volumes[0].present.tolist() == [[1, 1, 1]]


def test_batches_with_context_have_the_same_slices_in_their_middle(prepared):
    cases = [replace(case, spacing_mm=(1.2, 6.0, 6.0)) for case in PreparedDataset(prepared).split("train")]
    form = {"size": (16, 12), "batch_size": 5, "seed": 1}
    plain, wide = (
        Batches(cases, MODALITIES, BatchSettings(**form)),
        Batches(cases, MODALITIES, BatchSettings(context=3, **form)),
    )
    for step in (0, 3):
        one, three = plain[step], wide[step]
        assert torch.equal(one.images, three.images)
        assert torch.equal(one.present, three.present)
        assert three.neighbours.shape == (5, 3 * len(MODALITIES), 16, 12)
        assert torch.equal(three.neighbours[:, 1::3], one.neighbours)
        assert torch.equal(one.neighbours, one.images)
    fixed = wide.validation_batch(4)
    index, z = wide.items[0]
    whole = wide.read(index, -1)
    padded = crop_or_pad(whole, (16, 12), [0.5, 0.5])
    around = neighbours(z, 3, whole.shape[1], cases[index].spacing_mm[0])
    assert torch.equal(fixed.neighbours[0], padded[:, around].flatten(0, 1))


# Neighbours and lesions


@pytest.mark.parametrize(("spacing_mm", "step"), [(0.5, 2), (1.0, 1), (2.0, 1), (3.0, 0), (7.0, 0)])
def test_neighbours_are_a_millimetre_apart_and_thick_slices_repeat_themselves(tmp_path, spacing_mm, step):
    numbers = np.broadcast_to(np.arange(1, 10)[:, None, None, None], (9, 3, 4, 4))
    case = case_of(tmp_path, "P", numbers, spacing_mm=spacing_mm)
    batches = Batches([case], MODALITIES, BatchSettings(size=(4, 4), batch_size=9, seed=0, context=3))
    for number, around in zip(batches[0].images[:, 0, 0, 0], batches[0].neighbours[:, :3, 0, 0], strict=True):
        want = [max(number - step, 1), number, min(number + step, 9)]
        assert around.tolist() == [float(value) for value in want]


def lesion_case(folder: Path) -> tuple[Case, np.ndarray]:
    """Six slices, of which two have a lesion, by what the images hold: 2, 3 where it enhances, else 1."""
    labels = np.zeros((6, 4, 6), np.uint8)
    labels[1, 1, 2], labels[4, 2:, 3:] = 1, 3
    images = (1 + (labels > 0) + (labels == 3))[:, None] + np.zeros((6, 3, 4, 6))
    return case_of(folder, "L", images, labels=labels), labels


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_slices_with_a_lesion_are_drawn_so_often_per_epoch(tmp_path, draws):
    case, _ = lesion_case(tmp_path)
    cases = [case, replace(case, has_labels=False, lesion_voxels=())]
    settings = BatchSettings(size=(4, 6), batch_size=5, seed=0, lesion_draws=draws)
    batches = Batches(cases, MODALITIES, settings)
    assert len(batches.items) == 12
    epoch = 10 + 2 * draws
    assert batches.steps_per_epoch == -(-epoch // 5)
    steps = [batches[step] for step in range(epoch)]  # five epochs
    has_lesion = torch.cat([batch.lesion.flatten(1).any(1) for batch in steps]).reshape(5, epoch)
    assert has_lesion.sum(1).tolist() == [2 * draws] * 5
    owners = torch.cat([batch.case for batch in steps]).reshape(5, epoch)
    assert owners.sum(1).tolist() == [6] * 5
    assert len(batches.validation_batch(99).images) == 12  # validation sees each once
    volumes = Batches(cases, MODALITIES, replace(settings, size=(6, 4, 6)))
    assert volumes.epoch_items == volumes.items == [(0, -1), (1, -1)]


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("size", [(3, 5), (4, 8), (5, 3, 4)], ids=["crop", "pad", "3D"])
def test_the_lesion_is_cropped_and_flipped_with_its_image(tmp_path, size, context):
    if len(size) == 3 and context > 1:
        return
    case, _ = lesion_case(tmp_path)
    batches = Batches([case], MODALITIES, BatchSettings(size=size, batch_size=8, seed=0, context=context))
    for batch in (*(batches[step] for step in range(4)), batches.validation_batch(6)):
        assert batch.lesion.shape == (len(batch.images), 1, *size)
        assert torch.equal(batch.lesion[:, 0], (batch.images[:, 0] - 1).clamp(min=0))
        assert batch.lesion.any()
        assert batch.neighbours.shape[1] == 3 * context
    unlabelled = replace(case, has_labels=False)
    assert not Batches([unlabelled], MODALITIES, BatchSettings(size=size, batch_size=8, seed=0))[0].lesion.any()


def test_sagittal_slices_have_no_sides_to_be_mirrored(tmp_path):
    """Their columns run upwards."""
    whole, flipped = case_of(tmp_path, "P", np.random.default_rng(0).random((4, 3, 5, 6))), {}
    for plane in PLANES:
        case = whole.in_plane(plane)
        originals = list(torch.from_numpy(case.images().astype(np.float32)))
        batches = Batches([case], MODALITIES, BatchSettings(size=case.images().shape[2:], batch_size=8, seed=0))
        images = torch.cat([batches[step].images for step in range(10)])
        flipped[plane] = sum(not any(torch.equal(image, one) for one in originals) for image in images)
    assert case.images().shape == (6, 3, 5, 4)
    assert 20 < flipped["axial"] < 60
    assert 20 < flipped["coronal"] < 60
    assert flipped["sagittal"] == 0
