"""The empty stage: what the weights in use draw well, as pictures or as cards. A press draws that prompt at once."""

from html import escape
from typing import Any

import gradio as gr

from core.sizes import WeightsKind
from engine.mode_generate import examples
from web.fields import QUIET, REWORD_JS, Field
from web.language import Say, english, say_to
from web.situation import Situation
from web.theme import ASSETS_URL

# Which prompt was pressed goes to the server as what the press is about; the element stays, and what is in it changes.
PRESS_JS = f"""{REWORD_JS}
element.addEventListener("click", ({{ target }}) => {{
  const pressed = target.closest("button");
  if (pressed) trigger("select", {{ prompt: pressed.ariaLabel ?? pressed.textContent }});
}});
"""


def lay_out(kind: WeightsKind) -> gr.HTML:
    """Make the examples where a stage stands now."""
    return gr.HTML(shown(kind), js_on_load=PRESS_JS, elem_id="examples")


def wire(shelf: gr.HTML, prompt: Field, situation: gr.State) -> Any:
    """Let a press fill in the prompt, and a change of language word the examples; return what a press begins."""
    shelf.input(_reworded, situation, shelf, **QUIET)
    return shelf.select(_chosen, None, prompt, **QUIET)


def shown(kind: WeightsKind, say: Say = english) -> str:
    """Return the examples for some weights: a mosaic of pictures of the miniature, which docs/mosaic.py has drawn."""
    said = [escape(say(prompt)) for prompt in examples(kind)]
    if kind == "mini":
        tiles = (
            f'<button type="button" aria-label="{prompt}" title="{prompt}">'
            f'<img src="{ASSETS_URL}/mosaic/{number}.webp" width="256" height="256" alt=""></button>'
            for number, prompt in enumerate(said)
        )
        inside = f'<div class="mosaic">{"".join(tiles)}</div>'
    else:
        inside = f'<div class="cards">{"".join(f"<button type=button>{prompt}</button>" for prompt in said)}</div>'
    return f"<p>{escape(say('Press one to draw it, or describe a picture of your own.'))}</p>{inside}"


def _chosen(event: gr.EventData) -> Any:
    prompt = getattr(event, "prompt", None)
    return prompt if isinstance(prompt, str) else gr.skip()


def _reworded(now: Situation, visitor: gr.Request) -> str:
    return shown(now.kind, say_to(visitor))
