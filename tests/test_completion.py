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
from conftest import image, make_head, save_untrained, sha256, tree, voxels, write_images, write_study
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from torch import nn

from crossmr import completion
from crossmr.cli import main
from crossmr.cohort import complete_cohort
from crossmr.completion import Settings, complete
from crossmr.data.dataset import seeded
from crossmr.data.study import load_study
from crossmr.errors import ConfigError, ModelError, NamingError, StudyError
from crossmr.model import load_model

SHAPE = (26, 28, 22)
SETTINGS = Settings(steps=3, precision="float32")
FAST = {"steps": 3, "precision": "float32", "device": "cpu"}
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
    result = complete(study, model, **FAST)
    assert list(result.images) == ["t2f"]
    assert result.manifest["acquired"] == ["t1n", "t1c", "t2w"]
    assert result.manifest["not_filled"] == {}
    data = np.asarray(result.images["t2f"].dataobj)
    assert data.dtype == np.float32
    assert data.min() >= 0
    assert data.max() <= 1
    inside = data[(data > 0) & (data < 1)]
    assert inside.size > data.size / 2  # a result that is clipped everywhere would make these tests empty
    assert inside.std() > 0.01


def test_header_says_synthetic_and_how_to_show_it(model, tmp_path):
    result = complete(write_images(tmp_path, "P", ("t1n", "t2w")), model, **FAST)
    for modality, made in result.images.items():
        assert bytes(made.header["descrip"].item()).startswith(f"SYNTHETIC {modality} by crossmr".encode())
        assert (float(made.header["cal_min"]), float(made.header["cal_max"])) == (0, 1)
        assert made.header.get_data_dtype() == np.float32
        assert struct.unpack("<ff", made.to_bytes()[112:120]) == (1, 0)  # scl_slope and scl_inter, as written


def test_description_fits_the_header_whatever_the_sources_are_called(tmp_path):
    sources = ("t1n", "susceptibilityweighted", "apparentdiffusioncoefficient", "protondensityweighted")
    folder = save_untrained(tmp_path / "model", sources=sources, guidance="none")
    heads = {name: image(make_head("t1n", seed=k, shape=SHAPE)) for k, name in enumerate(sources)}
    made = complete(heads, folder, **FAST).images["t2f"]
    assert len(made.header["descrip"].item()) == 79


