"""A new mode is a request, a mode of the engine, a tab, and two rows: shown by one that blurs an image.

The three classes and functions below are what would be three files.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import gradio as gr
import pytest
from PIL import Image, ImageFilter
from pydantic import Field

import core.request
from core.errors import RequestError
from core.events import Result, Stage
from core.metadata import read_picture
from core.request import DrawRequest, ImageFile, Model, Prompt, Resolved, Seed, Weights, random_seed
from core.sizes import WeightsKind
from core.upload import Upload
from diffusion.memory import MemoryPlan
from engine import Engine
from engine.estimate import Work
from engine.mode import Drawing, Drawn, Job, Mode, Prepared, Studio
from engine.modes import MODES
from images import reading
from images.cache import Controls
from web import endpoints, page
from web.fields import Fields, image_field
from web.form import Form
from web.output import Output
from web.tabs import TABS, Tab

# --- core/blur.py


class Blur(DrawRequest):
    """A blurred image."""

    mode: ClassVar[str] = "blur"
    help: ClassVar[str] = "an image, blurred"
    files: ClassVar[tuple[str, ...]] = ("image",)
    stem: ClassVar[str] = "z-image-blur"
    needs: ClassVar[Mapping[Model, tuple[str, ...]]] = {"turbo": ()}
    model: ClassVar[Model] = "turbo"

    image: ImageFile = Field(description="The image to blur.")
    prompt: Prompt = Field("none", description="Not used.")
    radius: float = Field(2.0, ge=0, le=20, description="How far each pixel spreads.")
    seed: Seed = 0
    weights: Weights = "auto"

    def resolved(self, kind: WeightsKind, uploads: Mapping[str, Upload] | None = None) -> ResolvedBlur:
        """Return this request with every open value filled in."""
        return ResolvedBlur(**self._filled(seed=self.seed or random_seed(), weights=kind, uploads=uploads or {}))


class ResolvedBlur(Blur, Resolved):
    """A blurred image, with every value filled in."""

    weights: WeightsKind

    @property
    def steps_run(self) -> int:
        """0: nothing is drawn."""
        return 0


# --- engine/mode_blur.py


class BlurMode(Mode[ResolvedBlur]):
    """A blurred image."""

    request = Blur

    def prepare(self, request: ResolvedBlur, kind: WeightsKind, controls: Controls) -> Generator[Stage, None, Prepared]:
        """Decode the image."""
        yield Stage("preprocessing")
        opened = reading.decode(request.uploads["image"])
        return Prepared(opened.image.size, opened.image, opened.notes, {"image": opened.digest})

    def work(self, request: ResolvedBlur, kind: WeightsKind, size: tuple[int, int], plan: MemoryPlan) -> Work:
        """Return what a request computes: nothing that counts."""
        return Work(kind, 0, *size, field="image")

    def draw(self, studio: Studio, job: Job[ResolvedBlur]) -> Drawing:
        """Blur an image."""
        assert job.prepared.image is not None
        yield Stage("decoding")
        blurred = job.prepared.image.filter(ImageFilter.GaussianBlur(job.request.radius))
        return Drawn(blurred, job.prepared.notes, job.prepared.inputs)


# --- web/tab_blur.py


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> Form:
    """Lay out the tab."""
    fields = Fields(Blur)
    image = image_field(Blur)
    fields.add("radius")
    fields.add_seed()
    start = gr.Button("Blur")
    form = Form.of(Blur, fields, Output.lay_out(Blur, ""), image=image)
    form.draws_on(start, engine)
    return form


def publish(engine: Engine) -> None:
    """Add the endpoint."""
    endpoints.publish(Blur, "Blur an image.", partial(endpoints.stream, engine, Blur))


# --- and its rows


@pytest.fixture
def blur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(core.request.MODES, "blur", Blur)
    monkeypatch.setitem(MODES, "blur", BlurMode())
    monkeypatch.setattr("web.page.TABS", [*TABS, Tab(Blur, "Blur", lay_out, publish)])


core.request.MODES.pop("blur")  # other tests look at the modes that there are


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((40, 24), 80).convert("RGB").save(path)
    return path


def test_the_engine_carries_it_out_and_its_image_replays(engine: Engine, blur: None, photo: Path) -> None:
    result = engine.draw(Blur.parse(image=str(photo), radius=3, seed=5))
    expected = Image.open(photo).filter(ImageFilter.GaussianBlur(3))
    with Image.open(io.BytesIO(result.png)) as made:
        assert made.tobytes() == expected.tobytes()
    (photo.parent / "made.png").write_bytes(result.png)
    found = read_picture(photo.parent / "made.png")
    assert (found.mode, found.values["radius"], found.values["image"]) == ("blur", 3, "photo.png")
    request = Blur.parse(**{**found.values, "image": str(photo)})
    assert engine.draw(request).png == result.png


def test_a_wrong_value_is_refused_by_its_field(engine: Engine, blur: None, photo: Path) -> None:
    with pytest.raises(RequestError, match="radius: 99 is not possible; allowed: a number from 0 to 20"):
        Blur.parse(image=str(photo), radius=99)
    *_, failure = engine.run(Blur.parse(image=str(photo.parent / "absent.png")))
    assert not isinstance(failure, Result)


def test_the_page_has_its_tab_and_its_endpoint(engine: Engine, blur: None) -> None:
    async def build() -> gr.Blocks:  # within a loop: else Gradio makes some that nobody closes
        return page.build(engine)

    built = asyncio.run(build())
    labels = [str(block.label) for block in built.blocks.values() if isinstance(block, gr.Tab)]
    assert '"Blur"' in labels[-1]  # to be translated in the browser
    published = built.get_api_info()["named_endpoints"]["/blur"]["parameters"]
    assert [parameter["parameter_name"] for parameter in published] == ["image", "prompt", "radius", "seed", "weights"]
