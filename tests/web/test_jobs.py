"""Jobs: they go on without their client, are asked about by an id, and are gone after a time."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from core.events import Result
from core.request import ControlNet, Preprocess, Upscale
from engine import Engine, Settings
from tests.helpers.api_server import api_server, wait_until_idle, waiting
from tests.helpers.serving import ROOT, server
from web import jobs
from web.api_keys import ApiKeys
from web.kept_files import KeptFiles

GOLD = ROOT / "weights" / "mini" / "loras" / "gold.safetensors"
PROMPT = "a fox on a black background"
LONG: dict[str, Any] = {"mode": "generate", "prompt": PROMPT, "model": "base", "steps": 100}
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server().url}v1", timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def small(engine: Engine) -> Engine:
    """An engine where one request may wait, with the worker that every test shares."""
    return Engine(Settings(weights="mini", device="cpu", queue_limit=1), engine.worker)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((64, 48)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def sent(client: httpx.Client, fields: Facts, **files: Path) -> Facts:
    """Send a job, as a form where there are files."""
    if files:
        parts = {name: (path.name, path.read_bytes()) for name, path in files.items()}
        answer = client.post("/jobs", data=fields, files=parts)
    else:
        answer = client.post("/jobs", json=fields)
    assert answer.status_code == 202, answer.text
    facts: Facts = answer.json()
    assert answer.headers["location"].endswith(f"/v1/jobs/{facts['id']}")
    return facts


def wait_for(client: httpx.Client, job: Facts, reached: Callable[[Facts], object]) -> Facts:
    deadline = time.monotonic() + 120
    while True:
        facts: Facts = client.get(f"/jobs/{job['id']}").json()
        if reached(facts):
            return facts
        assert time.monotonic() < deadline, facts
        assert facts["state"] in ("queued", "running"), facts
        time.sleep(0.02)


def done(client: httpx.Client, job: Facts) -> tuple[Facts, list[bytes]]:
    """Return a job that is done, and its files."""
    facts = wait_for(client, job, lambda facts: facts["state"] == "done")
    return facts, [httpx.get(file["url"]).content for file in facts["files"]]


def test_every_mode_gives_the_file_that_it_gives_elsewhere(
    client: httpx.Client, engine: Engine, draw: Callable[..., Result], photo: Path
) -> None:
    facts, (png, sidecar) = done(client, sent(client, {"mode": "generate", "prompt": PROMPT, "seed": 7}))
    assert png == draw(prompt=PROMPT, seed=7).png
    assert (facts["seed"], facts["parameters"], facts["error"]) == (7, json.loads(sidecar), None)
    assert [file["name"] for file in facts["files"]] == ["z-image-7.png", "z-image-7.json"]
    assert facts["expires"] - facts["created"] >= 3600

    given = {"prompt": PROMPT, "preprocessor": "gray", "seed": 7}
    _, (png, _) = done(client, sent(client, {"mode": "controlnet", **given}, image=photo))
    assert png == engine.draw(ControlNet.parse(image=str(photo), **given)).png
    _, (png, _) = done(client, sent(client, {"mode": "upscale", "upscaler": "fast", "seed": 7}, image=photo))
    assert png == engine.draw(Upscale.parse(image=str(photo), upscaler="fast", seed=7)).png

    url = f"data:image/png;name=photo.png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    facts, (png,) = done(client, sent(client, {"mode": "preprocess", "preprocessor": "gray", "image": url}))
    control = engine.control_image(Preprocess.parse(image=str(photo), preprocessor="gray"))
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.tobytes() == control.image.tobytes()
    assert (facts["parameters"], facts["seed"]) == ({"digest": control.digest}, None)


def test_a_lora_comes_as_a_file(client: httpx.Client, draw: Callable[..., Result]) -> None:
    fields = {"prompt": PROMPT, "seed": 7, "lora_strength": 1, "steps": 2}
    _, (png, _) = done(client, sent(client, {"mode": "generate", **fields}, lora=GOLD))
    assert png == draw(**fields, lora=str(GOLD)).png
    refused = client.post("/jobs", json={"mode": "generate", "prompt": PROMPT, "lora": str(GOLD)})
    assert "a file that comes with the request" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({}, "mode", "mode: None is not possible; allowed: generate, controlnet, upscale, preprocess"),
        ({"mode": ["generate"]}, "mode", "allowed: generate, "),
        ({"mode": "generate"}, "prompt", "prompt: None is not possible"),
        ({"mode": "generate", "prompt": PROMPT, "n": 2}, "n", "only the fields prompt, model"),
        ({"mode": "generate", "prompt": PROMPT, "width": 200}, "width", "the nearest is"),
        ({"mode": "generate", "prompt": PROMPT, "image": "data:;base64,"}, "image", "'image.bin' is not possible"),
        ({"mode": "upscale", "image": "/etc/hostname"}, "image", "a file that comes with the request"),
        ({"mode": "preprocess", "image": "data:image/png;base64,AAAA"}, "image", "a picture file"),
        ({"mode": "generate", "prompt": PROMPT, "checkpoint": "/etc/hostname"}, "checkpoint", "is not possible"),
    ],
)
def test_what_is_not_possible_is_refused_at_once(
    client: httpx.Client, fields: Facts, param: str, sentence: str
) -> None:
    answer = client.post("/jobs", json=fields)
    if fields.get("mode") == "preprocess":  # the picture is looked at while the job runs
        facts = wait_for(client, answer.json(), lambda facts: facts["state"] == "failed")
        assert (facts["error"]["param"], facts["files"]) == (param, [])
        assert sentence in facts["error"]["message"]
        return
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert sentence in answer.json()["error"]["message"]


def test_a_job_tells_how_far_it_is_and_stops_within_a_step(client: httpx.Client) -> None:
    running, queued = sent(client, LONG), sent(client, LONG)
    facts = wait_for(client, running, lambda facts: facts["seconds_left"] is not None and facts["preview"])
    assert (facts["state"], facts["stage"], facts["total"]) == ("running", "denoising", 100)
    assert 0 < facts["step"] < 100
    with Image.open(io.BytesIO(base64.b64decode(facts["preview"].partition(",")[2]))) as picture:
        assert picture.format == "JPEG"
    assert wait_for(client, queued, lambda facts: facts["place"])["place"] == 1
    listed = [facts["id"] for facts in client.get("/jobs").json()["data"]]
    assert listed[:2] == [queued["id"], running["id"]]

    assert client.delete(f"/jobs/{running['id']}").json()["state"] == "cancelled"
    wait_for(client, queued, lambda facts: facts["state"] == "running")  # long before a hundred steps
    assert client.delete(f"/jobs/{queued['id']}").json()["state"] == "cancelled"
    facts = client.get(f"/jobs/{queued['id']}").json()
    assert (facts["state"], facts["step"], facts["preview"], facts["files"]) == ("cancelled", None, None, [])


def test_a_client_that_goes_ends_its_own_run_and_no_job(client: httpx.Client) -> None:
    address = f"{server().url}v1"
    with httpx.Client(base_url=address) as gone:
        first = sent(gone, LONG)
    wait_for(client, first, lambda facts: facts["step"])  # though who sent it has gone
    fields = {"prompt": PROMPT, "model": "base", "num_inference_steps": 100, "stream": True}
    with httpx.stream("POST", f"{address}/images/generations", json=fields, timeout=60) as waits:
        lines = waits.iter_lines()  # held: the connection closes with it
        assert next(lines) == ": 1 before this one"
        second = sent(client, LONG)
        wait_for(client, second, lambda facts: facts["place"] == 2)
    wait_for(client, second, lambda facts: facts["place"] == 1)  # the place in between was freed
    client.delete(f"/jobs/{second['id']}")
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as other:
        stream = other.images.generate(
            prompt=PROMPT, model="base", stream=True, partial_images=3, extra_body={"num_inference_steps": 100}
        )
        third = sent(client, LONG)
        wait_for(client, third, lambda facts: facts["place"] == 2)
        client.delete(f"/jobs/{first['id']}")
        events = iter(stream)
        assert next(events).type == "image_generation.partial_image"
        stream.close()
        wait_for(client, third, lambda facts: facts["state"] == "running")
        client.delete(f"/jobs/{third['id']}")


def test_a_job_that_is_removed_expired_or_lost_is_not_there(
    client: httpx.Client, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api_server(small) as address, httpx.Client(base_url=address, timeout=60) as here:
        fields = {"mode": "generate", "prompt": PROMPT, "steps": 1}
        first, second = (done(here, sent(here, fields))[0] for _ in range(2))
        assert here.delete(f"/jobs/{first['id']}").status_code == 200
        monkeypatch.setattr(jobs, "MOST_ENDED", 0)  # as when many have ended since
        for facts in (first, second):
            answer = here.get(f"/jobs/{facts['id']}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
            assert "then expires" in answer.json()["error"]["message"]
            assert [httpx.get(file["url"]).status_code for file in facts["files"]] == [404, 404]
        assert here.get("/jobs/nothing").status_code == here.delete("/jobs/nothing").status_code == 404
        lost = client.get(f"/jobs/{first['id']}")  # another start of the server
        assert (lost.status_code, lost.json()["error"]["code"]) == (410, "job_lost")
        assert "started again" in lost.json()["error"]["message"]


def test_jobs_that_nobody_asks_about_are_forgotten_too(engine: Engine, tmp_path: Path) -> None:
    made = jobs.Jobs(engine, KeptFiles(str(tmp_path)))
    facts = jobs.JobFacts(id="job", mode="generate", state="queued", created=0)
    made._jobs["job"] = job = jobs.Job("client", None, facts)
    made.check_room("client")
    assert made._jobs
    job.end("done", expires=time.time() - 1)
    made.check_room("client")
    assert not made._jobs


def test_a_job_is_seen_by_its_own_key_alone(small: Engine) -> None:
    keys = ApiKeys(["first-key", "other-key"])
    with api_server(small, keys) as address, httpx.Client(base_url=address, timeout=60) as mine:
        mine.headers["Authorization"] = "Bearer first-key"
        job = sent(mine, LONG)
        other = {"Authorization": "Bearer other-key"}
        assert mine.get(f"/jobs/{job['id']}", headers=other).status_code == 404
        assert mine.delete(f"/jobs/{job['id']}", headers=other).status_code == 404
        assert mine.get("/jobs", headers=other).json()["data"] == []
        assert [facts["id"] for facts in mine.get("/jobs").json()["data"]] == [job["id"]]
        mine.delete(f"/jobs/{job['id']}")
        wait_until_idle(small)
    with api_server(small) as address:  # where nothing tells callers apart
        assert httpx.get(f"{address}/jobs").json()["error"]["code"] == "not_listed"


def test_jobs_are_bounded_let_their_files_go_and_end_with_the_server(
    small: Engine, photo: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
        with api_server(small) as address, httpx.Client(base_url=address, timeout=60) as here:
            long = {"mode": "controlnet", "prompt": PROMPT, "steps": 100}
            running, _ = sent(here, long, image=photo), sent(here, long, image=photo)
            assert len(list((tmp_path / "uploads").rglob("photo.png"))) == 2
            answer = here.post("/jobs", json=LONG)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) > 0
            here.delete(f"/jobs/{running['id']}")
            while len(list((tmp_path / "uploads").rglob("photo.png"))) > 1:
                time.sleep(0.01)
    assert waiting(small) == 0
    assert not list((tmp_path / "uploads").iterdir())