def test_python_takes_a_folder_paths_and_images_alike_and_writes_nothing(model_folder, tmp_path, monkeypatch):
    study = write_images(tmp_path / "cohort", "P", ("t1n", "t2w"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = tree(tmp_path)
    paths = {m: study / f"P-{m}.nii.gz" for m in ("t2w", "t1n")}
    ways = [
        complete(study, model_folder, **FAST),
        complete(str(study), str(model_folder), **FAST),
        complete(paths, model_folder, case="P", **FAST),
        complete({m: str(path) for m, path in paths.items()}, model_folder, case="P", **FAST),
        complete({m: nib.load(path) for m, path in paths.items()}, model_folder, case="P", **FAST),
        complete({"T1": paths["t1n"], "T2": paths["t2w"]}, model_folder, case="P", **FAST),
    ]
    assert tree(tmp_path) == before
    first = {m: made.to_bytes() for m, made in ways[0].images.items()}
    assert set(first) == {"t1c", "t2f"}
    for way in ways[1:]:
        assert {m: made.to_bytes() for m, made in way.images.items()} == first
    hashes = {m: {"file": path.name, "sha256": sha256(path)} for m, path in paths.items()}
    assert [way.manifest["inputs"] for way in ways] == [hashes, hashes, hashes, hashes, {}, hashes]


def test_python_refuses_what_it_cannot_tell_apart(model, tmp_path):
    head = image(make_head(shape=SHAPE))
    with pytest.raises(NamingError, match="t1n twice"):
        complete({"T1": head, "t1n": head}, model, **FAST)
    with pytest.raises(ConfigError, match="'T3' is no modality"):
        complete({"T3": head}, model, **FAST)
    for case in "PQ":
        write_images(tmp_path, case, ("t1n", "t2w"))
    with pytest.raises(NamingError, match="holds 2 studies"):
        complete(tmp_path, model, **FAST)
    with pytest.raises(StudyError, match="no acquired volume"):
        complete({}, model, **FAST)
    with pytest.raises(ModelError, match="is no model"):
        complete(tmp_path / "P", tmp_path, **FAST)


def test_only_wanted_targets_are_filled(model, tmp_path):
    study = write_images(tmp_path, "P", ("t1n", "t2w"))
    every = complete(study, model, **FAST)
    one = complete(study, model, targets=["t2f"], **FAST)
    assert list(every.images) == ["t1c", "t2f"]
    assert list(one.images) == ["t2f"]
    assert one.manifest["not_filled"] == {}
    assert one.images["t2f"].to_bytes() == every.images["t2f"].to_bytes()
    assert one.manifest["settings"]["targets"] == ["t2f"]


def test_says_why_a_gap_cannot_be_filled(model, tmp_path):
    result = complete(write_images(tmp_path, "P", ("t1n", "t2f")), model, **FAST)
    assert result.images == {}
    assert result.manifest["not_filled"] == {
        "t1c": "the model needs t1n, t2w, and t2w is missing",
        "t2w": "the model was trained for t1c, t2f only",
    }
    assert result.manifest["synthetic"] == {}


@pytest.mark.parametrize("target", ["t2w", "pdw"])
def test_a_target_the_model_does_not_know_is_refused_before_anything_runs(model, cohort, tmp_path, target):
    with pytest.raises(ConfigError, match=f"cannot synthesise {target}; it was trained for t1c, t2f"):
        complete(cohort / "Ann", model, targets=[target], **FAST)
    with pytest.raises(ConfigError, match=f"cannot synthesise {target}"):
        complete_cohort(cohort, tmp_path / "out", model, settings=Settings(targets=("t1c", target)))
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_are_refused(cohort, tmp_path):
    with pytest.raises(ConfigError, match="--guidance is 'oracle'"):
        Settings(guidance="oracle")
    told_nothing = load_model(save_untrained(tmp_path / "model", guidance="unconditional", conditional=False))
    with pytest.raises(ConfigError, match="knows no condition"):
        complete(cohort / "Ann", told_nothing, guidance="sample", **FAST)
    with pytest.raises(ConfigError, match="0 sampling steps"):
        complete(cohort / "Ann", told_nothing, steps=0)
    assert complete(cohort / "Ann", told_nothing, **FAST).manifest["settings"]["guidance"] == "unconditional"


@pytest.mark.parametrize(
    ("trained", "conditional", "default"),
    [
        ("sample", True, "sample"),
        ("unconditional", True, "unconditional"),
        ("truth", True, "sample"),
        ("truth", False, "unconditional"),
        ("none", False, "none"),
    ],
)
def test_guidance_is_as_the_model_was_trained(tmp_path, trained, conditional, default):
    folder = save_untrained(tmp_path, guidance=trained, conditional=conditional)
    assert completion.default_guidance(load_model(folder)) == default


def test_synthetic_volumes_are_no_inputs(model, tmp_path):
    study = write_images(tmp_path / "a", "P", ("t1n", "t2w"))
    plain = complete(study, model, **FAST)
    nib.save(plain.images["t2f"], study / "P-t2f.nii.gz")
    again = complete(study, model, **FAST)
    assert set(again.images) == {"t1c", "t2f"}
    assert again.manifest["acquired"] == ["t1n", "t2w"]
    assert set(again.manifest["inputs"]) == {"t1n", "t2w"}
    assert again.manifest["notes"] == ["t2f is itself synthetic, so it was not used as an input."]
    assert {m: i.to_bytes() for m, i in again.images.items()} == {m: i.to_bytes() for m, i in plain.images.items()}
    source = nib.load(study / "P-t2w.nii.gz")
    source.header["descrip"] = b"SYNTHETIC t2w by somebody"
    refused = complete({"t1n": study / "P-t1n.nii.gz", "t2w": source}, model, **FAST)
    assert refused.images == {}
    assert "t2w is missing" in refused.manifest["not_filled"]["t2f"]


# Geometry


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIL"])
@pytest.mark.parametrize("turn", [None, TURN], ids=["straight", "oblique"])
def test_output_lies_on_the_reference_grid_bit_for_bit(model, tmp_path, codes, turn):
    upright = complete(write_images(tmp_path / "ras", "P", ("t1n", "t2w")), model, **FAST)
    study = write_images(tmp_path / "as", "P", ("t1n", "t2w"), change=stored_as(codes, turn))
    second = nib.load(study / "P-t2w.nii.gz")  # says the same place otherwise: the first volume is the reference
    other = nib.Nifti1Image(np.asarray(second.dataobj), second.affine)
    other.set_qform(None, code=0)
    nib.save(other, study / "P-t2w.nii.gz")
    complete_cohort(tmp_path / "as", tmp_path / "out", model, settings=SETTINGS)
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
        model = save_untrained(tmp_path / "model", spatial_dims=3, window=(16, 16, 16))
    study = write_images(tmp_path, "P", ("t1n", "t2w"), air=False)
    inside = voxels(study / "P-t1n.nii.gz") != 0
    assert 0.05 < inside.mean() < 0.5
    for made in complete(study, model, **FAST).images.values():
        data = np.asarray(made.dataobj)
        assert not data[~inside].any()
        assert (data[inside] > 0).mean() > 0.9


def test_unmasked_input_is_filled_around_the_head_and_empty_slices_stay_zero(model, tmp_path):
    shape = (26, 28, 40)
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=shape)
    mask = load_study({m: study / f"P-{m}.nii.gz" for m in ("t1n", "t2w")}).mask.transpose(2, 1, 0)
    headless = ~mask.any((0, 1))
    assert 10 <= headless.sum() < 30
    data = np.asarray(complete(study, model, **FAST).images["t2f"].dataobj)
    assert not data[:, :, headless].any()
    assert (data[:, :, ~headless] > 0).mean() > 0.9


@pytest.mark.parametrize("shape", [(27, 31, 23), (26, 29, 22), (25, 28, 21)])
@pytest.mark.parametrize("window", [None, (16, 16, 16), (40, 40, 40)], ids=["2D", "3D-smaller", "3D-larger"])
def test_padding_and_windows_move_no_voxel(tmp_path, shape, window):
    """With a network that copies its first source, the result is that source, normalised."""
    dims = {} if window is None else {"spatial_dims": 3, "window": window}
    model = load_model(save_untrained(tmp_path / "model", guidance="none", **dims))
    model.synthesis = Copy()
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=shape, air=False)
    loaded = load_study({m: study / f"P-{m}.nii.gz" for m in ("t1n", "t2w")})
    for made in complete(study, model, **FAST).images.values():
        expected = loaded.normalised("t1n").transpose(2, 1, 0)
        assert expected.max() > 0.2
        np.testing.assert_allclose(np.asarray(made.dataobj), expected, atol=1e-5)


