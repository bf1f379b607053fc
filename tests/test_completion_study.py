"""Completion: what is missing is filled on the exact grid, the same whatever the batch, the order or the cohort."""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import image, make_head, save_untrained, sha256, tree, unguided, voxels, write_images, write_study
from dicoms import write_series
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from torch import nn

from crossmr.cli import main
from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.inputs import what_to_fill
from crossmr.completion.study import _as_images, _fit_map, complete, complete_study
from crossmr.data.head import DARKEST
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.errors import ConfigError, ModelError, NamingError, StudyError
from crossmr.networks import inference
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import INHERITED, read_model
from crossmr.picture import window
from crossmr.tensors import pad_to_multiple, seeded

SHAPE = (26, 28, 22)
SETTINGS = InferenceSettings(ddim_steps=3, device="cpu", precision="float32")
TURN = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)


def stored_as(codes, turn=None):
    """A change for `write_images`: the same head, its axes stored otherwise, perhaps oblique."""

    def change(head):
        affine = head.affine.copy()
        if turn is not None:
            affine[:3, :3] = turn @ affine[:3, :3]
        affine[:3, 3] = (-71.3, 42.7, 13.1)
        turned = nib.Nifti1Image(np.asarray(head.dataobj), affine)
        turned = turned.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)))
        turned.header.set_xyzt_units("mm", "sec")
        turned.set_sform(turned.affine, code=4)
        turned.set_qform(turned.affine, code=1)
        return turned

    return change


def with_settings(**changes):
    return replace(SETTINGS, **changes)


class Copy(nn.Module):
    """Stands in for the C-UNet: every target is the first source."""

    def __init__(self, targets=2):
        super().__init__()
        self.targets = targets

    def forward(self, sources, y_0=None):
        return sources[:, :1].repeat_interleave(self.targets, dim=1)


# What is filled


def test_fills_exactly_what_is_missing(model, tmp_path):
    study = write_images(tmp_path, "P", ("t1n", "t1c", "t2w"))
    result = complete(study, model, SETTINGS)
    assert list(result.images) == ["t2f"]
    assert result.manifest["acquired"] == ["t1n", "t1c", "t2w"]
    assert result.manifest["not_filled"] == {}
    data = np.asarray(result.images["t2f"].dataobj)
    assert data.dtype == np.float32
    assert data.min() >= 0
    assert data.max() <= 1
    inside = data[(data > DARKEST) & (data < 1)]
    assert inside.size > (data > 0).sum() / 2  # a result that is clipped everywhere would make these tests empty
    assert inside.std() > 0.01


def test_header_says_synthetic_and_how_to_show_it(model, tmp_path):
    result = complete(write_images(tmp_path, "P", ("t1n", "t2w")), model, SETTINGS)
    for modality, made in result.images.items():
        assert bytes(made.header["descrip"].item()).startswith(f"SYNTHETIC {modality} by crossmr".encode())
        shown = float(made.header["cal_min"]), float(made.header["cal_max"])
        assert shown == pytest.approx(window(made.get_fdata(dtype=np.float32)))
        assert made.header.get_data_dtype() == np.float32
        assert struct.unpack("<ff", made.to_bytes()[112:120]) == (1, 0)  # scl_slope and scl_inter, as written


def test_description_fits_the_header_whatever_the_sources_are_called(tmp_path):
    sources = ("t1n", "susceptibilityweighted", "apparentdiffusioncoefficient", "protondensityweighted")
    folder = save_untrained(tmp_path / "model", sources=sources, guidance="none")
    heads = {name: image(make_head("t1n", seed=k, shape=SHAPE)) for k, name in enumerate(sources)}
    made = complete(heads, folder, SETTINGS).images["t2f"]
    assert len(made.header["descrip"].item()) == 79


