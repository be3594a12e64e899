"""Where files lie on this machine is told to its own users only: everybody else gets the files' names.

Texts for visitors pass through here before they are worded: `web.language.Say` for the page, `web.endpoints` and
`web.api_errors` for programs, which always get names. The log has the whole text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any, TypeVar

from core.events import Failure
from core.messages import Message

log = logging.getLogger(__name__)

Told = TypeVar("Told")

_ROOT = r"(?:file://)?(?:~?/|[A-Za-z]:[\\/]|\\\\)"
# What begins with a path is one, spaces and all …
_WHOLE = re.compile(r"(?:(?:file://)?/(?=[^\s/]+(?:/|$))|~/|[A-Za-z]:[\\/]|\\\\)(?:[^\n]*[\\/](?=[^\\/\n]))?")
_ON = r"(?:is|are|and|or|was|cannot|could)"
_SENTENCE = re.compile(rf"[;:,?!] | {_ON} ")  # … unless it goes on like this
_QUOTED = re.compile(rf"(['\"`]){_ROOT}(?:(?!\1)[^\n])*[\\/]((?:(?!\1)[^\\/\n])+)\1")
_NAME = r"[^\s\\/'\"`<>(),;:]+"
_SPACED = rf"{_NAME}(?: (?!{_ON}\b){_NAME}){{0,8}}"  # what stands between two separators, spaces and all
_FIRST = rf"(?:file://)?(?:/{_NAME}|(?:~/|[A-Za-z]:[\\/]|\\\\){_SPACED})[/\\]"  # "/imagine a 3/4 view" is none
_BARE = re.compile(rf"(?<![\w.:/\\<~]){_FIRST}(?:{_SPACED}[/\\])*(?={_NAME})")  # two names at least: "/v1" is none


def names_only(told: Told) -> Told:
    """Return a text, a message, a failure, or values of these, with each absolute path cut to its last name."""
    cut: Told = _cut(told)
    if cut != told:
        log.info("told without paths: %s", told.message if isinstance(told, Failure) else told)
    return cut


def _cut(value: Any) -> Any:
    match value:
        case str():
            return _cut_text(value)
        case PurePath():
            return value.name
        case Failure():
            return replace(value, message=_cut(value.message), values=_cut(value.values))
        case Message():
            text = value.text if value.values else _cut_text(value.text)  # a template holds no paths
            return Message(value.code, text, **_cut(value.values))
        case Mapping():
            return {name: _cut(item) for name, item in value.items()}
        case list() | tuple():
            return type(value)(_cut(item) for item in value)
    return value


def _cut_text(text: str) -> str:
    if "/" not in text and "\\" not in text:
        return text
    if not _SENTENCE.search(text) and (begins := _WHOLE.match(text)):
        text = text[begins.end() :]
    return _BARE.sub("", _QUOTED.sub(r"\1\2\1", text))
