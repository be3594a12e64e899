"""What makes this repository a Space: README.md's front matter and the one command that deploys it."""

import importlib.metadata
import re
import shlex
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # given on without saying so
from packaging.requirements import Requirement

import web.server
from hub import parts
from tests.helpers import sparse

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs" / "space.md"

# What each repository holds that a pipeline reads: the names as on the hub, with the small files beside the weights.
SHARDS = {"turbo": 3, "base": 2}
READ = {
    "turbo": ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"],
    "base": ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"],
    "text_encoder": ["text_encoder/config.json", "text_encoder/model.safetensors.index.json"],
    "vae": ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
    "tokenizer": [
        f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    ],
}


def front_matter() -> dict[str, Any]:
    _, front, _ = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    told: dict[str, Any] = yaml.safe_load(front)
    return told


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def preloaded() -> dict[str, list[str]]:
    lines = (line.split(maxsplit=1) for line in front_matter()["preload_from_hub"])
    return {repo: patterns.split(",") for repo, patterns in lines}


def files_of(part: parts.Part) -> list[str]:
    """Return names that the part has on the hub."""
    if part.pattern.endswith("*.safetensors"):
        count = SHARDS.get(part.name, 3)
        stem = part.pattern.removesuffix("*.safetensors") + "model"
        shards = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    else:
        shards = [] if "*" in part.pattern else [part.pattern]
    return shards + READ.get(part.name, [])


def test_the_front_matter_names_what_a_space_needs() -> None:
    front = front_matter()
    assert front["title"] == "Z-Image Studio"
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert front["python_version"] == "3.12"  # a string: as a number, 3.10 would be 3.1
    asked = (ROOT / "requirements.txt").read_text()
    found = re.search(r"^gradio>=([\d.]+),<([\d.]+)$", asked, re.M)
    assert found
    lowest, below = found.groups()

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert number(lowest) <= number(front["sdk_version"]) < number(below)
    assert front["sdk_version"] == importlib.metadata.version("gradio")
    assert len(front["short_description"]) <= 60  # the hub's limit


def test_a_space_gets_a_torch_that_zerogpu_supports() -> None:
    asked = {wanted.name: wanted.specifier for wanted in map(Requirement, requirements())}
    supported = [f"2.{minor}.0" for minor in range(20) if asked["torch"].contains(f"2.{minor}.0")]
    assert supported == ["2.8.0", "2.9.0", "2.10.0", "2.11.0"]
    # torchvision's minor releases go with torch's, 15 apart.
    paired = [f"0.{minor}.0" for minor in range(40) if asked["torchvision"].contains(f"0.{minor}.0")]
    assert paired == [f"0.{int(version.split('.')[1]) + 15}.0" for version in supported]


def test_the_guide_says_how_to_check_that_the_requirements_resolve() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    command = re.search(r"uv pip compile --no-config --python-version (\S+) .*requirements\.txt", guide)
    assert command
    assert command[1] == front_matter()["python_version"]


@pytest.mark.parametrize("part", parts.PARTS.values(), ids=lambda part: part.name)
def test_every_part_is_preloaded_with_its_small_files(part: parts.Part) -> None:
    globs = preloaded()[part.repo]
    for name in files_of(part):
        assert any(fnmatchcase(name, glob) for glob in globs), f"{name} of {part.repo} is not preloaded"
    folder = part.pattern.rpartition("/")[0]
    assert not folder or f"{folder}/*" in globs  # broad: a file that a later revision adds comes along


def test_nothing_is_preloaded_that_no_part_has() -> None:
    assert set(preloaded()) == {part.repo for part in parts.PARTS.values()}


def test_the_space_brings_the_package_spaces() -> None:
    named = re.findall(r"^[A-Za-z0-9_.-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert "spaces" not in named
    assert not re.search(r"^spaces==", (ROOT / "requirements.lock").read_text(), re.M)


def test_one_command_deploys_what_runs_and_nothing_else() -> None:
    line = re.search(r"^\.venv/bin/hf upload .*$", GUIDE.read_text(encoding="utf-8"), re.M)
    assert line
    command = shlex.split(line[0])
    excluded = command[command.index("--exclude") + 1 :]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    uploaded = set(filter_repo_objects(tracked.stdout.splitlines(), ignore_patterns=excluded))
    rooms = [face.parent for face in ROOT.glob("*/__init__.py") if face.parent.name != "train_mini"]
    needed = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*")), *ROOT.glob("weights/**/*")]
    needed += [ROOT / name for name in ("README.md", "requirements.txt", "LICENSE", "NOTICE")]
    names = {path.relative_to(ROOT).as_posix() for path in needed if path.is_file() and "__pycache__" not in path.parts}
    assert names & set(tracked.stdout.splitlines()) <= uploaded
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    made = [name if name.endswith(".lock") else f"{name}/deep/file" for name in ignored]
    made += [".git/config", "__pycache__/app.pyc"]
    made += ["tests/__pycache__/x.pyc", "train_mini/scenes.py", "models/Tongyi-MAI/Z-Image/x.safetensors"]
    assert len(made) > 10
    assert not list(filter_repo_objects(made, ignore_patterns=excluded))


def test_links_that_cannot_be_made_keep_no_space_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sparse.write_hub_snapshot(tmp_path / "hub", parts.PARTS["vae"].repo, ["vae"])
    (tmp_path / "models").write_text("a file in the way")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    web.server.link_preloaded()
    assert "no links to the preloaded weights" in caplog.text


def test_a_space_decides_its_address_and_needs_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    options = web.server.launch_options("0.0.0.0", 80, None, False)
    assert not {"server_name", "server_port", "auth"} & set(options)
