"""Where weights are looked for: an ordered table of places, and the folders of each as the environment sets them up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from hub.checkpoint import entries

MODELS_ROOT = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Place:
    """One place that weights are looked for in: repository name -> folders that might hold it, best first."""

    name: str
    folders: Callable[[str, Mapping[str, str], Path | None], Iterable[Path]]


def _explicit_folders(repo: str, environ: Mapping[str, str], root: Path | None) -> list[Path]:
    base = explicit_root(environ, root)
    return [base / repo, base / repo.split("/")[1]] if base else []


def _models_folders(repo: str, environ: Mapping[str, str], _: Path | None) -> list[Path]:
    return [models_root(environ) / repo]


def _hugging_face_folders(repo: str, environ: Mapping[str, str], _: Path | None) -> list[Path]:
    """Follow huggingface_hub.constants: HF_HUB_CACHE, else HF_HOME/hub, else the XDG cache."""
    folder = hub_cache(environ) / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        commit = ""
    return _snapshots(folder, {commit})


def _modelscope_folders(repo: str, environ: Mapping[str, str], _: Path | None) -> list[Path]:
    """Follow modelscope_hub: snapshots as of SDK 1.38, and the flat folders of older ones, dots written as ___."""
    base = modelscope_cache(environ)
    owner, name = repo.split("/")
    older = Path(owner) / name.replace(".", "___")
    return [
        *_snapshots(base / "models" / f"{owner}--{name}", {"master", "main"}),
        *(base / prefix / older for prefix in ("models", "hub/models", "hub", ".")),
    ]


CACHES: tuple[Place, ...] = (
    Place("Hugging Face cache", _hugging_face_folders),
    Place("ModelScope cache", _modelscope_folders),
)
PLACES: tuple[Place, ...] = (
    Place("explicit folder", _explicit_folders),
    Place("models folder", _models_folders),
    *CACHES,
)


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the Hugging Face cache's folder, by the rules of huggingface_hub.constants."""
    if named := _first(environ, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        return named
    named_home = _first(environ, "HF_HOME")
    return (named_home or (_first(environ, "XDG_CACHE_HOME") or home(environ) / ".cache") / "huggingface") / "hub"


def modelscope_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the ModelScope cache's folder, by the rules of modelscope_hub.config."""
    return _first(environ, "MODELSCOPE_CACHE") or home(environ) / ".cache" / "modelscope"


def models_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of `<owner>/<repository>` that DiffSynth looks in: `models` beside the app, or as told."""
    base = environ.get("DIFFSYNTH_MODEL_BASE_PATH")
    return expanded(base, environ) if base else MODELS_ROOT


def explicit_root(environ: Mapping[str, str], root: Path | None) -> Path | None:
    """Return the folder that is looked in first: the one given, else the one that Z_IMAGE_MODELS names."""
    return root if root is not None else _first(environ, "Z_IMAGE_MODELS")


def _first(environ: Mapping[str, str], *names: str) -> Path | None:
    return next((expanded(environ[name], environ) for name in names if environ.get(name)), None)


def home(environ: Mapping[str, str]) -> Path:
    """Return the user's folder."""
    folder = environ.get("USERPROFILE" if os.name == "nt" else "HOME")
    return Path(folder) if folder else Path.home()


def expanded(path: str, environ: Mapping[str, str]) -> Path:
    """Expand $NAME and a leading ~, as huggingface_hub does."""
    path = Template(path).safe_substitute(environ)
    return home(environ) / path[2:] if path == "~" or path.startswith(("~/", "~\\")) else Path(path)


def _snapshots(folder: Path, preferred: set[str]) -> list[Path]:
    """Return a repository's cached snapshots: a preferred name first, then from new to old."""
    snapshots = [path for path in entries(folder / "snapshots") if path.is_dir()]
    return sorted(snapshots, key=lambda path: (path.name not in preferred, -path.stat().st_mtime_ns, path.name))
