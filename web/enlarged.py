"""What the stage shows once a run has ended: a small picture enlarged, several at once. The files stay as they are.

Icons that a browser blurs look broken, so small ones go through Real-ESRGAN's fast network for the eye.
"""

import base64
import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency
from PIL import Image

from core.errors import StudioError
from core.request import Request
from core.whole_file import replacing
from engine import Engine
from web.endpoints import uploaded
from web.fields import QUIET, REWORD_JS, Update, named_for
from web.language import Say, say_to
from web.output import Output
from web.strip import Past, siblings

log = logging.getLogger(__name__)

SMALL = 256  # pixels a side; a larger one has all that a screen's place for it can show, or nearly
TILE = 512  # pixels a side of a large one among others
ALL = -1  # the number of the button that shows all pictures of a press

# Whether the visitor wants it is kept by the browser, and sent along each time.
CHOICE = 'localStorage.getItem("studio-enlarge") !== "no"'
WANTED_JS = f"(picture) => {{ try {{ return [picture, {CHOICE}, null]; }} catch {{ return [picture, true, null]; }} }}"
PRESS_JS = f"""{REWORD_JS}
element.addEventListener("click", ({{ target }}) => {{
  const pressed = target.closest("button");
  if (!pressed) return;
  if (pressed.name === "picture") return trigger("select", {{ index: +pressed.value, value: null }});
  try {{ localStorage.setItem("studio-enlarge", pressed.value); }} catch {{}} // a browser that keeps nothing
  trigger("input");
}});
"""


def lay_out(mode: type[Request]) -> gr.HTML:
    """Make the place over a tab's picture, where a stage stands now."""
    return gr.HTML(js_on_load=PRESS_JS, **named_for(mode, "enlarged"))


def wire(engine: Engine, place: gr.HTML, output: Output, runs: Sequence[Dependency]) -> None:
    """Show what came of each of an output's runs, and a picture that is chosen among them."""

    def single(shown: dict[str, Any] | None, wanted: bool, past: list[Past], visitor: gr.Request) -> str:
        if shown is None:
            return ""
        made = siblings(past, uploaded(shown))
        return _single(engine, Path(uploaded(shown)), wanted, len(made), say_to(visitor))

    def together(shown: dict[str, Any] | None, wanted: bool, past: list[Past], visitor: gr.Request) -> str:
        made = siblings(past, uploaded(shown)) if shown else []
        if len(made) < 2:
            return single(shown, wanted, past, visitor)
        return _grid(engine, made, past, wanted, say_to(visitor))

    def choose(
        event: gr.SelectData, shown: dict[str, Any] | None, wanted: bool, past: list[Past], visitor: gr.Request
    ) -> Update:
        if event.index == ALL:
            return {place: together(shown, wanted, past, visitor)}
        chosen, say = past[event.index], say_to(visitor)
        made = siblings(past, chosen.picture)
        return output.look_at(chosen, say) | {place: _single(engine, Path(chosen.picture), wanted, len(made), say)}

    # Beside the queue of pictures, so that the next one can be asked for meanwhile.
    about: dict[str, Any] = {"js": WANTED_JS, "preprocess": False, "concurrency_limit": None, **QUIET}
    inputs = [output.picture, place, output.strip.past]
    for run in runs:
        run.then(together, inputs, place, **about)
    output.looked_back.then(single, inputs, place, **about)
    place.input(single, inputs, place, **about)
    place.select(choose, inputs, [place, *output.shown], **about)


def _single(engine: Engine, path: Path, wanted: bool, of_several: int, say: Say) -> str:
    """Return what lies over a single picture; empty where that needs nothing."""
    told, image = "", ""
    try:
        with Image.open(path) as opened:
            (width, height), small = opened.size, max(opened.size) <= SMALL
        if small and wanted:
            image = _image(_for_the_eye(engine, path))
            told = escape(say("Shown enlarged; the file is {width} × {height}.", width=width, height=height))
            told += f' <button type="button" value="no">{escape(say("Show the file"))}</button>'
        elif small:
            told = escape(say("The file is {width} × {height}.", width=width, height=height))
            told += f' <button type="button" value="yes">{escape(say("Show it enlarged"))}</button>'
    except (StudioError, OSError) as error:  # the picture itself is there, and is what was asked for
        log.warning("not shown enlarged: %s", error)
        return ""
    if of_several > 1:
        name = escape(say("Show all {count}", count=of_several))
        told += f' <button type="button" name="picture" value="{ALL}">{name}</button>'
    return f"{image}<p>{told}</p>" if told else ""


def _grid(engine: Engine, made: list[Past], past: list[Past], wanted: bool, say: Say) -> str:
    """Return pictures side by side, each with its seed; the last one is what the page has on show."""
    tiles = ""
    try:
        for one in made:
            seed = escape(say("seed {seed}", seed=one.seed))
            image = _image(_for_the_eye(engine, Path(one.picture), wanted))
            on_show = ' aria-current="true"' if one is made[-1] else ""
            button = f'<button type="button" name="picture" value="{past.index(one)}" aria-label="{escape(one.name)}"'
            tiles += f"{button}{on_show}>{image}<span>{seed}</span></button>"
    except (StudioError, OSError) as error:  # removed meanwhile (web/visits.py), or no room
        log.warning("not shown side by side: %s", error)
        return ""
    return f'<div class="grid">{tiles}</div>'


def _for_the_eye(engine: Engine, picture: Path, enlarged: bool = True) -> Path:
    """Return a file of a picture for the eye, beside it in Gradio's cache: a small one enlarged; it is made once.

    Raises:
        StudioError: it cannot be.
    """
    made = picture.with_suffix(".large.webp" if enlarged else ".tile.webp")
    if not made.exists():
        with Image.open(picture) as opened:
            small = max(opened.size) <= SMALL
            opened.thumbnail((TILE, TILE))
        image = engine.shown_large(picture) if small and enlarged else opened
        with replacing(made) as file:
            image.save(file, "WEBP", quality=92)
    return made


def _image(file: Path) -> str:
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(file.read_bytes()).decode()}">'
