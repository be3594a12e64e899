"""Which weights there are, where they lie on this machine, whether they are whole, and which a request uses.

Looks, and never writes, downloads or loads; `hub.checkpoint` reads the files' headers. Base's and Turbo's transformers
have the same names and shapes, so a file counts as what its folder says it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from core.errors import RequestError, WeightsMissing
from core.messages import Message
from core.request import TextToImage
from core.sizes import WeightsKind
from hub import comfyui, packing
from hub.checkpoint import MAX_HEADER, UnusableError, entries, flat, hash_of, read_header, unreadable
from hub.naming import Shape, encoder_layout_of, layout_of
from hub.parts import (
    FETCH,
    KNOWN_HASHES,
    MINI_ROOT,
    OFFICIAL,
    ORIGINAL_VAE,
    PARTS,
    REPACKAGED,
    Edition,
    Part,
    all_of,
    controlnet_rank,
    needs,
    size_text,
)
from hub.places import PLACES, Place, explicit_root

MINIATURE = "embedded miniature"  # as a source
COMFYUI = "ComfyUI folder"  # likewise
PROBLEMS_SHOWN = 3  # of what was found and cannot be used; a sentence with more is not read


@dataclass(frozen=True)
class Found:
    """What a look for one part gave.

    `files` is empty where the part is missing; for the tokenizer it is the folder. `source` names the place, `size` is
    in bytes on disk. `problems` are sentences about what lay in the right place and could not be used. `edition` is
    how it was published, of what was fetched from a hub.
    """

    part: Part
    files: tuple[Path, ...] = ()
    source: str = ""
    size: int = 0
    problems: tuple[Message, ...] = ()
    edition: Edition = OFFICIAL

    @property
    def present(self) -> bool:
        """Whether the part is there, whole and what it should be."""
        return bool(self.files)

    @property
    def outdated(self) -> bool:
        """Whether what is there does, and there is a better release."""
        return self.present and bool(self.part.older) and self.files[0].name != self.part.pattern


@dataclass(frozen=True)
class Chosen:
    """The weights a request uses: part name -> files (for the tokenizer the folder), where from, and why.

    `checkpoint` is the name of the user's own, which then stands in the transformer's place; empty where there is none.
    """

    kind: WeightsKind
    files: dict[str, tuple[Path, ...]] = field(hash=False)
    source: str
    reason: Message
    checkpoint: str = ""


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
        raise RequestError("weights", weights, Message("weights", "auto, full or mini"))
    look = _Look(weights, needs(mode, model), find_all(environ, root), mini_root or MINI_ROOT)
    choice = next(choice for choice in _CHOICES if choice.when(look))
    if choice.kind is None:
        raise WeightsMissing(choice.text(look))
    parts = look.real if choice.kind == "full" else look.mini
    source = " and ".join(dict.fromkeys(found.source for found in parts))
    return Chosen(choice.kind, {found.part.name: found.files for found in parts}, source, choice.text(look))


@dataclass(frozen=True)
class _Look:
    """What a choice is made of: what was asked for, and what one look at the disk gave."""

    asked: str
    names: tuple[str, ...]  # of the parts that the request needs
    found: Sequence[Found]  # all parts of the real weights
    mini_root: Path

    @cached_property
    def real(self) -> list[Found]:
        """The real parts that the request needs."""
        return [found for name in self.names for found in self.found if found.part.name == name]

    @cached_property
    def mini(self) -> list[Found]:
        """The miniature's parts that the request needs; looked for only where the real ones are not used."""
        return [look_in_miniature(PARTS[name], self.mini_root) for name in self.names]

    @property
    def missing(self) -> list[Found]:
        """The real parts that the request needs and that are not there."""
        return [found for found in self.real if not found.present]

    @property
    def mini_missing(self) -> list[Found]:
        """The same of the miniature."""
        return [found for found in self.mini if not found.present]

    @property
    def some_model_is_real(self) -> bool:
        """Whether any model could draw with real weights."""
        present = {found.part.name for found in self.found if found.present}
        return any(present.issuperset(parts) for parts in TextToImage.needs.values())


@dataclass(frozen=True)
class _Choice:
    """One row of the table: in which situation it applies, which weights are used (None: none can be), and why."""

    when: Callable[[_Look], bool]
    kind: WeightsKind | None
    text: Callable[[_Look], Message]


_NOT_COMPLETE = Message("real_weights_incomplete", "the real weights are not complete on this machine")
_MINI_ASKED = Message("mini_asked", "the embedded miniature, as asked")
_MINI_BESIDE_REAL = Message(
    "mini_beside_real",
    "the embedded miniature, as asked; the real weights are on this machine too: leave the choice to auto, or ask for "
    "full",
)
_MINI_ALONE = Message("mini_alone", "the embedded miniature, because the real weights are not complete on this machine")


