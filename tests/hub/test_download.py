"""Fetching weights: from a hub of our own on loopback, with everything that goes wrong on a line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import random
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.errors import DownloadError
from hub import checkpoint, download, inventory, links
from hub.download import Fetched, Planned, Progress
from hub.huggingface import HuggingFace
from hub.parts import Part, Repackaged
from tests.helpers.hub_server import COMMIT, Fault, Hub, digest
from tests.helpers.proxying import Proxy, running
from tests.helpers.sparse import write_sparse

if TYPE_CHECKING:
    from hub.modelscope import ModelScope

REPO = "owner/tiny-model"
SHARDS = [f"transformer/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
NAMES = {"transformer/config.json", "transformer/model.safetensors.index.json", *SHARDS}


def tensors(folder: Path, name: str, numbers: int) -> bytes:
    """Return a safetensors file of so many numbers that no two files are alike."""
    path = folder / "made.safetensors"
    write_sparse(path, {name: (numbers,)}, "F32")
    with path.open("r+b") as file:
        file.seek(checkpoint.read_header(path).data_start)
        file.write(random.Random(name).randbytes(4 * numbers))
    return path.read_bytes()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small repository with everything that the real ones have: shards, an index, a configuration, other folders."""
    folder = tmp_path_factory.mktemp("content")
    index = b'{"weight_map": {"a": "%s", "b": "%s"}}' % tuple(Path(name).name.encode() for name in SHARDS)
    return {
        "README.md": b"# not wanted",
        "transformer/config.json": b'{"layers": 2}',
        "transformer/model.safetensors.index.json": index,
        SHARDS[0]: tensors(folder, "a", 100_000),
        SHARDS[1]: tensors(folder, "b", 200_000),
        "assets/picture.png": b"not wanted",
        "single.pth": random.Random(1).randbytes(300_000),
        "large.pth": random.Random(2).randbytes(30_000_000),
    }


@pytest.fixture(scope="module")
def parts(content: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """A registry of that repository, in place of the real one."""
    folder = tmp_path_factory.mktemp("parts")
    for name in SHARDS:
        (folder / Path(name).name).write_bytes(content[name])
    size = sum(len(content[name]) for name in SHARDS)
    known = checkpoint.model_hash(sorted(folder.iterdir()))
    return {
        "model": Part("model", REPO, "transformer/*.safetensors", size, "a test", known),
        "single": Part("single", REPO, "single.pth", 300_000, "a test"),
    }


@pytest.fixture
def hub(content: dict[str, bytes]) -> Iterator[Hub]:
    running = Hub({REPO: content}).start()
    yield running
    running.stop()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "m"),
    }


@pytest.fixture
def client(hub: Hub, environ: dict[str, str]) -> HuggingFace:
    return HuggingFace(hub.url, Path(environ["HF_HUB_CACHE"]), "hf_secret")


@pytest.fixture
def found(parts: dict[str, Part], environ: dict[str, str]) -> Callable[[], list[inventory.Found]]:
    """What a look at this machine gives now."""
    return lambda: inventory.find_all(environ, parts=parts.values())


Look = Callable[[], list[inventory.Found]]


def run(
    parts: dict[str, Part], client: HuggingFace | ModelScope, *, free: Callable[[Path], int] | None = None
) -> list[download.TransferEvent]:
    return list(download.fetch(list(parts.values()), client, free=free))


def blob(client: HuggingFace, content: bytes) -> Path:
    return client.folder / "models--owner--tiny-model" / "blobs" / hashlib.sha256(content).hexdigest()


# --- what arrives


