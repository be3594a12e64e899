"""Forms filled from outside: a dropped picture's parameters, a link, and what the visitor's browser kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from core import metadata
from core.errors import RequestError
from web import dropped
from web.endpoints import uploaded
from web.fields import QUIET, REWORD_JS, Update
from web.form import RAW, READY_JS, Form
from web.language import Say, fixed, say_to
from web.words import failed, field_name

MOST_TOLD = 24  # things that were not restored; a hostile picture has thousands
QUERY_MODE = "mode"  # ?mode=controlnet&prompt=...

# A live region, which must be there before there is something to say; whatever is done next takes what it said away.
TOLD_JS = f"""{REWORD_JS}
element.setAttribute("role", "status");
watch("value", () => element.classList.remove("read"));
for (const next of ["click", "input"])
  addEventListener(next, ({{ target }}) => element.contains(target) || element.classList.add("read"), true);
element.addEventListener("click", ({{ target }}) => {{
  const pressed = target.closest("button");
  if (pressed) trigger("select", {{ index: 0, value: pressed.value }});
}});
"""


def lay_out() -> tuple[gr.UploadButton, gr.HTML]:
    """Make the button that takes a picture to restore, and the place for words."""
    button = gr.UploadButton(
        fixed("Restore settings"),  # type: ignore[arg-type]  # Gradio translates it here too
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        size="sm",
        scale=0,
        elem_id="restore",
        elem_classes=["restore"],
    )
    told = gr.HTML(js_on_load=TOLD_JS, elem_id="restored", elem_classes=["status"])
    told.input(lambda: "", None, told, **QUIET)  # what was shown on arrival is over when the language changes
    return button, told


def wire(
    page: gr.Blocks,
    button: gr.UploadButton,
    upload: gr.UploadButton,
    told: gr.HTML,
    tabs: gr.Tabs,
    forms: Sequence[Form],
    ready: Callable[[], None],
) -> None:
    """Wire every way into the forms. To be called outside of the tabs.

    `button` takes a picture to restore, `upload` whatever is dropped;
    `ready` is called each time a visitor's page has been filled in.
    """
    for form in forms:
        form.kept.render()  # type: ignore[no-untyped-call]  # Gradio leaves it untyped
    by_mode = {form.mode.mode: form for form in forms}
    changed = [block for form in forms for block in form.changed]

    def restore(picture: dict[str, Any] | None, visitor: gr.Request) -> Update:
        """Fill in the form that a picture was made with."""
        say = say_to(visitor)
        if picture is None:
            return {told: ""}
        try:
            found = metadata.read_picture(Path(uploaded(picture)))
        except RequestError as error:
            return {told: failed(error, say)}
        form = by_mode.get(found.mode) or next(iter(by_mode.values()))
        update, refused = form.fill(found.filled)
        sentence = say("The settings of the picture are in the form.")
        return update | {
            told: _told(
                sentence, _named(refused, say) | {say(name): text for name, text in found.not_restored.items()}, say
            ),
            tabs: gr.Tabs(selected=form.mode.mode),
        }

    def arrive(visitor: gr.Request, *kept: dict[str, Any] | None) -> Update:
        """Fill in what the browser kept, then what the link holds."""
        say = say_to(visitor)
        update: Update = {told: ""}
        asked = dict(visitor.query_params)
        form = by_mode.get(asked.pop(QUERY_MODE, ""), next(iter(by_mode.values())))
        asked = {name: value for name, value in asked.items() if name in form.fields}
        for other, values in zip(by_mode.values(), kept, strict=True):
            if isinstance(values, dict) and not (asked and other is form):  # a link starts from what is usual
                update |= other.fill(values)[0]
        if asked:
            filled, refused = form.fill(asked)
            update |= filled
            update[told] = _told(say("The link has filled in the form."), _named(refused, say), say)
            update[tabs] = gr.Tabs(selected=form.mode.mode)
        return update

    outputs = [told, tabs, *changed]
    button.upload(restore, button, outputs, preprocess=False, **QUIET)
    dropped.wire(upload, told, tabs, by_mode, restore, outputs)
    for form in forms:
        with form.output.others:
            use = gr.Button(fixed("Restore"), size="sm", elem_classes=["restore"])
        use.click(restore, form.output.picture, outputs, preprocess=False, **QUIET)
    arrived = page.load(arrive, [form.kept for form in by_mode.values()], outputs, **QUIET)
    for form in by_mode.values():
        if form.refresh:
            arrived = arrived.then(*form.refresh, **RAW)
    # Not on a GET, which whoever looks whether the server is alive asks for too.
    arrived.then(None, None, None, js=READY_JS, **QUIET).then(ready, None, None, queue=False, **QUIET)


def _named(refused: Mapping[str, str], say: Say) -> dict[str, str]:
    return {field_name(name, say): value for name, value in refused.items()}


def _told(sentence: str, left_out: Mapping[str, str], say: Say) -> str:
    """Return a text on what was done, with the names of what could not be."""
    # With the time: the same sentence, said again, is seen again.
    html = f'<p data-at="{time.monotonic_ns()}">{escape(sentence)}</p>'
    if left_out:
        listed = ", ".join(f"{name}: {value}"[:80] for name, value in islice(left_out.items(), MOST_TOLD))
        listed += ", …" if len(left_out) > MOST_TOLD else ""
        html += f'<p class="note">{escape(say("Not restored: {names}", names=listed))}</p>'
    return html