def test_python_takes_a_folder_paths_and_images_alike_and_writes_nothing(model_folder, tmp_path, monkeypatch):
    study = write_images(tmp_path / "cohort", "P", ("t1n", "t2w"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = tree(tmp_path)
    paths = {m: study / f"P-{m}.nii.gz" for m in ("t2w", "t1n")}
    ways = [
        complete(study, model_folder, SETTINGS),
        complete(str(study), str(model_folder), SETTINGS),
        complete(paths, model_folder, SETTINGS, case="P"),
        complete({m: str(path) for m, path in paths.items()}, model_folder, SETTINGS, case="P"),
        complete({m: nib.load(path) for m, path in paths.items()}, model_folder, SETTINGS, case="P"),
        complete({"T1": paths["t1n"], "T2": paths["t2w"]}, model_folder, SETTINGS, case="P"),
    ]
    assert tree(tmp_path) == before
    first = {m: made.to_bytes() for m, made in ways[0].images.items()}
    assert set(first) == {"t1c", "t2f"}
    for way in ways[1:]:
        assert {m: made.to_bytes() for m, made in way.images.items()} == first
    hashes = {m: {"file": path.name, "sha256": sha256(path)} for m, path in paths.items()}
    assert [way.manifest["inputs"] for way in ways] == [hashes, hashes, hashes, hashes, {}, hashes]


@pytest.mark.parametrize("codes", ["LPS", "SRA"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_arrays_with_their_affine_are_images(model, tmp_path, codes, dtype):
    study = write_images(tmp_path, "P", ("t1n", "t2w"), change=stored_as(codes, TURN))
    images = {m: nib.load(study / f"P-{m}.nii.gz") for m in ("t1n", "t2w")}
    whole = {m: np.asarray(i.dataobj).round().astype(np.float32) for m, i in images.items()}
    images = {m: nib.Nifti1Image(whole[m], i.affine) for m, i in images.items()}
    pairs = {m: (whole[m].astype(dtype), i.affine) for m, i in images.items()}
    wanted, made = (complete(one, model, SETTINGS) for one in (images, pairs))
    assert list(made.images) == ["t1c", "t2f"]
    for modality, image_made in made.images.items():
        np.testing.assert_array_equal(image_made.dataobj, wanted.images[modality].dataobj)
        np.testing.assert_array_equal(image_made.affine, images["t1n"].affine)
        assert image_made.shape == whole["t1n"].shape
        assert image_made.header.get_xyzt_units()[0] == "mm"
    tensors = {m: (torch.from_numpy(array), torch.from_numpy(affine)) for m, (array, affine) in pairs.items()}
    np.testing.assert_array_equal(complete(tensors, model, SETTINGS).images["t2f"].dataobj, made.images["t2f"].dataobj)


def test_python_refuses_what_it_cannot_tell_apart(model, tmp_path):
    head = image(make_head(shape=SHAPE))
    with pytest.raises(NamingError, match="t1n twice"):
        complete({"T1": head, "t1n": head}, model, SETTINGS)
    with pytest.raises(ConfigError, match="'T3' is not a modality"):
        complete({"T3": head}, model, SETTINGS)
    for case in "PQ":
        write_images(tmp_path, case, ("t1n", "t2w"))
    with pytest.raises(NamingError, match="holds 2 studies"):
        complete(tmp_path, model, SETTINGS)
    with pytest.raises(StudyError, match="no acquired volume"):
        complete({}, model, SETTINGS)
    with pytest.raises(ModelError, match="is not a model"):
        complete(tmp_path / "P", tmp_path, SETTINGS)


def test_only_wanted_targets_are_filled(model, tmp_path):
    study = write_images(tmp_path, "P", ("t1n", "t2w"))
    every = complete(study, model, SETTINGS)
    one = complete(study, model, with_settings(targets=("t2f",)))
    assert list(every.images) == ["t1c", "t2f"]
    assert list(one.images) == ["t2f"]
    assert one.manifest["not_filled"] == {}
    assert one.images["t2f"].to_bytes() == every.images["t2f"].to_bytes()
    assert one.manifest["settings"]["targets"] == ["t2f"]


@pytest.mark.parametrize("one", ["t2f", "FLAIR", ["t2f"], ("flair", "t2f"), "T2-FLAIR"])
def test_a_target_is_a_name_and_not_its_letters(model, tmp_path, one):
    study = write_images(tmp_path, "P", ("t1n", "t2w"))
    assert InferenceSettings(targets=one).targets == ("t2f",)
    for made in (complete(study, model, SETTINGS, targets=one), complete(study, model, with_settings(targets=one))):
        assert list(made.images) == ["t2f"]
        assert made.manifest["settings"]["targets"] == ["t2f"]
    assert list(complete(study, model, with_settings(targets=one), targets=["T1ce"]).images) == ["t1c"]


def test_all_targets_of_a_string_with_commas_are_made(model, tmp_path):
    study = write_images(tmp_path, "P", ("t1n", "t2w"))
    assert list(complete(study, model, SETTINGS, targets="FLAIR, T1ce").images) == ["t1c", "t2f"]
    with pytest.raises(ConfigError, match="'T1ce FLAIR' names several modalities"):
        complete(study, model, SETTINGS, targets="T1ce FLAIR")


def test_no_target_at_all_and_one_that_is_none_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="No modality is named"):
        InferenceSettings(targets=[])
    with pytest.raises(ConfigError, match="cannot synthesise f; it was trained for t1c, t2f"):
        complete(write_images(tmp_path, "P", ("t1n", "t2w")), model, SETTINGS, targets="f")


def test_says_why_a_gap_cannot_be_filled(model, tmp_path):
    result = complete(write_images(tmp_path, "P", ("t1n", "t2f")), model, SETTINGS)
    assert result.images == {}
    assert result.manifest["not_filled"] == {
        "t1c": "the model needs t1n, t2w, and t2w is missing",
        "t2w": "the model was trained for t1c, t2f only",
    }
    assert result.manifest["synthetic"] == {}


@pytest.mark.parametrize("target", ["t2w", "pdw"])
def test_a_target_the_model_does_not_know_is_refused_before_anything_runs(model, cohort, tmp_path, target):
    with pytest.raises(ConfigError, match=f"cannot synthesise {target}; it was trained for t1c, t2f"):
        complete(cohort / "Ann", model, with_settings(targets=(target,)))
    with pytest.raises(ConfigError, match=f"cannot synthesise {target}"):
        complete_cohort(cohort, tmp_path / "out", model, InferenceSettings(targets=("t1c", target)))
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_are_refused(model, cohort, tmp_path):
    with pytest.raises(ConfigError, match="--guidance is 'oracle'"):
        InferenceSettings(guidance="oracle")
    unconditional = read_model(save_untrained(tmp_path / "unconditional", conditional=False))
    unguided = read_model(save_untrained(tmp_path / "unguided", guidance="none"))
    for one, changes, match in (
        (unconditional, {"guidance": "sample"}, "trained without a condition; use guidance 'unconditional'"),
        (unconditional, {"ddim_steps": 0}, "0 sampling steps"),
        (model, {"guidance": "none"}, "always guided in training; .*crossmr evaluate MODEL --against BASELINE"),
        (unguided, {"guidance": "sample"}, "trained without guidance, so --guidance sample means nothing to it"),
        (unguided, {"guidance": "unconditional"}, "trained without guidance"),
    ):
        with pytest.raises(ConfigError, match=match):
            complete(cohort / "Ann", one, with_settings(**changes))
    assert complete(cohort / "Ann", unconditional, SETTINGS).manifest["settings"]["guidance"] == "unconditional"


@pytest.mark.parametrize(
    ("trained", "conditional", "default"),
    [
        ("joint", True, "sample"),
        ("joint", False, "unconditional"),
        ("last", True, "none"),
        ("none", False, "none"),
    ],
)
def test_guidance_is_as_the_model_was_trained(tmp_path, trained, conditional, default):
    model = read_model(save_untrained(tmp_path, guidance=trained, conditional=conditional))
    assert inference.chosen_guidance(model, SETTINGS) == default
    assert inference.samples_drawn(model, SETTINGS) == (default != "none")


def test_synthetic_volumes_are_no_inputs(model, tmp_path):
    study = write_images(tmp_path / "a", "P", ("t1n", "t2w"))
    plain = complete(study, model, SETTINGS)
    nib.save(plain.images["t2f"], study / "P-t2f.nii.gz")
    again = complete(study, model, SETTINGS)
    assert set(again.images) == {"t1c", "t2f"}
    assert again.manifest["acquired"] == ["t1n", "t2w"]
    assert set(again.manifest["inputs"]) == {"t1n", "t2w"}
    assert again.manifest["notes"] == ["t2f is itself synthetic, so it was not used as an input."]
    assert {m: i.to_bytes() for m, i in again.images.items()} == {m: i.to_bytes() for m, i in plain.images.items()}
    source = nib.load(study / "P-t2w.nii.gz")
    source.header["descrip"] = b"SYNTHETIC t2w by somebody"
    refused = complete({"t1n": study / "P-t1n.nii.gz", "t2w": source}, model, SETTINGS)
    assert refused.images == {}
    assert "t2w is missing" in refused.manifest["not_filled"]["t2f"]


# Geometry


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIL"])
@pytest.mark.parametrize("turn", [None, TURN], ids=["straight", "oblique"])
def test_output_lies_on_the_reference_grid_bit_for_bit(model, tmp_path, codes, turn):
    upright = complete(write_images(tmp_path / "ras", "P", ("t1n", "t2w")), model, SETTINGS)
    study = write_images(tmp_path / "as", "P", ("t1n", "t2w"), change=stored_as(codes, turn))
    second = nib.load(study / "P-t2w.nii.gz")  # says the same place otherwise: the first volume is the reference
    other = nib.Nifti1Image(np.asarray(second.dataobj), second.affine)
    other.set_qform(None, code=0)
    nib.save(other, study / "P-t2w.nii.gz")
    complete_cohort(tmp_path / "as", tmp_path / "out", model, SETTINGS)
    reference = nib.load(study / "P-t1n.nii.gz")
    if turn is None:
        assert "".join(nib.aff2axcodes(reference.affine)) == codes
    else:
        assert np.count_nonzero(reference.affine[:3, :3]) == 9
    for modality in ("t1c", "t2f"):
        made = nib.load(tmp_path / "out" / "P" / f"P-{modality}_synthetic.nii.gz")
        assert made.shape == reference.shape
        assert made.affine.tobytes() == reference.affine.tobytes()
        fields = ["dim", "pixdim", "xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z"]
        fields += ["qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
        for name in fields:
            assert made.header[name].tobytes() == reference.header[name].tobytes(), name
        assert (int(made.header["sform_code"]), int(made.header["qform_code"])) == (4, 1)
        back = made.as_reoriented(io_orientation(made.affine))  # the same head, whichever way it is stored
        np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(upright.images[modality].dataobj))


@pytest.mark.parametrize("dims", [2, 3])
def test_skull_stripped_input_gives_zero_outside_the_mask(model, tmp_path, dims):
    if dims == 3:
        model = save_untrained(tmp_path / "model", seed=2, spatial_dims=3, window=(16, 16, 16))
    study = write_images(tmp_path, "P", ("t1n", "t2w"), air=False)
    inside = voxels(study / "P-t1n.nii.gz") != 0
    assert 0.05 < inside.mean() < 0.5
    for made in complete(study, model, SETTINGS).images.values():
        data = np.asarray(made.dataobj)
        assert not data[~inside].any()
        assert (data[inside] > 0).mean() > 0.9


def test_the_head_is_filled_and_nothing_around_it(model, tmp_path):
    shape = (26, 28, 40)
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=shape)
    mask = load_study({m: study / f"P-{m}.nii.gz" for m in ("t1n", "t2w")}).mask.transpose(2, 1, 0)
    headless = ~mask.any((0, 1))
    assert 10 <= headless.sum() < 30
    data = np.asarray(complete(study, model, SETTINGS).images["t2f"].dataobj)
    np.testing.assert_array_equal(data > 0, mask)


@pytest.mark.parametrize("shape", [(27, 31, 23), (26, 29, 22), (25, 28, 21)])
@pytest.mark.parametrize("window", [None, (16, 16, 16), (40, 40, 40)], ids=["2D", "3D-smaller", "3D-larger"])
def test_padding_and_windows_move_no_voxel(tmp_path, shape, window):
    """With a network that copies its first source, the result is that source, normalised, where there is head."""
    dims = {} if window is None else {"spatial_dims": 3, "window": window}
    model = read_model(save_untrained(tmp_path / "model", guidance="last", **dims))
    model.synthesis = Copy()
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=shape, air=False)
    loaded = load_study({m: study / f"P-{m}.nii.gz" for m in ("t1n", "t2w")})
    for made in complete(study, model, SETTINGS).images.values():
        expected = loaded.normalised("t1n").transpose(2, 1, 0)
        assert expected.max() > 0.2
        np.testing.assert_allclose(np.asarray(made.dataobj), expected, atol=1e-5)


@pytest.mark.parametrize("window", [(16, 16, 16), (28, 32, 24)], ids=["smaller", "larger"])
def test_3d_model_completes_volumes_larger_and_smaller_than_its_window(tmp_path, window):
    folder = save_untrained(tmp_path / "model", spatial_dims=3, window=window)
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=(27, 31, 23))
    result = complete(study, folder, SETTINGS)
    for made in result.images.values():
        data = np.asarray(made.dataobj)
        assert data.shape == (27, 31, 23)
        assert 0 <= data.min() <= data.max() <= 1
        assert ((data > DARKEST) & (data < 1)).sum() > (data > 0).sum() / 2 > 500
    other = complete(study, folder, with_settings(seed=1))
    for modality, made in result.images.items():
        assert np.abs(np.asarray(other.images[modality].dataobj) - np.asarray(made.dataobj)).max() > 1e-4