def test_everything_that_a_part_needs_arrives_and_is_found(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    assert not any(part.present for part in found())
    events = run(parts, client)
    plan = events[0]
    assert isinstance(plan, Planned)
    wanted = NAMES | {"single.pth"}
    assert (plan.files, plan.total, plan.left) == (5, *[sum(len(content[name]) for name in wanted)] * 2)
    fetched = {event.file.name: event.path for event in events if isinstance(event, Fetched)}
    assert fetched.keys() == wanted
    for name, path in fetched.items():
        assert path == client.folder / "models--owner--tiny-model" / "snapshots" / COMMIT / name
        assert path.read_bytes() == content[name]
    assert [part.source for part in found()] == ["Hugging Face cache"] * 2
    assert (client.folder / "models--owner--tiny-model" / "refs" / "main").read_text() == COMMIT


def test_progress_counts_every_byte_once_and_ends_at_all(client: HuggingFace, parts: dict[str, Part]) -> None:
    progress = [event for event in run(parts, client) if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert progress[0].done < progress[-1].done == progress[-1].total
    assert (progress[-1].files_done, progress[-1].files) == (5, 5)


def test_a_second_call_transfers_nothing(hub: Hub, client: HuggingFace, parts: dict[str, Part]) -> None:
    run(parts, client)
    gets = [path for way, path, _ in hub.requests if way == "GET" and not path.startswith("/api")]
    events = run(parts, client)
    assert isinstance(events[0], Planned)
    assert events[0].left == 0
    assert [path for way, path, _ in hub.requests if way == "GET" and not path.startswith("/api")] == gets


def test_other_programs_find_it_in_the_cache_without_a_network(
    client: HuggingFace, parts: dict[str, Part], hub: Hub
) -> None:
    from huggingface_hub import snapshot_download

    run(parts, client)
    seen = len(hub.requests)
    folder = Path(snapshot_download(REPO, cache_dir=client.folder, local_files_only=True, endpoint=hub.url))
    assert (folder / SHARDS[0]).is_file()
    assert len(hub.requests) == seen


def test_several_files_come_at_once(hub: Hub, client: HuggingFace, parts: dict[str, Part]) -> None:
    """With one file held up by the hub, the others arrive all the same."""
    hub.faults[SHARDS[0]] = Fault("slow")
    events = download.fetch([parts["model"]], client)
    fetched = []
    for event in events:
        if isinstance(event, Fetched):
            fetched.append(event.file.name)
        if len(fetched) == 3:
            break
    assert set(fetched) == NAMES - {SHARDS[0]}
    hub.stop_waiting()
    assert isinstance(events, Generator)
    events.close()


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, client: HuggingFace, parts: dict[str, Part]
) -> None:
    run(parts, client)
    assert {headers.get("authorization") for headers in hub.asked("GET", "/owner")} == {"Bearer hf_secret"}
    storage = hub.asked("GET", "/storage")
    assert len(storage) == 3
    assert not any("authorization" in headers for headers in storage)


def test_of_a_repackaged_part_one_file_is_fetched_found_and_linked(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], environ: dict[str, str]
) -> None:
    name, again = "split_files/all/whole.safetensors", "other/again"
    hub.repos = {REPO: content, again: {name: content[SHARDS[0]], "split_files/all/fp4.safetensors": b"not wanted"}}
    known = inventory.identity({"a": (100_000,)})
    part = dataclasses.replace(parts["model"], repackaged=Repackaged(again, name, 400_000, known))
    assert part.in_edition("official") is part
    events = list(download.fetch([part.in_edition("repackaged")], client))
    assert [event.file.name for event in events if isinstance(event, Fetched)] == [name]
    (there,) = inventory.find_all(environ, parts=[part])
    assert (there.edition, there.part, there.files[0].name) == ("repackaged", part, "whole.safetensors")
    (link,) = links.link(environ, [part])
    assert link.path == Path(environ["DIFFSYNTH_MODEL_BASE_PATH"]) / again / name
    assert links.link(environ, [part]) == []


def test_a_silent_line_is_told_so_that_whoever_reads_can_stop(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "HEARD", 0.01)
    hub.faults["single.pth"] = Fault("slow")
    events = download.fetch([parts["single"]], client)
    told = [next(events) for _ in range(4)]
    hub.stop_waiting()
    assert told[1:] == [Progress(0, 300_000, 0, 1)] * 3
    assert isinstance(events, Generator)
    events.close()


def test_a_speed_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    speed = download.Speed(lambda: now[0])
    assert (speed.per_second, speed.left(100)) == (0, None)
    for now[0], done in ((0, 0), (1, 900), (100, 1000), (120, 1200)):
        speed.see(done)
    assert (speed.per_second, speed.left(1300)) == (10, 10)
    speed.see(0)  # what was wrong is thrown away
    assert (speed.per_second, speed.left(1300)) == (0, None)


