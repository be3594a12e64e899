"""Which weights there are, where they lie on this machine, whether they are whole, and which a request uses.

Looks, and never writes, downloads or loads; `checkpoint` reads the files' headers. Cannot tell Base's transformer from
Turbo's: names and shapes are the same, so a file counts as what its folder says it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from core.errors import RequestError, WeightsMissing
from core.sizes import WeightsKind
from hub.checkpoint import MAX_HEADER, entries, flat, model_hash, read_header
from hub.checkpoint import fingerprint as fingerprint
from hub.parts import FETCH, KNOWN_HASHES, MINI_ROOT, NEEDS, PARTS, Part, needs, size_text
from hub.places import PLACES, Place, explicit_root
from hub.places import hub_cache as hub_cache

MINIATURE = "embedded miniature"  # as a source


@dataclass(frozen=True)
class Found:
    """What a look for one part gave.

    `files` is empty where the part is missing; for the tokenizer it is the folder. `source` names the place, `size` is
    in bytes on disk. `problems` are sentences about what lay in the right place and could not be used.
    """

    part: Part
    files: tuple[Path, ...] = ()
    source: str = ""
    size: int = 0
    problems: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        """Whether the part is there, whole and what it should be."""
        return bool(self.files)


@dataclass(frozen=True)
class Chosen:
    """The weights a request uses: part name -> files (for the tokenizer the folder), where from, and why."""

    kind: WeightsKind
    files: dict[str, tuple[Path, ...]] = field(hash=False)
    source: str
    reason: str


def choose(
    weights: str,
    mode: str,
    model: str,
    *,
    root: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    mini_root: Path | None = None,
) -> Chosen:
    """Decide which weights a request uses. Full and miniature parts are never mixed.

    `auto` takes the real weights where all the parts of this mode and model are whole. Where some are not, but another
    model could draw with real weights, it says what is missing: an unannounced miniature would be a surprise there.
    On a machine without real weights it takes the miniature.

    Args:
        weights: "auto", "full" or "mini".
        mode: "generate", "controlnet" or "upscale".
        model: "turbo" or "base".
        root: a folder of repositories to look in first, instead of the one that Z_IMAGE_MODELS names.
        environ: the environment to take the places from.
        mini_root: the miniature's folder, instead of this repository's.

    Raises:
        WeightsMissing: what this request needs is not there.
        RequestError: an unknown choice, mode or model; an explicit folder that does not exist.
    """
    if weights not in ("auto", "full", "mini"):
        raise RequestError("weights", weights, "auto, full or mini")
    names = needs(mode, model)
    found = {one.part.name: one for one in find_all(environ, root)}
    missing = [found[name] for name in names if not found[name].present]
    if weights != "mini" and not missing:
        real = [found[name] for name in names]
        source = " and ".join(dict.fromkeys(one.source for one in real))
        reason = f"the real weights: {size_text(sum(one.size for one in real))} from the {source}"
        return Chosen("full", {one.part.name: one.files for one in real}, source, reason)

    some_model_is_real = any(
        all(found[name].present for name in parts) for (of, _), parts in NEEDS.items() if of == "generate"
    )
    if weights == "full" or (weights == "auto" and some_model_is_real):
        raise weights_missing(missing)

    mini = [_look_in_miniature(PARTS[name], mini_root or MINI_ROOT) for name in names]
    if absent := [one for one in mini if not one.present]:
        raise _no_miniature(absent, missing)
    if weights == "mini":
        reason = f"the {MINIATURE}, as asked"
        if not missing:
            reason += "; the real weights are on this machine too: leave the choice to auto, or ask for full"
    else:
        reason = f"the {MINIATURE}, because the real weights are not complete on this machine"
    if problems := _problems(missing):
        reason += f" ({problems})"
    if missing:
        reason += f"; to fetch the real weights ({_total(missing)}): {fetch_command(missing)}"
    return Chosen("mini", {one.part.name: one.files for one in mini}, MINIATURE, reason)


def find_all(
    environ: Mapping[str, str] = os.environ,
    root: Path | None = None,
    *,
    parts: Iterable[Part] = tuple(PARTS.values()),
    places: Sequence[Place] = PLACES,
) -> list[Found]:
    """Look for parts of the real weights, all of them where none are named, in their order.

    Raises:
        RequestError: an explicit folder that does not exist.
    """
    explicit = explicit_root(environ, root)
    if explicit is not None and not explicit.is_dir():
        raise RequestError("Z_IMAGE_MODELS", str(explicit), "an existing folder, or not set")
    return [_find(part, environ, root, places) for part in parts]


def find(name: str, environ: Mapping[str, str] = os.environ, root: Path | None = None) -> Found:
    """Look for one part that is chosen by itself, such as a preprocessor's model.

    Raises:
        WeightsMissing: it is not on this machine, or not whole.
        RequestError: an explicit folder that does not exist.
    """
    found = next(one for one in find_all(environ, root) if one.part.name == name)
    if not found.present:
        raise weights_missing([found], f"{found.part.needed_by} needs a model that is not on this machine")
    return found


# --- whether: complete, and what it should be --------------------------------------------------------------------


class _UnusableError(Exception):
    """Something lies where a part belongs, and is not that part; the message says what is wrong with which path."""


def _find(part: Part, environ: Mapping[str, str], root: Path | None, places: Sequence[Place]) -> Found:
    """Return the part from the first place in the table that has it whole, with the problems met before it."""
    problems: list[str] = []
    for place in places:
        for repo in (part.repo, *part.also):
            try:
                folders = list(place.folders(repo, environ, root))
            except OSError as error:
                problems.append(f"{error.filename} cannot be read ({error.strerror})")
                continue
            found = _look_in(folders, place.name, part)
            problems += found.problems
            if found.present:
                return Found(part, found.files, place.name, found.size, tuple(dict.fromkeys(problems)))
    return Found(part, problems=tuple(dict.fromkeys(problems)))


def _look_in_miniature(part: Part, mini_root: Path) -> Found:
    """Look for a part's miniature: the same layout, but names, shapes and sizes of its own."""
    return _look_in([mini_root / part.repo.split("/")[1]], MINIATURE, part, official=False)


