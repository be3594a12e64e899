"""A small picture shown large, once it is there: icons that a browser blurs look broken. The file stays as it is."""

import base64
import logging
from collections.abc import Callable, Sequence
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
from web.fields import QUIET, REWORD_JS, named_for
from web.language import Say, say_to
from web.output import Output

log = logging.getLogger(__name__)

SMALL = 256  # pixels a side; a larger one has all that a screen's place for it can show, or nearly

# The visitor's choice is kept by the browser, and sent along each time.
CHOICE = 'localStorage.getItem("studio-enlarge") !== "no"'
WANTED_JS = f"(picture) => {{ try {{ return [picture, {CHOICE}]; }} catch {{ return [picture, true]; }} }}"
PRESS_JS = f"""{REWORD_JS}
element.addEventListener("click", ({{ target }}) => {{
  const pressed = target.closest("button");
  if (!pressed) return;
  try {{ localStorage.setItem("studio-enlarge", pressed.value); }} catch {{}} // a browser that keeps nothing
  trigger("input");
}});
"""


def lay_out(mode: type[Request]) -> gr.HTML:
    """Make the place over a tab's picture, where a stage stands now."""
    return gr.HTML(js_on_load=PRESS_JS, **named_for(mode, "enlarged"))


def wire(engine: Engine, place: gr.HTML, output: Output, runs: Sequence[Dependency]) -> None:
    """Show the picture of an output large after each of its runs and choices, and when the visitor wants it."""

    def show(shown: dict[str, Any] | None, wanted: bool, visitor: gr.Request) -> str:
        if shown is None:
            return ""
        path, say = Path(uploaded(shown)), say_to(visitor)
        try:
            with Image.open(path) as opened:
                size = opened.size
            if max(size) > SMALL:
                return ""
            return _large(_file_of(engine, path), size, say) if wanted else _as_it_is(size, say)
        except (StudioError, OSError) as error:  # the picture itself is there, and is what was asked for
            log.warning("not shown enlarged: %s", error)
            return ""

    # Beside the queue of pictures, so that the next one can be asked for meanwhile.
    about = {"js": WANTED_JS, "preprocess": False, "concurrency_limit": None, **QUIET}
    begins: list[Callable[..., Any]] = [run.then for run in (*runs, output.looked_back)]
    for begin in (*begins, place.input):
        begin(show, [output.picture, place], place, **about)


def _file_of(engine: Engine, picture: Path) -> Path:
    """Return the file of a picture's enlargement, beside it in Gradio's cache; it is made once.

    Raises:
        StudioError: it cannot be.
    """
    large = picture.with_suffix(".large.webp")
    if not large.exists():
        image = engine.shown_large(picture)
        with replacing(large) as file:
            image.save(file, "WEBP", quality=92)
    return large


def _large(file: Path, size: tuple[int, int], say: Say) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    told = say("Shown enlarged; the file is {width} × {height}.", width=size[0], height=size[1])
    return (
        f'<img alt="" src="data:image/webp;base64,{data}">'
        f'<p>{escape(told)} <button type="button" value="no">{escape(say("Show the file"))}</button></p>'
    )


def _as_it_is(size: tuple[int, int], say: Say) -> str:
    told = say("The file is {width} × {height}.", width=size[0], height=size[1])
    return f'<p>{escape(told)} <button type="button" value="yes">{escape(say("Show it enlarged"))}</button></p>'
