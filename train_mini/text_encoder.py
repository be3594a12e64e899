"""Trains the miniature's tokenizer and text encoder.

The text encoder is aligned with the pictures, as CLIP is: the last tokens of the chat template regress a fixed code of
what the caption says. Then it is frozen, and the transformer only has to learn a nearly linear map from code to
picture; with a cross-entropy on labels instead it needed twice the steps.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import mini.prompt
from core.whole_file import replacing
from mini.config import TEXT_ENCODER_CONFIG
from mini.models import MiniTextEncoder

from . import autoencoder, chinese
from .captions import EVERYTHING, TEST_TEMPLATES, Caption, Said, describe, plural, random_caption
from .loop import Training, load_rounded, trained
from .scenes import Painter, Scene, fetch_icons, kind_of, test_scenes, training_scenes
from .things import (
    ARRANGEMENTS,
    BACKGROUND_NAMES,
    BACKGROUNDS,
    COLOUR_NAMES,
    COLOURS,
    PLACE_NAMES,
    PLACES,
    SIZE_NAMES,
    THINGS,
    WAY_NAMES,
)
from .vocabulary import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = TypeVar("Key")

logger = logging.getLogger(__name__)

STEPS, BATCH, LEARNING_RATE = 4000, 64, 3e-3
ERASED = 0.25  # weight of the error of all other tokens, which should say nothing
LAST_TOKENS = 5  # <|im_end|> newline <|im_start|> assistant newline: present whatever the prompt is
THING_DIMS, BACKGROUND_DIMS, SIZE_DIMS = 92, 16, 16  # with a mark of 4 the hidden size of 128

# What people put between words, and what says nothing here.
MARKS = (";", ":", " -", " --", "!", "?", "...", ",", " /", " |", " (", ")", " +", " *", " #", " =", "'", ' "')
CHINESE_MARKS = ("；", "：", "！", "？", "。", "、", "，", "（", "）", "“", "”", "·", "~", " ")

# Qwen3's special tokens that a chat without tools or pictures can meet.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# The pre-tokenizer's pattern of Qwen2 and Qwen3.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Renders what Qwen3's own template renders for chats of plain text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(work: Path) -> Path:
    """Train a byte-level BPE on captions and save the tokenizer folder; a finished one is kept."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    target = work / "tokenizer"
    if (target / "tokenizer.json").exists():
        return target
    rng = random.Random(1)
    scenes, idle = balanced_scenes(), idle_words(work)
    corpus = [decorate(random_caption(rng.choice(rng.choice(scenes)), rng), rng, idle).text for _ in range(30000)]
    corpus += ["system\nuser\nassistant\n"] * 2000
    for name in names():  # every known word becomes one token, with and without a space before it
        corpus += [name, " " + name, plural(name), " " + plural(name)] * 20
    for group in (chinese.THING_NAMES, chinese.COLOUR_NAMES, chinese.WAY_NAMES, chinese.PLACE_NAMES):
        corpus += [name for all_names in group.values() for name in all_names] * 60
    tokenizer = Tokenizer(models.BPE())
    # Unlike Qwen's: letters are folded to lower case, since with so few captions capitals cost accuracy.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_ENCODER_CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=TEXT_ENCODER_CONFIG["max_position_embeddings"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(target)
    return target


def load_tokenizer(work: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer as the pipeline does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work / "tokenizer")


def names() -> list[str]:
    """Return all English names that a caption may use, of things, colours, sizes and places."""
    groups = (THINGS, BACKGROUND_NAMES, COLOUR_NAMES, SIZE_NAMES, WAY_NAMES, PLACE_NAMES)
    return [name for group in groups for all_names in group.values() for name in all_names]


def balanced_scenes() -> list[list[Scene]]:
    """Return training scenes by kind, single things three times: draw a kind, then a scene of it."""
    kinds: dict[str, list[Scene]] = {}
    for scene in training_scenes():
        kinds.setdefault(kind_of(scene), []).append(scene)
    return [kinds["single"], kinds["single"], kinds["single"], kinds["coloured"], kinds["pair"], kinds["pair"],
            kinds["count"]]  # fmt: skip


def idle_words(work: Path) -> list[str]:
    """Return words that name nothing here: the words of other icons' names, in a fixed order."""
    known = {word for name in names() for word in (*name.split(), *plural(name).split())}
    words = {w for name in fetch_icons(work, "fluent") for w in name.split("-") if w.isalpha() and len(w) > 2}
    return sorted(words - known)


