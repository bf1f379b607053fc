"""Tensors on disk: bit for bit, or not at all."""

import json
import pickle

import pytest
import torch

from crossmr.checkpoint import load_bundle, load_checkpoint, save_bundle, save_checkpoint
from crossmr.errors import ModelError
from crossmr.files import digest, write_json


def tensors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    x[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    return {
        "float32": x,
        "bfloat16": x.bfloat16(),
        "int64": torch.tensor([-(2**62) - 1, 0, 2**53 + 1]),
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x[0, 0].t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "trained": torch.randn(3, generator=generator).requires_grad_(),
    }


def same_bits(a, b):
    def bits(tensor):
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


@pytest.fixture
def folder(tmp_path):
    data = {"note": "é", "rate": 0.1, "steps": [1, 2]}
    save_bundle(tmp_path, {"first": tensors(), "second": {"w": torch.arange(6.0)}}, data, "config")
    return tmp_path


def resign(folder, **changes):
    """Change the JSON as someone would who knows how it is hashed."""
    body = json.loads((folder / "config.json").read_text())
    body.pop("sha256")
    body = {key: value for key, value in {**body, **changes}.items() if value is not ...}
    write_json(folder / "config.json", {**body, "sha256": digest(body)})


def test_a_bundle_comes_back_bit_for_bit(folder):
    loaded, data = load_bundle(folder, "config")
    assert {key: data[key] for key in ("note", "rate", "steps")} == {
        "note": "é",
        "rate": 0.1,
        "steps": [1, 2],
    }
    assert set(loaded) == {"first", "second"}
    want = tensors()
    assert set(loaded["first"]) == set(want)
    for name, tensor in want.items():
        assert same_bits(loaded["first"][name], tensor), name
    assert torch.equal(loaded["second"]["w"], torch.arange(6.0))


def test_a_bundle_is_the_same_bytes_each_time(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    save_bundle(again, {"first": tensors()}, {}, "config")
    assert (again / "first.safetensors").read_bytes() == (folder / "first.safetensors").read_bytes()


@pytest.mark.parametrize("file", ["config.json", "first.safetensors", "second.safetensors"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_is_noticed(folder, file, flip):
    whole = (folder / file).read_bytes()
    for k in range(40):
        position = k * (len(whole) - 1) // 39
        damaged = bytearray(whole)
        damaged[position] ^= flip
        (folder / file).write_bytes(damaged)
        with pytest.raises(ModelError) as caught:
            load_bundle(folder, "config")
        assert file.split(".")[0] in str(caught.value), position
        assert "\n" not in str(caught.value)
    (folder / file).write_bytes(whole)
    load_bundle(folder, "config")


@pytest.mark.parametrize("file", ["config.json", "first.safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_cut_file_is_noticed(folder, file, fraction):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ModelError):
        load_bundle(folder, "config")


@pytest.mark.parametrize("file", ["config.json", "first.safetensors"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(ModelError, match=f"{file} cannot be read: No such file"):
        load_bundle(folder, "config")


@pytest.mark.parametrize(
    "name",
    [
        "../{}.safetensors",
        "/etc/{}.safetensors",
        "sub/{}.safetensors",
        "sub\\{}.safetensors",
        "{}.safetensors\n",
        "{}.pt",
    ],
)
def test_a_file_outside_the_folder_is_never_opened(folder, name):
    body = json.loads((folder / "config.json").read_text())
    resign(folder, files={name.format("first"): body["files"]["first.safetensors"]})
    (folder / "sub").mkdir()
    for place in (folder.parent, folder / "sub", folder):
        (place / "first.safetensors").write_bytes((folder / "first.safetensors").read_bytes())
    with pytest.raises(ModelError, match="outside the model"):
        load_bundle(folder, "config")


def test_no_pickle_is_ever_loaded(folder):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    content = pickle.dumps(Trap())
    (folder / "first.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256"):
        load_bundle(folder, "config")
    resign(folder, files={"first.safetensors": digest(content)})
    with pytest.raises(ModelError, match="not a safetensors"):
        load_bundle(folder, "config")


@pytest.mark.parametrize("files", [..., None, ["first.safetensors"], "first.safetensors"])
def test_json_that_names_no_files_is_refused(folder, files):
    resign(folder, files=files)
    with pytest.raises(ModelError, match="names no tensor files"):
        load_bundle(folder, "config")


def state(step):
    return {"w": torch.full((3,), float(step))}


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, state(step), {"rate": 0.5})
    assert steps_of(tmp_path) == [
        "step-00000010.json",
        "step-00000010.safetensors",
        "step-00000100.json",
        "step-00000100.safetensors",
    ]
    loaded, data = load_checkpoint(tmp_path)
    assert torch.equal(loaded["w"], state(100)["w"])
    assert (data["step"], data["rate"]) == (100, 0.5)


def test_what_is_no_checkpoint_is_neither_counted_nor_deleted(tmp_path):
    for name in ("step-00000000", "step-99999999"):
        (tmp_path / f"{name}.json").write_text('{"mine": 1}')
        (tmp_path / f"{name}.safetensors").write_text("mine")
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {})
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"step-00000000", "step-00000003", "step-00000004", "step-99999999"}


def test_a_checkpoint_written_twice_is_the_later_one(tmp_path):
    save_checkpoint(tmp_path, 5, state(1), {})
    save_checkpoint(tmp_path, 5, state(2), {})
    assert torch.equal(load_checkpoint(tmp_path)[0]["w"], state(2)["w"])


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, suffix):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), {})
    path = tmp_path / f"step-00000002.{suffix}"
    path.write_bytes(path.read_bytes()[:-7])
    heard = []
    loaded, data = load_checkpoint(tmp_path, heard.append)
    assert torch.equal(loaded["w"], state(1)["w"])
    assert data["step"] == 1
    assert len(heard) == 1
    assert "step-00000002" in heard[0]


def test_a_renamed_checkpoint_is_passed_over_aloud(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {})
    (tmp_path / "step-00000007.json").write_bytes((tmp_path / "step-00000001.json").read_bytes())
    heard = []
    loaded, data = load_checkpoint(tmp_path, heard.append)
    assert data["step"] == 1
    assert torch.equal(loaded["w"], state(1)["w"])
    assert "renamed" in heard[0]


def test_tensors_without_their_json_are_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), {})
    save_checkpoint(tmp_path, 2, state(2), {})
    (tmp_path / "step-00000002.json").unlink()  # as after a crash between the two files
    assert load_checkpoint(tmp_path)[1]["step"] == 1


def test_nothing_whole_is_none(tmp_path):
    heard = []
    assert load_checkpoint(tmp_path / "missing", heard.append) is None
    assert load_checkpoint(tmp_path, heard.append) is None
    assert heard == []
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), {})
        (tmp_path / f"step-{step:08d}.safetensors").write_bytes(b"")
    assert load_checkpoint(tmp_path, heard.append) is None
    assert len(heard) == 2
