"""Where ComfyUI keeps models: its folders on this machine, and which of the files in them may be a part of ours.

By names alone, as ComfyUI's own examples and downloads have them; what a file really holds is `hub.inventory`'s to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hub.checkpoint import entries
from hub.parts import controlnet_rank
from hub.places import expanded, explicit_root, home

# ComfyUI's folders by what they hold, each with its older name (folder_paths.py).
TRANSFORMERS = ("diffusion_models", "unet", "checkpoints")
USUAL = ("ComfyUI", "comfy/ComfyUI", "Documents/ComfyUI")  # below a user's home
PATHS_FILES = ("extra_model_paths.yaml", "extra_models_config.yaml")  # of a checkout, of the desktop program
SUFFIXES = (".safetensors", ".gguf")
MOST_FILES = 2_000  # that are looked at below one folder
LARGEST_PATHS_FILE = 1_000_000  # bytes; a real one has a few lines

# What may follow a part's own name: dtypes, ways of packing, and the sizes that llama.cpp has of them.
_HOW = "bf16|f(p)?16|f(p)?32|fp[48]|int[48]|nvfp4|mxfp8|svdq|sdnq|convrot|e4m3(fn)?|e5m2|scaled|mixed|gguf|ud"
PACKED = rf"([-_.]({_HOW}|i?q[2-8]|[k01sml]|xs|xl|xxs))*"


@dataclass(frozen=True)
class _Named:
    """What a part's files are called: in folders of ComfyUI's, by an expression for the whole name without its end."""

    folders: tuple[str, ...]
    pattern: re.Pattern[str]


_NAMED: Mapping[str, _Named] = {
    part: _Named(folders, re.compile(pattern, re.IGNORECASE))
    for part, folders, pattern in (
        # With a dtype or a way of packing at the end. Other names are fine-tunes, which are nobody's to choose but the
        # user's.
        ("turbo", TRANSFORMERS, rf"z[-_]?image[-_]?turbo{PACKED}"),
        ("base", TRANSFORMERS, rf"z[-_]?image([-_]?base)?{PACKED}"),
        ("text_encoder", ("text_encoders", "clip"), rf"qwen[-_]?3[-_]?4b{PACKED}"),
        ("vae", ("vae",), r"ae|flux[-_]?(1[-_]?)?(vae|ae)|z[-_]?image[-_]?(turbo[-_]?)?(vae|ae)"),
        ("controlnet", ("model_patches", "controlnet"), r"z[-_]image[-_]turbo[-_]fun[-_]controlnet[-_]union.*"),
    )
}
FOLDERS = frozenset(folder for named in _NAMED.values() for folder in named.folders)


def candidates(part: str, environ: Mapping[str, str] = os.environ, root: Path | None = None) -> Iterator[Path]:
    """Yield the files that may be a part: those of the folder that was named first, of these the largest.

    The more bytes, the nearer to what was published: 16 bits a number come before 8, and these before 4. Of ControlNets
    the newest comes first.

    Args:
        part: its name in `hub.parts.PARTS`; what ComfyUI does not have has none.
        environ: the environment to take folders from.
        root: a folder to look in first, instead of the one that Z_IMAGE_MODELS names.

    Raises:
        OSError: a folder is there and cannot be read.
    """
    if part not in _NAMED:
        return
    named = _NAMED[part]
    for folder in dict.fromkeys(place for name in named.folders for place in _folders(name, environ, root)):
        files = [
            file for file in entries(folder) if file.suffix.lower() in SUFFIXES and named.pattern.fullmatch(file.stem)
        ]
        if part == "controlnet":
            yield from sorted(files, key=lambda file: controlnet_rank(file.stem), reverse=True)
        else:
            yield from sorted(files, key=lambda file: -file.stat().st_size if file.is_file() else 0)


def transformers(environ: Mapping[str, str] = os.environ, root: Path | None = None) -> Iterator[Path]:
    """Yield every model file in the folders for transformers, and in what lies below, up to MOST_FILES a folder.

    A folder that cannot be read is left out: what it holds is nobody's only choice.
    """
    for folder in dict.fromkeys(place for name in TRANSFORMERS for place in _folders(name, environ, root)):
        below = (Path(place) / name for place, _, names in os.walk(folder) for name in sorted(names))
        yield from (file for file in islice(below, MOST_FILES) if file.suffix.lower() in SUFFIXES)


def published_as(stem: str) -> str | None:
    """Return which transformer a file's name, without its end, says that it is as published: "turbo" or "base"."""
    return next((part for part in ("turbo", "base") if _NAMED[part].pattern.fullmatch(stem)), None)


def _folders(name: str, environ: Mapping[str, str], root: Path | None) -> Iterator[Path]:
    """Yield every folder that ComfyUI has for one kind of model."""
    for models in _models(environ, root):
        yield models / name
    for base in _bases(environ, root):
        for file in PATHS_FILES:
            yield from _listed(base / file, name, environ)


def _models(environ: Mapping[str, str], root: Path | None) -> Iterator[Path]:
    """Yield the folders that ComfyUI's folders of models may lie in."""
    if named := explicit_root(environ, root):
        # The folder of folders, ComfyUI's own, or one of the folders with files in it.
        yield from (named, named / "models", *([named.parent] if named.name in FOLDERS else []))
    yield from (base / "models" for base in _bases(environ, None))


def _bases(environ: Mapping[str, str], root: Path | None) -> Iterator[Path]:
    """Yield the folders that may be ComfyUI's."""
    if named := explicit_root(environ, root):
        yield from (named, named.parent)
    yield from (home(environ) / folder for folder in USUAL)
    yield Path(__file__).resolve().parent.parent.parent / "ComfyUI"  # beside us


def _listed(file: Path, name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders for one kind of model that a file of ComfyUI's for further folders lists."""
    import yaml

    try:
        if not file.is_file() or file.stat().st_size > LARGEST_PATHS_FILE:
            return
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return  # ComfyUI's matter; what it lists elsewhere is found all the same
    for section in sections.values() if isinstance(sections, dict) else ():
        if isinstance(section, dict):
            yield from _of_section(section, name, file.parent, environ)


def _of_section(section: Mapping[Any, Any], name: str, beside: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    base = section.get("base_path")
    below = beside / expanded(base, environ) if isinstance(base, str) else beside
    paths = section.get(name)
    if isinstance(paths, str):
        yield from (below / line.strip() for line in paths.splitlines() if line.strip())
