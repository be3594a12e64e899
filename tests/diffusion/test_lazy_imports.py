"""What is left out when the program is imported, and that whoever wants it gets the real thing."""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from core.events import Result
from diffusion import lazy_imports

ROOT = Path(__file__).parent.parent.parent

# What no picture of the miniature needs; several of these take longer to import than the picture takes to draw.
LEFT_OUT = (
    "accelerate",
    "cv2",
    "diffsynth.core.data.operators",
    "diffsynth.core.data.unified_dataset",
    "diffsynth.models.dinov3_image_encoder",
    "diffsynth.models.siglip2_image_encoder",
    "diffsynth.models.z_image_image2lora",
    "gradio",
    "modelscope",
    "pandas",
    "peft",
    "scipy",
    "spandrel",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torchvision",
)

# Draws as the command line does; tells what is there, and what is still in place of something else.
DRAW = f"""
import builtins, json, sys
import cli

usual_import = builtins.__import__
options = ["--seed", "7", "--weights", "mini", "--device", "cpu", "--out", sys.argv[1]]
assert cli.main(["generate", "a fox on a black background", *options]) == 0
facts = {{"there": [name for name in {LEFT_OUT} if name in sys.modules]}}

import torch
facts["in place"] = [name for name, replaced in {{
    "import": builtins.__import__ is not usual_import,
    "compile": torch.compile.__module__ != "torch",
    "disable": torch.compiler.disable.__module__ != "torch.compiler",
    "_dynamo": "_dynamo" in vars(torch),
}}.items() if replaced]
"""

# Uses what was left out, as somebody might who compiles a model, with a backend that needs no compiler.
USE = """
from diffsynth.core.vram.layers import AutoWrappedModule
from diffsynth.pipelines import z_image

class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x

places = ("offload", "onload", "preparing", "computation")
settings = {f"{place}_device": "cpu" for place in places} | {f"{place}_dtype": torch.float32 for place in places}
facts["managed"] = torch.compile(AutoWrappedModule(Twice(), **settings), backend="eager")(torch.ones(2)).tolist()
facts["resized"] = type(z_image.ImageCropAndResize(height=16, width=16)).__module__

from torch._dynamo import trace_rules
from transformers import PreTrainedModel
facts["told"] = id(PreTrainedModel.can_record_outputs.fget) in trace_rules._allowed_callable_ids
print(json.dumps(facts))
"""

COMPILE = """
import diffusion.lazy_imports
diffusion.lazy_imports.load("diffusion.pipeline")
import json, sys, torch
before = "torch._dynamo" in sys.modules
print(json.dumps([before, torch.compile(lambda x: 2 * x + 1)(torch.ones(3)).tolist()]))
"""


def told_by(code: str, *arguments: object) -> Any:
    """Run a program of its own, and return what it prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """A picture that a new process drew, and what that told about itself."""
    out = tmp_path_factory.mktemp("drawn") / "fox.png"
    facts = told_by(DRAW + USE, out)
    return out.read_bytes(), facts


def test_what_no_picture_needs_is_not_imported(drawn: tuple[bytes, dict[str, Any]]) -> None:
    assert drawn[1]["there"] == []


def test_the_picture_is_the_same(drawn: tuple[bytes, dict[str, Any]], draw: Callable[..., Result]) -> None:
    assert drawn[0] == draw().png


def test_afterwards_the_real_things_are_there_for_everybody(drawn: tuple[bytes, dict[str, Any]]) -> None:
    facts = drawn[1]
    assert facts["in place"] == []
    assert facts["managed"] == [2.0, 2.0]
    assert facts["resized"] == "diffsynth.core.data.operators"


def test_torchs_compiler_hears_later_of_what_was_decorated(drawn: tuple[bytes, dict[str, Any]]) -> None:
    assert drawn[1]["told"]


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch compiles with a C++ compiler, and none is here"
)
def test_models_can_still_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert told_by(COMPILE) == [False, [3.0, 3.0, 3.0]]


# --- the mechanism, on packages made for it

PART = """
class Thing:
    size = 3