def test_a_volume_that_fits_the_3d_window_is_one_pass_of_the_network(tmp_path):
    model = read_model(save_untrained(tmp_path / "model", spatial_dims=3, window=(16, 32, 32), guidance="none"))
    sources = torch.rand(2, 13, 17, 28, generator=torch.Generator().manual_seed(0))
    result = synthesise(model, HeadVolumes(by_name(sources), [1] * 13, 1.0), "P", SETTINGS).images
    padded = torch.zeros(1, 2, 16, 32, 32)
    padded[0, :, 2:15, 8:25, 2:30] = sources
    expected = unguided(model, model.network_input(padded, torch.ones(1, 2)))[0, :, 2:15, 8:25, 2:30]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# Guidance


@pytest.fixture(scope="module")
def last_folder(tmp_path_factory):
    """A model that can be guided in every way, or not at all, and says how far its images may be off."""
    return save_untrained(tmp_path_factory.mktemp("last"), guidance="last", uncertainty=True)


@pytest.fixture(scope="module")
def last(last_folder):
    return read_model(last_folder)


def by_name(sources):
    return {m: volume.numpy() for m, volume in zip(("t1n", "t2w"), sources, strict=True)}


def volume():
    """Sources (2, Z, Y, X) that need no padding, and the head's voxels: the first slice has none, the last one few."""
    return torch.rand(2, 5, 16, 32, generator=torch.Generator().manual_seed(3)), [0, 90, 90, 90, 5]