def _real_weights(look: _Look) -> Message:
    size = size_text(sum(found.size for found in look.real))
    places = [Message("place", source) for source in dict.fromkeys(found.source for found in look.real)]
    return Message("real_weights", "the real weights: {size} from the {source}", size=size, source=all_of(places))


def _with_fetch_command(reason: Message, missing: Sequence[Found]) -> Message:
    """Add to a reason what of the real weights cannot be used, and how to fetch what is missing."""
    if problems := _problems(missing):
        text = "{reason} (found and not usable: {problems})"
        reason = Message(reason.code, text, reason=reason, problems=problems[:PROBLEMS_SHOWN])
    text = "{reason}; to fetch the real weights ({size}): {command}"
    return Message(reason.code, text, reason=reason, size=_total(missing), command=fetch_command(missing))


def _miniature_lacks(missing: Sequence[Found]) -> Message:
    names = [found.part.name for found in missing]
    if problems := _problems(missing):
        text = "the embedded miniature has no {names} ({problems})"
        return Message("no_miniature", text, names=names, problems=problems[:PROBLEMS_SHOWN])
    return Message("no_miniature", "the embedded miniature has no {names}", names=names)


def _real_incomplete(look: _Look) -> Message:
    return _missing_text(look.missing, _NOT_COMPLETE)


def _neither(look: _Look) -> Message:
    text = "{miniature}, and the real weights are not complete on this machine"
    return _missing_text(look.missing, Message("neither", text, miniature=_miniature_lacks(look.mini_missing)))


def _only_real(look: _Look) -> Message:
    return Message(
        WeightsMissing.code,
        "{miniature}; the real weights are complete: use --weights full",
        miniature=_miniature_lacks(look.mini_missing),
        missing=[found.part.name for found in look.mini_missing],
        command="",
    )


# The first row whose condition holds decides.
_CHOICES: tuple[_Choice, ...] = (
    _Choice(lambda look: look.asked != "mini" and not look.missing, "full", _real_weights),
    _Choice(lambda look: look.asked == "full", None, _real_incomplete),
    _Choice(lambda look: look.asked == "auto" and look.some_model_is_real, None, _real_incomplete),
    _Choice(lambda look: bool(look.mini_missing and look.missing), None, _neither),
    _Choice(lambda look: bool(look.mini_missing), None, _only_real),
    _Choice(lambda look: not look.missing, "mini", lambda _: _MINI_BESIDE_REAL),
    _Choice(lambda look: look.asked == "mini", "mini", lambda look: _with_fetch_command(_MINI_ASKED, look.missing)),
    _Choice(lambda _: True, "mini", lambda look: _with_fetch_command(_MINI_ALONE, look.missing)),
)


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
        allowed = Message("folder", "an existing folder, or not set")
        raise RequestError("Z_IMAGE_MODELS", str(explicit), allowed)
    return [_find(part, environ, root, places) for part in parts]


def find(name: str, environ: Mapping[str, str] = os.environ, root: Path | None = None) -> Found:
    """Look for one part that is chosen by itself, such as a preprocessor's model.

    Raises:
        WeightsMissing: it is not on this machine, or not whole.
        RequestError: an explicit folder that does not exist.
    """
    (found,) = find_all(environ, root, parts=[PARTS[name]])
    if not found.present:
        by = Message("needed_by", found.part.needed_by)
        what = Message("part_missing", "{by} needs a model that is not on this machine", by=by)
        raise weights_missing([found], what)
    return found


# --- whether: complete, and what it should be --------------------------------------------------------------------


def _find(part: Part, environ: Mapping[str, str], root: Path | None, places: Sequence[Place]) -> Found:
    """Return the part from the first place in the table that has it whole, with the problems met before it.

    Of a part with several releases, the best that is anywhere.
    """
    looked: list[Found] = []
    for name in (part.pattern, *part.older):
        looked.append(_find_in_places(replace(part, pattern=name), environ, root, places))
        if looked[-1].present:
            break
    if part.repackaged and not looked[-1].present:
        again = _find_in_places(part.in_edition(REPACKAGED), environ, root, places)
        looked.append(replace(again, edition=REPACKAGED))
    if places is PLACES and (part.older or not looked[-1].present):
        looked.append(_look_in_comfyui(part, environ, root))
    problems = tuple(dict.fromkeys(problem for found in looked for problem in found.problems))
    present = [found for found in looked if found.present]
    if not present:
        return Found(part, problems=problems)
    best = max(present, key=lambda found: controlnet_rank(found.files[0].name)) if part.older else present[0]
    return replace(best, part=part, problems=problems)