@pytest.mark.parametrize("window", [(16, 16, 16), (28, 32, 24)], ids=["smaller", "larger"])
def test_3d_model_completes_volumes_larger_and_smaller_than_its_window(tmp_path, window):
    folder = save_untrained(tmp_path / "model", spatial_dims=3, window=window)
    study = write_images(tmp_path, "P", ("t1n", "t2w"), shape=(27, 31, 23))
    result = complete(study, folder, **FAST)
    for made in result.images.values():
        data = np.asarray(made.dataobj)
        assert data.shape == (27, 31, 23)
        assert 0 <= data.min() <= data.max() <= 1
        assert ((data > 0) & (data < 1)).mean() > 0.5
    other = complete(study, folder, seed=1, **FAST)
    for modality, made in result.images.items():
        assert np.abs(np.asarray(other.images[modality].dataobj) - np.asarray(made.dataobj)).max() > 1e-4


def test_a_volume_that_fits_the_3d_window_is_one_pass_of_the_network(tmp_path):
    model = load_model(save_untrained(tmp_path / "model", spatial_dims=3, window=(16, 20, 24), guidance="none"))
    sources = torch.rand(2, 13, 17, 18, generator=torch.Generator().manual_seed(0))
    result = completion.synthesise(model, by_name(sources), [1] * 13, "P", SETTINGS).images
    padded = torch.zeros(1, 2, 16, 20, 24)
    padded[0, :, 2:15, 2:19, 3:21] = sources
    expected = model.synthesis(padded)[0, :, 2:15, 2:19, 3:21].clamp(0, 1)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# Randomness


