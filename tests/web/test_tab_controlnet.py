"""The ControlNet tab as a visitor meets it, and its endpoints as programs do: a real browser, server and miniature."""

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect

from core import metadata
from core.request import PREPROCESSORS, ControlNet, Preprocess
from core.sizes import IMAGE_SIZES
from core.upload import Upload
from images import preprocess
from tests.helpers.browsing import NARROW, PHONE, Open, advanced, shoot
from tests.helpers.serving import Server, server

pytestmark = pytest.mark.browser

PROMPT = "a fox on a black background"


@pytest.fixture(scope="module")
def served() -> Server:
    return server()


@pytest.fixture
def visit(open_tab: Open) -> Open:
    return functools.partial(open_tab, "ControlNet")


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    image = Image.new("RGB", (160, 160), (240, 240, 230))
    ImageDraw.Draw(image).ellipse((30, 30, 130, 130), fill=(200, 30, 30))
    image.save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


def upload(page: Page, path: Path) -> None:
    page.locator("#controlnet-image input[type=file]").first.set_input_files(path)
    page.locator("#preview img").wait_for()


def shown(page: Page, selector: str) -> Image.Image:
    source = page.locator(f"{selector} img").get_attribute("src")
    assert source
    return Image.open(io.BytesIO(page.request.get(source).body()))


def generate(page: Page) -> None:
    page.locator("#controlnet-generate").click()
    page.locator("#controlnet-status b").wait_for()


def test_upload_preview_and_picture(visit: Open, sketch: Path) -> None:
    page = visit()
    button = page.locator("#controlnet-generate")
    expect(button).to_be_disabled()
    shoot(page, "20-controlnet-empty")
    upload(page, sketch)
    expect(button).to_be_enabled()
    canny = preprocess.control(Preprocess.parse(image=str(sketch)), Upload.open(sketch), IMAGE_SIZES["mini"]).image
    assert np.array_equal(np.asarray(shown(page, "#preview").convert("RGB")), np.asarray(canny))

    before = page.locator("#preview img").get_attribute("src")
    page.get_by_role("radio", name="Scribble").check()
    expect(page.locator("#preview img")).not_to_have_attribute("src", before)
    scribble = preprocess.control(
        Preprocess.parse(image=str(sketch), preprocessor="scribble"), Upload.open(sketch), IMAGE_SIZES["mini"]
    ).image
    assert np.array_equal(np.asarray(shown(page, "#preview").convert("RGB")), np.asarray(scribble))

    page.locator("#controlnet-prompt textarea").fill(PROMPT)
    generate(page)
    shoot(page, "21-controlnet-picture")
    source = page.locator("#controlnet-picture img").get_attribute("src")
    assert source
    made = page.request.get(source).body()
    chunk = Image.open(io.BytesIO(made)).info["z-image-studio"]
    assert '"mode": "controlnet"' in chunk
    assert '"preprocessor": "scribble"' in chunk
    assert Upload.open(sketch).digest in chunk

    page.locator("#controlnet-image").get_by_label("Remove Image").click()
    expect(button).to_be_disabled()
    expect(page.locator("#preview")).to_be_hidden()


def test_thresholds_belong_to_canny(visit: Open, sketch: Path) -> None:
    with Image.open(sketch) as strong:
        ImageDraw.Draw(strong).line((10, 145, 150, 145), fill=(140, 140, 130), width=6)  # kept at 200, not at 1000
        strong.save(sketch)
    page = visit()
    upload(page, sketch)
    advanced(page, "controlnet")
    high = page.get_by_label("number input for High threshold")
    expect(high).to_be_visible()
    before = page.locator("#preview img").get_attribute("src")
    high.fill("1000")
    high.press("Tab")
    expect(page.locator("#preview img")).not_to_have_attribute("src", before)
    page.get_by_role("radio", name="Gray").check()
    expect(high).to_be_hidden()


