"""The panel "Get the real model": who may see and steer it, and the way from the miniature to the real model."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from starlette.requests import Request

from hub.download_job import DownloadJob
from tests.helpers import small_models
from tests.helpers.accessibility import violations
from tests.helpers.browsing import (
    LAPTOP,
    PATIENCE,
    PHONE,
    PROMPT,
    finished,
    generate,
    picture_bytes,
    set_steps,
    settled,
    shoot,
    write,
)
from tests.helpers.hub_server import Fault, Hub
from tests.helpers.serving import Server, server
from web import server as web_server
from web.real_model import Manager, is_local

REPO = "Tongyi-MAI/Z-Image-Turbo"
ELSEWHERE = {"X-Forwarded-For": "203.0.113.5"}


def visitor(client: str = "127.0.0.1", **headers: str) -> gr.Request:
    sent = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    return gr.Request(Request({"type": "http", "method": "POST", "path": "/", "client": (client, 1), "headers": raw}))


@pytest.mark.parametrize(
    "asks",
    [
        visitor(),
        visitor("127.0.0.3", host="localhost:7860", origin="http://localhost:7860"),
        visitor("::1", host="[::1]:7860"),
        visitor(host="studio.localhost:7860"),
    ],
)
def test_who_sits_at_the_machine_is_local(asks: gr.Request) -> None:
    assert is_local(asks)


@pytest.mark.parametrize(
    "asks",
    [
        visitor("192.168.0.7"),
        visitor("192.168.0.7", x_forwarded_for="127.0.0.1"),
        visitor(x_forwarded_for="127.0.0.1"),
        visitor(x_real_ip="127.0.0.1"),
        visitor(forwarded="for=127.0.0.1"),
        visitor(via="1.1 proxy"),
        visitor(host="studio.example"),
        visitor(host="192.168.0.2:7860"),
        visitor(origin="http://evil.example"),
        visitor(origin="http://127.0.0.1:9999"),
        visitor(origin="null"),
        visitor(host=""),
    ],
)
def test_whoever_may_be_elsewhere_is_not(asks: gr.Request, tmp_path: Path) -> None:
    assert not is_local(asks)
    assert not Manager(DownloadJob(tmp_path / "x")).may(asks)
    assert Manager(DownloadJob(tmp_path / "x"), everybody=True).may(asks)


def test_only_a_server_for_this_machine_offers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = web_server.is_for_this_machine
    assert offers("127.0.0.1", [])
    assert not offers("0.0.0.0", [])
    assert not offers("127.0.0.1", ["studio.example"])
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/studio")
    assert not offers("127.0.0.1", [])
    monkeypatch.delenv("GRADIO_ROOT_PATH")
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert not offers("127.0.0.1", [])


# --- its listeners


def asked(url: str, path: str, body: dict[str, Any] | None = None) -> str:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **ELSEWHERE})
    with urllib.request.urlopen(request, timeout=PATIENCE / 1000) as answer:
        text: str = answer.read().decode()
        return text


def test_every_listener_is_private_and_refuses_whoever_is_elsewhere() -> None:
    url = server().url
    config = json.loads(asked(url, "config"))
    marks = {"facts", "progress"}
    ours = {part["id"] for part in config["components"] if marks & set(part["props"].get("elem_classes") or [])}
    assert len(ours) >= 2
    listeners = [each for each in config["dependencies"] if ours & set(each["outputs"])]
    assert len(listeners) == 8
    for listener in listeners:
        assert listener["api_visibility"] == "private"
        session = f"elsewhere-{listener['id']}"
        data = {"data": [None] * len(listener["inputs"]), "fn_index": listener["id"], "session_hash": session}
        asked(url, "gradio_api/queue/join", data)
        told = asked(url, f"gradio_api/queue/data?session_hash={session}")
        if any(event == "load" for _, event in listener["targets"]):
            assert "Get the real model" not in told
            assert "process_completed" in told
        else:
            assert "The weights are managed at the machine that serves this page." in told, listener


# --- the whole way


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    running = Hub(small_models.repositories()).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def bare(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server on a machine without real weights, beside a hub that has small ones."""
    folder = tmp_path_factory.mktemp("bare")
    named = {name: str(folder / name) for name in ("HOME", "HF_HOME", "DIFFSYNTH_MODEL_BASE_PATH", "MODELSCOPE_CACHE")}
    environment = {**named, "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    program = "tests/helpers/small_models.py"
    flags = ("--weights", "auto", "--memory", "20")
    return server(*flags, environment=tuple(environment.items()), program=program)


def open_at(browser: Browser, url: str, size: tuple[int, int], **settings: Any) -> Page:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **settings)
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    settled(page)
    return page


