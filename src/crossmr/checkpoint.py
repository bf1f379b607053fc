"""Tensors on disk: safetensors and JSON with SHA-256, written atomically, never pickled.

A folder of tensors is whole when its JSON file says so: the JSON is written last, names every tensor file
with its hash, and carries a hash of itself, so that one flipped byte anywhere is noticed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from crossmr.errors import ModelError
from crossmr.files import digest, read_json, write_atomically, write_json


def save_bundle(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], data: Mapping[str, Any], name: str) -> None:
    """Write groups of tensors to folder/GROUP.safetensors, then hashes and `data` to folder/NAME.json."""
    files = {}
    for group, state in tensors.items():
        content = safetensors.torch.save({key: value.detach().contiguous().cpu() for key, value in state.items()})
        write_atomically(folder / f"{group}.safetensors", content)
        files[f"{group}.safetensors"] = digest(content)
    body = {**data, "files": files}
    write_json(folder / f"{name}.json", {**body, "sha256": digest(body)})


def load_bundle(folder: Path, name: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_bundle` wrote, after checking every hash.

    Raises:
        ModelError: a file is missing, was changed or is damaged; nothing of it is returned.
    """
    body = read_json(folder / f"{name}.json")
    if body.pop("sha256", None) != digest(body):
        raise ModelError(
            f"{folder / name}.json does not match its own SHA-256: it was changed or damaged. Copy it again."
        )
    if not isinstance(body.get("files"), dict):
        raise ModelError(f"{folder / name}.json names no tensor files: it was not written by crossmr.")
    tensors = {}
    for file, sha256 in body["files"].items():
        if not re.fullmatch(r"[a-z0-9_.-]+\.safetensors", file):
            raise ModelError(
                f"{folder / name}.json names the file {file!r}, which lies outside the model. Do not use it."
            )
        try:
            content = (folder / file).read_bytes()
        except OSError as error:
            raise ModelError(
                f"{folder / file} cannot be read: {error.strerror or error}. Copy the whole folder again."
            ) from error
        if digest(content) != sha256:
            raise ModelError(f"{folder / file} does not match its SHA-256: it was changed or damaged. Copy it again.")
        try:
            tensors[file.removesuffix(".safetensors")] = safetensors.torch.load(content)
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that PyTorch lacks
            raise ModelError(
                f"{folder / file} is not a safetensors file that PyTorch reads ({error}). Copy it again."
            ) from error
    return tensors, body


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any], keep: int = 2
) -> None:
    """Write step `step` of a training and delete all but the `keep` newest whole checkpoints."""
    name = f"step-{step:08d}"
    save_bundle(folder, {name: tensors}, {**data, "step": step}, name)
    for old in [name for name in _steps(folder) if _is_bundle(folder / f"{name}.json")][keep:]:
        (folder / f"{old}.json").unlink()
        (folder / f"{old}.safetensors").unlink(missing_ok=True)


def _is_bundle(path: Path) -> bool:
    """Whether a file is one that `save_bundle` wrote: it matches its own hash."""
    try:
        body = read_json(path)
    except ModelError:
        return False
    return bool(body.pop("sha256", None) == digest(body))


def load_checkpoint(
    folder: Path, warn: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint in `folder`, or None; `warn` hears of each damaged one passed over."""
    for name in _steps(folder):
        try:
            tensors, data = load_bundle(folder, name)
            if name not in tensors:
                raise ModelError(f"{folder / name}.json is another checkpoint's, renamed.")
            return tensors[name], data
        except ModelError as error:
            warn(f"{error} Going on from the checkpoint before it.")
    return None


def _steps(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, newest first."""
    return sorted((path.stem for path in folder.glob("step-*.json")), reverse=True)