@pytest.mark.parametrize("guidance", ["sample", "unconditional", "none"])
def test_batched_equals_one_slice_at_a_time(model, cohort, monkeypatch, guidance):
    results = {}
    for size in (1, 5, 16):
        monkeypatch.setattr(completion, "BATCH", size)
        results[size] = complete(cohort / "Ann", model, guidance=guidance, **FAST).images["t2f"].get_fdata()
    for size in (5, 16):
        assert np.abs(results[size] - results[1]).max() < 1e-5


def test_seed_and_case_name_decide_the_sample(model, cohort):
    def data(**options):
        case = {m: cohort / "Ann" / f"Ann-{m}.nii.gz" for m in ("t1n", "t2w")}
        return complete(case, model, **{**FAST, **options}).images["t2f"].get_fdata()

    for guidance in ("sample", "unconditional"):
        first = data(guidance=guidance)
        assert np.array_equal(data(guidance=guidance), first)
        for other in (data(guidance=guidance, seed=1), data(guidance=guidance, case="another")):
            assert np.abs(other - first).max() > 1e-3
    unguided = data(guidance="none")
    assert np.array_equal(data(guidance="none", seed=1, case="another"), unguided)
    samples = [data(guidance=guidance) for guidance in ("sample", "unconditional")]
    for a, b in ((samples[0], unguided), (samples[1], unguided), (samples[0], samples[1])):
        assert np.abs(a - b).max() > 1e-3


# A grid of cells, deviations, several guided syntheses


@pytest.fixture(scope="module")
def cell_folder(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("cells"), cell=8)


@pytest.fixture(scope="module")
def cells(cell_folder):
    return load_model(cell_folder)


def by_name(sources):
    return {m: volume.numpy() for m, volume in zip(("t1n", "t2w"), sources, strict=True)}


def volume():
    """Sources (2, Z, Y, X) of sides that are multiples of the cell, and the head voxels: its first slice has none."""
    return torch.rand(2, 4, 16, 24, generator=torch.Generator().manual_seed(3)), [0, 9, 9, 9]


def synthesised(model, case="Ann", **changes):
    sources, head = volume()
    settings = Settings(**{"steps": 3, "precision": "float32", **changes})
    return completion.synthesise(model, by_name(sources), head, case, settings)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("guidance", ["sample", "unconditional"])
def test_cells_give_the_mean_of_the_guided(cells, samples, guidance):
    images = volume()[0][:, 1:].transpose(0, 1)
    with torch.no_grad():
        unguided = cells.synthesis(images).clamp(0, 1)
        guided = []
        for key in [("case", 7, "Ann"), ("case", 7, "Ann", 1), ("case", 7, "Ann", 2)][:samples]:
            (y_0,) = cells.guide_cells(images, unguided, [seeded(*key)], told=guidance == "sample", steps=3)
            guided.append(cells.synthesis(images, y_0).clamp(0, 1))
        deviation = cells.deviation(images, unguided)
    want = sum(guided) / samples
    assert (want - unguided).abs().max() > 3e-3
    result = synthesised(cells, guidance=guidance, samples=samples, seed=7)
    torch.testing.assert_close(result.images[:, 1:], want.transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.deviations[:, 1:], deviation.transpose(0, 1), atol=1e-5, rtol=1e-4)
    assert max(part[:, 0].abs().max() for part in result[:2]) == 0  # no head, no synthesis, no doubt
    if samples == 1:
        assert torch.equal(synthesised(cells, guidance=guidance, seed=7).images, result.images)