def _find_in_places(part: Part, environ: Mapping[str, str], root: Path | None, places: Sequence[Place]) -> Found:
    problems: list[Message] = []
    for place in places:
        for repo in (part.repo, *part.also):
            try:
                folders = list(place.folders(repo, environ, root))
            except OSError as error:
                problems.append(unreadable(error.filename, error))
                continue
            found = _look_in(folders, place.name, part)
            problems += found.problems
            if found.present:
                return replace(found, source=place.name, problems=tuple(problems))
    return Found(part, problems=tuple(problems))


def _look_in_comfyui(part: Part, environ: Mapping[str, str], root: Path | None) -> Found:
    """Return the part from the first of ComfyUI's files that holds it whole, in a way that can be read."""
    problems: list[Message] = []
    try:
        for file in comfyui.candidates(part.name, environ, root):
            try:
                _check_single(file, part)
            except UnusableError as error:
                problems.append(error.message)
            else:
                return Found(part, (file,), COMFYUI, file.stat().st_size, tuple(problems))
    except OSError as error:
        problems.append(unreadable(error.filename, error))
    return Found(part, problems=tuple(problems))


def _check_single(file: Path, part: Part) -> None:
    """Refuse a file that is not the whole of a part, in ComfyUI's names, DiffSynth's or llama.cpp's.

    Raises:
        UnusableError: what it is instead, or how it is packed that is not read here.
    """
    assert part.hash is not None  # ComfyUI's parts all have one
    found = identity(packing.stored([whole(file)]).shapes)
    if found not in part.hashes and (part.name, found) != ("vae", ORIGINAL_VAE):
        holds = KNOWN_HASHES.get(found, Message("unknown_model", "an unknown model ({hash})", hash=found))
        text = "{folder} holds {model}, not {expected}"
        raise UnusableError(text, folder=file, model=holds, expected=KNOWN_HASHES[part.hash])


def identity(shapes: Mapping[str, Shape]) -> str:
    """Return DiffSynth's name for a model of such tensors, in whichever of the known spellings."""
    layout = layout_of(shapes) or encoder_layout_of(shapes)
    return hash_of(layout.own if layout else shapes)


def look_in_miniature(part: Part, mini_root: Path = MINI_ROOT) -> Found:
    """Look for a part's miniature: the same layout, but names, shapes and sizes of its own."""
    folder = mini_root / part.repo.split("/")[1]
    looked = [
        _look_in([folder], MINIATURE, replace(part, pattern=name), official=False)
        for name in (part.pattern, *part.older)
    ]
    return replace(next((found for found in looked if found.present), looked[0]), part=part)


def _look_in(folders: Iterable[Path], source: str, part: Part, *, official: bool = True) -> Found:
    """Return the part from the first of these folders that has it whole."""
    problems = []
    for folder in folders:
        try:
            files = _part_files(folder, part, official)
        except UnusableError as error:
            problems.append(error.message)
        except OSError as error:
            problems.append(unreadable(error.filename, error))
        else:
            if files:
                size = sum(file.stat().st_size for file in flat(files))
                return Found(part, files, source, size, tuple(problems))
    return Found(part, problems=tuple(problems))


def _part_files(folder: Path, part: Part, official: bool) -> tuple[Path, ...]:
    """Return a part's files in a repository's folder, none where it has none.

    Raises:
        UnusableError: some are there, but not all of them, or not whole, or (if `official`) not what they should be.
    """
    folder, pattern = folder / os.path.dirname(part.pattern), os.path.basename(part.pattern)
    if part.name == "tokenizer":
        return _tokenizer_files(folder)
    names = [path.name for path in entries(folder) if fnmatchcase(path.name, pattern)]
    if not names:
        return ()
    files = tuple(folder / name for name in (shards(folder, names) if "*" in pattern else names))
    sizes = [whole(path).stat().st_size for path in files]
    if part.hash is None:
        size = sizes[0] - (read_header(files[0]).data_start if files[0].suffix == ".safetensors" else 0)
        if official and size != part.size:
            text = "{file} has {size:,} bytes instead of {expected:,}"
            raise UnusableError(text, file=files[0], size=size, expected=part.size)
        return files
    found = identity(packing.stored(files).shapes)
    if official and found not in part.hashes:
        holds = KNOWN_HASHES.get(found, Message("unknown_model", "an unknown model ({hash})", hash=found))
        raise UnusableError(
            "{folder} holds {model}, not {expected}", folder=folder, model=holds, expected=KNOWN_HASHES[part.hash]
        )
    return files


def shards(folder: Path, names: list[str], index: Path | None = None) -> list[str]:
    """Return the names of all the files that belong together: by an index, else by the numbers in their names.

    Args:
        folder: that they lie in.
        names: those that are there.
        index: the one to go by, where there may be others.

    Raises:
        UnusableError: one is missing, or nothing says which belong together.
    """
    indexes = [index] if index else [path for path in entries(folder) if path.name.endswith(".safetensors.index.json")]
    if indexes:
        return _all_of(folder, _index_shards(indexes[0]), names)
    if _NUMBERED.fullmatch(names[0]):
        return numbered_shards(folder, names[0], names)
    if len(names) == 1:
        return names
    text = "{folder} holds {names}, and no index says which belong together"
    raise UnusableError(text, folder=folder, names=all_of(names[:3]))