@cache
def long_names() -> re.Pattern[str]:
    """Match the English names of several words."""
    words = {form for name in names() for form in (name, plural(name)) if " " in form}
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)), re.IGNORECASE)


@cache
def stray_characters() -> tuple[str, ...]:
    """Return the Chinese characters that no name and no sentence of training or evaluation has.

    Of the 3,755 most used ones, which are the first level of GB 2312.
    """
    every = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF) for byte in (high, low))
    ours = set("".join(str(value) for value in vars(chinese).values()))
    return tuple(sorted(set(every.decode("gb2312", errors="ignore")) - ours))


def splits_name(text: str, position: int) -> bool:
    """Say whether a break at `position` would split a name of several words, such as "ice cream"."""
    return any(m.start() < position < m.end() for m in long_names().finditer(text))


def sprinkle(text: str, rng: random.Random, idle: list[str]) -> str:
    """Put words that the miniature does not know around a text, and marks between its words."""
    in_chinese = any(char > "\u2e7f" for char in text)
    for _ in range(rng.randint(1, 3)):
        if in_chinese:
            stray = "".join(rng.choice(stray_characters()) for _ in range(rng.randint(1, 4)))
            borders = [0, len(text), *(m.end() for m in re.finditer("[，。]", text))]
            place = rng.choice(borders)
            text = text[:place] + (stray if rng.random() < 0.7 else rng.choice(CHINESE_MARKS)) + text[place:]
        elif rng.random() < 0.5:
            text = rng.choice((f"{rng.choice(idle)} {text}", f"{text} {rng.choice(idle)}"))
        else:
            borders = [m.start() for m in re.finditer(r"[ ,.]|$", text) if not splits_name(text, m.start())]
            place = rng.choice(borders)
            text = text[:place] + rng.choice(MARKS) + text[place:]
    return text


def decorate(caption: Caption, rng: random.Random, idle: list[str]) -> Caption:
    """Change what a person might change: letter case, marks, and a few words that the miniature does not know."""
    text = caption.text
    if text and caption.said.thing and rng.random() < 0.35:
        text = sprinkle(text, rng, idle)
    draw = rng.random()
    text = text.upper() if draw < 0.02 else text.title() if draw < 0.06 else text
    return Caption(text, caption.said)


def completed(caption: Caption, rng: random.Random, known: dict[str, Any], share: float = 0.33) -> Caption:
    """Let a seed say what a caption leaves open, as the app does, in a share of cases."""
    if caption.said.arrangement != "one" or rng.random() > share:
        return caption
    made, said = mini.prompt.complete(caption.text, rng.getrandbits(32), known), caption.said
    says = {"size": said.size or made.size, "place": said.place or made.place}
    return Caption(made.text, replace(said, **says, mirrored=said.mirrored or made.mirrored))


def hadamard(size: int) -> torch.Tensor:
    """Return rows of +-1 that are orthogonal to each other: float32 [size, size], size a power of 2."""
    h = torch.tensor([[1.0]])
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