def slices_with_head():
    """The slices (4, 2, Y, X) that are synthesised."""
    return volume()[0][:, 1:].transpose(0, 1)


def synthesised(model, case="Ann", scans=None, **changes):
    sources, foreground = volume()
    return synthesise(model, HeadVolumes(by_name(sources), foreground, 1.0), case, with_settings(**changes), scans)


def inputs_with_head(model):
    """What the C-UNet reads of them."""
    return model.network_input(slices_with_head(), torch.ones(4, 2))


def guided_by_hand(model, y_0):
    """What a representation (1, T·D) makes of each slice, (T, 4, Y, X)."""
    inputs = inputs_with_head(model)
    with torch.no_grad():
        return model.image(model.predict(inputs, y_0.expand(len(inputs), -1))[0], inputs).transpose(0, 1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", ["sample", "unconditional", "none"])
def test_batched_equals_one_slice_at_a_time(last, cohort, monkeypatch, guidance):
    settings = with_settings(guidance=guidance, samples=None if guidance == "none" else 2)
    results = {}
    for size in (1, 5, 16):
        monkeypatch.setattr(inference, "BATCH", size)
        result = complete(cohort / "Ann", last, settings)
        results[size] = [made["t2f"].get_fdata() for made in (result.images, result.stds)]
    for size in (5, 16):
        for volume, alone in zip(results[size], results[1], strict=True):
            assert np.abs(volume - alone).max() < 1e-5


def test_seed_and_case_name_decide_the_sample(last, cohort):
    def data(case="study", **changes):
        study = {m: cohort / "Ann" / f"Ann-{m}.nii.gz" for m in ("t1n", "t2w")}
        return complete(study, last, with_settings(**changes), case=case).images["t2f"].get_fdata()

    for guidance in ("sample", "unconditional"):
        first = data(guidance=guidance)
        assert np.array_equal(data(guidance=guidance), first)
        for change in ({"seed": 1}, {"case": "another"}, {"samples": 2}):
            assert np.abs(data(**{"guidance": guidance, **change}) - first).max() > 1e-4, change
    unguided = data(guidance="none")
    assert np.array_equal(data(guidance="none", seed=1, case="another"), unguided)
    samples = [data(guidance=guidance) for guidance in ("sample", "unconditional")]
    for a, b in ((samples[0], unguided), (samples[1], unguided), (samples[0], samples[1])):
        assert np.abs(a - b).max() > 1e-4


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("guidance", ["sample", "unconditional"])
@pytest.mark.parametrize("kind", ["model", "last"])
def test_the_image_is_the_mean_of_the_guided_syntheses(kind, guidance, samples, request):
    """One vector for the whole volume per sample; the slices with enough head condition it."""
    model = request.getfixturevalue(kind)
    keys = [("case", 7, "Ann"), ("case", 7, "Ann", 1), ("case", 7, "Ann", 2)][: samples or 1]
    with torch.no_grad():
        pooled = model.pooled(slices_with_head()[:3]).mean(0, keepdim=True)
        condition = model.condition(pooled, torch.ones(1, 2)) if guidance == "sample" else None
        vectors = model.draw([seeded(*key) for key in keys], condition, torch.ones(1, 2), steps=3)
    guided = torch.stack([guided_by_hand(model, row[None]) for row in vectors])
    made = synthesised(model, guidance=guidance, samples=samples, seed=7)
    close(made.images[:, 1:], guided.mean(0))
    assert made.images[:, 0].abs().max() == 0  # no head, no synthesis
    if kind == "last":
        assert torch.equal(made.stds, synthesised(model).stds)  # of the unguided image, which the network learnt
    elif samples:
        close(made.stds[:, 1:], guided.std(0))
        assert made.stds[:, 0].abs().max() == 0
    else:
        assert made.stds is None
    if samples:
        assert (made.images[:, 1:] - guided[0]).abs().max() > 1e-3


def test_unguided_images_say_how_far_they_may_be_off(last_folder):
    model = read_model(last_folder)
    made = synthesised(model)
    with torch.no_grad():
        want = unguided(model, inputs_with_head(model))
        std = model.std(model.predict(inputs_with_head(model))[1])
    torch.testing.assert_close(made.images[:, 1:], want.transpose(0, 1))
    torch.testing.assert_close(made.stds[:, 1:], std.transpose(0, 1))
    model.calibration = {"variance": torch.tensor([[9.0, 0.0], [0.0, 0.04]])}
    scaled = synthesised(model).stds
    torch.testing.assert_close(scaled[0], 3 * made.stds[0])
    assert scaled[:, 0].abs().max() == 0  # no head, no doubt
    torch.testing.assert_close(scaled[1, 1:], torch.full_like(scaled[1, 1:], 0.2 / 15))


def test_targets_come_in_the_order_of_the_settings(last):
    both, one, turned = (synthesised(last, targets=targets) for targets in (None, ("t2f",), ("t2f", "t1c")))
    assert (both.targets, one.targets, turned.targets) == (("t1c", "t2f"), ("t2f",), ("t2f", "t1c"))
    for part in ("images", "stds"):
        whole = getattr(both, part)
        assert torch.equal(getattr(one, part), whole[1:])
        assert torch.equal(getattr(turned, part), whole.flip(0))


def test_the_std_lies_beside_the_image_of_a_model_with_uncertainty(last_folder, model, small, tmp_path):
    certain = read_model(last_folder)
    certain.calibration = {"variance": torch.tensor([[9.0, 0.01], [1.0, 0.02]])}
    out, again = tmp_path / "out", CohortSettings(overwrite=True)
    complete_cohort(small, out, certain, SETTINGS)
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert manifest["settings"]["guidance"] == "none"
    assert manifest["std"]["calibration"]["t1c"] == {"a": 9.0, "c": pytest.approx(0.01)}
    assert manifest["std"]["of"].endswith("fitted to the errors on validation patients")
    reference = nib.load(small / "Ann" / "Ann-t1n.nii.gz")
    assert set(manifest["synthetic"]) == {"t1c", "t2f"}
    for modality, entry in manifest["synthetic"].items():
        assert set(entry) == {"file", "std", "from", "verdict", "warnings", "scale"}
        made, std = (nib.load(out / "Ann" / entry[key]) for key in ("file", "std"))
        assert entry["std"] == f"Ann-{modality}_std.nii.gz"
        assert std.shape == reference.shape
        assert np.array_equal(std.affine, reference.affine)
        assert std.header["descrip"].item().startswith(f"SYNTHETIC {modality} std by crossmr".encode())
        assert std.get_fdata()[made.get_fdata() > 0].min() >= 0.0999 / 15
        assert float(std.header["cal_max"]) == pytest.approx(window(std.get_fdata(dtype=np.float32))[1])
    kinds = [panel["kind"] for panel in manifest["picture"]["panels"]]
    assert kinds == ["acquired"] * 2 + ["synthetic", "standard deviation"] * 2
    del certain.calibration["variance"]
    complete_cohort(small, out, certain, SETTINGS, again)
    record = json.loads((out / "Ann" / "manifest.json").read_text())["std"]
    assert record == {"of": "the unguided synthesis's error, learnt, uncalibrated", "calibration": None}
    complete_cohort(small, out, model, SETTINGS, again)  # without that network, one sample has no std
    assert not list(out.rglob("*_std.nii.gz"))  # no std outlives its image
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert manifest["std"] is None
    assert {entry["std"] for entry in manifest["synthetic"].values()} == {None}
    complete_cohort(small, out, model, with_settings(samples=2), again)
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert "uncalibrated" in manifest["std"]["of"]
    assert len(list(out.rglob("*_std.nii.gz"))) == len(manifest["synthetic"])


@pytest.mark.parametrize(
    ("pair", "patients", "how", "kept"),
    [
        ((1.0, 0.0), [0, 3], "fitted to the errors on validation patients; T1ce: not calibrated", [0, 3]),
        ((1.0, 0.0), None, "fitted to the errors on validation patients; T1ce: not calibrated", [0, None]),  # of old
        (
            (2.0, 0.1),
            [INHERITED, 3],
            "fitted to the errors on validation patients; T1ce: fitted to the errors of the model that its training "
            "started from",
            [None, 3],
        ),
    ],
)
def test_the_manifest_says_which_standard_deviation_was_fitted_to_how_many_patients(
    last_folder, small, pair, patients, how, kept
):
    model = read_model(last_folder)
    model.calibration = {"variance": torch.tensor([pair, (2.0, 0.1)])}
    if patients is not None:
        model.calibration["patients"] = torch.tensor(patients, dtype=torch.int32)
    record = complete(small / "Ann", model, SETTINGS).manifest["std"]
    assert record["of"] == f"the unguided synthesis's error, learnt, {how}"
    assert [record["calibration"][target].get("patients") for target in ("t1c", "t2f")] == kept


@pytest.mark.parametrize("changes", [{}, {"guidance": "sample", "samples": 2}], ids=["unguided", "samples"])
@pytest.mark.parametrize("uncertainty", [True, False])
def test_stds_of_volumes_come_window_by_window(tmp_path, uncertainty, changes):
    folder = save_untrained(tmp_path, guidance="last", uncertainty=uncertainty, spatial_dims=3, window=(8, 8, 8))
    sources = torch.rand(2, 9, 12, 10, generator=torch.Generator().manual_seed(3))
    head = HeadVolumes(by_name(sources), [0] + [9] * 8, 1.0)
    made = synthesise(read_model(folder), head, "Ann", with_settings(**changes))
    assert made.images.shape == (2, 9, 12, 10)
    if not uncertainty and not changes:
        assert made.stds is None
        return
    assert made.stds.shape == made.images.shape
    assert made.stds[:, 0].abs().max() == 0
    assert made.stds[:, 1:].min() >= 0
    assert made.stds.max() > 1e-3


def test_samples_are_recorded(last, model, small, tmp_path):
    for number, (one, samples, drawn) in enumerate([(last, None, 1), (last, 2, 2), (model, None, 1), (model, 3, 3)]):
        complete_cohort(small, tmp_path / str(number), one, with_settings(guidance="sample", samples=samples))
        manifest = json.loads((tmp_path / str(number) / "Ann" / "manifest.json").read_text())
        assert manifest["settings"]["samples"] == drawn
    with pytest.raises(ConfigError, match="--samples is -1"):
        with_settings(samples=-1)
    for guidance in (None, "none"):
        with pytest.raises(ConfigError, match="guidance 'none' draws none; add --guidance sample"):
            complete(small / "Ann", last, with_settings(samples=3, guidance=guidance))


def test_no_samples_at_all_are_refused_in_one_line(model_folder, small, tmp_path, monkeypatch, capsys):
    arguments = ["complete", small, "-o", tmp_path / "out", "--model", model_folder, "--samples", 0]
    monkeypatch.setattr(sys, "argv", ["crossmr", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["crossmr: --samples is 0; expected at least 1."]
    assert not (tmp_path / "out").exists()


# A reference

BY_REFERENCE = {"guidance": "reference", "reference": Path("elsewhere")}


def real_scans(*modalities, shape=(4, 16, 16)):
    """Real scans of another study, of another size; its first slice has no head."""
    volumes = {m: np.random.default_rng([*m.encode()]).random(shape, np.float32) for m in modalities}
    return HeadVolumes(volumes, [0, *[50] * (shape[0] - 1)], 1.0)


def represented(model, scans, modalities):
    """Their y_0 (1, M·D), zero of those that there are none of."""
    shape = next(iter(scans.volumes.values())).shape
    volumes = np.stack([scans.volumes.get(m, np.zeros(shape, np.float32)) for m in modalities])
    images = pad_to_multiple(torch.from_numpy(volumes[:, 1:]), 2, 16).transpose(0, 1)
    with torch.no_grad():
        pooled = model.pooled(images).mean(0, keepdim=True)
    return model.y_0(pooled, torch.tensor([[float(m in scans.volumes) for m in modalities]]))


@pytest.mark.parametrize("targets", [("t1c", "t2f"), ("t1c",), ("t2f",)], ids="+".join)
@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 21, 13)], ids=str)
def test_a_reference_guides_by_one_vector_of_its_real_scans(last, model, targets, shape):
    """Of whatever size they are; what it lacks of the targets is zero."""
    scans = real_scans(*targets, shape=shape)
    for one in (last, model):
        y_0 = represented(one, scans, ("t1c", "t2f"))
        assert int((y_0 != 0).any(0).sum()) == y_0.shape[1] * len(targets) // 2
        made = synthesised(one, scans=scans, **BY_REFERENCE)
        close(made.images[:, 1:], guided_by_hand(one, y_0))
        assert made.images[:, 0].abs().max() == 0


