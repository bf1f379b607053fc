"""The model registry: models are listed, found by name, imported and exported whole, anything else refused."""

import errno
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import save_untrained, sha256, tree, write_study

import crossmr
from crossmr import registry
from crossmr.cli import main
from crossmr.completion.study import complete
from crossmr.errors import ConfigError, ModelError, OutputError
from crossmr.files import digest
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.networks.trained_on import names_of, remember


@pytest.fixture(autouse=True)
def models_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSMR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "shipped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model"))


def run(monkeypatch, *said):
    monkeypatch.setattr(sys, "argv", ["crossmr", *map(str, said)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_exported_and_imported_is_the_same_model(folder, tmp_path):
    registry.export_model(folder, tmp_path / "mine.zip")
    known = registry.import_model(tmp_path / "mine.zip")
    assert (known.name, known.shipped) == ("mine", False)
    for path in folder.iterdir():
        assert (known.folder / path.name).read_bytes() == path.read_bytes()
    assert registry.find_model("mine") == known.folder
    registry.export_model("mine", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "mine.zip").read_bytes()
    assert registry.import_model(folder, "other").folder.name == "other"
    assert list(registry.known_models()) == ["mine", "other"]
    registry.remove_model("mine")
    assert list(registry.known_models()) == ["other"]


def test_whom_a_model_was_trained_on_stays_at_home_unless_it_is_to_go_too(folder, tmp_path, monkeypatch, capsys):
    patients = [remember(names_of("Doe^Jane", ()), ())]
    mine = save_untrained(tmp_path / "mine", patients=patients)
    assert run(monkeypatch, "models", "export", mine, tmp_path / "without.zip") == 0
    assert "excluded: the list of hashes of the patients" in capsys.readouterr().out
    assert run(monkeypatch, "models", "export", mine, tmp_path / "with.zip", "--with-patients") == 0
    assert "excluded" not in capsys.readouterr().out
    assert run(monkeypatch, "models", "export", folder, tmp_path / "none.zip") == 0
    assert "excluded" not in capsys.readouterr().out
    loaded = {name: read_model(registry.import_model(tmp_path / f"{name}.zip").folder) for name in ("with", "without")}
    assert loaded["with"].patients == tuple(patients)
    assert loaded["without"].patients == ()
    assert loaded["with"].record == loaded["without"].record == read_model(mine).record
    assert patients[0].salt.encode() not in (tmp_path / "without.zip").read_bytes()


def test_a_name_that_is_taken_is_not_replaced(folder, tmp_path):
    registry.import_model(folder, "mine")
    before = (registry.models_folder() / "mine" / "config.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match="a model 'mine' already"):
        registry.import_model(folder, "mine")
    assert (registry.models_folder() / "mine" / "config.json").stat().st_mtime_ns == before
    (tmp_path / "there.zip").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        registry.export_model(folder, tmp_path / "there.zip")
    assert (tmp_path / "there.zip").read_bytes() == b"mine"


def test_a_run_s_model_is_called_after_the_run(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "runA" / "model")
    shutil.copytree(folder, tmp_path / "runB" / "model")
    assert registry.import_model(tmp_path / "runA" / "model").name == "runA"
    monkeypatch.chdir(tmp_path / "runB")
    assert registry.import_model(Path("model")).name == "runB"
    monkeypatch.chdir(tmp_path / "runB" / "model")
    with pytest.raises(OutputError, match="a model 'runB' already"):
        registry.import_model(Path())


def test_a_folder_that_is_no_model_is_named_as_the_user_names_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=rf"^{tmp_path}/run is not a model: .* Did you mean {tmp_path}/run/model\?$"):
        registry.import_model(tmp_path / "run")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/empty is not a model: it has no config\.json"):
        registry.import_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ModelError, match=r"empty: config\.json does not match its own SHA-256"):
        registry.import_model(tmp_path / "empty")
    config = {"format": "other", "format_version": 1, "files": {}}
    sealed = json.dumps({**config, "sha256": digest(config)})
    with pytest.raises(ModelError, match=r"old\.zip: is other 1; this crossmr reads"):
        registry.import_model(packed(folder, tmp_path / "old.zip", {"config.json": sealed.encode()}))


def packed(folder, path, changes):
    """The model as a zip, with entries changed, added, or, None, left out."""
    entries = {one.name: one.read_bytes() for one in folder.iterdir()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if content is not None:
                archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"../evil.safetensors": b"x"}, "is not a file of a model"),
        ({"/tmp/evil.safetensors": b"x"}, "is not a file of a model"),
        ({"sub/config.json": b"{}"}, "is not a file of a model"),
        ({"run.sh": b"x"}, "is not a file of a model"),
        ({"synthesis.safetensors": b"damaged"}, "does not match its SHA-256"),
        ({"synthesis.safetensors": None}, "cannot be read"),
        ({"config.json": None}, "not a model"),
        ({"config.json": b"{}"}, "does not match its own SHA-256"),
    ],
)
def test_what_is_no_whole_model_is_refused_and_nothing_is_left(folder, tmp_path, changes, match):
    with pytest.raises(ModelError, match=match):
        registry.import_model(packed(folder, tmp_path / "bad.zip", changes))
    assert registry.known_models() == {}
    assert list(registry.models_folder().iterdir()) == []
    assert not (tmp_path / "evil.safetensors").exists()


