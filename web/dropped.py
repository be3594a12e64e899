"""A file that is dropped beside the fields for files goes where it belongs: a LoRA to its slot, a picture to a field.

What can be meant in several ways is asked once: a picture that carries settings may restore them, or be drawn from.
"""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from PIL import Image, UnidentifiedImageError

from core import metadata
from core.errors import RequestError
from core.upload import IMAGE_FILE
from web.endpoints import uploaded
from web.fields import QUIET, Update
from web.form import RAW, Form
from web.language import Say, say_to
from web.words import failed

RESTORE = "restore"
TITLES = {RESTORE: "Restore settings", "controlnet": "Use as control", "upscale": "Upscale this"}

WHERE_JS = """(file) => [file, document.querySelector('[role="tab"].selected').dataset.tabId]"""


def lay_out() -> gr.UploadButton:
    """Make what web/assets/page.js hands a dropped file to, where the page's header stands now."""
    return gr.UploadButton("", file_types=None, visible="hidden", elem_id="dropped")


def wire(
    upload: gr.UploadButton,
    told: gr.HTML,
    tabs: gr.Tabs,
    forms: Mapping[str, Form],
    restore: Callable[[dict[str, Any] | None, gr.Request], Update],
    restored: list[Block],
) -> None:
    """Wire what `lay_out` made.

    Args:
        upload: brings what is dropped.
        told: where it is said what was done, and asked what to do.
        tabs: the tabs.
        forms: their forms, by mode.
        restore: fills a form in from a picture.
        restored: what that changes.
    """
    held = gr.State()  # the picture that is asked about
    slots = [block for form in forms.values() for block in _slot_of(form)]
    images = [form.image for form in forms.values() if form.image]

    def place(file: dict[str, Any] | None, tab: str, visitor: gr.Request) -> Update:
        """Put a file where it belongs, or ask."""
        if file is None or tab not in forms:
            return {told: ""}
        path, say = Path(uploaded(file)), say_to(visitor)
        if path.suffix.lower() == ".safetensors":
            return to_slot(tab if forms[tab].slot else next(iter(forms)), str(path))
        if not _is_picture(path):
            return {told: failed(RequestError("image", path.name, IMAGE_FILE), say)}
        carries = _carries_settings(path)
        if not carries and forms[tab].image is not None:
            return to_image(tab, str(path))
        choices = TITLES if carries else {name: title for name, title in TITLES.items() if name != RESTORE}
        return {told: _question(choices, say), held: file}

    def to_image(mode: str, path: str) -> Update:
        image = forms[mode].image
        assert image is not None  # only such modes are offered
        return {image: path, tabs: gr.Tabs(selected=mode), told: ""}

    def to_slot(mode: str, path: str) -> Update:
        use, file, drawer = _slot_of(forms[mode])
        return {use: True, file: path, drawer: gr.Accordion(open=True), tabs: gr.Tabs(selected=mode), told: ""}

    def decide(event: gr.SelectData, file: dict[str, Any] | None, visitor: gr.Request) -> Update:
        """Do what the visitor has chosen."""
        if file is None or event.value not in TITLES:
            return {told: ""}
        return restore(file, visitor) if event.value == RESTORE else to_image(event.value, uploaded(file))

    outputs = [*restored, *slots, *images, held]
    upload.upload(place, [upload, told], outputs, js=WHERE_JS, **RAW)
    told.select(decide, held, outputs, **QUIET)


def _slot_of(form: Form) -> list[Block]:
    """Return the parts of a form's LoRA slot, and the drawer that it is in; empty where the mode takes none."""
    return [form.slot.use, form.slot.file, form.drawer.place] if form.slot and form.drawer else []


def _is_picture(path: Path) -> bool:
    """Whether a file begins as a picture does; what else may be wrong with it, its field says."""
    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True


def _carries_settings(path: Path) -> bool:
    try:
        return bool(metadata.read_picture(path).filled)
    except RequestError:
        return False


def _question(choices: Mapping[str, str], say: Say) -> str:
    buttons = "".join(
        f'<button type="button" value="{name}">{escape(say(title))}</button>' for name, title in choices.items()
    )
    return f'<p>{escape(say("What is this picture for?"))}</p><p class="asked">{buttons}</p>'