def test_a_reference_guides_nothing_that_is_there(any_model):
    """A model of any subset is guided by the scans of what is missing alone."""

    def guided(*modalities):
        return synthesised(any_model, scans=real_scans(*modalities), **BY_REFERENCE).images

    both, one = guided("t1c", "t2f"), guided("t1c")
    assert (both - one).abs().max() > 1e-4
    assert torch.equal(guided("t1n", "t1c", "t2w", "t2f"), both)  # t1n and t2w are there


def test_a_reference_is_another_study(last_folder, model, small, tmp_path):
    write_study(tmp_path, "Earlier", ["t1c", "t2f", "t2w"], seed=5)
    write_study(tmp_path / "poor", "Poor", ["t1n"])
    settings = {"guidance": "reference", "reference": tmp_path / "Earlier"}
    complete_cohort(small, tmp_path / "out", last_folder, with_settings(**settings))
    record = json.loads((tmp_path / "out" / "Ann" / "manifest.json").read_text())["settings"]
    assert record["guidance"] == "reference"
    assert record["samples"] == 0
    files = {m: tmp_path / "Earlier" / f"Earlier-{m}.nii.gz" for m in ("t1c", "t2f")}
    assert record["reference"] == {m: {"file": path.name, "sha256": sha256(path)} for m, path in files.items()}
    for wrong, match in (
        ({"reference": tmp_path / "poor"}, "has none of t1c, t2f"),
        ({"reference": small, "guidance": None}, "go together"),
        ({"reference": None}, "go together"),
        ({"reference": tmp_path / "Earlier", "samples": 2}, "draws none"),
    ):
        with pytest.raises(ConfigError, match=match):
            complete_cohort(small, tmp_path / "refused", last_folder, with_settings(**{**settings, **wrong}))
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ConfigError, match="needs real scans"):
        synthesised(model, **settings)