def test_unguided_images_say_how_far_they_may_be_off(cell_folder):
    model = load_model(cell_folder)
    assert completion.default_guidance(model) == "none"
    made = synthesised(model)
    images = volume()[0][:, 1:].transpose(0, 1)
    with torch.no_grad():
        want = model.synthesis(images).clamp(0, 1)
        deviation = model.deviation(images, want)
    torch.testing.assert_close(made.images[:, 1:], want.transpose(0, 1))
    torch.testing.assert_close(made.deviations[:, 1:], deviation.transpose(0, 1))
    model.calibration = {"variance": torch.tensor([[9.0, 0.0], [0.0, 0.04]])}
    scaled = synthesised(model).deviations
    torch.testing.assert_close(scaled[0], 3 * made.deviations[0])
    assert scaled[:, 0].abs().max() == 0
    torch.testing.assert_close(scaled[1, 1:], torch.full_like(scaled[1, 1:], 0.2))


def test_a_completion_writes_deviations_beside_the_images(cell_folder, model, small, tmp_path):
    sure = load_model(cell_folder)
    sure.calibration = {"variance": torch.tensor([[9.0, 0.01], [1.0, 0.02]])}
    out, settings = tmp_path / "out", Settings(steps=2, precision="float32")
    complete_cohort(small, out, sure, settings=settings)
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert manifest["settings"]["guidance"] == "none"
    assert manifest["deviation"]["calibration"]["t1c"] == {"a": 9.0, "b": pytest.approx(0.01)}
    assert manifest["deviation"]["of"].endswith("scaled to what held-out patients show")
    reference = nib.load(small / "Ann" / "Ann-t1n.nii.gz")
    for modality in manifest["synthetic"]:
        entry = manifest["synthetic"][modality]
        made, deviation = (nib.load(out / "Ann" / entry[key]) for key in ("file", "deviation"))
        assert entry["deviation"] == f"Ann-{modality}_std.nii.gz"
        assert deviation.shape == reference.shape
        assert np.array_equal(deviation.affine, reference.affine)
        assert "SYNTHETIC" in str(deviation.header["descrip"])
        assert "std" in str(deviation.header["descrip"])
        inside = made.get_fdata() > 0
        assert deviation.get_fdata()[inside].min() >= 0.0999
    complete_cohort(small, out, model, settings=settings, overwrite=True)  # a pooled model says nothing of one sample
    assert not list(out.rglob("*_std.nii.gz"))  # no deviation outlives its image
    assert json.loads((out / "Ann" / "manifest.json").read_text())["deviation"] is None
    complete_cohort(small, out, model, settings=replace(settings, samples=2), overwrite=True)
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert "uncalibrated" in manifest["deviation"]["of"]
    assert len(list(out.rglob("*_std.nii.gz"))) == len(manifest["synthetic"])


def test_seed_and_case_name_decide_the_grids(cells):
    first = synthesised(cells, guidance="sample", samples=2).images
    assert torch.equal(synthesised(cells, guidance="sample", samples=2).images, first)
    for change in ({"seed": 1}, {"case": "another"}, {"samples": 1}, {"guidance": "unconditional"}):
        other = synthesised(cells, **{"guidance": "sample", "samples": 2, **change}).images
        assert (other - first).abs().max() > 1e-3, change
    unguided = synthesised(cells, guidance="none").images
    assert torch.equal(synthesised(cells, guidance="none", seed=1, case="another").images, unguided)


def test_slices_of_a_batch_share_their_grids_with_slices_alone(cells, monkeypatch):
    whole = synthesised(cells, guidance="sample", samples=2)
    monkeypatch.setattr(completion, "BATCH", 1)
    for part, again in zip(whole[:2], synthesised(cells, guidance="sample", samples=2)[:2], strict=True):
        torch.testing.assert_close(again, part, atol=1e-5, rtol=1e-5)


def test_deviations_of_volumes_come_window_by_window(tmp_path):
    folder = save_untrained(tmp_path, cell=4, spatial_dims=3, window=(8, 8, 8))
    sources = torch.rand(2, 9, 12, 10, generator=torch.Generator().manual_seed(3))
    settings = Settings(guidance="sample", samples=2, steps=2, precision="float32")
    made = completion.synthesise(load_model(folder), by_name(sources), [0] + [9] * 8, "Ann", settings)
    assert made.images.shape == made.deviations.shape == (2, 9, 12, 10)
    assert made.deviations[:, 0].abs().max() == 0
    assert made.deviations[:, 1:].min() >= 0
    assert made.deviations.max() > 1e-3