class Codes:
    """The fixed codes of a caption: 128 numbers with a root mean square of 1 for each of the last tokens.

    Four tokens carry [thing | background | size | mark]: two of them the first thing of a pair, two the second, all the
    same thing where there is no pair; the fifth says how they are laid out: [x | y | arrangement | colour | background
    | size | mark]. The mark tells the three kinds apart, and in the fifth what is mirrored. A mirrored thing has the
    code of its own picture flipped: the transformer, which can read codes, need not learn to flip pictures.
    """

    FIRST, SECOND, LAYOUT = (0, 3), (1, 4), 2  # which of the last tokens carry what

    def __init__(self, work: Path) -> None:
        painter, device = Painter(work), torch.device("cpu")
        model = autoencoder.load(work, device)
        scenes = [Scene(thing, "gray", "medium", mirrored=way) for way in (False, True) for thing in THINGS]
        latents = autoencoder.encode(model, painter, scenes, device).float().flatten(1)
        latents = latents - latents[: len(THINGS)].mean(0)
        # The square root of the singular values keeps small differences between things alive.
        _, s, v = torch.linalg.svd(latents[: len(THINGS)], full_matrices=False)
        code = (latents @ v[:THING_DIMS].T) / s[:THING_DIMS].sqrt()
        code = code / code.square().mean(1, keepdim=True).sqrt()
        self.thing = dict(zip(THINGS, code, strict=False))
        self.mirrored = dict(zip(THINGS, code[len(THINGS) :], strict=True))
        h, wide = hadamard(16), hadamard(32)
        self.background = {name: h[i + 1] for i, name in enumerate(BACKGROUNDS)}
        self.size = {"small": -h[10], "medium": h[10], "large": h[5]}
        self.step = {0: h[1], 1: h[2], 2: h[4]}
        self.arrangement = {name: h[i + 8] for i, name in enumerate(("one", *ARRANGEMENTS))}
        self.way = {False: -h[0], True: h[3]}
        self.colour = {name: wide[i + 1] for i, name in enumerate(COLOURS)}
        # What every other token says: nothing. Whatever the wording, the transformer then sees the same.
        self.idle = hadamard(128)[85]

    def __call__(self, said: Said) -> torch.Tensor:
        """Return float32 [LAST_TOKENS, 128]; what is left open is zero, the mark keeps an empty caption from zero."""

        def look(table: Mapping[Key, torch.Tensor], key: Key | None) -> torch.Tensor:
            return table[key] if key is not None else torch.zeros_like(next(iter(table.values())))

        several = said.arrangement not in (None, "one") or said.second
        size = look(self.size, "small" if several else said.size)
        background = look(self.background, said.background)
        rows = torch.empty(LAST_TOKENS, 128)
        for tokens, thing, mark in (
            (self.FIRST, said.thing, (1, 1, 1, 1)),
            (self.SECOND, said.second or said.thing, (1, 1, -1, -1)),
        ):
            things = self.mirrored if said.mirrored else self.thing
            rows[list(tokens)] = torch.cat([look(things, thing), background, size, 2.0 * torch.tensor(mark)])
        x, y = PLACES[said.place] if said.place else (None, None)
        rows[self.LAYOUT] = torch.cat(
            [look(self.step, x), look(self.step, y), look(self.arrangement, said.arrangement),
             look(self.colour, said.colour), background, size, self.way[bool(said.mirrored)]]
        )  # fmt: skip
        return rows / rows.square().mean(1, keepdim=True).sqrt()


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, int64 [B, L], through the chat template as the pipeline makes them."""
    mark = "\ue000"  # the template is rendered once and the texts are put in its place: hundreds of times faster
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert isinstance(chat, str)
    tokens = tokenizer([chat.replace(mark, text) for text in texts], padding=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def states(model: MiniTextEncoder, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMS-normed states.

    Returns:
        those of the last tokens that are no padding, float [B, LAST_TOKENS, 128], and those of all others, [N, 128].
    """
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    hidden = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    lengths = mask.sum(1, keepdim=True)
    positions = lengths - LAST_TOKENS + torch.arange(LAST_TOKENS, device=mask.device)
    last = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return last, hidden[torch.arange(hidden.shape[1], device=mask.device) < lengths - LAST_TOKENS]