@pytest.mark.parametrize("guidance", ["joint", "last"])
@pytest.mark.parametrize("target", ["t1c", "t2f"])
def test_a_reference_with_only_some_of_the_targets_guides(small, tmp_path, guidance, target):
    model = read_model(save_untrained(tmp_path / "model", guidance=guidance))
    write_study(tmp_path / "all", "Earlier", ["t1c", "t2f"], seed=5)
    write_study(tmp_path / "one", "Earlier", [target], seed=5)
    data, records = {}, {}
    for name in ("all", "one"):
        settings = with_settings(guidance="reference", reference=tmp_path / name)
        result = complete(small / "Ann", model, settings)
        assert list(result.images) == ["t1c", "t2f"]
        records[name] = result.manifest["settings"]["reference"]
        data[name] = np.stack([made.get_fdata() for made in result.images.values()])
    assert list(records["one"]) == [target]
    assert records["one"][target] == records["all"][target]
    assert np.abs(data["one"] - data["all"]).max() > 1e-4


def test_a_reference_is_found_by_the_same_mapping(last_folder, tmp_path):
    for folder, names in (
        (tmp_path / "cohort" / "Ann", {"t1n": "a", "t2w": "b"}),
        (tmp_path / "ref", {"t1c": "c", "t2f": "d"}),
    ):
        folder.mkdir(parents=True)
        for modality, letter in names.items():
            nib.save(image(make_head(modality)), folder / f"V_{letter}.nii.gz")
    mapping = {"t1n": "*_a.nii.gz", "t2w": "*_b.nii.gz", "t1c": "*_c.nii.gz", "t2f": "*_d.nii.gz"}
    settings = with_settings(guidance="reference", reference=tmp_path / "ref")
    out = tmp_path / "out"
    summary = complete_cohort(tmp_path / "cohort", out, last_folder, settings, CohortSettings(mapping))
    assert len(summary.completed) == 1
    assert set(json.loads((out / "manifest.json").read_text())["settings"]["reference"]) == {"t1c", "t2f"}


# Any subset


@pytest.fixture(scope="module")
def any_model(tmp_path_factory):
    modalities = ("t1n", "t1c", "t2w", "t2f")
    both = {"sources": modalities, "targets": modalities, "context_slices": 3}
    return read_model(save_untrained(tmp_path_factory.mktemp("any"), guidance="last", uncertainty=True, **both))


@pytest.mark.parametrize("acquired", [("t1n",), ("t2f", "t1c"), ("t1n", "t2w", "t2f"), ("t1n", "t1c", "t2w", "t2f")])
def test_whatever_is_there_fills_whatever_is_missing(any_model, tmp_path, acquired):
    write_study(tmp_path, "Ann", acquired)
    result = complete(tmp_path / "Ann", any_model, SETTINGS)
    missing = [m for m in any_model.config.targets if m not in acquired]
    assert list(result.images) == list(result.stds) == missing
    for modality in missing:
        entry = result.manifest["synthetic"][modality]
        assert entry["from"] == [m for m in any_model.config.sources if m in acquired]
        assert "+".join(entry["from"]) in str(result.images[modality].header["descrip"])
        data = result.images[modality].get_fdata()
        assert ((data > 0) & (data < 1)).mean() > 0.05
    assert result.manifest["not_filled"] == {}


