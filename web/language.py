"""The page's languages: one file of `locales/` each, which maps English templates to that language's.

Fixed texts are translated in the browser, by Gradio; what holds values is put into words here, in the language that the
browser shows. What a file does not have stays English.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import gradio as gr
from gradio.i18n import I18nData

from core.messages import Message
from engine.fair_queue import UNLIMITED
from web.clients import caller
from web.names_only import names_only

LOCALES = Path(__file__).parent / "locales"
COOKIE = "studio-language"  # set by web/assets/page.js whenever the page's language changes


@dataclass(frozen=True, eq=False)
class Say:
    """Puts texts into one language, by its texts for English templates.

    Attributes:
        texts: what that language has for English templates.
        tag: what it is called, as browsers do.
        with_paths: whether its reader may learn where files lie: who sits at this machine may.
    """

    texts: Mapping[str, str]
    tag: str = "en"
    with_paths: bool = False

    def __call__(self, text: str | Message, **values: object) -> str:
        """Return a message, or a template filled in with `values`, in this language."""
        message = text if isinstance(text, Message) else Message("page", text, **values)
        if not self.with_paths:
            message = names_only(message)
        return message.render(lambda template: self.texts.get(template, template))


english = Say({})

Words = Callable[[Say], str]  # a text as HTML, in whatever language it is asked for


@cache
def locales() -> Mapping[str, Mapping[str, str]]:
    """Return each language's texts by English template, under every tag that a browser may call the language."""
    texts: dict[str, Mapping[str, str]] = {"en": {}}
    for path in sorted(LOCALES.glob("*.json")):
        locale = json.loads(path.read_text(encoding="utf-8"))
        texts |= dict.fromkeys(locale["tags"], locale["texts"])
    return texts


@cache
def named() -> Mapping[str, str]:
    """Return what each language calls itself, by the tag that the page asks Gradio for it by: the first of its file."""
    files = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(LOCALES.glob("*.json")))
    return {"en": "English", **{locale["tags"][0]: locale["name"] for locale in files}}


def for_gradio() -> gr.I18n:
    """Return all languages for `launch(i18n=...)`: what holds no values, which is what the browser translates."""
    return gr.I18n(
        **{tag: {text: to for text, to in texts.items() if "{" not in text} for tag, texts in locales().items()}
    )


def fixed(text: str) -> I18nData:
    """Return a text of the page that is translated in the browser; it holds no values and no closing brace."""
    return I18nData(text)


@lru_cache(maxsize=64)  # tags come from visitors
def say_in(tag: str, with_paths: bool = False) -> Say:
    """Return what puts texts into a language; an unknown tag gets its main language, else English."""
    spoken = tag if tag in locales() else tag.split("-")[0]
    return Say(locales()[spoken], spoken, with_paths) if spoken in locales() else Say({}, with_paths=with_paths)


def say_to(visitor: gr.Request | None) -> Say:
    """Return what puts texts into the language that a visitor's page is shown in, with paths if they sit here."""
    if visitor is None:
        return english
    chosen = dict(visitor.cookies).get(COOKIE)
    accepted = dict(visitor.headers).get("accept-language", "en").split(",")[0].split(";")[0].strip()
    return say_in(chosen or accepted, caller(visitor)[0] == UNLIMITED)