def test_a_preprocessor_that_cannot_work_says_why_and_draws_nothing(visit: Open, sketch: Path) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    upload(page, sketch)
    page.get_by_role("radio", name="Pose").check()
    status = page.locator("#preview-status .failed")
    expect(status).to_contain_text("a picture with a person in it")
    expect(page.locator("#preview")).to_be_hidden()
    page.get_by_role("radio", name="Depth").check()
    expect(status).to_contain_text("Depth-Anything-V2-Small-hf/model.safetensors (99 MB)")
    expect(status.locator("code")).to_contain_text("models download")
    expect(page.locator("#controlnet-generate")).to_be_disabled()
    status.get_by_role("button", name="Copy").click()
    expect(page.locator("#said")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == status.locator("code").inner_text()
    shoot(page, "22-controlnet-no-model")
    page.get_by_role("radio", name="Gray").check()
    expect(page.locator("#controlnet-generate")).to_be_enabled()


def test_outlines_get_a_hint(visit: Open, sketch: Path, tmp_path: Path) -> None:
    edges = preprocess.control(Preprocess.parse(image=str(sketch)), Upload.open(sketch), IMAGE_SIZES["full"]).image
    edges.save(tmp_path / "edges.png")
    page = visit()
    upload(page, tmp_path / "edges.png")
    expect(page.locator("#preview-status")).to_contain_text("Pre-processed may fit better")


def test_a_result_becomes_a_control_image(visit: Open) -> None:
    page = visit()
    page.get_by_role("tab", name="Text to Image").click()
    page.get_by_label("Prompt", exact=False).first.fill(PROMPT)
    page.locator("#generate").click()
    page.locator("#generate-status b").wait_for()
    page.get_by_role("button", name="Use as control").click()
    page.locator("#preview img").wait_for()
    expect(page.locator("#controlnet-generate")).to_be_enabled()
    expect(page.locator("#controlnet-prompt textarea")).to_have_value(PROMPT)
    expect(page.get_by_role("tab", name="ControlNet")).to_have_attribute("aria-selected", "true")
    shoot(page, "23-controlnet-from-result")


@pytest.mark.parametrize("size", [NARROW, PHONE], ids=["narrow", "phone"])
def test_it_fits_without_sideways_scrolling(visit: Open, sketch: Path, size: tuple[int, int]) -> None:
    page = visit(size)
    upload(page, sketch)
    advanced(page, "controlnet")
    page.get_by_label("number input for High threshold").wait_for()
    shoot(page, "24-controlnet-everything")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_the_tab_is_about_what_a_request_takes(visit: Open) -> None:
    page = visit()
    advanced(page, "controlnet")
    fields = {
        "image": page.locator("#controlnet-image button.upload-container"),
        "preprocessor": page.locator("#preprocessor"),
        "prompt": page.locator("#controlnet-prompt textarea"),
        "scale": page.get_by_label("number input for Control scale"),
        "steps": page.locator("#controlnet-controls").get_by_label("number input for Steps"),
    }
    for name, field in fields.items():
        text = ControlNet.model_fields[name].description
        assert text
        expect(field).to_have_accessible_description(text)
    for facts in PREPROCESSORS.values():
        expect(page.get_by_role("radio", name=facts.title)).to_be_visible()


# --- the endpoints


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[Client]:
    connected = Client(served.url, verbose=False)
    yield connected
    connected.close()


def test_endpoints_take_an_uploaded_picture(client: Client, sketch: Path) -> None:
    file, facts = client.predict(image=handle_file(sketch), preprocessor="gray", api_name="/preprocess")
    gray = preprocess.control(
        Preprocess.parse(image=str(sketch), preprocessor="gray"), Upload.open(sketch), IMAGE_SIZES["mini"]
    )
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(gray.image))
    assert facts == {"digest": Upload.open(sketch).digest, "notes": []}
    file, sidecar = client.predict(image=handle_file(sketch), prompt=PROMPT, seed=7, api_name="/controlnet")
    assert sidecar["inputs"] == {"image": Upload.open(sketch).digest}
    assert metadata.read_picture(Path(file)).mode == "controlnet"


@pytest.mark.parametrize("endpoint", ["/preprocess", "/controlnet"])
def test_endpoints_open_no_other_file_of_the_machine(client: Client, sketch: Path, endpoint: str) -> None:
    values = {"prompt": PROMPT} if endpoint == "/controlnet" else {}
    for image in (str(sketch), {"path": str(sketch)}, {"path": "../../etc/passwd"}, None):
        with pytest.raises(AppError, match=r"^image: .*; allowed: a file that is uploaded with the request"):
            client.predict(image=image, **values, api_name=endpoint)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"scale": 3}, "scale"), ({"preprocessor": "hed"}, "preprocessor"), ({"canny_low": 300}, "canny_low")],
)
def test_endpoints_refuse_with_a_sentence(client: Client, sketch: Path, values: dict[str, Any], named: str) -> None:
    with pytest.raises(AppError, match=rf"^{named}: .* is not possible; allowed: "):
        client.predict(image=handle_file(sketch), prompt=PROMPT, **values, api_name="/controlnet")
