"""The page: what a visitor sees and presses, and the endpoints that programs call by name.

Data flows one way: a tab's form becomes a request, the engine turns it into events, each event becomes what the page
shows. Each tab is a module of its own.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from core import metadata
from core.errors import RequestError
from core.request import MODES, Model, TextToImage
from engine import Engine
from web import dropped, real_model, situation, theme
from web.endpoints import publish_inspect, uploaded
from web.fields import QUIET, REWORD_JS, Field, Update
from web.form import RAW, Form
from web.language import fixed, named, say_to
from web.malformed import CheckedBlocks
from web.output import Output
from web.restore import lay_out, wire
from web.tabs import TABS
from web.words import weights_sentence

# As `web.fields.REWORD_JS`, with the tab that is open.
WEIGHTS_JS = """
const open = () => document.querySelector('[role="tab"].selected').dataset.tabId;
addEventListener("studio-language", () => trigger("input", { mode: open() }));
"""

# What web/assets/page.js says, in the page's language.
SPOKEN = {
    "picture": "Picture",
    "close": "Close",
    "before": "Previous picture",
    "after": "Next picture",
    "drop": "Drop a picture or a LoRA anywhere",
    "copied": "Copied",
    "refused": "Not copied: this browser does not allow it.",
}

HEAD = f'''<meta name="color-scheme" content="dark"><script src="{theme.ASSETS_URL}/page.js" defer></script>'''


def build(engine: Engine, manager: real_model.Manager | None = None) -> gr.Blocks:
    """Return the page. Nothing is loaded before a visitor's browser shows it, and nothing is drawn unasked.

    Args:
        engine: what draws.
        manager: who may fetch the real model from the page; nobody where there is none.
    """
    # Pictures are copied to Gradio's cache to be served; they go after an hour, ten minutes after their visitor
    # (web/visits.py), and when the server stops.
    page = CheckedBlocks(title=theme.TITLE, analytics_enabled=False)
    with page:
        with gr.Row(elem_id="top"):
            gr.HTML(
                f'<h1>{theme.TITLE}<span class="stop">.</span></h1><p id="said" role="status"></p>', elem_id="brand"
            )
            panel = real_model.lay_out() if manager else None
            weights_line = gr.HTML(js_on_load=WEIGHTS_JS, elem_id="weights", elem_classes=["weights"])
            restore, restored = lay_out()
            upload = dropped.lay_out()
            gr.HTML(_switch(), elem_id="languages")
            spoken = gr.HTML(_spoken(), js_on_load=REWORD_JS, elem_id="words")
        forms: dict[str, Form] = {}
        places: list[gr.Tab] = []
        with gr.Tabs() as tabs:
            for tab in TABS:
                with gr.Tab(fixed(tab.title), id=tab.mode.mode) as place:
                    forms[tab.mode.mode] = tab.lay_out(engine, place, weights_line)
                places.append(place)
        for form in forms.values():
            for tab in TABS:
                if tab.offer:
                    _hand_over(form.output, tab.offer, tabs, forms[tab.mode.mode])
        _reword_weights(engine, weights_line, forms[TextToImage.mode].fields["model"], places)
        gr.on([page.load, spoken.input], _spoken, None, spoken, **QUIET)
        wire(page, restore, upload, restored, tabs, list(forms.values()), engine.warm_up)
        if panel and manager:
            real_model.wire(page, panel, manager, engine, forms[TextToImage.mode])
        for tab in TABS:
            tab.publish(engine)
        publish_inspect()
    # The engine owns the one queue, which is fair and bounded; Gradio's own must not stand before it.
    # Nor is there a way around it: Gradio's would begin a run and leave it, its turn held.
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def _hand_over(drawn: Output, label: str, tabs: gr.Tabs, to: Form) -> None:
    """Offer a finished picture to another tab, whose mode starts from an image."""
    with drawn.others:
        use = gr.Button(fixed(label), size="sm", elem_classes=[f"to-{to.mode.mode}"])
    assert to.image is not None
    image, prompt = to.image, to.fields["prompt"]
    takes_prompt = to.mode.model_fields["prompt"].is_required()  # else its own says what a refinement should add

    def use_it(picture: dict[str, Any] | None) -> Update:
        if picture is None:
            return {image: gr.skip()}
        try:
            told = metadata.read_picture(Path(uploaded(picture))).values.get("prompt")
        except RequestError:  # swept away after an hour
            return {image: gr.skip()}
        handed: Update = {tabs: gr.Tabs(selected=to.mode.mode), image: uploaded(picture)}
        return handed | ({prompt: told} if takes_prompt and told else {})

    use.click(use_it, drawn.picture, [tabs, image, prompt], **RAW)


def _reword_weights(engine: Engine, weights_line: gr.HTML, model_field: Field, places: list[gr.Tab]) -> None:
    """Show in another language which weights draw in the tab that is open.

    Gradio leaves the name of a tab that was not opened yet as it was, so the names come along.
    """

    def reword(chosen: Model, event: gr.EventData, visitor: gr.Request) -> Update:
        mode = MODES.get(event.mode, TextToImage)
        model = chosen if mode is TextToImage else mode.usual_model()
        say = say_to(visitor)
        names: Update = {place: gr.Tab(say(tab.title)) for place, tab in zip(places, TABS, strict=True)}
        return {weights_line: weights_sentence(situation.Situation.of(engine, mode, model), say), **names}

    weights_line.input(reword, model_field, [weights_line, *places], **QUIET)


def _spoken(visitor: gr.Request | None = None) -> str:
    """Return what the page's own JavaScript says: Gradio translates no more than one text of a component."""
    say = say_to(visitor)
    return "".join(f'<span id="word-{key}" hidden>{say(text)}</span>' for key, text in SPOKEN.items())


def _switch() -> str:
    """Return a button for each language that the whole page speaks; which one is pressed, web/assets/page.js knows."""
    names = (
        f'<button type="button" data-language="{tag}" lang="{tag}">{name}</button>' for tag, name in named().items()
    )
    return f'<div class="switch" role="group" aria-label="Language, 语言">{"".join(names)}</div>'
