"""What is measured: each predictor's image is its own, of the sources it is given, and the second model fits."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import header_alone, save_untrained, write_study

from crossmr.baselines import BASELINES, fit_baselines, predict_baselines
from crossmr.data.naming import find_studies
from crossmr.errors import ConfigError, ModelError
from crossmr.evaluation import predictors as module
from crossmr.evaluation.measures import measure
from crossmr.evaluation.predictors import find_predictors, memory_needed, predict
from crossmr.evaluation.subjects import find_subjects, subject_of_files
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import read_model

SETTINGS = InferenceSettings(ddim_steps=3, precision="float32")
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
ALL = (*SOURCES, *TARGETS)


def read(folder):
    return [subject_of_files(files) for files in find_studies(folder)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_study(folder, "P", ALL, lesion=True)
    return read(folder)[0]


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    for seed in (20, 21):
        write_study(folder, f"T{seed}", ALL, seed=seed)
    return fit_baselines([lambda s=s: s.volumes for s in read(folder)], ALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, baselines):
    """Runs: the model measured; plain, joint and any-subset ones of the same task; and others of other tasks."""
    root = tmp_path_factory.mktemp("runs")
    everything = {"sources": ALL, "targets": ALL}
    models = {
        "main": {"guidance": "last", "uncertainty": True, "baselines": baselines},
        "plain": {"guidance": "none", "seed": 1},
        "joint": {"guidance": "joint", "seed": 2},
        "any": {"guidance": "last", "seed": 3, **everything},
        "reversed": {"guidance": "none", "seed": 4, "sources": SOURCES[::-1], "targets": TARGETS[::-1]},
        "fewer sources": {"guidance": "none", "sources": ("t1n",)},
        "more sources": {"guidance": "none", "sources": (*SOURCES, "swi")},
        "fewer targets": {"guidance": "none", "targets": ("t1c",)},
        "any of three": {"guidance": "last", "sources": ALL[:3], "targets": ALL[:3]},
    }
    return {name: save_untrained(root / name / "model", **changes) for name, changes in models.items()}


@pytest.fixture(scope="module")
def model(folders):
    return read_model(folders["main"])


def expected(model, subject, sources, settings, targets=TARGETS):
    """What a model makes of these sources alone, target → volume."""
    head = HeadVolumes({m: subject.volumes[m] for m in sources}, subject.head.sum((1, 2)).tolist(), 1.0)
    synthesis = synthesise(model, head, subject.name, settings)
    return {target: synthesis.images[model.config.targets.index(target)].numpy() for target in targets}


def test_the_second_model_has_the_planes_that_it_can(folders, tmp_path):
    model = read_model(save_untrained(tmp_path / "model", guidance="none", uncertainty=True, planes=3))
    planes = [
        [predictor.settings.planes for predictor in find_predictors(model, replace(SETTINGS, planes=asked), (), second)]
        for asked, second in ((3, folders["plain"]), (1, folders["plain"]), (1, tmp_path / "model"))
    ]
    assert planes == [[3, None], [1, 1], [1, 1]]


def test_each_predictor_s_images_are_its_own(model, subject, folders, baselines):
    predictors = find_predictors(model, SETTINGS, ("sample", "unconditional"), folders["any"])
    names = ["unguided", "guided: sample", "guided: unconditional", "against: any"]
    assert [predictor.name for predictor in predictors] == names
    images = predict(subject, SOURCES, predictors).images
    assert list(images) == [*names, *BASELINES]
    wanted = {
        "unguided": expected(model, subject, SOURCES, SETTINGS),
        "guided: sample": expected(model, subject, SOURCES, replace(SETTINGS, guidance="sample")),
        "guided: unconditional": expected(model, subject, SOURCES, replace(SETTINGS, guidance="unconditional")),
        "against: any": expected(read_model(folders["any"]), subject, SOURCES, SETTINGS),
    }
    sources = {m: subject.volumes[m] for m in SOURCES}
    for name, volumes in predict_baselines(baselines, model.config.modalities, sources, TARGETS).items():
        wanted[name] = dict(zip(TARGETS, volumes, strict=True))
    for name, volumes in wanted.items():
        assert list(images[name]) == list(TARGETS)
        for target in TARGETS:
            np.testing.assert_array_equal(images[name][target], volumes[target], err_msg=f"{name} {target}")
    different = [images[name][target] for name in images for target in TARGETS if name != "constant"]
    for k, volume in enumerate(different):
        assert all(np.abs(volume - other).max() > 1e-3 for other in different[k + 1 :])


def test_the_standard_deviations_are_of_the_model_s_own(model, subject, folders):
    predictors = find_predictors(model, replace(SETTINGS, samples=2), ("sample",), folders["joint"])
    stds = predict(subject, SOURCES, predictors).stds
    head = HeadVolumes({m: subject.volumes[m] for m in SOURCES}, subject.head.sum((1, 2)).tolist(), 1.0)
    wanted = synthesise(model, head, subject.name, SETTINGS).stds
    assert list(stds) == list(TARGETS)
    for target, std in zip(TARGETS, wanted.numpy(), strict=True):
        np.testing.assert_array_equal(stds[target], std)
    plain = read_model(folders["plain"])
    assert predict(subject, SOURCES, find_predictors(plain, SETTINGS, (), folders["main"])).stds == {}


def test_hidden_targets_are_never_inputs(model, subject, folders, monkeypatch):
    """Every model is given the sources and nothing else, and other truth changes nothing."""
    given = []

    def spy(model, head, *rest):
        given.append({m: volume.copy() for m, volume in head.volumes.items()})
        return synthesise(model, head, *rest)

    monkeypatch.setattr(module, "synthesise", spy)
    predictors = find_predictors(model, SETTINGS, ("sample", "unconditional"), folders["any"])
    noise = np.random.default_rng(1).random((2, *subject.head.shape), np.float32)
    changed = replace(subject, volumes={**subject.volumes, **dict(zip(TARGETS, noise, strict=True))})
    first, second = (predict(one, SOURCES, predictors).images for one in (subject, changed))
    for name, volumes in first.items():
        for target in TARGETS:
            np.testing.assert_array_equal(volumes[target], second[name][target])
    assert len(given) == 8
    for volumes in given:
        assert set(volumes) == set(SOURCES)
        assert all(np.array_equal(volumes[m], subject.volumes[m]) for m in SOURCES)


def test_a_model_of_any_subset_is_given_each_subset(subject, folders):
    model = read_model(folders["any"])
    predictors = find_predictors(model, SETTINGS, (), folders["any"])
    made = {}
    for sources in (("t2w",), ("t2w", "t2f")):
        hidden = [m for m in ALL if m not in sources]
        images = predict(subject, sources, predictors).images
        made[sources] = images["unguided"]
        wanted = expected(model, subject, sources, SETTINGS, hidden)
        for volumes in images.values():
            assert list(volumes) == hidden
            for target in hidden:
                np.testing.assert_array_equal(volumes[target], wanted[target])
    assert np.abs(made["t2w",]["t1c"] - made["t2w", "t2f"]["t1c"]).max() > 1e-3


def test_targets_that_a_study_lacks_are_not_predicted(model, subject):
    fewer = replace(subject, volumes={m: subject.volumes[m] for m in (*SOURCES, "t2f")})
    predictions = predict(fewer, SOURCES, find_predictors(model, SETTINGS))
    assert all(list(volumes) == ["t2f"] for volumes in (*predictions.images.values(), predictions.stds))
    whole = predict(subject, SOURCES, find_predictors(model, SETTINGS))
    np.testing.assert_array_equal(predictions.images["unguided"]["t2f"], whole.images["unguided"]["t2f"])


def test_skull_stripped_predictions_are_zero_outside_the_head(model, folders, tmp_path):
    write_study(tmp_path, "P", ALL, air=False)
    (subject,) = read(tmp_path)
    predictions = predict(subject, SOURCES, find_predictors(model, SETTINGS, ("sample",), folders["any"]))
    for volumes in (*predictions.images.values(), predictions.stds):
        assert all(not volume[~subject.head].any() for volume in volumes.values())
    assert predictions.images["unguided"]["t1c"][subject.head].mean() > 0.1


def test_predictions_are_zero_where_the_true_one_has_no_skull(model, subject):
    brain = np.zeros_like(subject.head)
    brain[:, 10:20, 10:20] = subject.head[:, 10:20, 10:20]
    volumes = {**subject.volumes, "t1c": np.where(brain, subject.volumes["t1c"], np.float32(0))}
    predictions = predict(replace(subject, volumes=volumes), SOURCES, find_predictors(model, SETTINGS))
    for images in (*predictions.images.values(), predictions.stds):
        assert (images["t1c"][brain] > 0).all()
        assert not images["t1c"][~brain].any()
        assert images["t2f"][subject.head & ~brain].all()


def test_there_is_no_regression_of_what_no_training_patient_had_with_the_sources(folders, subject):
    some = [lambda: {m: subject.volumes[m] for m in (*SOURCES, "t2f")}, lambda: {"t1c": subject.volumes["t1c"]}]
    model = read_model(folders["main"])
    model.baselines = fit_baselines(some, ALL)
    images = predict(subject, SOURCES, find_predictors(model, SETTINGS)).images
    assert {name: list(volumes) for name, volumes in images.items()} == {
        "unguided": [*TARGETS],
        "constant": [*TARGETS],
        "mean image": [*TARGETS],
        "linear regression": ["t2f"],
    }
    scored = {(score.predictor, score.target) for score in measure(subject, SOURCES, images)}
    assert ("linear regression", "t2f") in scored
    assert ("linear regression", "t1c") not in scored


# Which predictors there are


@pytest.mark.parametrize(
    ("own", "others", "names"),
    [
        (None, (), ["unguided"]),
        (None, ("none",), ["unguided"]),
        ("sample", ("none", "sample", "none"), ["guided: sample", "unguided"]),
        ("none", ("unconditional", "none"), ["unguided", "guided: unconditional"]),
    ],
)
def test_the_model_s_own_comes_first_and_each_once(model, own, others, names):
    assert [p.name for p in find_predictors(model, replace(SETTINGS, guidance=own), others)] == names


def test_the_second_model_goes_by_its_own_default(model, folders):
    settings = replace(SETTINGS, guidance="sample", samples=3, seed=5)
    *_, joint = find_predictors(model, settings, (), folders["joint"])
    assert joint.name == "against: joint"
    assert (joint.settings.guidance, joint.settings.samples, joint.settings.seed) == ("sample", 3, 5)
    *_, plain = find_predictors(model, settings, (), str(folders["plain"]))
    assert (plain.settings.guidance, plain.settings.samples) == ("none", None)
    assert plain.model.record["sha256"] == read_model(folders["plain"]).record["sha256"]


def test_the_second_model_is_named_by_its_run_or_registered_name(model, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSMR_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    for name, place in {"bare": tmp_path, "kept": tmp_path / "models", "model": tmp_path / "models"}.items():
        save_untrained(place / name, guidance="none")
    monkeypatch.chdir(folders["plain"].parent)
    for against, name in (("model", "plain"), (tmp_path / "bare", "bare"), ("kept", "kept")):
        assert find_predictors(model, SETTINGS, (), against)[-1].name == f"against: {name}"
    monkeypatch.chdir(tmp_path)
    assert find_predictors(model, SETTINGS, (), "model")[-1].name == "against: model"
    with pytest.raises(ModelError, match="nowhere"):
        find_predictors(model, SETTINGS, (), "nowhere")


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        *(("main", name, True) for name in ("main", "plain", "joint", "any", "reversed")),
        *(("main", name, False) for name in ("fewer sources", "more sources", "fewer targets", "any of three")),
        *(("any", name, False) for name in ("main", "plain", "any of three")),
        *(("any of three", name, True) for name in ("any", "any of three")),
    ],
)
def test_the_second_model_must_know_the_sources_and_targets(folders, first, second, fits):
    model = read_model(folders[first])
    if fits:
        assert find_predictors(model, SETTINGS, (), folders[second])[-1].name == f"against: {second}"
    else:
        with pytest.raises(ConfigError, match=r"^--against .* makes .* from .*, but the model makes .*\.$") as caught:
            find_predictors(model, SETTINGS, (), folders[second])
        assert "\n" not in str(caught.value)


def test_a_second_model_with_other_orders_gives_the_same_targets(model, subject, folders):
    images = predict(subject, SOURCES, find_predictors(model, SETTINGS, (), folders["reversed"])).images
    wanted = expected(read_model(folders["reversed"]), subject, SOURCES, SETTINGS)
    assert list(images["against: reversed"]) == list(TARGETS)
    for target in TARGETS:
        np.testing.assert_array_equal(images["against: reversed"][target], wanted[target])


def test_what_a_model_cannot_do_is_refused(model, folders):
    for name, guidances, words in (
        ("plain", ("sample",), "without guidance"),
        ("joint", ("none",), "always guided"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_predictors(read_model(folders[name]), SETTINGS, guidances)
    with pytest.raises(ConfigError, match="steps"):
        find_predictors(model, replace(SETTINGS, ddim_steps=0))


def test_a_number_of_samples_is_refused_where_none_are_drawn(model, folders):
    settings = replace(SETTINGS, samples=2)
    for against in (None, folders["plain"]):
        with pytest.raises(ConfigError, match="add --guidance sample"):
            find_predictors(model, settings, (), against)
    assert [p.settings.samples for p in find_predictors(model, settings, ("sample",))] == [None, 2]
    assert [p.settings.samples for p in find_predictors(model, settings, (), folders["joint"])] == [None, 2]


def test_the_second_model_is_loaded_to_the_first_one_s_device(model, folders, monkeypatch):
    devices = []

    def spy(folder, device):
        devices.append(device)
        return read_model(folder)

    monkeypatch.setattr(module, "load_model", spy)
    find_predictors(model, SETTINGS, (), folders["plain"])
    assert devices == [model.device]


def test_memory_is_estimated_by_headers_models_and_targets(folders, tmp_path):
    (tmp_path / "P").mkdir()
    for modality in ALL:
        header_alone(tmp_path / "P" / f"P-{modality}.nii.gz", 300)
    (found,) = find_subjects(tmp_path)

    def needed(name, found=found, *, every_subset=False, device="cpu", **others):
        model = read_model(folders[name])
        model.to(device)
        return memory_needed(found, find_predictors(model, SETTINGS, **others), every_subset=every_subset)

    assert 100 * 300**3 < needed("main") < 300 * 300**3
    assert needed("main") < needed("main", against=folders["plain"])  # its images are kept, too
    assert needed("any") < needed("any", every_subset=True)  # three targets at once
    assert needed("main", device="meta") < needed("main")  # features are elsewhere
    (tmp_path / "P" / "P-t1c.nii.gz").unlink()
    (fewer,) = find_subjects(tmp_path)
    assert needed("main", fewer) < needed("main")
    for path in (tmp_path / "P").iterdir():
        path.write_bytes(b"no image")
    assert needed("main", fewer) == 0