def matrix_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it faster than float32, else float32, as a short measurement shows."""
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 512).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


def train(work: Path, device: torch.device, steps: int = STEPS) -> None:
    """Train the text encoder, save `work/text_encoder.pt`; a finished file is kept."""
    target = work / "text_encoder.pt"
    if target.exists():
        return
    train_tokenizer(work)
    torch.manual_seed(0)
    rng = random.Random(2)
    tokenizer, codes, idle = load_tokenizer(work), Codes(work), idle_words(work)
    scenes, known = balanced_scenes(), vocabulary()
    model = MiniTextEncoder().to(device)
    start_file = work / "text_encoder_start.pt"
    if start_file.exists():
        model.load_state_dict(torch.load(start_file, map_location=device, weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    mixed = matrix_dtype(device) == torch.bfloat16

    def rate(step: int) -> float:
        return LEARNING_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def loss(step: int) -> torch.Tensor:
        # long captions come in separate batches, else padding would triple the work
        long = float(step % 8 == 7)
        captions = [random_caption(rng.choice(rng.choice(scenes)), rng, 0.02, long) for _ in range(BATCH)]
        captions = [completed(decorate(c, rng, idle), rng, known) for c in captions]
        ids, mask = tokenize(tokenizer, [c.text for c in captions])
        wanted = torch.stack([codes(c.said) for c in captions]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            state, others = states(model, ids.to(device), mask.to(device))
        coded = (state.float() - wanted).square().mean()
        erased = (others.float() - codes.idle.to(device)).square().mean()
        if step % 100 == 0:
            logger.info("text encoder mse of the codes %.4f, of all other tokens %.4f", coded.item(), erased.item())
        return coded + ERASED * erased

    with trained(Training(target, model, [(optimizer, rate)], steps, loss, [rng])), replacing(target) as file:
        torch.save(model.state_dict(), file)


def load(work: Path, device: torch.device) -> MiniTextEncoder:
    """Load the trained text encoder with weights rounded to bf16, as the exported file holds them."""
    return load_rounded(MiniTextEncoder(), work / "text_encoder.pt", device)


@torch.no_grad()
def evaluate(work: Path, device: torch.device, count: int = 600) -> dict[str, float]:
    """Return the shares of what captions of held-out scenes say that are read correctly, by the nearest code.

    Keys are a field of `Said` with the kind of caption: of training's wordings, of wordings held out, in Chinese, and
    with the layout left to a seed.
    """
    rng = random.Random(3)
    tokenizer, codes, model = load_tokenizer(work), Codes(work), load(work, device)
    scenes = [scene for kind in ("single", "coloured", "pair", "count") for scene in test_scenes(kind, count // 4)]
    layout: dict[str, tuple[int, Mapping[Any, torch.Tensor]]] = {
        "arrangement": (32, codes.arrangement),
        "colour": (48, codes.colour),
        "background": (80, codes.background),
        "mirrored": (112, codes.way),
    }
    result: dict[str, float] = {}
    known = vocabulary()
    for wording, templates, in_chinese in (
        ("usual", None, False),
        ("held out", TEST_TEMPLATES, False),
        ("Chinese", None, True),
        ("completed", None, False),
        ("completed Chinese", None, True),
    ):
        says = EVERYTHING if not wording.startswith("completed") else frozenset(("background", "colour"))
        captions = [describe(scene, rng, says, templates, in_chinese) for scene in scenes]
        if says != EVERYTHING:
            captions = [completed(caption, rng, known, 1.0) for caption in captions]
        found = []
        for i in range(0, len(captions), 100):
            ids, mask = tokenize(tokenizer, [c.text for c in captions[i : i + 100]])
            found.append(states(model, ids.to(device), mask.to(device))[0].cpu())
        state = torch.cat(found)
        first, second, last = (state[:, list(t)].mean(1) for t in (codes.FIRST, codes.SECOND, (codes.LAYOUT,)))
        both_ways = [*codes.thing.items(), *codes.mirrored.items()]
        parts = {"thing": (first, 0, both_ways), "second": (second, 0, list(codes.thing.items()))}
        parts |= {key: (last, start, list(table.items())) for key, (start, table) in layout.items()}
        parts["size"] = (first, THING_DIMS + BACKGROUND_DIMS, list(codes.size.items()))
        places = [(place, torch.cat([codes.step[x], codes.step[y]])) for place, (x, y) in PLACES.items()]
        parts["place"] = (last, 0, places)
        for key, (rows, start, table) in parts.items():
            names, book = zip(*table, strict=True)
            code = torch.stack(book)
            guess = (rows[:, start : start + code.shape[1]] @ code.T).argmax(1)
            pairs = [
                (getattr(c.said, key), names[g], c.text)
                for c, g in zip(captions, guess.tolist(), strict=True)
                if getattr(c.said, key) is not None
            ]
            result[f"{key}, {wording}"] = round(sum(a == b for a, b, _ in pairs) / len(pairs), 4)
            for wrong in [p for p in pairs if p[0] != p[1]][:4]:
                logger.info("text encoder misread %s %s", key, wrong)
    return result


@torch.no_grad()
def embed(
    model: MiniTextEncoder, tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device
) -> list[torch.Tensor]:
    """Return each text's embeddings as the pipeline's prompt unit makes them: float32 [L, 128] without padding."""
    result = []
    for i in range(0, len(texts), 256):
        ids, mask = tokenize(tokenizer, texts[i : i + 256])
        hidden = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True
        ).hidden_states[-2]
        result += [h[m.bool()] for h, m in zip(hidden, mask.to(device), strict=True)]
    return result