def test_what_unpacks_to_too_much_or_is_no_zip_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "MAX_MODEL_BYTES", 100)
    with pytest.raises(ModelError, match="would unpack to more than"):
        registry.import_model(packed(folder, tmp_path / "large.zip", {}))
    (tmp_path / "text.zip").write_text("no zip")
    for wrong in ("text.zip", "missing.zip"):
        with pytest.raises(ModelError, match="cannot be read as an exported model"):
            registry.import_model(tmp_path / wrong)
    for name in ("../up", "", ".hidden", "a b"):
        with pytest.raises((ModelError, OutputError)):
            registry.import_model(folder, name or "/")


def test_the_default_is_used_where_none_is_named(folder, tmp_path):
    write_study(tmp_path, "Ann", ["t1n", "t2w"])
    with pytest.raises(ModelError, match="no default model"):
        complete(tmp_path / "Ann")
    registry.import_model(folder, "default")
    completed = complete(tmp_path / "Ann", settings=InferenceSettings(precision="float32"))
    assert list(completed.images) == ["t1c", "t2f"]
    assert completed.manifest["settings"]["model_sha256"] == read_model(folder).record["sha256"]
    with pytest.raises(
        ModelError, match="'defautl' is neither a folder nor the name of a model; the models are: default"
    ):
        complete(tmp_path / "Ann", "defautl")


def test_a_model_is_loaded_once_by_name_or_folder_for_many_studies(folder, tmp_path, monkeypatch):
    registry.import_model(folder, "default")
    registry.import_model(folder, "mine")
    for number in range(2):
        write_study(tmp_path, f"P{number}", ["t1n", "t2w"], seed=number)
    loaded = [crossmr.load_model(), *(crossmr.load_model(m, device="cpu") for m in ("default", "mine", folder))]
    assert {model.record["sha256"] for model in loaded} == {read_model(folder).record["sha256"]}
    once = crossmr.complete(tmp_path / "P1", "mine", InferenceSettings(precision="float32", device="cpu"))
    monkeypatch.setattr("crossmr.networks.model.read_model", None)  # nothing is read from here on
    assert all(crossmr.load_model(model, device="meta") is model for model in loaded)
    for number in range(2):
        result = crossmr.complete(
            tmp_path / f"P{number}", model=loaded[1], settings=InferenceSettings(precision="float32")
        )
    assert {m: i.to_bytes() for m, i in result.images.items()} == {m: i.to_bytes() for m, i in once.images.items()}
    with pytest.raises(ConfigError, match="--device is 'tpu'"):
        crossmr.load_model("default", device="tpu")


def test_shipped_models_come_first_and_are_not_removed(folder, tmp_path):
    save_untrained(tmp_path / "shipped" / "default", seed=1)
    known = registry.known_models()["default"]
    assert known.shipped
    assert registry.find_model() == tmp_path / "shipped" / "default"
    with pytest.raises(ModelError, match="shipped"):
        registry.remove_model("default")
    with pytest.raises(ModelError, match="not an imported model"):
        registry.remove_model("other")


