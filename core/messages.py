"""Messages: texts that are worded where they are shown, in the reader's language.

Errors, notes, stages and reasons carry a `Message`: an English template with the values that belong into it. What
shows it asks `Message.render` with a translation of templates; `str()` gives the English. So nothing takes a finished
sentence apart to translate it, and a message travels between processes with its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Translate = Callable[[str], str]  # an English template -> the same in another language, or as it is


@dataclass(frozen=True, init=False)
class Message:
    """One translatable text.

    Attributes:
        code: what a program branches on; stays when the text is improved.
        text: the English, a template of `str.format` with named places, which is also its key in a locale file.
        values: what belongs into the places: numbers, strings, messages, or lists of these. Lists of messages are
            joined by semicolons, others and single words by commas.
    """

    code: str
    text: str
    values: Mapping[str, Any] = field(hash=False)

    def __init__(self, code: str, text: str, /, **values: Any) -> None:
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        return self.render(str)

    @classmethod
    def word(cls, text: str) -> Message:
        """Return a single word or a name, which is listed with commas like one that no language translates."""
        return cls("word", text)

    def render(self, translate: Translate) -> str:
        """Return the text with its values, templates translated by `translate`, those of its values too."""
        text = translate(self.text)
        # Without values it is no template, and may hold braces of its own.
        shown = {name: _shown(value, translate) for name, value in self.values.items()}
        return text.format(**shown) if shown else text


def plain(value: Any) -> Any:
    """Return a value, or a container of values, with each message in it in English: what JSON can hold."""
    if isinstance(value, Message):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _shown(value: Any, translate: Translate) -> Any:
    """Return what a template is filled with: a number stays one, for a template may say how it is written."""
    if isinstance(value, Message):
        return value.render(translate)
    if isinstance(value, list | tuple):
        sentences = any(isinstance(item, Message) and item.code != "word" for item in value)
        separator = "; " if sentences else ", "
        return translate(separator).join(str(_shown(item, translate)) for item in value)
    return value
