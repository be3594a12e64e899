"""The page's languages: one file of `locales/` each, which maps the English sentences to that language's.

Fixed texts are translated in the browser, by Gradio; sentences that hold values are worded here, in the language that
the browser shows. What a file does not have stays English. Knows nothing of what the sentences are about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import gradio as gr
from gradio.i18n import I18nData

FOLDER = Path(__file__).parent / "locales"
COOKIE = "studio-language"  # set by assets/page.js whenever the page's language changes

Say = Callable[..., str]  # say(sentence, name=value): the sentence in the visitor's language, filled in


@cache
def locales() -> Mapping[str, Mapping[str, str]]:
    """Return each language's texts by English sentence, under every tag that a browser may call the language."""
    texts: dict[str, Mapping[str, str]] = {"en": {}}
    for path in sorted(FOLDER.glob("*.json")):
        locale = json.loads(path.read_text(encoding="utf-8"))
        texts |= dict.fromkeys(locale["tags"], locale["texts"])
    return texts


def for_gradio() -> gr.I18n:
    """Return all languages for `launch(i18n=...)`."""
    return gr.I18n(**{tag: dict(texts) for tag, texts in locales().items()})


def fixed(sentence: str) -> I18nData:
    """Return a text of the page that is translated in the browser; it holds no values and no closing brace."""
    return I18nData(sentence)


def english(sentence: str, **values: object) -> str:
    """Fill in a sentence, as `Say` for English."""
    return sentence.format(**values) if values else sentence


def say_in(tag: str) -> Say:
    """Return what words sentences in a language; an unknown tag gets its main language, else English."""
    texts = locales().get(tag) or locales().get(tag.split("-")[0], {})
    return lambda sentence, **values: english(texts.get(sentence, sentence), **values)


def say_to(visitor: gr.Request | None) -> Say:
    """Return what words sentences in the language that a visitor's page is shown in."""
    if visitor is None:
        return english
    chosen = dict(visitor.cookies).get(COOKIE)
    accepted = dict(visitor.headers).get("accept-language", "en").split(",")[0].split(";")[0].strip()
    return say_in(chosen or accepted)
