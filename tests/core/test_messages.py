"""Messages: English by default, any language where they are shown, whole after a journey between processes."""

import pickle

from core.errors import QueueFull, RequestError
from core.messages import Message, plain

GERMAN = {
    "{count} pictures of {thing}": "{count} Bilder von {thing}",
    "a fox": "einem Fuchs",
    "; ": " – ",
    "why: {reasons}": "Grund: {reasons}",
    "it is red": "rot",
}


def german(text: str) -> str:
    return GERMAN.get(text, text)


def test_a_message_is_english_until_it_is_translated_with_its_values() -> None:
    message = Message("count", "{count} pictures of {thing}", count=2, thing=Message("thing", "a fox"))
    assert str(message) == "2 pictures of a fox"
    assert message.render(german) == "2 Bilder von einem Fuchs"


def test_lists_are_joined_and_messages_in_them_translated() -> None:
    reasons = Message("why", "why: {reasons}", reasons=[Message("red", "it is red"), Message("new", "it is new")])
    assert str(reasons) == "why: it is red; it is new"
    assert reasons.render(german) == "Grund: rot – it is new"
    assert str(Message("names", "{names}", names=("a", "b"))) == "a, b"


def test_values_are_never_templates_nor_translated() -> None:
    message = Message("unknown", "{words} and {share:.0%}", words="{0} a fox", share=0.5)
    assert message.render(german) == "{0} a fox and 50%"
    assert str(Message("braces", "{not a template}")) == "{not a template}"


def test_a_message_and_its_error_travel_whole() -> None:
    error = RequestError("steps", 0, Message("range", "a number from {low}", low=1))
    assert pickle.loads(pickle.dumps(error.message)) == error.message
    assert str(error) == "steps: 0 is not possible; allowed: a number from 1"
    assert QueueFull(3).message.code == "queue_full"


def test_json_gets_the_english_of_each_message() -> None:
    message = Message("thing", "a fox")
    assert plain({"a": [message, 1], "b": (message,)}) == {"a": ["a fox", 1], "b": ["a fox"]}
