"""Checkpoints that users bring: fine-tunes and merges of Z-Image's transformer, named by them or found on this machine.

One file, shards with an index, or a diffusers folder; in any spelling that `hub.naming` knows and any packing that
`hub.packing` does. Turbo and Base look the same, so which of them a checkpoint was made of is told by its metadata and
its name, or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import RequestError
from core.messages import Message
from core.request import MODELS, Model, WeightsChoice
from core.sizes import WeightsKind
from hub import comfyui, inventory, packing
from hub.checkpoint import UnusableError, entries, unreadable
from hub.inventory import Chosen
from hub.naming import layout_of
from hub.parts import PARTS, all_of, needs, size_text
from hub.places import explicit_root

INDEX = ".safetensors.index.json"
MOST_SHOWN = 12  # names in a sentence

# Entries of metadata that name what a checkpoint was made of: safetensors' (modelspec, kohya's) and GGUF's.
_TELLING = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "modelspec.title")
_TELLING_GGUF = ("general.base_model.0.name", "general.finetune", "general.basename", "general.name")
_UNDISTILLED = re.compile(
    r"(?<![a-z])(de|un)[-_ ]?(turbo|distill)", re.IGNORECASE
)  # Turbo made into something to be guided, as Base
_TURBO = re.compile(r"turbo|(?<![a-z])zit(?![a-z])", re.IGNORECASE)
_BASE = re.compile(r"z[-_ ]?image[-_ ]?base|(?<![a-z])(zib|base)(?![a-z])|tongyi-mai/z-image$", re.IGNORECASE)


@dataclass(frozen=True)
class FineTune:
    """A checkpoint that can draw.

    Attributes:
        name: of the file, or the folder.
        files: that it is read from.
        kind: of the weights that it goes with.
        model: what it was made of, where it says.
        stored: what its numbers are stored as.
        size: bytes on disk.
    """

    name: str
    files: tuple[Path, ...]
    kind: WeightsKind
    model: Model | None
    stored: str
    size: int

    @property
    def title(self) -> str:
        """Its name without a file's ending, and without the number of one of several."""
        stem = self.name.removesuffix(INDEX).removesuffix(".safetensors").removesuffix(".gguf")
        return re.sub(r"-\d{5}-of-\d{5}$", "", stem)

    def used_as(self, asked: Model | None) -> Model:
        """Return which model it is used as, where a request may say.

        Raises:
            RequestError: nobody says.
        """
        if asked or self.model:
            return asked or self.model  # type: ignore[return-value]  # one of them is not None
        text = "turbo or base, whichever {name} was made of: neither its name nor its metadata says (--model)"
        raise RequestError("model", "", Message("which_model", text, name=self.name))

    def check_goes_with(self, model: Model) -> None:
        """Refuse one that was made of another model than the only one that a mode draws with.

        Raises:
            RequestError: it says that it was made of another.
        """
        if self.model not in (None, model):
            text = "a checkpoint made of {model} in this mode; this one is of {other}"
            titles = {"model": MODELS[model].title, "other": MODELS[self.model].title}
            raise RequestError("checkpoint", self.name, Message("wrong_model", text, **titles))


def found(environ: Mapping[str, str] = os.environ, root: Path | None = None) -> dict[str, FineTune]:
    """Return the fine-tunes in ComfyUI's folders and the folder that was named, by their names; the first of a name.

    Transformers as published are none: they are parts, which `hub.inventory` finds.
    """
    tunes: dict[str, FineTune] = {}
    for path in _candidates(environ, root):
        if path.name not in tunes and not comfyui.published_as(path.stem):
            try:
                tunes[path.name] = read(path)
            except (UnusableError, OSError):
                continue
    return tunes


def unusable(environ: Mapping[str, str] = os.environ, root: Path | None = None) -> list[Message]:
    """Return a sentence on each file beside these that looks like Z-Image by its name, and cannot be used."""
    problems = []
    for path in _candidates(environ, root):
        try:
            read(path)
        except UnusableError as error:
            if re.search(r"z[-_ ]?image|(?<![a-z])zi[tb](?![a-z])", path.stem, re.IGNORECASE):
                problems.append(error.message)
        except OSError as error:
            problems.append(unreadable(path, error))
    return problems