def test_a_pooled_model_averages_its_guided_syntheses(model):
    several, one = (synthesised(model, guidance="sample", samples=k).images for k in (3, 1))
    assert synthesised(model, guidance="sample").deviations is None
    assert torch.equal(synthesised(model, guidance="sample").images, one)
    images = volume()[0][:, 1:].transpose(0, 1)
    with torch.no_grad():
        pooled = model.pool_sources(images)
        keys = [("case", 0, "Ann"), ("case", 0, "Ann", 1), ("case", 0, "Ann", 2)]
        y_0 = model.guide(pooled, [seeded(*key) for key in keys], steps=3)
        guided = [model.synthesis(images, row.expand(3, -1)).clamp(0, 1) for row in y_0]
    torch.testing.assert_close(one[:, 1:], guided[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(several[:, 1:], (sum(guided) / 3).transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert (several - one).abs().max() > 1e-3


def test_samples_are_recorded(cells, model, small, tmp_path):
    for number, (one, samples, said) in enumerate([(cells, None, 1), (cells, 2, 2), (model, None, 1), (model, 3, 3)]):
        settings = Settings(guidance="sample", steps=1, samples=samples, precision="float32")
        complete_cohort(small, tmp_path / str(number), one, settings=settings)
        manifest = json.loads((tmp_path / str(number) / "Ann" / "manifest.json").read_text())
        assert manifest["settings"]["samples"] == said
    with pytest.raises(ConfigError, match="--samples is -1"):
        complete(small / "Ann", model, samples=-1, **FAST)
    for one, guidance in ((cells, None), (model, "none")):
        with pytest.raises(ConfigError, match="guidance 'none' draws none; add --guidance sample"):
            complete(small / "Ann", one, samples=3, guidance=guidance, **FAST)


def test_no_samples_at_all_are_refused_in_one_line(model_folder, small, tmp_path, monkeypatch, capsys):
    said = ["complete", small, "-o", tmp_path / "out", "--model", model_folder, "--samples", 0]
    monkeypatch.setattr(sys, "argv", ["crossmr", *map(str, said)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["crossmr: --samples is 0; wanted at least 1."]
    assert not (tmp_path / "out").exists()


# Any subset


@pytest.fixture(scope="module")
def any_model(tmp_path_factory):
    modalities = ("t1n", "t1c", "t2w", "t2f")
    folder = tmp_path_factory.mktemp("any")
    return load_model(save_untrained(folder, cell=8, sources=modalities, targets=modalities, context_slices=3))


@pytest.mark.parametrize("acquired", [("t1n",), ("t2f", "t1c"), ("t1n", "t2w", "t2f"), ("t1n", "t1c", "t2w", "t2f")])
def test_whatever_is_there_fills_whatever_is_missing(any_model, tmp_path, acquired):
    write_study(tmp_path, "Ann", acquired)
    result = complete(tmp_path / "Ann", any_model, precision="float32")
    missing = [m for m in any_model.config.targets if m not in acquired]
    assert list(result.images) == list(result.deviations) == missing
    for modality in missing:
        entry = result.manifest["synthetic"][modality]
        assert entry["from"] == [m for m in any_model.config.sources if m in acquired]
        assert "+".join(entry["from"]) in str(result.images[modality].header["descrip"])
        data = result.images[modality].get_fdata()
        assert ((data > 0) & (data < 1)).mean() > 0.05
    assert result.manifest["not_filled"] == {}


def test_a_study_with_nothing_the_model_reads_is_not_filled(any_model):
    wanted, reasons = completion.what_to_fill(["swi"], any_model, Settings())
    assert wanted == []
    assert set(reasons.values()) == {"the model needs any of t1n, t1c, t2w, t2f, and none is there"}


@pytest.mark.parametrize("guidance", ["none", "sample", "unconditional"])
def test_a_slice_is_made_of_its_neighbours_and_of_what_is_shown(any_model, guidance):
    given = {m: np.random.default_rng(3).random((6, 16, 24), np.float32) for m in ("t1c", "t2f")}
    settings = Settings(guidance=guidance, steps=2, precision="float32")

    def made(**changed):
        return completion.synthesise(any_model, {**given, **changed}, [9] * 6, "Ann", settings).images[[0, 2]]

    first = made()
    volume = torch.zeros(4, 6, 16, 24)
    volume[1], volume[3] = (torch.from_numpy(given[m]) for m in ("t1c", "t2f"))
    around = torch.stack([volume[:, [max(z - 1, 0), z, min(z + 1, 5)]].flatten(0, 1) for z in range(6)])
    inputs = any_model.inputs(around, torch.tensor([[0.0, 1, 0, 1]] * 6))
    if guidance == "none":
        with torch.no_grad():
            want = any_model.unguided(inputs).transpose(0, 1)[[0, 2]]
        torch.testing.assert_close(first, want, atol=1e-5, rtol=1e-5)
    other = given["t1c"].copy()
    other[5] = 0.5 * other[5]
    changes = (made(t1c=other) - first).abs().amax((0, 2, 3))
    assert changes[4:].min() > 1e-4
    assert changes[:4].max() == 0  # further slices do not see it


@pytest.mark.parametrize("kind", ["cells", "any_model", "model"])
def test_the_mean_of_the_samples_guides_one_synthesis(kind, request):
    model = request.getfixturevalue(kind)
    one, mean = (synthesised(model, guidance=g, samples=1).images for g in ("sample", "mean"))
    assert torch.equal(one, mean)
    several, averaged = (synthesised(model, guidance=g, samples=8).images for g in ("sample", "mean"))
    assert torch.equal(synthesised(model, guidance="mean").images, averaged)
    assert (several - averaged).abs().max() > 1e-5
    assert (averaged - one).abs().max() > 1e-5
    assert (averaged - synthesised(model, guidance="none").images).abs().max() > 1e-5


def test_a_reference_guides_by_its_real_scans_stretched_to_the_head(cells, any_model):
    images = volume()[0][:, 1:].transpose(0, 1)
    real = {m: np.random.default_rng(k).random((4, 16, 24), np.float32) for k, m in enumerate(("t1c", "t2f"))}

    def guided(model, reference):
        sources, head = volume()
        settings = Settings(guidance="reference", reference=Path("elsewhere"), precision="float32")
        return completion.synthesise(model, by_name(sources), head, "Ann", settings, reference=reference).images

    whole = torch.from_numpy(np.stack([real["t1c"], real["t2f"]]))[:, 1:].transpose(0, 1)
    with torch.no_grad():
        want = cells.synthesis(images, cells.representation.represent(whole)).clamp(0, 1).transpose(0, 1)
    torch.testing.assert_close(guided(cells, real)[:, 1:], want, atol=1e-5, rtol=1e-5)
    larger = {m: np.repeat(np.repeat(v, 2, 1), 2, 2) for m, v in real.items()}
    assert (guided(cells, larger)[:, 1:] - want).abs().mean() < (want - synthesised(cells).images[:, 1:]).abs().mean()
    both, one = guided(any_model, real), guided(any_model, {"t1c": real["t1c"]})
    assert (both - one).abs().max() > 1e-4
    with_source = guided(any_model, {**real, "t1n": real["t2f"]})  # it is there: nothing to guide
    assert torch.equal(with_source, both)


def test_a_reference_is_another_study(cell_folder, small, tmp_path):
    write_study(tmp_path, "Earlier", ["t1c", "t2f"], seed=5)
    write_study(tmp_path / "poor", "Poor", ["t1n"])
    out, settings = tmp_path / "out", {"guidance": "reference", "precision": "float32"}
    complete_cohort(small, out, cell_folder, settings=Settings(**settings, reference=tmp_path / "Earlier"))
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    assert manifest["settings"]["guidance"] == "reference"
    assert manifest["settings"]["samples"] == 0
    assert set(manifest["settings"]["reference"]) == {"t1c", "t2f"}
    for wrong, match in (
        ({"reference": tmp_path / "poor"}, "has none of t1c, t2f"),
        ({"reference": small, "guidance": None}, "go together"),
        ({"reference": None}, "go together"),
        ({"reference": tmp_path / "Earlier", "samples": 2}, "draws none"),
    ):
        with pytest.raises(ConfigError, match=match):
            complete_cohort(small, tmp_path / "refused", cell_folder, settings=Settings(**{**settings, **wrong}))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("shape", [(27, 31, 23), (40, 25, 7), (33, 26, 3)])
@pytest.mark.parametrize("air", [True, False])
def test_any_size_with_and_without_skull(any_model, shape, air):
    affine = np.diag([6.0, 6.0, 9.0, 1.0])
    given = {m: image(make_head(m, air=air, shape=shape), affine) for m in ("t1n", "t2f")}
    result = complete(given, any_model, precision="float32")
    assert list(result.images) == ["t1c", "t2w"]
    for made in (*result.images.values(), *result.deviations.values()):
        data = made.get_fdata()
        assert data.shape == shape
        assert np.array_equal(made.affine, affine)
        assert 0 == data.min() < data.max()
        if not air and shape[2] > 18:  # else the head is cut off at the volume's ends, and the rest might be air
            head = ndimage.binary_dilation(given["t1n"].get_fdata() > 0, iterations=2)
            assert not data[~head].any()
    assert max(made.get_fdata().max() for made in result.images.values()) <= 1


def test_what_no_training_patient_had_together_is_not_synthesised(any_model):
    present = [[1, 1, 0, 1], [0, 1, 1, 1]]  # t1n and t2w never together
    any_model.trivial = {"present": torch.tensor(present, dtype=torch.uint8)}
    try:
        wanted, reasons = completion.what_to_fill(["t1n", "t1c"], any_model, Settings())
        assert wanted == ["t2f"]
        assert reasons == {"t2w": "no training patient had t2w together with t1n, t1c"}
        assert completion.what_to_fill(["t1c"], any_model, Settings())[0] == ["t1n", "t2w", "t2f"]
    finally:
        any_model.trivial = {}


def test_a_reference_is_found_by_the_same_mapping(cell_folder, small, tmp_path):
    for folder, names in (
        (tmp_path / "cohort" / "Ann", {"t1n": "a", "t2w": "b"}),
        (tmp_path / "ref", {"t1c": "c", "t2f": "d"}),
    ):
        folder.mkdir(parents=True)
        for modality, letter in names.items():
            nib.save(image(make_head(modality)), folder / f"V_{letter}.nii.gz")
    mapping = {"t1n": "*_a.nii.gz", "t2w": "*_b.nii.gz", "t1c": "*_c.nii.gz", "t2f": "*_d.nii.gz"}
    settings = Settings(guidance="reference", reference=tmp_path / "ref", precision="float32")
    result = complete_cohort(tmp_path / "cohort", tmp_path / "out", cell_folder, settings=settings, mapping=mapping)
    assert len(result["completed"]) == 1
    assert set(result["settings"]["reference"]) == {"t1c", "t2f"}


def test_out_of_memory_halves_the_batch_and_says_so(tmp_path, monkeypatch):
    model = load_model(save_untrained(tmp_path / "model"))
    study = load_study({m: image(make_head(m)) for m in ("t1n", "t2w")})
    settings = Settings(guidance="none", precision="float32")
    whole = completion.complete_study(study, model, settings)
    forward, sizes = model.synthesis.forward, []

    def small(images, *others):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return forward(images, *others)

    monkeypatch.setattr(model.synthesis, "forward", small)
    result = completion.complete_study(study, model, settings)
    assert sizes[:3] == [16, 8, 4]
    assert "ran out of memory, so 4 slices were made at once, not 16" in result.manifest["notes"][-1]
    for modality, made in result.images.items():
        np.testing.assert_allclose(made.get_fdata(), whole.images[modality].get_fdata(), atol=1e-6)
    monkeypatch.setattr(
        model.synthesis, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        completion.complete_study(study, model, settings)
