"""Links from cached snapshots into the models folder, and reading the weights that are there in full."""

import hashlib
import os
from pathlib import Path

import pytest

from hub import checkpoint, download, inventory, links
from hub.parts import Part
from hub.verify import Reading, Verdict, known_digest, verify
from tests.helpers.hub_server import digest
from tests.helpers.sparse import COMMIT, TOKENIZER, write_sparse

REPO = "owner/tiny-model"
NEWER = "b" * 40
INDEX = "model.safetensors.index.json"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose caches and models folder lie in this test's folder."""
    return {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models")}


@pytest.fixture
def repo(environ: dict[str, str]) -> Path:
    return Path(environ["HOME"]) / ".cache" / "huggingface" / "hub" / "models--owner--tiny-model"


@pytest.fixture
def here(environ: dict[str, str]) -> Path:
    """Where the links of the model go."""
    return Path(environ["DIFFSYNTH_MODEL_BASE_PATH"]) / REPO / "transformer"


def write_snapshot(repo: Path, commit: str, shards: int) -> Path:
    """Write a snapshot as huggingface_hub does: blobs named by their digests, and links to them."""
    snapshot = repo / "snapshots" / commit
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        write_sparse(snapshot / "transformer" / name, {f"{commit[0]}{number}": (50 + number,)})
    index = ", ".join(f'"{name}": "{name}"' for name in names)
    (snapshot / "transformer" / INDEX).write_text(f'{{"weight_map": {{{index}}}}}')
    (snapshot / "tokenizer").mkdir()
    for name, content in TOKENIZER.items():
        (snapshot / "tokenizer" / name).write_bytes(content)
    (repo / "blobs").mkdir(exist_ok=True)
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = repo / "blobs" / digest(path.read_bytes(), large=path.suffix == ".safetensors")
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


@pytest.fixture
def snapshot(repo: Path) -> Path:
    return write_snapshot(repo, COMMIT, 2)


def registry(*snapshots: Path) -> list[Part]:
    """Return a registry of the tiny model; its hash is that of the first snapshot's files."""
    known = checkpoint.model_hash(sorted((snapshots[0] / "transformer").glob("*.safetensors")))
    return [
        Part("model", REPO, "transformer/*.safetensors", 1000, "a test", known),
        Part("tokenizer", REPO, "tokenizer/*", 1000, "a test"),
    ]


# --- links


def test_every_file_of_a_part_is_linked_and_found_there(snapshot: Path, environ: dict[str, str], here: Path) -> None:
    parts = registry(snapshot)
    done = links.link(environ, parts)
    assert {change.action for change in done} == {"linked"}
    assert {path.name for path in here.iterdir()} == {path.name for path in (snapshot / "transformer").iterdir()}
    for path in here.iterdir():
        assert path.is_symlink()
        assert path.samefile(snapshot / "transformer" / path.name)
    assert {path.name for path in (here.parent / "tokenizer").iterdir()} == set(TOKENIZER)
    assert [found.source for found in inventory.find_all(environ, parts=parts)] == ["models folder"] * 2
    assert links.link(environ, parts) == []


def test_without_anything_in_a_cache_nothing_is_written(environ: dict[str, str], here: Path, tmp_path: Path) -> None:
    assert links.link(environ, [Part("model", REPO, "transformer/*.safetensors", 1, "a test", "0")]) == []
    assert list(tmp_path.iterdir()) == []


def test_the_newest_complete_snapshot_wins_and_old_names_go(
    snapshot: Path, repo: Path, environ: dict[str, str], here: Path
) -> None:
    links.link(environ, registry(snapshot))
    newer = write_snapshot(repo, NEWER, 3)
    os.utime(newer, (2_000_000_000, 2_000_000_000))
    parts = registry(newer)
    done = links.link(environ, parts)
    assert {path.name for path in here.glob("*.safetensors")} == {
        f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)
    }
    assert sorted(change.path.name for change in done if change.action == "removed") == [
        f"model-{n:05}-of-00002.safetensors" for n in (1, 2)
    ]
    assert all(NEWER in os.readlink(path) for path in here.iterdir())
    # A newer one that lacks a shard is not taken.
    (newer / "transformer" / "model-00002-of-00003.safetensors").unlink()
    links.link(environ, registry(snapshot))
    assert all(COMMIT in os.readlink(path) for path in here.iterdir())


def test_links_to_nothing_are_repaired(snapshot: Path, environ: dict[str, str], here: Path) -> None:
    parts = registry(snapshot)
    links.link(environ, parts)
    path = here / "model-00001-of-00002.safetensors"
    path.unlink()
    path.symlink_to("/nowhere/at/all")
    (done,) = links.link(environ, parts)
    assert (done.path, done.action) == (path, "repaired")
    assert path.samefile(snapshot / "transformer" / path.name)