def _candidates(environ: Mapping[str, str], root: Path | None) -> Iterator[Path]:
    """Yield every file that may be a fine-tune; of several that belong together, one stands for all."""
    return filter(inventory.stands_for_all, _files_of_models(environ, root))


def _files_of_models(environ: Mapping[str, str], root: Path | None) -> Iterator[Path]:
    yield from comfyui.transformers(environ, root)
    if named := explicit_root(environ, root):
        try:
            yield from (path for path in entries(named) if path.suffix.lower() in comfyui.SUFFIXES)
        except OSError:
            return


def find(named: str, environ: Mapping[str, str] = os.environ, root: Path | None = None) -> FineTune:
    """Return the checkpoint that a user names: a path, or the name of one that is found, with its ending or without.

    Raises:
        RequestError: there is none, it is not whole, or it is no transformer of Z-Image.
    """
    try:
        path = Path(named).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):  # longer than any name, half a character, the home of nobody
        path, there = Path("?"), False
    if not there:
        tunes = found(environ, root)
        for name, tune in tunes.items():
            if named in (name, tune.title):
                return tune
        raise RequestError("checkpoint", named, allowed(tunes))
    try:
        return read(path)
    except UnusableError as error:
        text = "a whole transformer of Z-Image; {problem}"
        raise RequestError("checkpoint", named, Message("checkpoint_file", text, problem=error.message)) from None
    except OSError as error:
        text = "a file that can be read; {problem}"
        problem = unreadable(path, error)
        raise RequestError("checkpoint", named, Message("checkpoint_file", text, problem=problem)) from None


def allowed(tunes: Mapping[str, FineTune]) -> Message:
    """Return what a checkpoint may be, as a phrase."""
    if not tunes:
        text = "the path of a .safetensors or .gguf file or of a diffusers folder; none is found on this machine"
        return Message("checkpoints", text)
    text = "the path of a .safetensors or .gguf file or of a diffusers folder, or one of {names}"
    return Message("checkpoints", text, names=list(tunes)[:MOST_SHOWN])


def offered(named: str) -> None:
    """Refuse a checkpoint that a visitor names, unless it is one that is found: no other file is opened for them.

    Raises:
        RequestError: it is none.
    """
    tunes = found()
    if named not in tunes:
        some = Message("checkpoints_offered", "one of {names}", names=list(tunes)[:MOST_SHOWN])
        none = Message("checkpoints_offered", "none: no checkpoint is found on this machine")
        raise RequestError("checkpoint", named, some if tunes else none)


def read(path: Path) -> FineTune:
    """Look at a checkpoint's headers.

    Raises:
        UnusableError: it is not whole, it is packed in a way that is not read here, or it is no transformer of Z-Image.
        OSError: it cannot be read.
    """
    files = _files(path)
    stored = packing.stored(files)
    layout = layout_of(stored.shapes)
    if layout is None:
        raise UnusableError("{file} holds no whole transformer of Z-Image", file=path)
    size, name = sum(file.stat().st_size for file in files), _name(path)
    return FineTune(name, files, layout.size, _made_of(name, stored.metadata), stored.title, size)


def _name(path: Path) -> str:
    """Return what a checkpoint is called: by its file, or by the folder of one whose files are called as all are."""
    if path.name.startswith(("diffusion_pytorch_model", "model-0", "model.safetensors")):
        path = path.parent
    if path.name == "transformer":
        path = path.parent
    if re.fullmatch("[0-9a-f]{40}", path.name) and path.parent.name == "snapshots":  # of a hub's cache
        path = path.parent.parent
    return path.name.removeprefix("models--").replace("--", "/")


