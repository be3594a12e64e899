"""Notes on what the miniature adds to a prompt or does not know, and example prompts for each kind of weights."""

from __future__ import annotations

import mini.config
from core.messages import Message
from core.request import PREPROCESSORS, Preprocessor
from core.sizes import WeightsKind
from mini.everyday import understood
from mini.prompt import complete, foreign_colours


def completed(prompt: str, seed: int, kind: WeightsKind) -> tuple[str, list[Message]]:
    """Return the prompt to draw: for the miniature, completed by the seed with size, place and direction."""
    if kind != "mini":
        return prompt, []
    made = complete(prompt, seed)
    if not made.words:
        return prompt, []
    text = "The seed chose what the prompt leaves open: {words}."
    words = [Message.word(word) for word in made.words]
    return made.text, [Message("seed_chose", text, words=words, prompt=made.text)]


def in_known_words(prompt: str, kind: WeightsKind) -> tuple[str, list[Message]]:
    """Return a prompt with everyday words put as the miniature knows them, and notes on these and on what it cannot."""
    if kind != "mini":
        return prompt, []
    found, notes = understood(prompt), []
    if found.instead:
        pairs = [f"{said} → {drawn}" for said, drawn in found.instead.items()]
        notes.append(Message("understood", "Drawn as what the miniature knows: {pairs}.", pairs=pairs))
    for thing, colour in foreign_colours(found.text):
        text = "The miniature draws “{thing}” in its own colours only, not in “{colour}”."
        notes.append(Message("own_colours", text, thing=Message.word(thing), colour=Message.word(colour)))
    return found.text, [*notes, *_unknown_words(found.text)]


def untaught_control(preprocessor: Preprocessor, kind: WeightsKind) -> list[Message]:
    """Return a note on a preprocessor that the miniature was not taught."""
    if kind != "mini" or preprocessor in (*mini.config.CONTROLS, "none"):
        return []
    known = [Message.word(PREPROCESSORS[name].title) for name in mini.config.CONTROLS]
    text = "The miniature was not taught {preprocessor}. It knows {known}."
    title = Message("preprocessor", PREPROCESSORS[preprocessor].title)
    return [Message("unknown_control", text, preprocessor=title, known=known)]


def _unknown_words(prompt: str) -> list[Message]:
    """Return a note on words of the prompt that the miniature was not taught."""
    unknown = mini.config.unknown_words(prompt)
    if not unknown:
        return []
    return [
        Message(
            "unknown_words",
            "The miniature does not know: {words}. It knows things on a plain background, such as {things}; their "
            "colours, sizes, places and small numbers.",
            words=unknown,
            things=mini.config.known_things()[::32],
        ),
    ]


# What the empty page shows, with the seed of each picture; docs/mosaic.py draws them.
MOSAIC: tuple[tuple[str, int], ...] = (
    ("a red apple in the center on a blue background", 7),
    ("a fox and a lion on a green background", 7),
    ("a small owl in the center on a yellow background", 3),
    ("three turtles on a purple background", 5),
    ("a medium cupcake in the center on a pink background", 4),
    ("a butterfly above a sunflower on a white background", 3),
    ("a small rocket in the center on a black background", 8),
    ("four strawberries on a yellow background", 2),
    ("a penguin and a duck on a blue background", 5),
    ("two cats on a gray background", 1),
    ("a small crab in the center on a turquoise background", 6),
    ("a doughnut and a croissant on a brown background", 2),
)

# What each kind of weights draws well; shown on the page to start from.
EXAMPLES: dict[WeightsKind, tuple[str, ...]] = {
    "mini": tuple(prompt for prompt, _ in MOSAIC),
    "full": (
        "A cat asleep on a warm windowsill, 35 mm photograph",
        "A lighthouse in a storm, ink and watercolour",
        'A shop window with a neon sign that says "OPEN LATE"',
    ),
}
