"""Who may import whom: the table of docs/contributing.md, held against the code itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "errors": set(),
    "theme": set(),
    "first_paint": {"theme"},
    "allowed_hosts": {"errors"},
    "whole_file": {"errors"},
    "request": {"errors"},
    "host_memory": set(),
    "measure": {"whole_file", "errors"},
    "device": {"measure", "host_memory", "errors"},
    "mini": {"errors"},
    "mini_models": {"mini"},
    "mini_prompt": {"mini"},
    "bounded": set(),
    "checkpoint": {"bounded"},
    "architectures": set(),
    "lora_dialects": set(),
    "lora": {"lora_dialects", "architectures", "bounded", "checkpoint", "errors"},
    "adapter": {"lora", "lora_dialects"},
    "places": {"checkpoint"},
    "weights": {"places", "errors", "checkpoint"},
    "hub": {"weights", "errors"},
    "hub_huggingface": {"hub", "weights", "checkpoint", "whole_file", "errors"},
    "hub_modelscope": {"hub", "weights", "errors"},
    "download": {"hub_huggingface", "hub_modelscope", "hub", "weights", "errors"},
    "links": {"places", "weights", "checkpoint"},
    "verify": {"weights", "checkpoint"},
    "metadata": {"bounded", "whole_file", "request", "errors"},
    "depth": set(),
    "pose": set(),
    "preprocess": {"depth", "pose", "weights", "request", "errors"},
    "sanity": set(),
    "loader": {"vae_tiles", "device", "host_memory"},
    "preview": {"request"},
    "pipeline": {
        *("image_to_image", "loader", "sanity", "preview", "tokens", "adapter", "mini", "weights", "device", "request"),
        "errors",
    },
    "safeguard": {"sanity", "request", "errors"},
    "preflight": {"device", "request", "errors"},
    "tiles": set(),
    "vae_tiles": {"tiles"},
    "ncnn_weights": set(),
    "upscaler_weights": {"ncnn_weights", "places", "weights", "errors"},
    "upscaler": {"upscaler_weights", "tiles", "request", "errors"},
    "image_to_image": {"vae_tiles", "request"},
    "upscaling": {
        *("safeguard", "upscaler", "upscaler_weights", "tiles", "vae_tiles", "preprocess", "preflight", "pipeline"),
        *("device", "request"),
    },
    "controls": {"preprocess", "request"},
    "packed": {"weights", "request", "errors"},
    "turns": {"errors"},
    "tokens": set(),
    "pace": {"request"},
    "shapes": {"request"},
    "language": set(),
    "hub_mirror": {"places"},
    "zerogpu": {"preflight", "request", "errors"},
    "stopwatch": {"request"},
    "mini_notes": {"mini", "mini_prompt", "request"},
    "lora_use": {"safeguard", "pipeline", "lora", "metadata", "request"},
    "engine": {
        *(
            "zerogpu",
            "turns",
            "stopwatch",
            "preflight",
            "tokens",
            "upscaling",
            "controls",
            "packed",
            "preprocess",
            "pipeline",
        ),
        *("lora", "lora_use", "mini_notes", "metadata", "weights", "device", "request", "errors"),
    },
    "ui_words": {"language", "request", "errors"},
    "ui_parts": {
        *("ui_gallery", "ui_words", "language", "pace", "shapes", "engine", "request", "metadata", "whole_file"),
        "errors",
    },
    "ui_lora": {"ui_parts", "language", "engine", "request", "errors"},
    "ui_form": {"ui_lora", "ui_parts", "language", "request", "errors"},
    "ui_fields": {"ui_form", "ui_parts", "language", "tokens", "metadata", "engine", "request"},
    "ui_gallery": {"language", "request"},
    "ui_restore": {"ui_form", "ui_parts", "ui_words", "language", "metadata", "request", "errors"},
    "tab_generate": {
        "ui_fields",
        "ui_gallery",
        "ui_form",
        "ui_lora",
        "ui_parts",
        "language",
        "shapes",
        "engine",
        "request",
    },
    "tab_controlnet": {
        *("ui_fields", "ui_gallery", "ui_form", "ui_lora", "ui_parts", "ui_words", "language", "engine", "request"),
        "errors",
    },
    "tab_upscale": {
        *("ui_fields", "ui_gallery", "ui_form", "ui_parts", "language", "upscaling", "metadata", "engine", "request"),
        "errors",
    },
    "ui": {
        *("tab_generate", "tab_controlnet", "tab_upscale", "ui_restore", "ui_parts", "language", "theme", "engine"),
        "request",
    },
    "cli_models": {"download", "hub", "links", "verify", "weights", "errors"},
    "cli": {
        *("cli_models", "app", "engine", "request", "metadata", "weights", "lora", "device", "host_memory"),
        *("measure", "whole_file", "errors"),
    },
    "app": {
        *("ui", "first_paint", "allowed_hosts", "theme", "language", "engine", "hub_mirror", "links", "zerogpu"),
        *("weights", "device"),
        "errors",
    },
    "install": set(),
}

# Third-party packages that only some modules may import, and whether they may do so at the top of the file.
HEAVY = {
    "torch": {"pipeline", "image_to_image", "upscaler", "loader", "preview", "adapter", "mini_models", "depth"},
    "diffsynth": {"pipeline", "image_to_image", "loader", "mini_models"},
    "spandrel": {"upscaler"},
    "transformers": {"pipeline", "depth"},
    "cv2": set(),
    "ai_edge_litert": set(),
    "spaces": set(),
    "huggingface_hub": {"hub_huggingface"},
    "modelscope_hub": {"hub_modelscope"},
    "gradio": {
        *("ui", "ui_lora", "ui_parts", "ui_form", "ui_fields", "ui_gallery", "ui_restore", "tab_generate"),
        *("tab_controlnet", "tab_upscale", "language", "app", "theme"),
    },
}
HEAVY_LAZILY = {
    "torch": {"engine", "device", "measure"},
    "diffsynth": {"mini"},
    "spandrel": set(),
    "transformers": {"mini_models"},
    "cv2": {"preprocess", "pose"},
    "ai_edge_litert": {"pose"},
    "huggingface_hub": {"cli_models"},
    "modelscope_hub": set(),
    "gradio": {"zerogpu"},
    "spaces": {"zerogpu"},
}

MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def imports(module: str, *, top_level_only: bool) -> set[str]:
    """Return the first parts of the names that a module imports at run time."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else [node for node in ast.walk(tree) if not _for_type_checkers(node, tree)]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def _for_type_checkers(node: ast.AST, tree: ast.Module) -> bool:
    guarded = [block for block in tree.body if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)]
    return any(node in ast.walk(block) for block in guarded)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_may(module: str) -> None:
    assert module in ALLOWED, f"{module}.py is not in the table of layers"
    inside = imports(module, top_level_only=False) & set(MODULES)
    assert inside <= ALLOWED[module]


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_where_they_belong(package: str) -> None:
    everywhere = {module for module in MODULES if package in imports(module, top_level_only=False)}
    at_the_top = {module for module in MODULES if package in imports(module, top_level_only=True)}
    assert at_the_top <= HEAVY[package]
    assert everywhere <= HEAVY[package] | HEAVY_LAZILY[package]


@pytest.mark.parametrize("module", ["app", "cli", "engine"])
def test_importing_a_front_loads_no_torch(module: str) -> None:
    heavy = "('torch', 'diffsynth', 'transformers', 'cv2')"
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_named_like_a_package_of_others() -> None:
    assert not set(MODULES) & set(sys.stdlib_module_names)