def test_a_study_with_nothing_the_model_reads_is_not_filled(any_model):
    requested, reasons = what_to_fill(["swi"], any_model, SETTINGS)
    assert requested == []
    assert set(reasons.values()) == {"the model needs any of t1n, t1c, t2w, t2f, and none is there"}


@pytest.mark.parametrize("guidance", ["none", "sample", "unconditional"])
def test_a_slice_is_made_of_its_neighbours_and_of_what_is_available(any_model, guidance):
    volumes = {m: np.random.default_rng(3).random((6, 16, 24), np.float32) for m in ("t1c", "t2f")}
    settings = with_settings(targets=("t1n", "t2w"), guidance=guidance)

    def made(**changed):
        return synthesise(any_model, HeadVolumes({**volumes, **changed}, [9] * 6, 1.0), "Ann", settings).images

    first = made()
    volume = torch.zeros(4, 6, 16, 24)
    volume[1], volume[3] = (torch.from_numpy(volumes[m]) for m in ("t1c", "t2f"))
    neighbours = torch.stack([volume[:, [max(z - 1, 0), z, min(z + 1, 5)]].flatten(0, 1) for z in range(6)])
    inputs = any_model.network_input(torch.nn.functional.pad(neighbours, (4, 4)), torch.tensor([[0.0, 1, 0, 1]] * 6))
    if guidance == "none":
        with torch.no_grad():
            want = unguided(any_model, inputs).transpose(0, 1)[[0, 2]]
        close(first, want[..., 4:-4])
    other = volumes["t1c"].copy()
    other[5] = 0.5 * other[5]
    changes = (made(t1c=other) - first).abs().amax((0, 2, 3))
    assert changes[4:].min() > 1e-4
    if guidance == "sample":
        assert changes[:4].min() > 0  # the vector is drawn for the whole volume
    else:
        assert changes[:4].max() == 0  # further slices do not see it


@pytest.mark.parametrize("guidance", ["sample", "unconditional"])
def test_no_vector_is_drawn_of_what_is_there(any_model, guidance):
    """The features of available modalities are zero in the condition's targets, and of missing ones in its sources."""
    volumes = {m: np.random.default_rng(3).random((6, 16, 16), np.float32) for m in ("t1c", "t2f")}
    drawn, draw = [], any_model.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_model, "draw", lambda *a, **k: drawn.append((a, draw(*a, **k))) or drawn[-1][1])
        synthesise(any_model, HeadVolumes(volumes, [9] * 6, 1.0), "Ann", with_settings(guidance=guidance, samples=2))
    (((_, condition, missing), vectors),) = drawn
    assert missing.tolist() == [[1, 0, 1, 0]]
    assert (vectors.unflatten(1, (4, -1)) != 0).any(2).tolist() == [[True, False, True, False]] * 2
    if guidance == "unconditional":
        assert condition is None
    else:
        assert condition[0, -4:].tolist() == [0, 1, 0, 1]
        assert (condition[0, :-4].unflatten(0, (4, -1)) != 0).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("shape", [(27, 31, 23), (40, 25, 7), (33, 26, 3)])
@pytest.mark.parametrize("air", [True, False])
def test_any_size_with_and_without_skull(any_model, shape, air):
    affine = np.diag([6.0, 6.0, 9.0, 1.0])
    study = {m: image(make_head(m, air=air, shape=shape), affine) for m in ("t1n", "t2f")}
    result = complete(study, any_model, SETTINGS)
    assert list(result.images) == ["t1c", "t2w"]
    for made in (*result.images.values(), *result.stds.values()):
        data = made.get_fdata()
        assert data.shape == shape
        assert np.array_equal(made.affine, affine)
        assert 0 == data.min() < data.max()
        if not air and shape[2] > 18:  # else the head is cut off at the volume's ends, and the rest might be air
            head = ndimage.binary_dilation(study["t1n"].get_fdata() > 0, iterations=2)
            assert not data[~head].any()
    assert max(made.get_fdata().max() for made in result.images.values()) <= 1


def test_what_no_training_patient_had_together_is_not_synthesised(any_model):
    present = [[1, 1, 0, 1], [0, 1, 1, 1]]  # t1n and t2w never together
    any_model.baselines = {"present": torch.tensor(present, dtype=torch.uint8)}
    try:
        requested, reasons = what_to_fill(["t1n", "t1c"], any_model, SETTINGS)
        assert requested == ["t2f"]
        assert [*reasons] == ["t2w"]
        assert reasons["t2w"].startswith(
            "no training patient had t2w together with t1n, t1c. To synthesise T2 all the "
        )
        assert what_to_fill(["t1c"], any_model, SETTINGS)[0] == ["t1n", "t2w", "t2f"]
        asked = replace(SETTINGS, targets=("t2w",))
        assert what_to_fill(["t1n", "t1c"], any_model, asked) == (["t2w"], {})
    finally:
        any_model.baselines = {}


