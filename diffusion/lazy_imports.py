"""Imports DiffSynth and transformers without what no picture needs.

They bring far more than is used here: torch's compiler, image encoders, data sets, the losses of other models,
distributed training. Importing that takes longer than all the rest. Inside `load`, some of their import statements get
stand-ins, which import the real thing when somebody uses it. Nothing outlasts `load` but those, as names in the modules
that asked for them: whoever imports the same later gets the real one. docs/adr/0043 says why it is done like this.
"""

from __future__ import annotations

import builtins
import functools
import gc
import importlib
import importlib.util
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Whose `from … import …` gets stand-ins for the names of which modules, each with all that lies below it. What these
# are imported for are functions and classes, which no importer uses while it is imported itself.
UNUSED: Mapping[str, tuple[str, ...]] = {
    "diffsynth": (
        "accelerate",
        "diffsynth.core.data.operators",
        "diffsynth.core.data.unified_dataset",
        "diffsynth.models.dinov3_image_encoder",
        "diffsynth.models.siglip2_image_encoder",
        "diffsynth.models.z_image_image2lora",
        "modelscope",
        "torch.nn.attention.flex_attention",
    ),
    "torchvision": ("torch._dynamo",),
    "transformers": (
        "accelerate",
        "torch._dynamo",
        "torch.distributed",
        "torch.nn.attention.flex_attention",
        "transformers.distributed.expert_parallel",
        "transformers.distributed.tensor_parallel",
        "transformers.integrations.flex_attention",
    ),
    "transformers.loss.loss_utils": ("transformers.loss",),
}
PACKAGES = frozenset(importer.partition(".")[0] for importer in UNUSED)

# A name that the models of transformers import from a module that needs torchvision, and where that has it from.
HANDED_ON: Mapping[tuple[str, ...], ModuleType] = {("transformers.processing_utils", "Unpack"): typing}

COMPILER = "torch._dynamo"

_one_at_a_time = threading.Lock()
_loaded: set[str] = set()


def load(module: str) -> None:
    """Import a module of ours, and with it what it needs of DiffSynth, transformers or spandrel.

    Several threads may ask at once: one imports, the others wait.

    Args:
        module: its dotted name.
    """
    with _one_at_a_time:
        if module in sys.modules:
            return
        # What is imported stays, and there is a million of it: a search for cycles would find nothing and take long.
        collects = gc.isenabled()
        gc.disable()
        try:
            with stand_ins():
                importlib.import_module(module)
        finally:
            if collects:
                gc.enable()
        if not _loaded:  # later, models would be among what is left alone, and never be given back
            gc.freeze()
        _loaded.add(module)


def is_loaded(module: str) -> bool:
    """Whether `load` has nothing to do for a module."""
    return module in sys.modules and not _one_at_a_time.locked()


class Deferred:
    """A function or a class that is made, or imported, when it is first used.

    Args:
        make: returns it.
        home: the module that it is imported from. Before that is there, nothing can be an instance of it.
    """

    def __init__(self, make: Callable[[], Any], home: str | None = None) -> None:
        self._real = functools.cache(make)
        self._home = home

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks for names, docstrings and the like without using anything
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return self._home in sys.modules and isinstance(instance, self._real())

    def __or__(self, other: Any) -> Any:  # in annotations
        return typing.Union[self, other]  # noqa: UP007 (this is that operator)

    def __ror__(self, other: Any) -> Any:
        return typing.Union[other, self]  # noqa: UP007


class _Module:
    """A module as far as `from … import …` looks at one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Deferred:
        return Deferred(lambda: getattr(importlib.import_module(self._name), name), self._name)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Give stand-ins for what UNUSED lists, and keep torch's compiler out, inside the block."""
    usual = builtins.__import__

    # With the signature of the built-in one, whose parameters hide other built-in names.
    def imported(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        package = str((globals or {}).get("__package__"))
        if globals and fromlist and "*" not in fromlist and package.partition(".")[0] in PACKAGES:
            wanted = importlib.util.resolve_name("." * level + name, package)
            if wanted not in sys.modules:
                if handed_on := HANDED_ON.get((wanted, *fromlist)):
                    return handed_on
                if _is_unused(wanted, globals["__name__"]):
                    return _Module(wanted)
        return usual(name, globals, locals, fromlist or (), level)

    with _compiler_kept_out(), _replaced({(builtins, "__import__"): imported}):
        yield


@contextmanager
def _replaced(attributes: Mapping[tuple[ModuleType, str], Any]) -> Iterator[None]:
    """Replace attributes of modules inside the block."""
    usual = {place: getattr(*place) for place in attributes}
    try:
        for (module, name), replacement in attributes.items():
            setattr(module, name, replacement)
        yield
    finally:
        for (module, name), value in usual.items():
            setattr(module, name, value)


def _is_unused(wanted: str, importer: str) -> bool:
    listed = (module for package, modules in UNUSED.items() if _lies_in(importer, package) for module in modules)
    return any(_lies_in(wanted, module) for module in listed) and _exists(wanted)


def _lies_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _exists(module: str) -> bool:
    """Whether a module could be imported, found out without importing the packages that it lies in."""
    places: Sequence[str] | None = None
    parts = module.split(".")
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), places)
        if spec is None:
            return False
        places = spec.submodule_search_locations
    return True


@contextmanager
def _compiler_kept_out() -> Iterator[None]:
    """Let what calls or decorates with torch's compiler inside the block wait until somebody compiles."""
    import torch

    if COMPILER in sys.modules:
        yield
        return
    later = _Compiler()
    sys.meta_path.insert(0, _Told(later.told))
    usual = torch.compile

    def compiled(model: Any, **options: Any) -> Deferred:
        return Deferred(lambda: usual(model._real() if isinstance(model, Deferred) else model, **options))

    public = {(torch.compiler, name): getattr(later, name) for name in ("disable", *later.MARKS)}
    vars(torch)["_dynamo"] = later  # torch imports it when it is asked for this name, and only then
    try:
        with _replaced({(torch, "compile"): compiled, **public}):
            yield
    finally:
        if vars(torch).get("_dynamo") is later:
            del vars(torch)["_dynamo"]


class _Compiler(ModuleType):
    """Stands in for torch._dynamo: takes its decorators, and is the real one for everything else.

    Attributes:
        told: what was decorated, by the decorator's name, for the real one.
    """

    MARKS = ("allow_in_graph", "assume_constant_result")  # these return the function as it is

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self.told: list[tuple[str, Callable[..., Any]]] = []

    def disable(self, function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Callable[..., Any]:
        """Return a function that is not compiled; before there is a compiler, that is the function itself."""
        if function is None:
            return lambda function: self.disable(function, *args, **options)
        given: Callable[..., Any] = function
        disabled = Deferred(lambda: importlib.import_module(COMPILER).disable(given, *args, **options))

        @functools.wraps(given)
        def run(*args: Any, **kwargs: Any) -> Any:
            return (disabled if COMPILER in sys.modules else given)(*args, **kwargs)

        return run

    def __getattr__(self, name: str) -> Any:
        if name in self.MARKS:
            return functools.partial(self._mark, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(COMPILER), name)

    def _mark(self, decorator: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.told.append((decorator, function))
        return function


class _Told(MetaPathFinder):
    """Tells torch's compiler, once it is imported, what was decorated before."""

    def __init__(self, told: Sequence[tuple[str, Callable[..., Any]]]) -> None:
        self._told = told

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the compiler as it always is found, and be there when it has been run."""
        if name != COMPILER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        usual = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            usual(module)
            for decorator, function in self._told:
                getattr(module, decorator)(function)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec
