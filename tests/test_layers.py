"""Which room may import which: the table of docs/contributing.md, checked against the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A row a room: what it may import besides itself. `train_mini`, `bench` and the tests may import everything.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "hub": {"core"},
    "mini": {"core"},
    "lora": {"core", "hub"},
    "images": {"core", "hub"},
    "upscaler": {"core", "hub", "images"},
    "diffusion": {"core", "hub", "mini", "lora", "images"},
    "engine": {"core", "hub", "mini", "lora", "images", "upscaler", "diffusion"},
    "web": {"core", "engine", "hub", "diffusion.tokens"},
    "app": {"core", "hub", "engine", "web"},
    "cli": {"core", "hub", "mini", "lora", "images", "upscaler", "diffusion", "engine", "app", "web.mcp"},
    "install": set(),
}
ROOMS = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]

# Packages of others that take long to import or exist for one purpose: at the top of which modules, or rooms, they may
# stand, and which others may import them inside of a function.
HEAVY: dict[str, tuple[set[str], set[str]]] = {
    "torch": ({"diffusion", "lora.adapter", "upscaler.network", "images.depth", "mini.models"}, {"engine.worker"}),
    "diffsynth": ({"diffusion", "mini.models"}, {"mini.config"}),
    "transformers": ({"diffusion", "images.depth"}, {"mini.models"}),
    "spandrel": ({"upscaler.network"}, set()),
    "cv2": (set(), {"images.preprocess", "images.pose"}),
    "ai_edge_litert": (set(), {"images.pose"}),
    "gradio": ({"web"}, {"engine.zerogpu", "engine.worker_zerogpu"}),
    "spaces": (set(), {"engine.zerogpu"}),
    "gguf": (set(), {"diffusion.convert"}),
    "huggingface_hub": ({"hub"}, set()),
    "mcp": ({"web.mcp"}, set()),
    "modelscope_hub": ({"hub"}, set()),
}


def modules() -> dict[str, ast.Module]:
    """Return the program's modules by their dotted names, parsed."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in names.items()}


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of each module that a tree imports, of ours as precisely as possible."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (inside & MODULES.keys()) or {node.module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def at_the_top(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported when the module itself is."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    for module, tree in MODULES.items():
        if room_of(module) == room:
            ours = {name for name in imported(tree) if room_of(name) in MAY_IMPORT}
            assert not {name for name in ours if not {name, room_of(name)} & allowed}, module


def test_no_files_of_a_room_import_each_other_in_a_circle() -> None:
    # A room's `__init__` is its face: it imports from inside, and nothing inside imports the face.
    inner = {module: set(imported(tree)) & MODULES.keys() for module, tree in MODULES.items() if module not in ROOMS}
    while leaves := {module for module, needs in inner.items() if not needs & inner.keys()}:
        for module in leaves:
            del inner[module]
    assert not inner
    assert not [module for module, tree in MODULES.items() if "." in module and room_of(module) in imported(tree)]


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_where_they_belong(package: str) -> None:
    top, lazily = HEAVY[package]
    for module, tree in MODULES.items():
        places = {module, room_of(module)}
        if package in {room_of(name) for name in at_the_top(tree)}:
            assert places & top, module
        elif package in {room_of(name) for name in imported(without_type_checking(tree))}:
            assert places & (top | lazily), module


def without_type_checking(tree: ast.Module) -> ast.Module:
    """Return a module without what only a type checker imports."""
    run = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(run, [])


@pytest.mark.parametrize("module", ["app", "cli", "engine"])
def test_importing_a_front_loads_no_torch(module: str) -> None:
    heavy = "('torch', 'diffsynth', 'transformers', 'cv2')"
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_holds_what_a_newcomer_has_to_see() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"app", "cli", "install"}
    assert all(len(path.relative_to(ROOT).parts) <= 2 for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {part for module in MODULES for part in module.split(".")} & (set(sys.stdlib_module_names) - {"test"})