def test_out_of_memory_halves_the_batch_and_says_so(last_folder, monkeypatch):
    model = read_model(last_folder)
    study = load_study({m: image(make_head(m)) for m in ("t1n", "t2w")})
    at_once = complete_study(study, model, SETTINGS)
    forward, sizes = model.synthesis.forward, []

    def small(images, *others):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return forward(images, *others)

    monkeypatch.setattr(model.synthesis, "forward", small)
    result = complete_study(study, model, SETTINGS)
    assert sizes[:3] == [16, 8, 4]
    assert "ran out of memory, so 4 slices were made at once, not 16" in result.manifest["notes"][-1]
    for modality, made in result.images.items():
        np.testing.assert_allclose(made.get_fdata(), at_once.images[modality].get_fdata(), atol=1e-6)
    monkeypatch.setattr(
        model.synthesis, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        complete_study(study, model, SETTINGS)


@pytest.mark.parametrize("uncertainty", [False, True])
def test_intensities_like_an_acquired_volume_can_be_mapped_back(tmp_path, uncertainty):
    model = read_model(save_untrained(tmp_path / "model", guidance="none", uncertainty=uncertainty))
    study = {m: image(500 * make_head(m)) for m in ("t1n", "t2w")}
    unit, like = (complete(study, model, InferenceSettings(device="cpu", scale=scale)) for scale in ("unit", "input"))
    assert unit.manifest["synthetic"]["t2f"]["scale"] is None
    assert (unit.manifest["settings"]["scale"], like.manifest["settings"]["scale"]) == ("unit", "input")
    for modality, mapped in like.images.items():
        entry = like.manifest["synthetic"][modality]["scale"]
        assert entry["like"] == {"t1c": "t1n", "t2f": "t2w"}[modality]
        scan = np.asarray(study[entry["like"]].dataobj)
        data, original = np.asarray(mapped.dataobj), np.asarray(unit.images[modality].dataobj)
        head = original != 0
        np.testing.assert_array_equal(data[~head], 0)  # masked stays exactly 0
        np.testing.assert_allclose((data[head] - entry["intercept"]) / entry["slope"], original[head], atol=1e-5)
        q25, median, q75 = np.percentile(data[head], (25, 50, 75))
        wanted = np.percentile(scan[head], (25, 50, 75))
        assert median == pytest.approx(wanted[1], rel=0.03)
        assert q75 - q25 == pytest.approx(wanted[2] - wanted[0], rel=0.05)
        assert (mapped.header["cal_min"], mapped.header["cal_max"]) == pytest.approx(window(data), rel=1e-5)
        if uncertainty:
            scaled = entry["slope"] * np.asarray(unit.stds[modality].dataobj)
            np.testing.assert_allclose(np.asarray(like.stds[modality].dataobj), scaled, rtol=1e-5)
    with pytest.raises(ConfigError, match="--scale is 'huge'; expected one of unit, input"):
        InferenceSettings(scale="huge")


@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_nothing_is_negative_unless_the_acquired_volume_is(shift):
    """A map to a scan that varies much makes what is darkest negative, which no magnitude is."""
    scan = make_head("t2w", air=False)
    study = load_study({"t2w": image(np.where(scan > 0, scan**8 / 10**14 + shift, 0))})
    darkest = study.volumes["t2w"].data[study.mask].min()
    synthetic = torch.rand(1, *study.mask[study.box()].shape, generator=torch.Generator().manual_seed(0)).sqrt()
    fitted = _fit_map(study, synthetic[0] * torch.from_numpy(study.mask[study.box()]), "t2w")
    images, _ = _as_images(study, inference.Synthesis(("t2f",), synthetic, None, 1), ["t2w"], {"t2f": fitted})
    data = read_volume(images["t2f"]).data
    mapped = np.zeros_like(data)
    mapped[study.box()] = fitted["slope"] * synthetic[0].numpy() + fitted["intercept"]
    assert (mapped[study.mask] < min(darkest, 0)).any()
    assert data[study.mask].min() == pytest.approx(min(darkest, 0), abs=0.01 * fitted["slope"])
    assert (data[study.mask] > 0).all() == (shift == 0)
    np.testing.assert_allclose(data[study.mask], mapped[study.mask].clip(fitted["least"]), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(data[~study.mask], 0)


def test_what_is_exactly_0_within_the_head_stays_so_on_another_scale():
    study = load_study({"t1n": image(make_head("t1n"))})
    synthetic = torch.full((1, *study.mask[study.box()].shape), 0.5)
    synthetic[:, 8:10] = 0  # slices that were not acquired
    synthesis = inference.Synthesis(("t2f",), synthetic, None, 1)
    images, _ = _as_images(study, synthesis, ["t1n"], {"t2f": {"slope": 2.0, "intercept": 7.0, "least": 0.01}})
    assert set(np.unique(np.asarray(images["t2f"].dataobj))) == {0, 8}
    assert (np.asarray(images["t2f"].dataobj) == 8).sum() == (
        study.mask[study.box()] & (synthetic[0] > 0).numpy()
    ).sum()


@pytest.mark.parametrize("doubt", ["agent everywhere", "DICOM beside NIfTI", "NIfTI beside DICOM"])
def test_python_and_the_command_line_say_the_same_of_a_study(doubt, any_model, tmp_path):
    """Whatever was not used, or is in doubt, counts for the study and for each contrast."""
    folder, affine = tmp_path / "in" / "P", np.diag([6.0, 6.0, 7.0, 1.0])
    if doubt == "DICOM beside NIfTI":
        write_images(tmp_path / "in", "P", ("t1n", "t2w"))
        write_series(folder / "flair", np.rint(make_head("t2f", shape=SHAPE)), affine, "t2f")
    else:
        agent = {"ContrastBolusAgent": "Gadavist", "description": "x"} if doubt == "agent everywhere" else {}
        for number, modality in enumerate(("t1n", "t2w"), 1):
            made = np.rint(make_head(modality, shape=SHAPE))
            write_series(folder / modality, made, affine, modality, number=number, **agent)
    if doubt == "NIfTI beside DICOM":
        nib.save(image(make_head("t2f", shape=SHAPE)), folder / "flair.nii.gz")
    said = complete(folder, any_model, SETTINGS).manifest
    assert complete_cohort(tmp_path / "in", tmp_path / "out", any_model, SETTINGS).failed == {}
    (path,) = (tmp_path / "out").glob("*/manifest.json")
    written = json.loads(path.read_text())
    for key in ("verdict", "reasons", "refused", "not_filled", "unread", "notes", "acquired", "given", "settings"):
        assert said[key] == written[key]
    one, other = ({m: entry["verdict"] for m, entry in of["synthetic"].items()} for of in (said, written))
    assert one == other
    assert said["verdict"] == ("look" if doubt == "agent everywhere" else "refuse")
    assert {*one.values()} == {"look" if doubt == "agent everywhere" else "use"}