def test_files_and_links_of_the_user_are_left_alone(
    snapshot: Path, environ: dict[str, str], here: Path, tmp_path: Path
) -> None:
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "config.json").write_text("mine")
    here.mkdir(parents=True)
    (here / "model-00001-of-00002.safetensors").write_text("mine")
    (here / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "drive" / "config.json")
    (here / "notes.txt").write_text("mine")
    done = links.link(environ, registry(snapshot)[:1])
    assert [(change.path.name, change.action) for change in done] == [
        ("model-00001-of-00002.safetensors", "kept"),
        ("model-00002-of-00002.safetensors", "kept"),
        (INDEX, "linked"),
    ]
    assert (here / "model-00001-of-00002.safetensors").read_text() == "mine"
    assert (here / "model-00002-of-00002.safetensors").read_text() == "mine"
    assert (here / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_a_link_of_the_user_is_left_alone(
    snapshot: Path, environ: dict[str, str], here: Path, tmp_path: Path
) -> None:
    (tmp_path / "drive").mkdir()
    here.parent.parent.mkdir(parents=True)
    here.parent.symlink_to(tmp_path / "drive")
    assert {change.action for change in links.link(environ, registry(snapshot))} == {"kept"}
    assert list((tmp_path / "drive").iterdir()) == []


def refuse(*_: object) -> None:
    """What Windows answers without developer mode."""
    raise OSError(22, "A required privilege is not held by the client")


def test_without_symbolic_links_hard_links_stand_in(snapshot: Path, environ: dict[str, str], here: Path) -> None:
    parts = registry(snapshot)
    assert {change.action for change in links.link(environ, parts, refuse)} == {"linked"}
    for path in here.iterdir():
        assert not path.is_symlink()
        assert path.samefile(snapshot / "transformer" / path.name)
    assert links.link(environ, parts, refuse) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system, which Linux has there")
def test_without_any_links_it_is_said_and_files_are_used_where_they_lie(
    snapshot: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("both folders lie on one file system")
        environ["DIFFSYNTH_MODEL_BASE_PATH"] = other
        done = links.link(environ, registry(snapshot), refuse)
        assert {change.action for change in done} == {"impossible"}
        assert "used where it lies" in str(done[0].reason)
        assert [found.source for found in inventory.find_all(environ, parts=registry(snapshot))] == [
            "Hugging Face cache"
        ] * 2


# --- verify


def verdicts(environ: dict[str, str], parts: list[Part]) -> list[Verdict]:
    return [event for event in verify(environ, parts=parts) if isinstance(event, Verdict)]


def test_whole_weights_are_proven_by_the_hubs_digests(snapshot: Path, environ: dict[str, str]) -> None:
    events = list(verify(environ, parts=registry(snapshot)))
    assert sum(isinstance(event, Reading) for event in events) == 2 + len(TOKENIZER)
    for verdict in verdicts(environ, registry(snapshot)):
        assert (verdict.state, verdict.problems, verdict.unproven) == ("whole", (), ())


def test_one_wrong_byte_is_found_and_the_file_makes_room(snapshot: Path, environ: dict[str, str]) -> None:
    """A header, a length and shapes that are right: only reading everything tells."""
    parts = registry(snapshot)
    links.link(environ, parts)
    path = snapshot / "transformer" / "model-00002-of-00002.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert inventory.find_all(environ, parts=parts)[0].present
    model, tokenizer = verdicts(environ, parts)
    assert (model.state, tokenizer.state) == ("broken", "whole")
    assert [file.name for file in model.broken] == [path.name]
    assert "holds something else than the hub gave" in str(model.problems[0])
    assert download.drop(model.broken) == (list(model.broken), [])
    found = inventory.find_all(environ, parts=parts)[0]
    assert not found.present
    assert "link to nothing" in str(found.problems[0])


def test_a_missing_part_and_one_that_is_cut_short(snapshot: Path, environ: dict[str, str]) -> None:
    part = registry(snapshot)[0]
    missing = Part("other", "owner/other", "*.safetensors", 1, "a test", "0")
    os.truncate(snapshot / "transformer" / "model-00001-of-00002.safetensors", 100)
    cut, absent = verdicts(environ, [part, missing])
    assert (cut.state, absent.state, absent.problems) == ("broken", "missing", ())
    assert "cut short" in str(cut.problems[0])


def test_files_of_the_user_are_never_removed(snapshot: Path, environ: dict[str, str], here: Path) -> None:
    parts = registry(snapshot)
    here.mkdir(parents=True)
    for path in (snapshot / "transformer").iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    (model, _) = verdicts(environ, parts)
    assert model.state == "whole"
    assert model.found.source == "models folder"
    assert len(model.unproven) == 2  # no digest lies beside them
    path = here / "model-00001-of-00002.safetensors"
    note = here.parent / ".cache" / "huggingface" / "download" / "transformer" / f"{path.name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n1700000000.0\n")
    assert len(verdicts(environ, parts)[0].unproven) == 1
    note.write_text(f"{COMMIT}\n{'0' * 64}\n1700000000.0\n")
    (model, _) = verdicts(environ, parts)
    assert model.broken == (path,)
    assert download.drop(model.broken) == ([], [path])
    assert path.is_file()


def test_digests_come_from_where_huggingface_hub_writes_them(tmp_path: Path) -> None:
    from huggingface_hub._local_folder import write_download_metadata

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "a.safetensors").write_bytes(b"x")
    write_download_metadata(tmp_path, "transformer/a.safetensors", COMMIT, "a" * 64)
    assert known_digest(tmp_path / "transformer" / "a.safetensors") == "a" * 64
    assert known_digest(tmp_path / "transformer" / "b.safetensors") == ""
