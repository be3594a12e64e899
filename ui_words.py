"""What the page says, as HTML and in the visitor's language: how far a run is, how it ended, which weights draw.

Knows nothing of components, or of how a run is carried out.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from errors import RequestError, StudioError
from language import Say, english, fixed
from request import Failure, Note, Preview, Queued, Result, Stage, Step, TileDone, WeightsKind

if TYPE_CHECKING:
    from ui_parts import Situation

STAGES = {
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

# Which weights draw, and the words to press for more.
WEIGHTS: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("Drawing with the embedded miniature, which knows small flat icons.", "How to get the real weights"),
    "full": ("Drawing with the real weights.", "Which ones"),
}
# The licence of each kind of weights, and where it stands (the model cards; weights/mini/README.md).
LICENCES: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("MIT", "https://opensource.org/license/mit"),
    "full": ("Apache-2.0", "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo"),
}
LICENCE = "The weights are under the licence {licence}; it claims nothing on the pictures."
WEIGHTS_MISSING = ("This model cannot draw yet: its weights are not complete.", "How to get them")

# Sentences that the values of a failure or a note, named by its code, are filled into.
SENTENCES = {
    "queue_full": "{limit} requests are waiting already; try again in a moment",
    "cancelled": "the request was cancelled",
    "prompt_cut": "The prompt is too long: the last {tokens} of its tokens were cut, at most {limit} fit.",
    "unknown_words": "The miniature does not know: {words}.",
    "seed_chose": "The seed chose what the prompt leaves open: {words}.",
    "gpu_retry": "The Space took its GPU back after {asked} s; trying once more with {seconds} s.",
    "space_out_of_memory": (
        "this picture needs more memory than the Space has; ask for a smaller one, or draw without a LoRA"
    ),
    "unknown_control": "The miniature was not taught this preprocessor: {preprocessor}.",
}

LEFT_SHOWN = 2  # seconds; of less, nobody has to be told

KEPT = "Your form is as you left it."


def weights_line(now: Situation, say: Say = english) -> str:
    """Say which weights draw, with more on demand."""
    plain, more = map(say, WEIGHTS[now.kind] if now.complete else WEIGHTS_MISSING)
    name, url = LICENCES[now.kind]
    licence = say(LICENCE, licence=f'<a href="{url}" target="_blank" rel="noopener">{name}</a>')
    about = f"<p>{escape(_upper(now.sentence))}</p><p>{licence}</p>"
    return f"<details><summary>{plain} <u>{more}</u></summary>{about}</details>"


def idle(sentence: str, button: str) -> str:
    """Say what to do first; `button` is what the keys press."""
    keys = '<span class="keys">Or press <kbd>Ctrl</kbd> <kbd>Enter</kbd>; <kbd>Esc</kbd> cancels.</span>'
    return f'<p class="hint">{fixed(f"{sentence}, then press {button}. {keys}")}</p>'


def said(sentence: str) -> str:
    """Return a sentence as a paragraph."""
    return f"<p>{escape(sentence)}</p>"


def working_on(sentence: str, aside: str = "", fraction: float | None = None) -> str:
    """Say what is being done. `aside` is for the eye only: a screen reader need not read every step aloud."""
    known = "" if fraction is None else f' aria-valuenow="{100 * fraction:.0f}" style="--done: {fraction:.1%}"'
    return (
        f'<div class="working"><div class="bar" role="progressbar" aria-label="Progress"{known}><i></i></div>'
        f'<p>{escape(sentence)}<span aria-hidden="true">{escape(aside)}</span></p></div>'
    )


def underway(event: Queued | Stage | Step | TileDone, say: Say, left: float | None, of_several: str) -> str:
    def working(sentence: str, aside: str = "", fraction: float | None = None) -> str:
        return working_on(f"{of_several} {sentence}".strip(), aside, fraction)

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
                aside += ", " + _time_left(left, say)
            return working(say(STAGES["denoising"]), aside, index / total)
        case TileDone(stage, index, total):
            return working(say(STAGES[stage]), say("tile {index} of {total}", index=index, total=total), index / total)


def again(note: Note, say: Say) -> str:
    """Say why a run begins anew, above how far it is."""
    return f'<p class="note" role="status">{escape(noted(note, say))}</p>'


def _time_left(seconds: float, say: Say) -> str:
    if seconds < 90:
        return say("about {seconds} s left", seconds=round(seconds))
    return say("about {minutes} min left", minutes=round(seconds / 60))


def emerging(preview: Preview) -> str:
    """Show how a picture looks so far, over the last one. A screen reader hears how far it is instead."""
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (preview.width, preview.height), preview.rgb)
    image.save(buffer, format="JPEG", quality=85, subsampling=0)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def failed(failure: Failure | StudioError, say: Say = english) -> str:
    """Say why there is no picture."""
    failure = Failure.of(failure) if isinstance(failure, StudioError) else failure
    facts = failure.values
    if failure.code != RequestError.code:
        text = _upper(_worded(failure.code, failure.text, facts, say))
    elif facts["field"] == "image" and facts["value"] == "None":
        text = say("Choose an image first.")
    elif facts["field"] == "prompt":
        text = say("What should the picture show? The prompt takes {allowed}.", allowed=_allowed(facts, say))
    elif facts["field"] == "lora":
        text = say("This LoRA cannot be used. Wanted: {allowed}.", allowed=_allowed(facts, say))
    else:
        name = facts["field"].replace("_", " ").capitalize().replace("Cfg", "CFG").replace("Lora", "LoRA")
        text = say(
            "{field} takes {allowed}; {value} is not possible.",
            field=say(name),
            allowed=_allowed(facts, say),
            value=facts["value"],
        )
        if facts["nearest"] is not None:
            text += " " + say("The nearest is {nearest}.", nearest=facts["nearest"])
    return f'<p class="failed">{escape(text)}</p>'


def _allowed(facts: Mapping[str, Any], say: Say) -> str:
    """Word what a field takes: its numbers stay, the sentence around them is translated where it is known."""
    numbers = re.findall(r"\d+(?:\.\d+)?", facts["allowed"])
    pattern = re.sub(r"\d+(?:\.\d+)?", "#", facts["allowed"])
    worded = iter(say(pattern).split("#"))
    if say(pattern) == pattern or say(pattern).count("#") != len(numbers):
        return facts["allowed"]
    return next(worded) + "".join(number + part for number, part in zip(numbers, worded, strict=True))


def done_with(result: Result, say: Say) -> str:
    used, total, loading = result.request, result.seconds["total"], result.seconds.get("loading", 0.0)
    time = f"{total:.1f} s"
    if loading >= 1:
        time = say("{total} s, {loading} of them loading", total=f"{total:.1f}", loading=f"{loading:.1f}")
    width, height = result.size
    drawn = f"{used.model.title()}, {say('{steps} steps', steps=used.steps_run)}, " if used.steps_run else ""
    facts = f"{drawn}{width} × {height}, {time}"
    notes = "".join(f'<p class="note">{escape(noted(note, say))}</p>' for note in result.notes)
    return f"<p><span>{say('Seed')} <b>{used.seed}</b></span><span>{facts}</span></p>{notes}"


def noted(note: Note, say: Say) -> str:
    """Word a note."""
    return _worded(note.code, note.text, note.values, say)


def _worded(code: str, text: str, values: Mapping[str, Any], say: Say) -> str:
    """Fill the values into the visitor's sentence for a code; where there is none, `text` is all there is."""
    sentence = SENTENCES.get(code)
    if sentence is None or say(sentence) == sentence:
        return text
    return say(sentence, **{name: ", ".join(one) if isinstance(one, list) else one for name, one in values.items()})


def parameters_of(text: str) -> str:
    # Not as gr.JSON: its colours compete with the picture's.
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _upper(text: str) -> str:
    """Begin a text like a sentence; it may end with a command, so its end stays."""
    return text[:1].upper() + text[1:]