_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)", re.IGNORECASE)
MOST_SHARDS = 1_000


def is_shard(name: str) -> bool:
    """Whether a name has the number of one of several files that belong together."""
    return _NUMBERED.fullmatch(name) is not None


def stands_for_all(path: Path) -> bool:
    """Whether a file is the first that is there of those that belong together, or the only one."""
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None:
        return True
    stem, number, count, suffix = numbered.groups()
    before = range(1, min(int(number), MOST_SHARDS))
    return not any(path.with_name(f"{stem}-{other:05}-of-{count}{suffix}").exists() for other in before)


def numbered_shards(folder: Path, one: str, names: list[str]) -> list[str]:
    """Return the names of all the files that belong together, by the numbers in the name of one.

    Raises:
        UnusableError: one is missing.
    """
    numbered = _NUMBERED.fullmatch(one)
    assert numbered is not None  # whoever calls has seen to it
    stem, _, count, suffix = numbered.groups()
    numbers = range(1, min(int(count), MOST_SHARDS) + 1)
    return _all_of(folder, [f"{stem}-{number:05}-of-{count}{suffix}" for number in numbers], names)


def _all_of(folder: Path, expected: list[str], names: list[str]) -> list[str]:
    """Return the names of files that are expected, all of which must be there."""
    if missing := [name for name in expected if name not in names]:
        text = "{folder} lacks {count} of {all} files: {names}"
        raise UnusableError(text, folder=folder, count=len(missing), all=len(expected), names=missing[:3])
    return expected


def _index_shards(index: Path) -> list[str]:
    path = whole(index)
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):  # a path would lead out of the folder
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnusableError("{file} is not an index of safetensors files", file=index) from None
    return names


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    names = {path.name for path in entries(folder)}
    if not names:
        return ()
    vocabulary = ["tokenizer.json"] if "tokenizer.json" in names else ["vocab.json", "merges.txt"]
    for name in ("tokenizer_config.json", *vocabulary):
        if name not in names:
            raise UnusableError("{folder} lacks {name}", folder=folder, name=name)
        content = whole(folder / name).read_bytes()
        if not content.rstrip().endswith(b"}") and name.endswith(".json"):
            raise UnusableError("{file} is cut short", file=folder / name)
    return (folder,)


def whole(path: Path) -> Path:
    """Return the path of a finished file; what it holds is not looked at.

    Raises:
        UnusableError: it is not there, or not finished.
    """
    if not path.is_file():
        raise UnusableError("{file} is a link to nothing" if path.is_symlink() else "{file} is not a file", file=path)
    # aria2 makes a file in full length first and keeps this beside it until it is done.
    if path.resolve().suffix == ".incomplete" or any(
        Path(f"{path}{end}").exists() for end in (".incomplete", ".aria2")
    ):
        raise UnusableError("{file} is still being downloaded, or its download was interrupted", file=path)
    return path


def _total(missing: Sequence[Found]) -> str:
    return size_text(sum(found.part.size for found in missing))


def fetch_command(missing: Iterable[Found]) -> str:
    """Return the command that fetches missing parts, going on where it was cut off."""
    return " ".join([FETCH, *(found.part.name for found in missing)])


def _problems(missing: Sequence[Found]) -> list[Message]:
    return [problem for found in missing for problem in found.problems]


def _missing_text(missing: Sequence[Found], what: Message) -> Message:
    problems = _problems(missing)
    text = "{what}; missing: {missing}; to fetch them ({size}): {command}"
    if problems:
        text = "{what}; missing: {missing} (found and not usable: {unusable}); to fetch them ({size}): {command}"
    return Message(
        WeightsMissing.code,
        text,
        what=what,
        missing=[found.part.title for found in missing],
        problems=problems,
        unusable=problems[:PROBLEMS_SHOWN],
        bytes=sum(found.part.size for found in missing),
        size=_total(missing),
        command=fetch_command(missing),
    )


def check_fetched(parts: Sequence[Part]) -> None:
    """Look for parts once more, all of which a hub has given.

    Raises:
        WeightsMissing: some are not what they should be.
    """
    if lacking := [found for found in find_all(parts=parts) if not found.present]:
        what = Message("not_as_expected", "the hub's files are here now, and not what they should be")
        raise weights_missing(lacking, what)


def weights_missing(missing: Sequence[Found], what: Message = _NOT_COMPLETE) -> WeightsMissing:
    """Return the error that names missing parts, their size and the command that fetches them."""
    return WeightsMissing(_missing_text(missing, what))