def _look_in(folders: Iterable[Path], source: str, part: Part, *, official: bool = True) -> Found:
    """Return the part from the first of these folders that has it whole."""
    problems = []
    for folder in folders:
        try:
            files = _part_files(folder, part, official)
        except _UnusableError as why:
            problems.append(str(why))
        except OSError as error:
            problems.append(f"{error.filename} cannot be read ({error.strerror})")
        else:
            if files:
                size = sum(file.stat().st_size for file in flat(files))
                return Found(part, files, source, size, tuple(problems))
    return Found(part, problems=tuple(problems))


def _part_files(folder: Path, part: Part, official: bool) -> tuple[Path, ...]:
    """Return a part's files in a repository's folder, none where it has none.

    Raises:
        _UnusableError: some are there, but not all of them, or not whole, or (if `official`) not what they should be.
    """
    folder, pattern = folder / os.path.dirname(part.pattern), os.path.basename(part.pattern)
    if part.name == "tokenizer":
        return _tokenizer_files(folder)
    names = [path.name for path in entries(folder) if fnmatchcase(path.name, pattern)]
    if not names:
        return ()
    files = tuple(folder / name for name in (_shards(folder, names) if "*" in pattern else names))
    sizes = [_whole(path).stat().st_size for path in files]
    try:
        if part.hash is None:
            size = sizes[0] - (read_header(files[0]).data_start if files[0].suffix == ".safetensors" else 0)
            if official and size != part.size:
                raise _UnusableError(f"{files[0]} has {size:,} bytes instead of {part.size:,}")
            return files
        found = model_hash(files)
    except ValueError as error:
        raise _UnusableError(str(error)) from None
    if official and found != part.hash:
        holds = KNOWN_HASHES.get(found, f"an unknown model ({found})")
        raise _UnusableError(f"{folder} holds {holds}, not {KNOWN_HASHES[part.hash]}")
    return files


