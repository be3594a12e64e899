"""A miniature that has a ControlNet: the trained one, else a stand-in of random weights in the true format.

The stand-in follows no structure, but every part of the program treats it as the real one.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import mini
import weights

ROOT = Path(__file__).parent.parent
TRAINED = mini.CONTROLNET_FOLDER / mini.CONTROLNET_FILE


def write_random(path: Path, seed: int = 0) -> None:
    """Write a ControlNet of random weights."""
    import torch
    from safetensors.torch import save_file

    from mini_models import MiniControlNet

    torch.manual_seed(seed)
    state = MiniControlNet().state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in state.items()}, path, {"format": "pt"})


@cache
def mini_root() -> Path:
    """Return the folder of a miniature that is complete."""
    if TRAINED.is_file():
        return weights.MINI_ROOT
    folder = Path(tempfile.mkdtemp(prefix="studio-mini-"))
    for entry in weights.MINI_ROOT.iterdir():
        (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    write_random(folder / mini.CONTROLNET_FOLDER.name / mini.CONTROLNET_FILE)
    return folder


@cache
def program() -> Path:
    """Return the folder of a program with such a miniature: this one, or a copy of it."""
    if TRAINED.is_file():
        return ROOT
    folder = Path(tempfile.mkdtemp(prefix="studio-program-"))
    for entry in ROOT.iterdir():
        if entry.suffix in (".py", ".css"):
            shutil.copy(entry, folder)  # modules look for their files beside themselves, through links
    shutil.copytree(ROOT / "assets", folder / "assets")
    (folder / "weights").mkdir()
    (folder / "weights" / "blazepose").symlink_to(ROOT / "weights" / "blazepose")
    (folder / "weights" / "mini").symlink_to(mini_root())
    return folder