def test_nothing_of_another_s_is_replaced_or_removed(folder, tmp_path):
    registry.import_model(folder, "mine")
    home = registry.models_folder()
    (home / "mine" / "notes.txt").write_text("mine")
    registry.remove_model("mine")
    assert tree(home) == {"mine/notes.txt": sha256(home / "mine" / "notes.txt")}
    assert registry.known_models() == {}
    with pytest.raises(OutputError, match="mine exists and is not a model; choose another name"):
        registry.import_model(folder, "mine")
    (home / "bert").mkdir()
    for name in ("config.json", "model.safetensors"):
        (home / "bert" / name).write_text('{"format": "bert"}')
    (home / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dangling.zip").symlink_to(tmp_path / "gone")
    before = tree(home)
    with pytest.raises(OutputError, match=r"bert/config\.json is not crossmr's"):
        registry.remove_model("bert")
    with pytest.raises(OutputError, match="link exists and is not a model"):
        registry.import_model(folder, "link")
    with pytest.raises(OutputError, match=r"dangling\.zip exists; name another file"):
        registry.export_model(folder, tmp_path / "dangling.zip")
    assert tree(home) == before
    assert (tmp_path / "dangling.zip").is_symlink()


def test_the_command_line_lists_verifies_imports_exports_and_removes(folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "models") == 0
    assert "no registered models" in capsys.readouterr().out
    assert run(monkeypatch, "models", "export", folder, tmp_path / "mine.zip") == 0
    assert run(monkeypatch, "models", "import", tmp_path / "mine.zip") == 0
    assert run(monkeypatch, "models", "import", tmp_path / "mine.zip", "--name", "second") == 0
    capsys.readouterr()
    assert run(monkeypatch, "models") == 0
    listed = capsys.readouterr().out
    assert "mine: t1n, t2w → t1c, t2f; imported" in listed
    assert read_model(folder).record["sha256"][:12] in listed
    assert run(monkeypatch, "models", "verify") == 0
    assert capsys.readouterr().out.count("whole") == 2
    weights = registry.models_folder() / "second" / "synthesis.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert run(monkeypatch, "models", "verify") == 1
    assert "second failed" in capsys.readouterr().err
    assert run(monkeypatch, "models", "verify", "mine") == 0
    assert run(monkeypatch, "models", "remove", "second") == 0
    assert run(monkeypatch, "models", "import", tmp_path / "mine.zip") == 1
    assert "There is a model 'mine' already" in capsys.readouterr().err


def test_a_model_that_is_named_is_not_hidden_by_a_folder_of_that_name(folder, tmp_path, monkeypatch, capsys):
    registry.import_model(folder, "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert registry.find_model("mine") == registry.models_folder() / "mine"
    (registry.models_folder() / "bad").mkdir()
    (registry.models_folder() / "bad" / "config.json").write_text('{"config": []}')
    assert run(monkeypatch, "models") == 0
    listed = capsys.readouterr().out
    assert "bad: damaged" in listed
    assert "mine: t1n" in listed
    (registry.models_folder() / "linked").symlink_to(folder)
    registry.remove_model("linked")
    assert (folder / "config.json").exists()
    registry.export_model("mine", tmp_path / "out.zip")
    with pytest.raises(ModelError, match=r"crossmr models import"):
        read_model(tmp_path / "out.zip")


def test_a_damaged_deflated_zip_and_an_impossible_network_are_refused(folder, tmp_path):
    path = tmp_path / "deflated.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one in folder.iterdir():
            archive.writestr(one.name, one.read_bytes())
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ModelError):
        registry.import_model(path)
    data = json.loads((folder / "config.json").read_text())
    data.pop("sha256")
    data["config"]["synthesis"]["channels"] = 10**9
    body = {**data, "sha256": digest(data)}
    with pytest.raises(ModelError, match=r"huge\.zip: .*config\.json"):
        registry.import_model(packed(folder, tmp_path / "huge.zip", {"config.json": json.dumps(body).encode()}))
    assert list(registry.models_folder().iterdir()) == []


def test_imported_models_are_in_the_home_folder_unless_said_otherwise(tmp_path, monkeypatch):
    assert registry.models_folder() == tmp_path / "home" / "models"
    monkeypatch.delenv("CROSSMR_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "user"))
    assert registry.models_folder() == tmp_path / "user" / ".crossmr" / "models"


@pytest.fixture
def closed_home(folder, tmp_path, monkeypatch):
    """A folder of imported models that this user may not look into, and a shipped model."""
    shutil.copytree(folder, registry.SHIPPED / registry.DEFAULT)

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for module, name in ((os, "listdir"), (os, "scandir"), (os, "stat"), (os, "mkdir")):
        usual = getattr(module, name)
        monkeypatch.setattr(
            *(module, name),
            lambda path=".", *given, usual=usual, **named: (
                refuse(path) if str(path).startswith(str(tmp_path / "home")) else usual(path, *given, **named)
            ),
        )
    return tmp_path / "home" / "models"


def test_a_home_that_cannot_be_read_hides_no_shipped_model(closed_home):
    assert list(registry.known_models()) == [registry.DEFAULT]
    assert registry.find_model() == registry.SHIPPED / registry.DEFAULT
    remedy = re.escape(f"{closed_home} cannot be read (Permission denied): set CROSSMR_HOME to another folder.")
    with pytest.raises(ModelError, match=rf"the models are: default\. {remedy}"):
        registry.find_model("mine")
    with pytest.raises(ModelError, match=rf"these are: none\. {remedy}"):
        registry.remove_model("mine")
    with pytest.raises(OutputError, match=r"could not be written: Permission denied.* or set CROSSMR_HOME to another"):
        registry.import_model(registry.SHIPPED / registry.DEFAULT, "mine")


def test_no_folder_is_called_tilde_where_nobody_has_a_home(monkeypatch):
    """In a container, under a number that no user has."""
    monkeypatch.delenv("CROSSMR_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert registry.models_folder() == Path(os.sep, ".crossmr", "models")
