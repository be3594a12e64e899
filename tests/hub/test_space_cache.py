"""The mirror of a preloaded cache: real files of another user's, real permissions, a second file system."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import space_cache

ROOT = Path(__file__).parent.parent.parent
REPO = "models--Tongyi-MAI--Z-Image-Turbo"
COMMIT = "c" * 40
NOBODY = 65534
LARGE, SMALL = "a" * 64, "b" * 40  # named as the hub's client names blobs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Spaces run Linux, and links need a right on Windows")


def fill(cache: Path) -> Path:
    """Lay out a hub cache as `hf download` does: two blobs, the links of one snapshot, and refs."""
    repo = cache / REPO
    snapshot = repo / "snapshots" / COMMIT / "transformer"
    for folder in (repo / "blobs", repo / "refs" / "pr", snapshot):
        folder.mkdir(parents=True)
    (repo / "blobs" / LARGE).write_bytes(b"weights")
    (repo / "blobs" / SMALL).write_bytes(b"{}")
    (repo / "blobs" / f"{LARGE}.incomplete").write_bytes(b"wei")
    (snapshot / "model.safetensors").symlink_to(f"../../../blobs/{LARGE}")
    (snapshot / "config.json").symlink_to(f"../../../blobs/{SMALL}")
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "pr" / "1").write_text(COMMIT)
    return repo


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fill(tmp_path / "hub")
    return tmp_path / "hub"


def check_whole(target: Path) -> None:
    """Hold a mirror against what `fill` made."""
    repo = target / REPO
    snapshot = repo / "snapshots" / COMMIT / "transformer"
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    assert (snapshot / "config.json").read_bytes() == b"{}"
    assert os.readlink(snapshot / "model.safetensors") == f"../../../blobs/{LARGE}"
    assert (repo / "refs" / "main").read_text() == COMMIT
    assert (repo / "refs" / "pr" / "1").read_text() == COMMIT
    assert sorted(path.name for path in (repo / "blobs").iterdir()) == [LARGE, SMALL]


def test_blobs_are_hard_links_and_refs_are_copies(cache: Path, tmp_path: Path) -> None:
    done = space_cache.mirror(cache, tmp_path / "mirror")
    check_whole(tmp_path / "mirror")
    assert (done.hard_links, done.symlinks, done.snapshots, done.refs, done.problems) == (2, 0, 2, 2, ())
    assert (tmp_path / "mirror" / REPO / "blobs" / LARGE).samefile(cache / REPO / "blobs" / LARGE)
    (tmp_path / "mirror" / REPO / "refs" / "main").write_text("d" * 40)
    assert (cache / REPO / "refs" / "main").read_text() == COMMIT


def test_a_second_run_changes_nothing_and_keeps_what_came_since(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    space_cache.mirror(cache, target)
    (target / REPO / "refs" / "main").write_text("d" * 40)
    before = {path: path.lstat().st_ino for path in target.rglob("*")}
    again = space_cache.mirror(cache, target)
    assert again == space_cache.Mirrored()
    assert {path: path.lstat().st_ino for path in target.rglob("*")} == before
    assert (target / REPO / "refs" / "main").read_text() == "d" * 40


def test_across_file_systems_blobs_are_symlinks(cache: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == cache.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        done = space_cache.mirror(cache, Path(folder))
        assert (done.hard_links, done.symlinks) == (0, 2)
        check_whole(Path(folder))
        assert space_cache.mirror(cache, Path(folder)) == space_cache.Mirrored()


def test_it_survives_that_packing_deletes_blobs(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    space_cache.mirror(cache, target)
    (cache / REPO / "blobs" / LARGE).unlink()  # as ZeroGPU does with what it has packed
    check_whole(target)
    (target / REPO / "blobs" / LARGE).unlink()  # or by the name in the mirror
    shutil.copy(target / REPO / "blobs" / SMALL, cache / REPO / "blobs" / LARGE)
    assert space_cache.mirror(cache, target).hard_links == 1


def test_a_broken_link_is_made_anew(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    space_cache.mirror(cache, target)
    blob = target / REPO / "blobs" / LARGE
    blob.unlink()
    blob.symlink_to(tmp_path / "gone")
    link = target / REPO / "snapshots" / COMMIT / "transformer" / "config.json"
    link.unlink()
    link.symlink_to("nowhere")
    space_cache.mirror(cache, target)
    check_whole(target)


def test_absolute_links_stay_inside_the_mirror(cache: Path, tmp_path: Path) -> None:
    link = cache / REPO / "snapshots" / COMMIT / "transformer" / "config.json"
    link.unlink()
    link.symlink_to(cache / REPO / "blobs" / SMALL)
    space_cache.mirror(cache, tmp_path / "mirror")
    copied = tmp_path / "mirror" / REPO / "snapshots" / COMMIT / "transformer" / "config.json"
    assert os.readlink(copied) == f"../../../blobs/{SMALL}"


def test_a_cache_of_files_without_links_is_mirrored_too(cache: Path, tmp_path: Path) -> None:
    file = cache / REPO / "snapshots" / COMMIT / "plain.json"
    file.write_text("[]")
    space_cache.mirror(cache, tmp_path / "mirror")
    assert (tmp_path / "mirror" / REPO / "snapshots" / COMMIT / "plain.json").read_text() == "[]"


def test_many_may_start_at_once(cache: Path, tmp_path: Path) -> None:
    for index in range(200):
        (cache / REPO / "blobs" / f"{index:040x}").write_text(str(index))
    code = (
        "import sys, pathlib; from hub import space_cache; "
        "space_cache.mirror(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(cache), str(tmp_path / "mirror")]
    runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(4)]
    printed = [run.communicate(timeout=120)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, printed
    blobs = tmp_path / "mirror" / REPO / "blobs"
    assert len(list(blobs.iterdir())) == 202
    assert all((blobs / f"{index:040x}").read_text() == str(index) for index in range(200))


# --- as another user ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def homes() -> Iterator[tuple[Path, Path]]:
    """A cache that the user who builds filled, below the home folder of the user who runs: both may look inside."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o755)
        cache = home / ".cache" / "huggingface" / "hub"
        fill(cache)
        os.chown(home, NOBODY, NOBODY)
        os.chown(home / ".cache", NOBODY, NOBODY)
        yield home, cache


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("environ", [{}, {"HF_HOME": "{home}/.cache/huggingface"}], ids=["default", "HF_HOME"])
def test_a_build_users_cache_is_used_through_a_mirror(environ: dict[str, str]) -> None:
    code = """
import json, os, shutil, sys, tempfile
from huggingface_hub import hf_hub_download
from hub import space_cache
os.setgid(65534), os.setuid(65534)  # after the imports: this user may not be able to read Python's own folder
done = space_cache.settle(os.environ)
hub = os.environ["HF_HUB_CACHE"]
name = "transformer/model.safetensors"
path = hf_hub_download("Tongyi-MAI/Z-Image-Turbo", name, cache_dir=hub, local_files_only=True)
refs = os.path.join(hub, "models--Tongyi-MAI--Z-Image-Turbo", "refs", "main")
open(refs, "a").close()
names = ("HF_HOME", "HF_HUB_CACHE", "ZEROGPU_MMAP_AUTOPRUNE_PATTERN")
print(json.dumps({"done": vars(done), "path": path, "again": space_cache.settle(os.environ),
                  **{name: os.environ.get(name) for name in names}}))
"""
    with homes() as (home, cache):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "HUGGING"))}
        given = {name: value.format(home=home) for name, value in environ.items()}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**kept, "HOME": str(home), **given, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout.splitlines()[-1])
        target = home / space_cache.MIRROR_FOLDER
        check_whole(target / "hub")
        assert facts["HF_HOME"] == str(target)
        assert facts["HF_HUB_CACHE"] == str(target / "hub")
        assert facts["path"].startswith(str(target / "hub"))
        assert facts["again"] is None  # the mirror can be written to: there is nothing to mirror
        # The kernel may let a file's owner alone make hard links of it; either way nothing is copied.
        assert facts["done"]["hard_links"] + facts["done"]["symlinks"] == 2
        protected = Path("/proc/sys/fs/protected_hardlinks")
        if protected.is_file() and protected.read_text().strip() == "1":
            assert facts["done"]["symlinks"] == 2
        # `spaces` deletes mapped blobs of this pattern after packing; of another user's it could not.
        assert not Path(cache / REPO / "blobs" / LARGE).match(facts["ZEROGPU_MMAP_AUTOPRUNE_PATTERN"])


def test_a_cache_of_our_own_is_used_where_it_lies(cache: Path, tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "HF_HUB_CACHE": str(cache)}
    assert space_cache.settle(environ) is None
    assert environ["HF_HUB_CACHE"] == str(cache)
    assert space_cache.settle({"HOME": str(tmp_path / "empty")}) is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make another user's files")
def test_what_cannot_be_read_is_named_and_the_rest_mirrored() -> None:
    with homes() as (home, cache):
        secret = cache / "models--someone--secret" / "blobs"
        secret.mkdir(parents=True)
        secret.chmod(0o700)
        (cache / REPO / "blobs" / SMALL).chmod(0o600)
        code = """
import os
from hub import space_cache
os.setgid(65534), os.setuid(65534)
print(*space_cache.settle(os.environ).problems, sep="\\n")
"""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "HUGGING"))}
        environ = {**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
        )
        assert f"{secret} cannot be read" in done.stdout
        assert f"{cache / REPO / 'blobs' / SMALL} cannot be read" in done.stdout
        assert (home / space_cache.MIRROR_FOLDER / "hub" / REPO / "blobs" / LARGE).read_bytes() == b"weights"
