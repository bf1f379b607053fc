"""The model registry: models shipped with the package, and models imported from a file.

An exported model is a zip of its folder. Nothing is downloaded: models come as files, which also pass a firewall.
"""

import contextlib
import io
import lzma
import os
import re
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crossmr.errors import ModelError, OutputError
from crossmr.files import is_record, refuse_foreign, write_atomically
from crossmr.paths import PATIENTS, check_model

if TYPE_CHECKING:  # PyTorch takes seconds to load, and a wrong name is refused without it
    import torch

    from crossmr.networks.model import CrossConditionedModel

SHIPPED = Path(__file__).parent / "weights"
DEFAULT = "default"
"""Name of the model that is used where none is named."""
MAX_MODEL_BYTES = 2**31
"""Bytes that an imported model may have."""
_FILE = re.compile(rf"config\.json|{re.escape(PATIENTS)}|[a-z0-9_-]+\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RegisteredModel:
    """A model that has a name."""

    name: str
    folder: Path
    shipped: bool


def models_folder() -> Path:
    """The folder of imported models: $CROSSMR_HOME/models, by default ~/.crossmr/models."""
    home = os.path.expanduser("~")  # "~" itself for a user without a name, as in a container
    return Path(os.environ.get("CROSSMR_HOME") or os.path.join(home if home != "~" else os.sep, ".crossmr")) / "models"


def known_models() -> dict[str, RegisteredModel]:
    """Name → model, the shipped ones first; imported ones that cannot be read are none."""
    models: dict[str, RegisteredModel] = {}
    for root, shipped in ((SHIPPED, True), (models_folder(), False)):
        with contextlib.suppress(OSError):
            for folder in sorted(root.iterdir()):
                if os.path.exists(folder / "config.json"):
                    models.setdefault(folder.name, RegisteredModel(folder.name, folder, shipped))
    return models


def _unreadable() -> str:
    """A hint where the folder of imported models cannot be read, as in another user's home."""
    try:
        os.listdir(models_folder())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f" {models_folder()} cannot be read ({error.strerror}): set CROSSMR_HOME to another folder."
    return ""


def find_model(model: Path | str | None = None) -> Path:
    """The folder of a model: of a registered name, the folder itself, or by default the default model's.

    Raises:
        ModelError: there is neither a model of this name nor such a folder.
    """
    known = known_models()
    if model is None:
        if DEFAULT not in known:
            raise ModelError("This crossmr has no default model. Name one with --model, or train one.")
        return known[DEFAULT].folder
    if str(model) in known and not os.path.exists(Path(model) / "config.json"):
        return known[str(model)].folder
    if not os.path.exists(model) and _NAME.fullmatch(str(model)):
        raise ModelError(
            f"'{model}' is neither a folder nor the name of a model; the models are: {', '.join(known) or 'none'}."
            f"{_unreadable()}"
        )
    check_model(Path(model))
    return Path(model)


def name_of(folder: Path) -> str:
    """What the model in a folder is called: RUN/model is known by its run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def load_model(
    model: "CrossConditionedModel | Path | str | None" = None, device: "torch.device | str" = "auto"
) -> "CrossConditionedModel":
    """Load a model once, to complete or evaluate as many studies with it as there are.

    Args:
        model: the name of a registered model, such as "default", or the folder of one; None for the default. A model
            that is loaded already is returned as it is, on its own device.
        device: where it runs: 'auto' (a GPU, if there is one), 'cpu', 'cuda', 'cuda:1' or 'mps'.

    Returns:
        The networks as one `nn.Module` in evaluation mode, float32, without gradients.

    Raises:
        ModelError: no such model, or one that is damaged or of another version. ConfigError: no such device.
    """
    if not (model is None or isinstance(model, (Path, str))):
        return model
    folder = find_model(model)
    from crossmr.device import choose_device
    from crossmr.networks.model import read_model

    return read_model(folder, choose_device(str(device)))


def import_model(source: Path, name: str | None = None) -> RegisteredModel:
    """Check an exported model, or a model's folder, and register it under a name, by default the file's, or `name_of`.

    Raises:
        ModelError: it is not a model, is damaged, or contains other files than a model's.
        OutputError: the name is taken, or nothing can be written.
    """
    if os.path.isdir(source):
        check_model(source)
        name = name or name_of(source)
    name = name or source.name.removesuffix(".zip")
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"'{name}' is not a name for a model; expected letters, digits, '.', '_' and '-'; choose with --name."
        )
    if name in known_models():
        raise OutputError(f"There is a model '{name}' already; choose another with --name.")
    if os.path.lexists(models_folder() / name):
        raise OutputError(f"{models_folder() / name} exists and is not a model; choose another name with --name.")
    try:
        models_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models_folder(), prefix=".import-") as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            for file, content in _contents(source).items():
                (folder / file).write_bytes(content)
            from crossmr.networks.model import read_model

            try:
                read_model(folder)
            except ModelError as error:
                said = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder} ", "")
                raise ModelError(f"{source}: {said}") from error
            os.replace(folder, models_folder() / name)
    except OSError as error:
        raise OutputError(
            f"{models_folder()} could not be written: {error.strerror or error}. Check free space and permissions, or "
            "set CROSSMR_HOME to another folder."
        ) from error
    return RegisteredModel(name, models_folder() / name, False)


def export_model(model: Path | str, target: Path, *, with_patients: bool = False) -> "CrossConditionedModel":
    """Check a model and write it to one zip file, without the list of whom it was trained on unless that is wanted.

    Raises:
        ModelError: there is no such model, or it is damaged. OutputError: the file exists or cannot be written.
    """
    if os.path.lexists(target):
        raise OutputError(f"{target} exists; name another file.")
    folder = find_model(model)
    from crossmr.networks.model import read_model

    loaded = read_model(folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file, content in sorted(_contents(folder).items()):
            if file == PATIENTS and not with_patients:
                continue
            archive.writestr(zipfile.ZipInfo(file), content)  # no dates: the same model, the same bytes
    write_atomically(target, buffer.getvalue())
    return loaded


def remove_model(name: str) -> None:
    """Delete an imported model's files, and its folder if nothing else lies in it.

    Raises:
        ModelError: there is none of this name, or it is shipped with the package. OutputError: it cannot be deleted, or
            is another program's.
    """
    known = known_models()
    model = known.get(name)
    if model is None or model.shipped:
        imported = ", ".join(name for name, one in known.items() if not one.shipped) or "none"
        shipped = " but shipped with crossmr" if model else ""
        raise ModelError(f"'{name}' is not an imported model{shipped}; these are: {imported}.{_unreadable()}")
    try:
        if model.folder.is_symlink():
            model.folder.unlink()
            return
        from crossmr.networks.model import FORMAT

        refuse_foreign(model.folder / "config.json", partial(is_record, kind=FORMAT))
        for path in sorted(model.folder.iterdir()):  # config.json first: half a model is none
            if _FILE.fullmatch(path.name) and path.is_file():
                path.unlink()
        with contextlib.suppress(OSError):  # what else lies in it stays
            model.folder.rmdir()
    except OSError as error:
        raise OutputError(f"{model.folder} could not be removed: {error.strerror or error}.") from error


def _contents(source: Path) -> dict[str, bytes]:
    """File name → content of a model's folder or zip; a zip with any other name is refused before it is unpacked."""
    try:
        if source.is_dir():
            return {path.name: path.read_bytes() for path in source.iterdir() if _FILE.fullmatch(path.name)}
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if foreign := [entry.filename for entry in entries if not _FILE.fullmatch(entry.filename)]:
                raise ModelError(f"{source} holds {foreign[0]!r}, which is not a file of a model. Do not use it.")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ModelError(f"{source} holds a file twice. Do not use it.")
            if sum(entry.file_size for entry in entries) > MAX_MODEL_BYTES:
                raise ModelError(f"{source} would unpack to more than {MAX_MODEL_BYTES >> 30} GiB. Do not use it.")
            return {entry.filename: archive.read(entry) for entry in entries}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{source} cannot be read as an exported model: {reason}. Copy it again.") from error
