"""A prepared dataset is read as it was written; damage is noticed."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_study
from torch.utils.data import DataLoader

from crossmr.data.dataset import PreparedDataset
from crossmr.data.patients import SPLITS
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import ConfigError, SetError
from crossmr.files import digest, write_json
from crossmr.tensors import PLANES, crop_or_pad, foreground_slices

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


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A copy of the dataset, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "set")


def test_a_dataset_is_what_was_prepared(prepared):
    opened = PreparedDataset(prepared)
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert [case.name for case in opened.cases] == [f"P-0000{number}-000" for number in range(5)]
    for case in opened.cases:
        record = manifest["cases"][case.name]
        assert (case.patient, case.split) == (case.name[:-4], record["part"])
        assert case.modalities == tuple(record["modalities"])
        assert case.has_labels == (case.name == "P-00001-000")
        assert not case.masked_background
        voxels = (case.masks()[:, 1] > 0).sum((1, 2)).tolist() if case.has_labels else []
        assert case.lesion_voxels == tuple(voxels)
        assert list(case.air) == list(case.modalities)
        for modality, fitted in record["normalisation"].items():
            assert case.air[modality] == (fitted["air"] - fitted["low"]) / (fitted["high"] - fitted["low"]) < 0
        assert case.foreground_voxels == tuple(case.masks()[:, 0].sum((1, 2)).tolist())
        assert case.images().shape == (len(case.foreground_voxels), len(case.modalities), *case.masks().shape[2:])
        volume = case.volume("t2f")
        assert volume.dtype == np.float32
        np.testing.assert_array_equal(volume, case.images()[:, case.modalities.index("t2f")])
    assert (opened.cases[1].masks()[:, 1] == 3).sum() == sum(opened.cases[1].lesion_voxels) == 4 * 4 * 3


def test_every_case_is_in_one_split(prepared):
    opened = PreparedDataset(str(prepared))
    splits = [opened.split(name) for name in SPLITS]
    assert all(splits)
    assert sorted(case.name for cases in splits for case in cases) == [case.name for case in opened.cases]
    with pytest.raises(
        ConfigError, match="'training' is not a split of a prepared dataset; expected one of train, val, test"
    ):
        opened.split("training")


def loaded(dataset, **settings):
    return list(DataLoader(dataset, **settings))


def test_items_are_whole_heads(prepared):
    dataset = PreparedDataset(prepared)
    assert len(dataset) == 5
    assert dataset.modalities == MODALITIES
    for case, item in zip(dataset.cases, dataset, strict=True):
        assert list(item) == ["image", "head", "label", "present", "spacing_mm", "case", "patient"]
        assert (item["case"], item["patient"]) == (case.name, case.patient)
        assert item["image"].shape == (3, *case.shape)
        assert item["image"].dtype == torch.float32
        assert 0 <= item["image"].min() < item["image"].max() <= 1
        for channel, modality in enumerate(MODALITIES):
            there = modality in case.modalities
            wanted = case.volume(modality) if there else np.zeros(case.shape)
            np.testing.assert_array_equal(item["image"][channel], wanted)
            assert item["present"][channel] == there
        np.testing.assert_array_equal(item["head"][0], case.masks()[:, 0])
        np.testing.assert_array_equal(item["label"][0], case.masks()[:, 1])
        assert item["head"].dtype == torch.float32
        assert item["label"].dtype == torch.int64
        assert item["spacing_mm"].tolist() == list(case.spacing_mm) == [7, 6, 6]
        assert item["image"][:, item["head"][0] == 0].max() == 0
    assert sum(int(item["label"].sum()) for item in dataset) == 3 * 4 * 4 * 3
    with pytest.raises(IndexError):
        dataset[5]


def test_items_are_of_one_split_and_of_the_modalities_asked_for(prepared):
    splits = {name: PreparedDataset(prepared, split=name, modalities=("FLAIR", "T1ce")) for name in SPLITS}
    assert sum(map(len, splits.values())) == 5
    for name, dataset in splits.items():
        assert [item["case"] for item in dataset] == [case.name for case in dataset.split(name)]
        assert dataset.modalities == ("t2f", "t1c")
        for item in dataset:
            case = next(case for case in dataset.cases if case.name == item["case"])
            np.testing.assert_array_equal(item["image"][0], case.volume("t2f"))
    assert PreparedDataset(prepared, modalities="t1n")[0]["image"].shape[0] == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [(19, 21), (40, 40), (9, 20, 33)])
def test_a_data_loader_takes_items_of_one_size(prepared, size, workers):
    dataset = PreparedDataset(prepared, size=size)
    slices = len(size) == 2
    foreground = [len(foreground_slices(case.foreground_voxels)) for case in dataset.cases]
    assert len(dataset) == (sum(foreground) if slices else 5) > 4
    batches = loaded(dataset, batch_size=4, num_workers=workers)
    assert sum(len(batch["case"]) for batch in batches) == len(dataset)
    assert batches[0]["image"].shape == (4, 3, *size)
    assert batches[0]["head"].shape == batches[0]["label"].shape == (4, 1, *size)
    assert batches[0]["present"].shape == (4, 3)
    case, z = dataset.cases[0], int(batches[0]["slice"][0]) if slices else slice(None)
    assert z == foreground_slices(case.foreground_voxels)[0] if slices else "slice" not in batches[0]
    wanted = crop_or_pad(torch.from_numpy(case.volume("t2f")[z]), size, [0.5] * len(size))
    assert torch.equal(batches[0]["image"][0, 2], wanted)


def test_a_size_of_whole_numbers_as_floats_is_one_of_voxels(prepared):
    dataset = PreparedDataset(prepared, size=(8.0, np.int64(16), 16))
    assert dataset.size == (8, 16, 16)
    assert dataset[0]["image"].shape == (3, 8, 16, 16)


def test_items_that_cannot_be_are_refused(prepared, copy):
    with pytest.raises(ConfigError, match="'training' is not a split"):
        PreparedDataset(prepared, split="training")
    with pytest.raises(ConfigError, match="has pdw; it has t1n, t1c, t2f"):
        PreparedDataset(prepared, modalities=("t1n", "PD"))
    for size in ((8,), (8, 8, 8, 8), (8, 0), (8.5, 16, 16), (8, np.nan), ("8", "8"), 8, (True, 8)):
        with pytest.raises(ConfigError, match=r"expected \(Y, X\) for slices"):
            PreparedDataset(prepared, size=size)
    dataset = PreparedDataset(copy)
    (copy / "cases" / "P-00000-000" / "masks.npy").unlink()
    with pytest.raises(SetError, match=r"masks\.npy is missing or damaged"):
        dataset[0]


def test_arrays_are_mapped_and_not_writable(prepared):
    case = PreparedDataset(prepared).cases[0]
    for array, dtype in ((case.images(), np.float16), (case.masks(), np.uint8)):
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0, 0] = 1


def test_the_fingerprint_is_of_pixels_and_split(prepared, tmp_path):
    cohort = prepared.parent / "cohort"
    prepare(cohort, tmp_path / "again")
    prepare(cohort, tmp_path / "split", PrepareSettings(split=Split(seed=1)))
    fingerprint = PreparedDataset(prepared).fingerprint
    assert PreparedDataset(tmp_path / "again").fingerprint == fingerprint
    assert PreparedDataset(tmp_path / "split").fingerprint != fingerprint
    shutil.copytree(prepared, tmp_path / "whose")
    for change in ({"patient": "another"}, {"part": "another"}, {"spacing_mm": [9.0, 9.0, 9.0]}):
        manifest = json.loads((prepared / "manifest.json").read_text())
        next(iter(manifest["cases"].values())).update(change)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        write_json(tmp_path / "whose" / "manifest.json", {**body, "sha256": digest(body)})
        assert PreparedDataset(tmp_path / "whose").fingerprint != fingerprint
    shutil.copytree(cohort, tmp_path / "cohort")
    write_study(tmp_path / "cohort", "P-00000-000", seed=99)
    prepare(tmp_path / "cohort", tmp_path / "pixels")
    assert PreparedDataset(tmp_path / "pixels").fingerprint != fingerprint


def test_a_folder_without_a_dataset(tmp_path):
    with pytest.raises(SetError, match=r"has no manifest\.json\. Make one with: crossmr prepare"):
        PreparedDataset(tmp_path)


def test_a_flipped_byte_in_the_manifest(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for position in np.linspace(3, len(content) - 80, 60).astype(int):
        if content[position : position + 1].isspace():
            continue
        damaged = bytearray(content)
        damaged[position] ^= 1
        with contextlib.suppress(ValueError):
            if json.loads(damaged) == json.loads(content):  # the last of 17 digits
                continue
        path.write_bytes(damaged)
        with pytest.raises(SetError, match=r"manifest\.json (does not match its own SHA-256|is damaged)"):
            PreparedDataset(copy)
    path.write_bytes(content)
    PreparedDataset(copy)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(SetError, match=r"manifest\.json is damaged"):
        PreparedDataset(copy)


@pytest.mark.parametrize(("key", "value"), [("format_version", 2), ("format", "nnunet"), ("format", None)])
def test_another_version(copy, key, value):
    body: dict[str, Any] = json.loads((copy / "manifest.json").read_text())
    del body["sha256"]
    body[key] = value
    (copy / "manifest.json").write_text(json.dumps({**body, "sha256": digest(body)}))
    with pytest.raises(SetError, match=r"another format or version than crossmr-set 4\. Run prepare again"):
        PreparedDataset(copy)


@pytest.mark.parametrize("name", ["images.npy", "masks.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "zip", "objects", "flipped"])
def test_a_damaged_array(copy, name, damage):
    case = PreparedDataset(copy).cases[3]
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


def test_a_case_in_another_plane_is_the_same_head(prepared):
    for case in PreparedDataset(prepared).cases:
        images, masks = case.images(), case.masks()
        assert case.in_plane("axial") is case
        for plane, (slices, rows, columns) in PLANES.items():
            other = case.in_plane(plane)
            order = (slices, rows, columns)
            np.testing.assert_array_equal(
                other.volume(case.modalities[0]), case.volume(case.modalities[0]).transpose(order)
            )
            np.testing.assert_array_equal(np.asarray(other.masks())[:, 1], np.asarray(masks)[:, 1].transpose(order))
            assert other.images().shape[1] == images.shape[1]
            assert other.shape == tuple(case.shape[axis] for axis in order)
            assert other.spacing_mm == tuple(case.spacing_mm[axis] for axis in order)
            assert sum(other.foreground_voxels) == sum(case.foreground_voxels)
            assert sum(other.lesion_voxels) == sum(case.lesion_voxels)
            assert len(other.foreground_voxels) == other.shape[0]