# --- what goes wrong on the line


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_gone_on_with(
    ranges: bool, hub: Hub, client: HuggingFace, content: dict[str, bytes]
) -> None:
    hub.ranges = ranges
    hub.faults["large.pth"] = Fault("cut", 1)
    run({"large": Part("large", REPO, "large.pth", 30_000_000, "a test")}, client)
    assert blob(client, content["large.pth"]).read_bytes() == content["large.pth"]
    asked = [headers["range"] for headers in hub.asked("GET", f"/storage/{REPO}/large.pth") if "range" in headers]
    assert asked == ["bytes=10485760-"]  # the library's blocks


def test_an_interrupted_download_is_gone_on_with_by_the_next_call(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    half = len(content["single.pth"]) // 2
    hub.faults["single.pth"] = Fault("short")
    with pytest.raises(DownloadError, match=r"sent another number of bytes .* goes on from there"):
        run({"single": parts["single"]}, client)
    partial = blob(client, content["single.pth"]).with_suffix(".incomplete")
    assert partial.read_bytes() == content["single.pth"][:half]
    assert not found()[1].present
    hub.faults.clear()
    events = run({"single": parts["single"]}, client)
    assert isinstance(events[0], Planned)
    assert events[0].left == len(content["single.pth"]) - half
    assert hub.asked("GET", "/storage")[-1]["range"] == f"bytes={half}-"
    assert found()[1].present
    assert not partial.exists()


def test_a_closed_generator_stops_and_keeps_what_arrived(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    events = download.fetch([parts["single"]], client)
    for event in events:
        if isinstance(event, Progress):
            break
    assert isinstance(events, Generator)
    events.close()
    kept = list((client.folder / "models--owner--tiny-model" / "blobs").iterdir())
    assert [path.read_bytes() == content["single.pth"][: path.stat().st_size] for path in kept] == [True]


def test_too_many_bytes_are_never_taken_for_the_file(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    hub.faults["single.pth"] = Fault("long")
    with pytest.raises(DownloadError, match="another number of bytes"):
        run({"single": parts["single"]}, client)
    assert not found()[1].present
    hub.faults.clear()
    run({"single": parts["single"]}, client)
    assert blob(client, content["single.pth"]).read_bytes() == content["single.pth"]


def test_other_content_of_the_right_length_is_fetched_anew_once(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    hub.faults["single.pth"] = Fault("wrong", 1)
    progress = [event for event in run({"single": parts["single"]}, client) if isinstance(event, Progress)]
    assert blob(client, content["single.pth"]).read_bytes() == content["single.pth"]
    assert progress[-1].done == progress[-1].total


def test_other_content_again_and_again_is_refused(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    hub.faults["single.pth"] = Fault("wrong")
    with pytest.raises(DownloadError, match="2 times with another content"):
        run({"single": parts["single"]}, client)
    assert not list((client.folder / "models--owner--tiny-model" / "blobs").iterdir())


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "RepoNotFound", "answers 401: .*HF_TOKEN"),
        (401, "", "answers 401: .*HF_TOKEN"),
        (403, "", "answers 403: .*HF_TOKEN"),
        (403, "GatedRepo", "accepted its terms.*HF_TOKEN"),
        (404, "RepoNotFound", "answers 404: .*HF_ENDPOINT"),
        (500, "", "answers 500; try again later"),
    ],
)
def test_refusals_say_what_to_do(
    status: int, code: str, sentence: str, hub: Hub, client: HuggingFace, parts: dict[str, Part]
) -> None:
    hub.refused[REPO] = (status, code)
    with pytest.raises(DownloadError, match=sentence) as raised:
        run(parts, client)
    assert f"{hub.url}/{REPO}" in str(raised.value)
    assert "hf_secret" not in str(raised.value)


def test_a_storage_that_refuses_is_told_with_its_status(hub: Hub, client: HuggingFace, parts: dict[str, Part]) -> None:
    hub.faults["single.pth"] = Fault(403)
    with pytest.raises(DownloadError, match="answers 403"):
        run({"single": parts["single"]}, client)


def test_a_repository_without_the_file_says_so(hub: Hub, client: HuggingFace) -> None:
    with pytest.raises(DownloadError, match=r"owner/tiny-model at http.* has no other/\*"):
        run({"x": Part("x", REPO, "other/*", 1, "a test")}, client)


def test_nobody_at_the_address(client: HuggingFace, hub: Hub, parts: dict[str, Part]) -> None:
    hub.stop()
    with pytest.raises(DownloadError, match=r"cannot be reached, .*HF_ENDPOINT may name a mirror"):
        run(parts, client)


# --- a hub that lies

ELSEWHERE = [  # names that lie in the folder as far as a path of POSIX is concerned, and lead out of it somewhere
    "transformer/..",
    "transformer/.. ",
    "transformer/..\\..\\..\\..\\evil",
    "transformer/C:evil",
    "transformer/C:\\evil",
    "transformer/model.safetensors:stream",
    "transformer/a\0b",
    "transformer/a\nb",
    "transformer/\ud800",
    "transformer/" + "n" * 300,
    "./transformer/x",
    "transformer//x",
]


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "mark",
    [
        '"../../../../evil"',
        '"/tmp/evil"',
        "../../../../evil",
        '"..\\..\\evil"',
        '"C:evil"',
        '"d41d8cd98f00b204e9800998ecf8427e"',  # an MD5, by which some storages call their files
        f'"{"0" * 64}-5"',
        f'"{"g" * 40}"',
        f'"{"٠" * 40}"'.encode().decode("latin-1"),
        '""',
        f'"{"a" * 4000}"',
    ],
)
@pytest.mark.parametrize("name", ["single.pth", "transformer/config.json"])
def test_an_etag_that_is_no_digest_is_refused_before_anything_is_written(
    mark: str, name: str, hub: Hub, client: HuggingFace, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.marks[name] = [mark]
    with pytest.raises(DownloadError, match=f"as the etag of {REPO}/{name}, where a hub answers 40 or 64") as raised:
        run(parts, client)
    assert str(raised.value).startswith(f"{hub.url} answers '")
    assert len(str(raised.value)) < 400
    assert str(raised.value).isascii()
    assert "HF_ENDPOINT" in str(raised.value)
    assert everything(tmp_path) == []


def test_a_digest_in_capitals_is_the_same_digest(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    hub.marks["single.pth"] = [f'"{digest(content["single.pth"], large=True).upper()}"']
    run({"single": parts["single"]}, client)
    assert blob(client, content["single.pth"]).read_bytes() == content["single.pth"]


def test_a_hub_that_answers_rightly_once_and_lies_then_leads_nowhere(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], tmp_path: Path
) -> None:
    right = f'"{digest(content["single.pth"], large=True)}"'
    hub.marks["single.pth"] = [right, '"../../../../evil"']
    (event,) = [event for event in run({"single": parts["single"]}, client) if isinstance(event, Fetched)]
    assert event.path.read_bytes() == content["single.pth"]
    assert not [name for name in everything(tmp_path) if "evil" in name]
    assert {path.split("/")[0] for path in everything(tmp_path)} == {"hub"}


@pytest.mark.parametrize(
    "commit", ["../../../evil", "..", "/tmp/evil", "main", "C:evil", "..\\evil", "a" * 39, "a" * 300]
)
def test_a_commit_that_is_none_is_refused_before_anything_is_written(
    commit: str, hub: Hub, client: HuggingFace, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.commit = commit
    with pytest.raises(DownloadError, match=f"as the commit of {REPO}, where a hub answers 40 or 64 hex digits"):
        run(parts, client)
    assert everything(tmp_path) == []


def test_a_commit_in_the_cache_is_not_taken_for_a_path(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], tmp_path: Path
) -> None:
    """Loose files of the wrong size are removed from the snapshot that `main` names."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "single.pth").write_bytes(b"mine")
    refs = client.folder / "models--owner--tiny-model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("../../../victim")
    (client.folder / "models--owner--tiny-model" / "snapshots").mkdir()
    run({"single": parts["single"]}, client)
    assert (tmp_path / "victim" / "single.pth").read_bytes() == b"mine"
    assert (refs / "main").read_text() == COMMIT


@pytest.mark.parametrize("name", ELSEWHERE, ids=range(len(ELSEWHERE)))
def test_a_file_name_that_leads_elsewhere_is_refused_before_anything_is_written(
    name: str, hub: Hub, client: HuggingFace, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.listed = [name]
    with pytest.raises(DownloadError, match=f"lists a file of {REPO} by the name '.*, which might lead out") as raised:
        run(parts, client)
    assert len(str(raised.value)) < 400
    assert str(raised.value).isascii()
    assert everything(tmp_path) == []


def test_names_outside_of_the_parts_folder_are_not_fetched(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.listed = ["../evil", "/evil", "transformer/../evil", "transformer/../../evil", "/transformer/evil", "\\evil"]
    run(parts, client)
    assert not [name for name in everything(tmp_path) if "evil" in name]
    assert not [path for _, path, _ in hub.requests if "evil" in path]


def test_where_the_commit_cannot_be_noted_it_is_told(
    client: HuggingFace, parts: dict[str, Part], tmp_path: Path
) -> None:
    refs = client.folder / "models--owner--tiny-model" / "refs"
    refs.parent.mkdir(parents=True)
    refs.mkdir()
    (refs / "main").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="is full: make room and try again"):
        run({"single": parts["single"]}, client)


def test_a_disk_that_fills_up_meanwhile_is_told_and_the_next_call_goes_on(
    client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    partial = blob(client, content["single.pth"]).with_suffix(".incomplete")
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="is full: make room and try again"):
        run({"single": parts["single"]}, client)
    partial.unlink()
    run({"single": parts["single"]}, client)
    assert blob(client, content["single.pth"]).read_bytes() == content["single.pth"]


# --- what is on the disk already


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes]
) -> None:
    with pytest.raises(DownloadError, match="has 500 MB free, and 2 MB are still to come: make room"):
        run(parts, client, free=lambda _: download.ROOM)
    assert not hub.asked("GET", "/storage")
    # What is there already needs no room.
    run(parts, client, free=lambda _: 10**12)
    run(parts, client, free=lambda _: 0)


def test_the_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert download.disk_free(tmp_path / "a" / "b") > 0


def test_a_file_that_was_cut_short_in_the_cache_is_gone_on_with(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    run(parts, client)
    os.truncate(blob(client, content[SHARDS[1]]), 100_000)
    assert "cut short" in str(found()[0].problems[0])
    seen = len(hub.asked("GET", "/storage"))
    run(parts, client)
    (asked,) = hub.asked("GET", "/storage")[seen:]
    assert asked["range"] == "bytes=100000-"
    assert all(part.present for part in found())


def test_a_link_to_nothing_in_the_cache_is_mended(
    client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    run(parts, client)
    blob(client, content[SHARDS[0]]).unlink()
    assert "link to nothing" in str(found()[0].problems[0])
    run(parts, client)
    assert all(part.present for part in found())


def test_a_cache_without_links_is_taken_as_it_is(
    hub: Hub, client: HuggingFace, parts: dict[str, Part], content: dict[str, bytes], found: Look
) -> None:
    """On Windows huggingface_hub puts the files themselves into snapshots."""
    run(parts, client)
    snapshot = client.folder / "models--owner--tiny-model" / "snapshots" / COMMIT
    for path in (snapshot / SHARDS[0], snapshot / SHARDS[1]):
        target = path.resolve()
        path.unlink()
        target.rename(path)
    os.truncate(snapshot / SHARDS[1], 1000)
    seen = len(hub.asked("GET", "/storage"))
    run(parts, client)
    assert len(hub.asked("GET", "/storage")) == seen + 1  # the whole shard is not fetched again
    assert all(part.present for part in found())


def test_small_files_are_checked_by_gits_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"Hello, World!")
    assert checkpoint.digest_of(tmp_path / "a", "0" * 40) == "b45ef6fec89518d314f546fd6c3025367b721684"
    assert checkpoint.digest_of(tmp_path / "a", "0" * 64) == digest(b"Hello, World!", large=True)
    assert checkpoint.digest_of(tmp_path / "a", "strange-etag") is None


# --- ModelScope


@pytest.fixture
def modelscope(hub: Hub, environ: dict[str, str]) -> ModelScope:
    """The other hub, which calls the repository by another owner's name."""
    from modelscope_hub import HubConfig

    from hub.modelscope import ModelScope

    hub.repos = {"other/tiny-model": hub.repos[REPO]}
    home = Path(environ["HOME"])
    return ModelScope(HubConfig(endpoint=hub.url, cache_dir=home / ".cache" / "modelscope", config_dir=home / "c"))


def elsewhere(part: Part) -> Part:
    return dataclasses.replace(part, also=("other/tiny-model",))


def test_modelscope_fills_its_own_cache_and_is_found(
    hub: Hub, modelscope: ModelScope, parts: dict[str, Part], content: dict[str, bytes], environ: dict[str, str]
) -> None:
    wanted = {name: elsewhere(part) for name, part in parts.items()}
    hub.faults[SHARDS[0]] = Fault("cut", 1)
    events = run(wanted, modelscope)
    assert {event.file.name for event in events if isinstance(event, Fetched)} == NAMES | {"single.pth"}
    assert isinstance(events[-1], Progress)
    assert events[-1].done == events[-1].total
    assert all(event.path.read_bytes() == content[event.file.name] for event in events if isinstance(event, Fetched))
    found = inventory.find_all(environ, parts=wanted.values())
    assert [part.source for part in found] == ["ModelScope cache"] * 2
    plan = run(wanted, modelscope)[0]
    assert isinstance(plan, Planned)
    assert plan.left == 0


def test_modelscope_without_the_repository_says_what_else_there_is(
    modelscope: ModelScope, parts: dict[str, Part]
) -> None:
    with pytest.raises(DownloadError, match="is not there; leave out `--hub modelscope`"):
        run(parts, modelscope)


@pytest.mark.parametrize("name", ELSEWHERE[:4], ids=range(4))
def test_modelscopes_names_are_checked_too(
    name: str, hub: Hub, modelscope: ModelScope, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.listed = [name]
    with pytest.raises(DownloadError, match=r"lists a file of other/tiny-model by the name .*MODELSCOPE_ENDPOINT"):
        run({"model": elsewhere(parts["model"])}, modelscope)
    assert not [made for made in everything(tmp_path) if "tiny-model" in made or "evil" in made]


def test_modelscopes_digests_are_checked_too(
    hub: Hub, modelscope: ModelScope, parts: dict[str, Part], tmp_path: Path
) -> None:
    hub.marks["single.pth"] = ["../../evil"]
    with pytest.raises(DownloadError, match=r"answers '\.\./\.\./evil' as the SHA-256 of other/tiny-model/single.pth"):
        run({"single": elsewhere(parts["single"])}, modelscope)
    hub.marks["single.pth"] = [""]
    run({"single": elsewhere(parts["single"])}, modelscope)  # without one, there is its size to go by


# --- proxies


@pytest.fixture
def set_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Let the environment name one proxy alone."""
    from huggingface_hub import close_session

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    close_session()  # the library keeps its client
    yield monkeypatch.setenv
    close_session()


@pytest.fixture(params=["huggingface", "modelscope"])
def far(request: pytest.FixtureRequest, client: HuggingFace, modelscope: ModelScope) -> HuggingFace | ModelScope:
    """A hub with a name that only a proxy knows."""
    from modelscope_hub import HubConfig

    from hub.modelscope import ModelScope

    if request.param == "huggingface":
        return HuggingFace("http://hub.invalid", client.folder)
    return ModelScope(
        HubConfig(
            endpoint="http://hub.invalid", cache_dir=modelscope.folder, config_dir=modelscope.folder.with_name("c")
        )
    )


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_weights_come_by_way_of_a_proxy(
    name: str, far: HuggingFace | ModelScope, hub: Hub, parts: dict[str, Part], set_proxy: Callable[[str, str], None]
) -> None:
    hub.repos = {**hub.repos, REPO: hub.repos["other/tiny-model"]}
    with running(Proxy(hub.port)) as proxy:
        set_proxy(name, proxy.url)
        run({"single": elsewhere(parts["single"])}, far)
    assert proxy.asked
    assert all("://" in address for address in proxy.asked)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("socks5://ann:secret@127.0.0.1:9", "ALL_PROXY names a SOCKS proxy, for which the package {} is missing: run"),
        ("socks5h://127.0.0.1:9", "ALL_PROXY names a SOCKS proxy, for which the package {} is missing: run"),
        ("foo://ann:secret@127.0.0.1", "ALL_PROXY names no proxy that can be asked"),
        ("http://ann:secret@127.0.0.1:port", "ALL_PROXY names no proxy that can be asked"),
        ("http://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    address: str,
    told: str,
    far: HuggingFace | ModelScope,
    parts: dict[str, Part],
    set_proxy: Callable[[str, str], None],
) -> None:
    package = "socksio" if isinstance(far, HuggingFace) else "PySocks"
    if "socks" in address and importlib.util.find_spec({"socksio": "socksio", "PySocks": "socks"}[package]):
        pytest.skip("this machine has what SOCKS proxies need")
    set_proxy("ALL_PROXY", address)
    with pytest.raises(DownloadError, match=told.format(package)) as refused:
        run({"single": elsewhere(parts["single"])}, far)
    assert "secret" not in str(refused.value)
