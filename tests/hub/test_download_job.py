"""A server's download: paused, cut off, gone on with after a restart, given up; against a hub on loopback."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub import inventory
from hub.download_job import DownloadJob, Order
from hub.huggingface import HuggingFace
from hub.parts import PARTS, Part
from tests.helpers.hub_server import Fault, Hub

REPO, FILE = "owner/tiny-model", "single.pth"
CONTENT = random.Random(1).randbytes(300_000)
ORDER = Order(("depth",))


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub({REPO: {FILE: CONTENT}}).start()
    yield running
    running.stop()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job is kept, on a machine of its own whose hub has one small part."""
    for name, folder in (("HF_HUB_CACHE", "hub"), ("DIFFSYNTH_MODEL_BASE_PATH", "models"), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setitem(PARTS, "depth", Part("depth", REPO, FILE, len(CONTENT), "a test"))
    return tmp_path / "models" / "download.json"


Start = Callable[[], DownloadJob]


@pytest.fixture
def start(hub: Hub, file: Path) -> Start:
    """A server's start: a new job, which knows of the last only what was kept."""

    def start() -> DownloadJob:
        job = DownloadJob(connect=lambda name: HuggingFace(hub.url, file.parent.parent / "hub"))
        job.restore()
        return job

    return start


def is_here() -> bool:
    return inventory.find_all(parts=[PARTS["depth"]])[0].present


def wait_for_transfer(hub: Hub, job: DownloadJob) -> None:
    while not hub.asked("GET", "/storage"):
        assert job.look().state == "running", job.look().error
        time.sleep(0.01)


def test_what_is_fetched_is_found_linked_and_forgotten(start: Start, file: Path) -> None:
    job = start()
    assert job.look().state == "idle"
    job.begin(ORDER)
    end = job.wait()
    assert (end.state, end.finished) == ("done", 1), end.error
    assert end.progress is not None
    assert end.progress.done == end.progress.total == len(CONTENT)
    assert is_here()
    assert (file.parent / REPO / FILE).read_bytes() == CONTENT
    assert not file.exists()
    assert start().look().state == "idle"
    job.begin(ORDER)  # there is nothing to fetch
    assert job.wait().state == "done"


def test_a_pause_outlives_the_server(start: Start, hub: Hub) -> None:
    hub.faults[FILE] = Fault("slow")
    job = start()
    job.begin(ORDER)
    wait_for_transfer(hub, job)
    job.pause()
    assert job.look().state == "paused"
    later = start()
    assert (later.look().state, later.look().order) == ("paused", ORDER)
    hub.stop_waiting()
    later.go_on()
    assert later.wait().state == "done", later.look().error
    job.wait()
    assert job.look().state == "paused"  # the stopped thread changes nothing any more
    assert is_here()


def test_a_server_that_was_stopped_goes_on_by_itself(start: Start, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"parts": ["depth"], "edition": "official", "hub": "huggingface", "paused": False}))
    assert start().wait().state == "done"
    assert is_here()


def test_after_a_cut_it_goes_on_by_itself_as_long_as_something_arrives(start: Start, hub: Hub) -> None:
    hub.faults[FILE] = Fault("short", 2)
    job = start()
    job.begin(ORDER)
    assert job.wait().state == "done", job.look().error
    ranges = [headers["range"] for headers in hub.asked("GET", "/storage") if "range" in headers]
    assert ranges == ["bytes=150000-", "bytes=225000-"]


def test_a_failure_says_why_and_can_be_gone_on_with(start: Start, hub: Hub, file: Path) -> None:
    hub.refused[REPO] = (403, "GatedRepo")
    job = start()
    job.begin(ORDER)
    end = job.wait()
    assert end.state == "failed"
    assert "accepted its terms" in str(end.error)
    assert file.exists()  # the server's next start tries again
    hub.refused.clear()
    job.go_on()
    end = job.wait()
    assert (end.state, end.error) == ("done", None)


def test_what_is_given_up_is_not_gone_on_with(start: Start, hub: Hub, file: Path) -> None:
    hub.faults[FILE] = Fault("slow")
    job = start()
    job.begin(ORDER)
    wait_for_transfer(hub, job)
    job.cancel()
    hub.stop_waiting()
    assert (job.wait().state, job.look().order, file.exists()) == ("idle", None, False)
    assert not is_here()


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "[]",
        '{"parts": ["nix"], "edition": "official", "hub": "huggingface", "paused": false}',
        '{"parts": [], "edition": "official", "hub": "huggingface", "paused": false}',
        '{"parts": [["depth"]], "edition": "official", "hub": "huggingface", "paused": false}',
        '{"parts": ["depth"], "edition": {}, "hub": "huggingface", "paused": false}',
        '{"parts": ["depth"], "edition": "official", "hub": "evil", "paused": false}',
        '{"parts": ["depth"], "edition": "official"}' + " " * 20_000,
    ],
)
def test_a_damaged_file_means_nothing(kept: str, start: Start, hub: Hub, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(kept)
    assert start().look().state == "idle"
    assert hub.requests == []