def _shards(folder: Path, names: list[str]) -> list[str]:
    """Return the names of all the files that belong together: by an index, else by the numbers in their names."""
    indexes = [path for path in entries(folder) if path.name.endswith(".safetensors.index.json")]
    if indexes:
        expected = _index_shards(indexes[0])
    elif numbered := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", names[0]):
        stem, count = numbered.groups()
        expected = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    elif len(names) == 1:
        return names
    else:
        raise _UnusableError(f"{folder} holds {' and '.join(names[:3])}, and no index says which belong together")
    if missing := [name for name in expected if name not in names]:
        raise _UnusableError(f"{folder} lacks {len(missing)} of {len(expected)} files: {', '.join(missing[:3])}")
    return expected


def _index_shards(index: Path) -> list[str]:
    path = _whole(index)
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):  # a path would lead out of the folder
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _UnusableError(f"{index} is not an index of safetensors files") from None
    return names


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    names = {path.name for path in entries(folder)}
    if not names:
        return ()
    vocabulary = ["tokenizer.json"] if "tokenizer.json" in names else ["vocab.json", "merges.txt"]
    for name in ("tokenizer_config.json", *vocabulary):
        if name not in names:
            raise _UnusableError(f"{folder} lacks {name}")
        content = _whole(folder / name).read_bytes()
        if not content.rstrip().endswith(b"}") and name.endswith(".json"):
            raise _UnusableError(f"{folder / name} is cut short")
    return (folder,)


def _whole(path: Path) -> Path:
    """Return the path of a finished file; what it holds is not looked at."""
    if not path.is_file():
        broken = path.is_symlink()
        raise _UnusableError(f"{path} is a link to nothing" if broken else f"{path} is not a file")
    # aria2 makes a file in full length first and keeps this beside it until it is done.
    if path.resolve().suffix == ".incomplete" or any(
        Path(f"{path}{end}").exists() for end in (".incomplete", ".aria2")
    ):
        raise _UnusableError(f"{path} is still being downloaded, or its download was interrupted")
    return path


def _total(missing: Sequence[Found]) -> str:
    return size_text(sum(one.part.size for one in missing))


def fetch_command(missing: Iterable[Found]) -> str:
    """Return the command that fetches missing parts, going on where it was cut off."""
    return " ".join([FETCH, *(one.part.name for one in missing)])


def _problems(missing: Sequence[Found]) -> str:
    problems = [problem for one in missing for problem in one.problems]
    return f"found and not usable: {'; '.join(problems[:3])}" if problems else ""


def _list(missing: Sequence[Found]) -> str:
    problems = _problems(missing)
    return f"missing: {', '.join(one.part.title for one in missing)}" + (f" ({problems})" if problems else "")


def weights_missing(
    missing: Sequence[Found], prefix: str = "the real weights are not complete on this machine"
) -> WeightsMissing:
    """Return the error that names missing parts, their size and the command that fetches them."""
    return WeightsMissing(
        f"{prefix}; {_list(missing)}; to fetch them ({_total(missing)}): {fetch_command(missing)}",
        missing=[one.part.title for one in missing],
        problems=[problem for one in missing for problem in one.problems],
        bytes=sum(one.part.size for one in missing),
        command=fetch_command(missing),
    )


def _no_miniature(absent: Sequence[Found], missing: Sequence[Found]) -> WeightsMissing:
    names = ", ".join(one.part.name for one in absent)
    problems = [problem for one in absent for problem in one.problems]
    prefix = f"the {MINIATURE} has no {names}" + (f" ({'; '.join(problems[:3])})" if problems else "")
    if missing:
        return weights_missing(missing, f"{prefix}, and the real weights are not complete on this machine")
    return WeightsMissing(f"{prefix}; the real weights are complete: use --weights full", missing=names, command="")
