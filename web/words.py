"""The page's texts, as HTML and in the visitor's language: how far a run is, how it ended, which weights draw."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import RequestError, StudioError
from core.events import Failure, Preview, Queued, Result, Stage, Step, TileDone
from core.messages import Message
from core.sizes import WeightsKind
from core.upload import IMAGE_FILE
from engine.mode_generate import known_things
from web.image_formats import small
from web.language import Say, english, fixed

if TYPE_CHECKING:
    from web.situation import Situation

STAGES = {
    "starting": "Starting, once",
    "loading": "Loading",
    "preprocessing": "Preparing the control image:",
    "estimating": "This will take",
    "safe mode": "Once more in safe mode,",
    "upscaling": "Enlarging",
    "encoding": "Reading the prompt",
    "denoising": "Drawing",
    "decoding": "Developing the picture",
    "saving": "Saving the picture",
}

# Fields that the page calls otherwise than the request.
LABELS = {
    "canny_low": "Low threshold",
    "canny_high": "High threshold",
    "cfg": "CFG",
    "lora": "LoRA",
    "lora_strength": "LoRA strength",
    "scale": "Control scale",
}

# Which weights draw: by name, and in a sentence.
WEIGHTS: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("Embedded miniature", "Drawing with the embedded miniature, which knows small flat icons."),
    "full": ("Real weights", "Drawing with the real weights."),
}
# The licence of each kind of weights, and where it stands (the model cards; weights/mini/README.md).
LICENCES: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("MIT", "https://opensource.org/license/mit"),
    "full": ("Apache-2.0", "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo"),
}
LICENCE = "The weights are under the licence {licence}; it claims nothing on the pictures."
WEIGHTS_MISSING = ("Weights missing", "This model cannot draw yet: its weights are not complete.")
MODEL_ZOO = "https://github.com/Tongyi-MAI/Z-Image#-model-zoo"
COMING_SOON = ("Edit", "Omni")

UNTOLD = ("prompt", "weights", "lora_strength")  # said elsewhere: by the form, the header, with the LoRA

LEFT_SHOWN = 2  # seconds; of less, nobody has to be told

KEPT = "Your form is as you left it."


def weights_sentence(now: Situation, say: Say = english) -> str:
    """Return which weights draw, with more on demand: how to get others, their licence, what is to come."""
    name_of_them, sentence = map(say, WEIGHTS[now.kind] if now.complete else WEIGHTS_MISSING)
    name, url = LICENCES[now.kind]
    licence = say(LICENCE, licence=f'<a href="{url}" target="_blank" rel="noopener">{name}</a>')
    soon = ", ".join(f'<a href="{MODEL_ZOO}" target="_blank" rel="noopener">{model}</a>' for model in COMING_SOON)
    program = f'<a href="?view=api" target="_blank">{say("How programs use this page")}</a>'
    why = escape(". ".join(upper(say(text)) for text in now.texts))
    about = (f"{sentence} {why}", licence, f"{say('Coming soon:')} {soon}", program)
    told = _known(now.kind, say) + "".join(f"<p>{text}</p>" for text in about)
    return f"<details><summary>{name_of_them}</summary><div>{told}</div></details>"


def _known(kind: WeightsKind, say: Say) -> str:
    """Return the things that weights draw, to search; a press on one puts it into the prompt (web/assets/page.js)."""
    things = known_things(kind, say.tag)
    if not things:
        return ""
    look = escape(say("What it knows: search {count} things", count=len(things)))
    buttons = "".join(f"<button type=button>{escape(thing)}</button>" for thing in things)
    return (
        f'<div class="known"><input type="search" placeholder="{look}" aria-label="{look}"><div>{buttons}</div></div>'
    )


def idle(sentence: str, button: str) -> str:
    """Return what to do first; `button` is what the keys press."""
    keys = '<span class="keys">Or press <kbd>Ctrl</kbd> <kbd>Enter</kbd>; <kbd>Esc</kbd> cancels.</span>'
    return f'<p class="hint">{fixed(f"{sentence}, then press {button}. {keys}")}</p>'


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def working_on(say: Say, sentence: str, aside: str = "", fraction: float | None = None) -> str:
    """Return what is being done. `aside` is for the eye only: a screen reader need not read every step aloud."""
    known = "" if fraction is None else f' aria-valuenow="{100 * fraction:.0f}" style="--done: {fraction:.1%}"'
    bar = f'<div class="bar" role="progressbar" aria-label="{say("Progress")}"{known}><i></i></div>'
    return f'<div class="working">{bar}<p>{escape(sentence)}<span aria-hidden="true">{escape(aside)}</span></p></div>'


def underway(event: Queued | Stage | Step | TileDone, say: Say, left: float | None, of_several: str) -> str:
    """Return how far a run is; `left` is its time in seconds, where it is known."""

    def working(sentence: str, aside: str = "", fraction: float | None = None) -> str:
        return working_on(say, f"{of_several} {sentence}".strip(), aside, fraction)

    match event:
        case Queued(1):
            return working(say("Waiting: one request comes before yours"))
        case Queued(ahead):
            return working(say("Waiting: {ahead} requests come before yours", ahead=ahead))
        case Stage(name, detail):
            known = 1.0 if name in ("decoding", "saving") else None
            return working(say(STAGES.get(name, name)), say(detail), known)
        case Step(index, total):
            aside = say("step {index} of {total}", index=index, total=total)
            if left is not None and left >= LEFT_SHOWN:
                aside += ", " + time_left(left, say)
            return working(say(STAGES["denoising"]), aside, index / total)
        case TileDone(stage, index, total):
            return working(say(STAGES[stage]), say("tile {index} of {total}", index=index, total=total), index / total)


def retrying(note: Message, say: Say) -> str:
    """Return why a run begins again, shown above how far it is."""
    return f'<p class="note" role="status">{escape(say(note))}</p>'


def time_left(seconds: float, say: Say) -> str:
    """Return how long something still takes."""
    if seconds < 90:
        return say("about {seconds} s left", seconds=round(seconds))
    return say("about {minutes} min left", minutes=round(seconds / 60))


def emerging(preview: Preview) -> str:
    """Return how a picture looks so far, shown over the last one. A screen reader gets how far it is instead."""
    return f'<img alt="" src="{small(preview)}">'


def failed(failure: Failure | StudioError, say: Say = english) -> str:
    """Return why there is no picture."""
    failure = Failure.of(failure) if isinstance(failure, StudioError) else failure
    facts = failure.values
    allowed = say(facts.get("allowed", ""))
    if failure.code != RequestError.code:
        return f'<p class="failed">{_with_command(upper(say(failure.message)), facts.get("command", ""), say)}</p>'
    if facts["field"] == "image" and facts["value"] == "None":
        text = say("Choose an image first.")
    elif facts["allowed"] == IMAGE_FILE:
        text = say("This file cannot be opened as a picture. PNG, JPEG and WebP work.")
    elif facts["field"] == "image":
        text = say("{value} cannot be used. Wanted: {allowed}.", value=facts["value"].strip("'"), allowed=allowed)
    elif facts["field"] == "prompt":
        text = say("What should the picture show? The prompt takes {allowed}.", allowed=allowed)
    elif facts["field"] == "lora":
        text = say("This LoRA cannot be used. Wanted: {allowed}.", allowed=allowed)
    else:
        text = say(
            "{field} cannot be {value}. Possible: {allowed}.",
            field=field_name(facts["field"], say),
            allowed=allowed,
            value=facts["value"].strip("'"),
        )
        if facts["nearest"] is not None:
            text += " " + say("The nearest is {nearest}.", nearest=facts["nearest"])
    return f'<p class="failed">{escape(text)}</p>'


def _with_command(text: str, command: str, say: Say) -> str:
    """Return a text as HTML, the command in it in a box with a button that copies it (web/assets/page.js)."""
    if not command:
        return escape(text)
    box = f'<code>{escape(command)}</code> <button type="button" class="copy-text">{escape(say("Copy"))}</button>'
    return escape(text).replace(escape(command), box)


def field_name(name: str, say: Say) -> str:
    """Return what the page calls a field of a request."""
    return say(LABELS.get(name, name.replace("_", " ").capitalize()))


def done_with(result: Result, say: Say) -> str:
    """Return how a picture was made: its seed, steps, size and time, and what the user should know."""
    used, total = result.request, result.seconds["total"]
    loading = sum(result.seconds.get(stage, 0.0) for stage in ("starting", "loading"))
    time = f"{total:.1f} s"
    if loading >= 1:
        time = say("{total} s, {loading} of them loading", total=f"{total:.1f}", loading=f"{loading:.1f}")
    width, height = result.size
    steps = say("1 step") if used.steps_run == 1 else say("{steps} steps", steps=used.steps_run)
    own = f"{Path(used.checkpoint_name).stem}, " if used.checkpoint_name else ""
    drawn = f"{used.model.title()}, {own}{steps}, " if used.steps_run else ""
    facts = f"{drawn}{width} × {height}, {time}"
    notes = "".join(f'<p class="note">{escape(say(note))}</p>' for note in result.notes)
    if not used.steps_run:  # nothing was drawn, and no seed means anything
        return f"<p><b>{width} × {height}</b><span>{time}</span></p>{notes}"
    return f"<p><span>{say('Seed')} <b>{used.seed}</b></span><span>{facts}</span></p>{notes}"


def parameters_of(text: str, say: Say = english) -> str:
    """Return a picture's parameters, a JSON text: what was asked for as facts, everything behind a second step."""
    asked = json.loads(text)["request"]
    facts = "".join(
        f"<dt>{escape(field_name(name, say))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in asked.items()
        if value not in (None, "") and name not in UNTOLD and not isinstance(value, dict | list)
    )
    # Not as gr.JSON: its colours compete with the picture's.
    whole = f'<summary>{escape(say("All parameters"))}</summary><pre tabindex="0">{escape(text)}</pre>'
    return f"<dl>{facts}</dl><details>{whole}</details>"


def upper(text: str) -> str:
    """Begin a text like a sentence; it may end with a command, so its end stays."""
    return text[:1].upper() + text[1:]