def work(number):
    return number + 1
"""


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Write a module of the package `wanting`, which leaves `unused.part` out, and import it with stand-ins."""
    for package in ("wanting", "unused"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "unused" / "part.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lazy_imports, "UNUSED", {"wanting": ("unused.part", "unused.absent")})
    monkeypatch.setattr(lazy_imports, "PACKAGES", {"wanting"})

    def imported(code: str, name: str = "wanting.module") -> Any:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.write_text(code)
        importlib.invalidate_caches()
        lazy_imports.load(name)
        return sys.modules[name]

    yield imported
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wanting", "unused")]:
        del sys.modules[name]


def is_there() -> bool:
    return "unused.part" in sys.modules


def test_a_stand_in_imports_the_real_thing_when_it_is_called(importing: Callable[..., Any]) -> None:
    module = importing("from unused.part import Thing, work as works")
    assert not is_there()
    assert module.works(1) == 2
    assert is_there()
    assert type(module.Thing()) is sys.modules["unused.part"].Thing


def test_a_stand_in_imports_the_real_thing_when_it_is_looked_into(importing: Callable[..., Any]) -> None:
    module = importing("from unused.part import Thing")
    assert not hasattr(module.Thing, "__wrapped__")  # as Python looks at whatever it decorates
    assert not is_there()
    assert module.Thing.size == 3


def test_a_stand_in_may_stand_in_annotations_and_checks(importing: Callable[..., Any]) -> None:
    code = "from unused.part import Thing\ndef check(it: int | Thing | None): return isinstance(it, (int, Thing))"
    module = importing(code)
    assert get_args(module.check.__annotations__["it"]) == (int, module.Thing, type(None))
    assert [module.check(1), module.check("1")] == [True, False]
    assert not is_there()  # of what is not there, nothing is an instance
    assert module.check(importlib.import_module("unused.part").Thing())
    assert not module.check("1")


def test_what_is_derived_from_at_once_is_imported_at_once(importing: Callable[..., Any]) -> None:
    module = importing("from unused.part import Thing\nclass Derived(Thing): pass")
    assert module.Derived.__mro__[1] is sys.modules["unused.part"].Thing


@pytest.mark.parametrize("code", ["import unused.part", "from unused.part import *"])
def test_other_ways_to_import_it_are_as_ever(importing: Callable[..., Any], code: str) -> None:
    importing(code)
    assert is_there()


def test_others_get_the_real_thing_meanwhile_and_afterwards(importing: Callable[..., Any]) -> None:
    assert importing("from unused.part import Thing", "unused.other").Thing.__module__ == "unused.part"
    assert importing("from unused.part import Thing").Thing is sys.modules["unused.part"].Thing  # it is there already


@pytest.mark.parametrize("code", ["from unused.absent import Thing", "from unused.part.deeper import Thing"])
def test_what_is_not_there_fails_as_ever(importing: Callable[..., Any], code: str) -> None:
    usual = builtins.__import__
    with pytest.raises(ImportError, match=r"unused\.(absent|part)"):
        importing(code)
    assert builtins.__import__ is usual
    assert gc.isenabled()


def test_several_threads_import_it_once(importing: Callable[..., Any], tmp_path: Path) -> None:
    code = """
import gc, pathlib, threading
with open(pathlib.Path(__file__).with_suffix(".txt"), "a") as log:
    log.write(f"{gc.isenabled()}\\n")
from unused.part import Thing
"""
    importing("", "wanting.first")  # the packages are on the path
    (tmp_path / "wanting" / "module.py").write_text(code)  # once: a thread may read while another one writes
    importlib.invalidate_caches()
    threads = [threading.Thread(target=lazy_imports.load, args=["wanting.module"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "wanting" / "module.txt").read_text() == "False\n"  # the collector rested
    assert gc.isenabled()
    assert lazy_imports.is_loaded("wanting.module")
    assert not lazy_imports.is_loaded("wanting.other")