def _files(path: Path) -> tuple[Path, ...]:
    """Return the files that belong to what was named: a file, one of several shards, their index, or a folder."""
    if path.is_dir():
        inside = path / "transformer" if (path / "transformer").is_dir() else path
        names = [file.name for file in entries(inside) if file.suffix == ".safetensors"]
        if not names:
            raise UnusableError("{folder} holds no .safetensors files", folder=inside)
        return tuple(inventory.whole(inside / name) for name in inventory.shards(inside, names))
    if path.name.endswith(INDEX):
        names = [file.name for file in entries(path.parent) if file.suffix == ".safetensors"]
        return tuple(inventory.whole(path.parent / name) for name in inventory.shards(path.parent, names, path))
    if path.suffix.lower() not in comfyui.SUFFIXES:
        raise UnusableError("{file} is neither a .safetensors nor a .gguf file", file=path)
    if inventory.is_shard(path.name):
        names = [file.name for file in entries(path.parent)]
        return tuple(
            inventory.whole(path.parent / name) for name in inventory.numbered_shards(path.parent, path.name, names)
        )
    return (inventory.whole(path),)


def _made_of(name: str, metadata: Mapping[str, str]) -> Model | None:
    """Return the model that a checkpoint was made of: by its metadata, else by its name."""
    stem = re.sub(r"\.(safetensors|gguf)$", "", name, flags=re.IGNORECASE)
    texts = [metadata.get(key, "") for key in (*_TELLING, *_TELLING_GGUF)]
    for text in (*texts, name):
        if _UNDISTILLED.search(text):
            return "base"
        if _TURBO.search(text):
            return "turbo"
        if _BASE.search(text):
            return "base"
    return "base" if comfyui.published_as(stem) == "base" else None


def choose(
    tune: FineTune,
    weights: WeightsChoice,
    mode: str,
    model: Model,
    environ: Mapping[str, str] = os.environ,
    root: Path | None = None,
) -> Chosen:
    """Return the weights of a request that names a checkpoint: the other parts are those that go with it.

    Args:
        tune: the checkpoint.
        weights: which kind is asked for.
        mode: "generate" or "controlnet".
        model: which model it is used as.
        environ: the environment to take the places from.
        root: a folder to look in first, instead of the one that Z_IMAGE_MODELS names.

    Raises:
        RequestError: the kind of weights that is asked for does not go with it; an explicit folder does not exist.
        WeightsMissing: another part is not there.
    """
    if weights not in ("auto", tune.kind):
        text = "auto or {kind} with the checkpoint {name}"
        raise RequestError("weights", weights, Message("weights_of", text, kind=tune.kind, name=tune.name))
    others = [PARTS[name] for name in needs(mode, model) if name != model]
    if tune.kind == "full":
        parts = inventory.find_all(environ, root, parts=others)
    else:
        parts = [inventory.look_in_miniature(part) for part in others]
    if missing := [part for part in parts if not part.present]:
        text = "the checkpoint {name} is not all that a picture needs"
        raise inventory.weights_missing(missing, Message("beside_checkpoint", text, name=tune.name))
    files = {model: tune.files, **{part.part.name: part.files for part in parts}}
    source = " and ".join(dict.fromkeys([tune.name, *(part.source for part in parts)]))
    places = all_of([Message("place", place) for place in dict.fromkeys(part.source for part in parts)])
    text = "{name} ({size}, {stored}), used as {model}, with the other parts from the {source}"
    if tune.model is None:
        text = "{name} ({size}, {stored}), used as {model} as asked, with the other parts from the {source}"
    elif tune.model != model:
        text = (
            "{name} ({size}, {stored}), used as {model} as asked, though it says that it was made of {other}, with the "
            "other parts from the {source}"
        )
    reason = Message(
        "checkpoint",
        text,
        name=tune.title,
        size=size_text(tune.size),
        stored=tune.stored,
        model=MODELS[model].title,
        source=places,
        other=MODELS[tune.model].title if tune.model else "",
    )
    return Chosen(tune.kind, files, source, reason, tune.title)
