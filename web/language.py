"""The page's languages: one file of `locales/` each, which maps the English sentences to that language's.

Fixed texts are translated in the browser, by Gradio; sentences that hold values are worded here, in the language that
the browser shows: the page's own from their values, the engine's from the English that it gives. What a file does not
have stays English.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import gradio as gr
from gradio.i18n import I18nData

from core.messages import Message

LOCALES = Path(__file__).parent / "locales"
COOKIE = "studio-language"  # set by web/assets/page.js whenever the page's language changes
LONGEST = 4_000  # characters of a sentence that is taken apart: a bound on the work


@dataclass(frozen=True, eq=False)
class Say:
    """Words sentences in one language, by its texts for English sentences; what it does not have stays English."""

    texts: Mapping[str, str]

    def __call__(self, sentence: str | Message, **values: object) -> str:
        """Return a message, or a sentence filled in with `values`, in this language."""
        if isinstance(sentence, Message):
            return sentence.render(lambda text: self.texts.get(text, text))
        worded = self.texts.get(sentence, sentence)
        return worded.format(**values) if values else worded

    def again(self, text: str) -> str:
        """Return an English text whose values are filled in already, as the engine's sentences are.

        It is taken apart by the sentence that it was made of; a value whose name begins with `said` is one itself, with
        `all_said` several, joined by semicolons.
        """
        if text in self.texts or len(text) > LONGEST:
            return self.texts.get(text, text)
        for pieces, worded in self._patterns:
            if (found := _taken_apart(text, pieces)) is not None:
                return worded.format(**{name: self._value(name, one) for name, one in found.items()})
        return text

    def _value(self, name: str, text: str) -> str:
        if name.startswith("all_said"):
            return self("; ").join(self.again(one) for one in text.split("; "))
        return self.again(text) if name.startswith("said") else text

    @cached_property
    def _patterns(self) -> list[tuple[list[tuple[str, str]], str]]:
        """The pieces of each sentence with values: first those that begin with words, of them those with most words."""
        made = [(list(_pieces(sentence)), worded) for sentence, worded in self.texts.items() if "{" in sentence]
        made.sort(key=lambda one: (not one[0][0][0], -sum(len(words) for words, _ in one[0])))
        return made


def _pieces(sentence: str) -> Iterator[tuple[str, str]]:
    """Take a sentence apart: its words, each with the name of the value that follows them; none follows the last."""
    name = None
    for words, name, _, _ in string.Formatter().parse(sentence):
        yield words, name or ""
    if name:
        yield "", ""


def _taken_apart(text: str, pieces: list[tuple[str, str]]) -> dict[str, str] | None:
    """Return the values in a text by name, each as short as can be; None where it is not the sentence of these pieces.

    What a regular expression with `.+?` for each value finds, which takes a power of the text's length for it.
    """
    (words, name), *rest = pieces
    values, place = {}, len(words)
    if not text.startswith(words):
        return None
    for words, following in rest:
        last = len(text) - len(words) if text.endswith(words) else -1
        end = text.find(words, place + 1) if following else last
        if end <= place or "\n" in text[place:end]:
            return None
        values[name] = text[place:end]
        place, name = end + len(words), following
    return values


english = Say({})

Words = Callable[[Say], str]  # what is said, as HTML, in whatever language it is asked for


@cache
def locales() -> Mapping[str, Mapping[str, str]]:
    """Return each language's texts by English sentence, under every tag that a browser may call the language."""
    texts: dict[str, Mapping[str, str]] = {"en": {}}
    for path in sorted(LOCALES.glob("*.json")):
        locale = json.loads(path.read_text(encoding="utf-8"))
        texts |= dict.fromkeys(locale["tags"], locale["texts"])
    return texts


def for_gradio() -> gr.I18n:
    """Return all languages for `launch(i18n=...)`: what holds no values, which is what the browser translates."""
    return gr.I18n(
        **{tag: {text: to for text, to in texts.items() if "{" not in text} for tag, texts in locales().items()}
    )


def fixed(sentence: str) -> I18nData:
    """Return a text of the page that is translated in the browser; it holds no values and no closing brace."""
    return I18nData(sentence)


@lru_cache(maxsize=64)  # tags come from visitors
def say_in(tag: str) -> Say:
    """Return what words sentences in a language; an unknown tag gets its main language, else English."""
    return Say(locales().get(tag) or locales().get(tag.split("-")[0], {}))


def say_to(visitor: gr.Request | None) -> Say:
    """Return what words sentences in the language that a visitor's page is shown in."""
    if visitor is None:
        return english
    chosen = dict(visitor.cookies).get(COOKIE)
    accepted = dict(visitor.headers).get("accept-language", "en").split(",")[0].split(";")[0].strip()
    return say_in(chosen or accepted)
