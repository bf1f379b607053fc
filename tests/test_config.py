"""Settings to plain data and back, and what is refused on the way."""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import pytest

from crossmr.config import check_kind, from_dict, to_dict, with_settings
from crossmr.errors import ConfigError
from crossmr.networks.model import ModelConfig
from crossmr.training.recipes import PAPER, RECIPES, TINY, Recipe


@dataclass(frozen=True)
class Inner:
    """A leaf."""

    size: int = 3


@dataclass(frozen=True)
class Outer:
    """Every kind of field that `config` reads."""

    name: str
    rate: float = 0.5
    flag: bool = False
    limit: int | None = 4
    pair: tuple[int, float] = (1, 2.0)
    sides: tuple[int, ...] = (8, 8)
    form: Literal["a", "b"] = "a"
    counts: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


OUTER = Outer("x", counts={"one": 1})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    text = json.dumps(to_dict(RECIPES[name]), allow_nan=False)
    assert from_dict(Recipe, json.loads(text)) == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_model_configs_survive_json(name):
    config = RECIPES[name].model_config(("t1n", "t2w"), ("t1c",))
    read = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
    assert read == config
    assert isinstance(read.window, tuple)
    assert isinstance(read.representation.multipliers, tuple)


def test_every_field_is_kept_in_its_type():
    read = from_dict(Outer, json.loads(json.dumps(to_dict(OUTER))))
    assert read == OUTER
    assert [type(getattr(read, f.name)) for f in fields(read)] == [type(getattr(OUTER, f.name)) for f in fields(OUTER)]


def test_left_out_settings_take_their_defaults():
    assert from_dict(Outer, {"name": "y"}) == Outer("y")


def test_a_missing_required_setting_is_named():
    with pytest.raises(ConfigError, match="name"):
        from_dict(Outer, {})


@pytest.mark.parametrize(
    ("path", "text", "want"),
    [
        ("name", "5", "5"),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("flag", "true", True),
        ("flag", "false", False),
        ("limit", "7", 7),
        ("limit", "none", None),
        ("pair", "3,0.25", (3, 0.25)),
        ("sides", "16,32,64", (16, 32, 64)),
        ("sides", "16", (16,)),
        ("form", "b", "b"),
        ("counts.one", "2", {"one": 2}),
        ("counts.two", "2", {"one": 1, "two": 2}),
        ("inner.size", "9", Inner(9)),
    ],
)
def test_settings_are_read_from_text(path, text, want):
    changed = with_settings(OUTER, {path: text})
    got = getattr(changed, path.split(".")[0])
    assert (got, type(got)) == (want, type(want))
    name = path.split(".")[0]
    assert {f.name for f in fields(Outer) if getattr(changed, f.name) != getattr(OUTER, f.name)} <= {name}


def test_several_nested_settings_at_once_leave_the_rest_alone():
    changed = with_settings(
        replace(TINY, guidance="last"),
        {"synthesis.channels": "32", "synthesis.multipliers": "[1, 2]", "crop": "64,64", "guidance": "none"},
    )
    assert (changed.synthesis.channels, changed.synthesis.multipliers) == (32, (1, 2))
    assert (changed.crop, changed.guidance) == ((64, 64), "none")  # 'none' is a word here, not a missing value
    assert changed.distribution == TINY.distribution
    assert TINY.synthesis.channels == 24


@pytest.mark.parametrize(
    "path",
    ["", "nothing.at.all", "synthesis", "synthesis.", ".channels", "synthesis.channels.more", "crop.0"],
)
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ConfigError, match="is not a setting"):
        with_settings(PAPER, {path: "1"})


@pytest.mark.parametrize(
    ("path", "hint"),
    [("synthesis.chanels", "channels"), ("guidence", "guidance"), ("distribution.schedule.step", "steps")],
)
def test_a_typo_is_met_with_the_nearest_name(path, hint):
    with pytest.raises(ConfigError, match=rf"'{path}' is not a setting.*Did you mean '{hint}'\?"):
        with_settings(PAPER, {path: "1"})


def test_a_far_off_name_is_met_with_all_names():
    with pytest.raises(ConfigError, match="It has: size"):
        from_dict(Inner, {"zzz": 1})


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("samples", "many"),
        ("samples", "2.5"),
        ("samples", "none"),
        ("samples", ""),
        ("flip", "maybe"),
        ("guidance", "psychic"),
        ("crop", "96,tall"),
        ("crop", ""),
        ("synthesis.channels", "inf"),
        ("synthesis_train.learning_rate", "nan"),
        ("synthesis_train.gradient_clip", "inf"),
    ],
)
def test_text_of_the_wrong_type_is_refused_by_path(path, text):
    with pytest.raises(ConfigError, match=f"^{path} is '{text.split(',')[-1]}'; "):
        with_settings(PAPER, {path: text})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("name", None),
        ("rate", True),
        ("rate", [1.0]),
        ("rate", float("inf")),
        ("rate", None),
        ("flag", 1),
        ("limit", 1.5),
        ("limit", float("nan")),
        ("limit", {}),
        ("pair", [1]),
        ("pair", [1, 2, 3]),
        ("pair", 1),
        ("sides", None),
        ("sides", [1, "a"]),
        ("form", ["a"]),
        ("counts", [1]),
        ("counts", {"a": "b"}),
        ("inner", 3),
        ("inner", {"size": 1.5}),
    ],
)
def test_data_of_the_wrong_type_is_refused_by_path(key, value):
    with pytest.raises(ConfigError, match=f"^{key}"):
        from_dict(Outer, {"name": "x", key: value})


def test_no_mapping_at_all_is_refused():
    with pytest.raises(ConfigError, match="Recipe: expected settings by name"):
        from_dict(Recipe, ["crop"])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("samples", "0"),
        ("representation.mask_ratio", "1"),
        ("representation.multipliers", "1,0"),
        ("representation.patch_size", "0"),
        ("distribution.width", "7"),
        ("distribution.condition_dropout", "-0.1"),
        ("distribution.schedule.steps", "0"),
        ("distribution.schedule.beta_end", "1"),
        ("synthesis.channels", "0"),
        ("synthesis_train.learning_rate", "0"),
        ("synthesis_train.ema_decay", "1"),
        ("synthesis_train.weight_decay", "-1"),
    ],
)
def test_the_checks_of_each_dataclass_surface(path, text):
    with pytest.raises(ConfigError) as caught:
        with_settings(PAPER, {path: text})
    assert path.split(".")[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["representation", "synthesis"])
def test_networks_of_no_level_are_refused(stage):
    with pytest.raises(ConfigError, match="at least 1"):
        from_dict(Recipe, {stage: {"multipliers": []}})


def test_settings_of_another_kind_are_named():
    check_kind(OUTER, Outer)
    with pytest.raises(ConfigError, match=r"inner is \{'size': 3\}; expected Inner\(…\), with the settings by name"):
        check_kind({"size": 3}, Inner, "inner")