def open_panel(page: Page) -> None:
    page.locator("#real-model > .label-wrap").click()
    page.locator("#real-model .block.facts li").first.wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_from_the_miniature_to_the_real_model_by_one_press(bare: Server, hub: Hub, browser: Browser) -> None:
    held = small_models.FILES["text_encoder"]
    hub.faults = {small_models.FILES["turbo"]: Fault("cut", 1), held: Fault("slow")}
    page = open_at(browser, bare.url, LAPTOP)
    expect(page.locator("#weights summary")).to_have_text("Embedded miniature")
    open_panel(page)
    expect(page.locator("#real-model .block.facts")).to_contain_text("Turbo's transformer missing")
    expect(page.locator("#real-model .block.facts")).to_contain_text("A picture of 1024 × 1024 in 8 steps would take")
    expect(page.get_by_label("The official files, as published: 32.8 GB")).to_be_checked()
    shoot(page, "60-real-model")
    assert violations(page) == []
    page.get_by_role("button", name="Fetch", exact=True).click()

    wanted = {
        name: len(data) for name, data in hub.repos[REPO].items() if "/" in name and not name.startswith("scheduler")
    }
    percent = 100 * (sum(wanted.values()) - wanted[held]) // sum(wanted.values())
    phone = open_at(browser, bare.url, PHONE, locale="zh-CN")
    expect(phone.locator("#real-model > .label-wrap")).to_contain_text(f"正在下载：{percent}%")
    open_panel(phone)
    for each, told in ((page, f"Fetching: {percent} %"), (phone, f"正在下载：{percent}%")):
        expect(each.locator("#real-model .block.progress")).to_contain_text(told)
        expect(each.locator("#real-model [role=progressbar]")).to_have_attribute("aria-valuenow", str(percent))
    expect(page.locator("#real-model [role=status]")).to_have_text("Fetching: 80 %")  # by tenths
    shoot(page, "61-real-model-fetching")
    shoot(phone, "61-real-model-fetching")
    assert violations(phone) == []

    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#real-model .block.progress")).to_contain_text("Paused. What has arrived is kept")
    expect(phone.locator("#real-model .block.progress")).to_contain_text("已暂停")
    hub.stop_waiting()
    phone.get_by_role("button", name="继续").click()
    expect(page.locator("#real-model .block.progress")).to_contain_text("The real model is here")
    expect(page.locator("#real-model .block.facts")).to_contain_text("10 MB in the models folder")
    assert len(hub.asked("GET", f"/storage/{REPO}/{small_models.FILES['turbo']}")) == 2  # it was cut off once

    expect(page.locator("#weights summary")).to_have_text("Real weights")
    page.keyboard.press("Escape")
    expect(page.locator("#real-model .block.facts")).to_be_hidden()
    write(page, PROMPT)
    set_steps(page, 2)
    for side in ("Width", "Height"):
        field = page.get_by_label(f"number input for {side}")
        field.fill("384")
        field.press("Tab")
    generate(page)
    finished(page)
    with Image.open(io.BytesIO(picture_bytes(page))) as picture:
        assert picture.size == (384, 384)
    phone.close()
    page.close()

    remote = open_at(browser, bare.url, LAPTOP, extra_http_headers=ELSEWHERE)
    expect(remote.locator("#weights summary")).to_have_text("Real weights")
    expect(remote.locator("#real-model")).to_have_count(0)
    remote.close()
