"""What the transformers train on: embedded captions, and for each the pictures that it may mean.

A caption leaves things open: size, place, background, colour. Which of the pictures goes with which noise then decides
what the model learns. If they were drawn independently, every noise would mean every picture, and the first steps of
sampling could only give their average, a ghost of two sizes. So the noise decides. Where things are, and how large they
are, follows the patches of noise that say "something is here" most (`wishes`); of a few pictures that fit, the one that
resembles the noise most is taken, for background and colour (conditional optimal-transport coupling, in its simplest
form). The noise stays plain Gaussian noise, and what it decides differs from seed to seed.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.whole_file import replacing

from . import autoencoder, text_encoder
from .captions import Caption, Said, random_caption
from .scenes import LAYOUTS, PICTURE_SIDE, Scene, corners, training_scenes
from .things import ARRANGEMENTS, COUNTS, SIZES
from .transformer import padded, stack_words

logger = logging.getLogger(__name__)

CAPTIONS, LONG_CAPTIONS = 130_000, 14_000
PATCH = 16  # pixels
CANDIDATES = 12  # pictures that compete for a noise
# How much more often such captions are drawn: small things have nine places where others have one; colours are the
# last thing to be learned, counts the first. Half of single things are mirrored, and a third of those look the same.
CENTRED, COLOURED, COUNTED, MIRRORED = 3.5, 3.0, 0.6, 2.0
OPEN = 0.3  # single things whose size or place is not said: the app says both, unless a control image does
CENTRED_ROWS = 3  # how often larger things compete for a noise, so that not all open prompts give small ones
FIELDS = ("background", "size", "place", "colour", "arrangement", "mirrored")
# The channel whose checkerboard says how much a patch of noise wants to be covered. Pictures are smooth, and least of
# all have such a pattern in this channel, so that what the noise says stays readable under half a picture.
WISH_CHANNEL = 1
LARGER_WISHES = {"medium": 0.7, "large": 0.75}  # so that half of all open prompts give small things


class Meanings:
    """Finds the training scenes that a caption may mean."""

    def __init__(self, scenes: list[Scene]) -> None:
        values: dict[str, dict[str | None, int]] = {field: {None: 0} for field in FIELDS}
        columns = np.empty((len(FIELDS), len(scenes)), np.int8)
        groups: dict[tuple[str, str | None], list[int]] = {}
        for row, scene in enumerate(scenes):
            for i, field in enumerate(FIELDS):
                known = values[field]
                columns[i, row] = known.setdefault(getattr(scene, field), len(known))
            groups.setdefault((scene.thing, scene.second), []).append(row)
        self.values, self.columns = values, columns
        self.layouts = np.array([LAYOUT_NUMBERS[layout_of(scene)] for scene in scenes], np.int8)
        self.repeats = np.array([1 if scene.size == "small" else CENTRED_ROWS for scene in scenes])
        self.groups = {key: self._repeated(np.array(rows)) for key, rows in groups.items()}
        self.every = self._repeated(np.arange(len(scenes)))
        # a caption without a thing is asked for often enough to keep its answers
        self.backgrounds = {
            name: self.every[columns[0, self.every] == number] for name, number in values["background"].items() if name
        }

    def _repeated(self, rows: np.ndarray) -> np.ndarray:
        return np.repeat(rows, self.repeats[rows])

    def rows(self, said: Said) -> np.ndarray:
        """Return the rows of all scenes that show what is said, int64 [N]; those of larger things several times."""
        if said.thing is None:
            return self.backgrounds[said.background] if said.background else self.every
        rows = self.groups[said.thing, said.second]
        for i, field in enumerate(FIELDS):
            value = getattr(said, field)
            if value is not None:
                rows = rows[self.columns[i, rows] == self.values[field][value]]
        return rows

    def wished(self, rows: np.ndarray, wish: np.ndarray) -> np.ndarray:
        """Return the rows of that layout, among those of `rows`, which a noise wishes most; wish: float [layouts]."""
        layouts = self.layouts[rows]
        present = np.flatnonzero(np.bincount(layouts, minlength=len(wish)))
        kept: np.ndarray = rows[layouts == present[wish[present].argmax()]]
        return kept


@dataclass
class Pool:
    """Embedded captions of one padded length with what they say."""

    words: torch.Tensor  # bfloat16 [N, L, 128]
    lengths: torch.Tensor  # int64 [N]
    said: list[Said]

    def __post_init__(self) -> None:
        weights = [
            (CENTRED if said.size in ("medium", "large") else 1.0)
            * (COLOURED if said.colour else 1.0)
            * (COUNTED if said.arrangement in COUNTS else 1.0)
            * (MIRRORED if said.mirrored else 1.0)
            * (OPEN if said.arrangement == "one" and None in (said.size, said.place) else 1.0)
            for said in self.said
        ]
        self.until = torch.tensor(weights, dtype=torch.float64).cumsum(0)

    def pick(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return the numbers of random captions, int64 [count]."""
        draws = torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.until, draws * self.until[-1], right=True)


class Pictures:
    """Draws batches of captions, noises and the pictures that belong to them."""

    def __init__(self, work: Path, device: torch.device, seed: int) -> None:
        scenes = training_scenes()
        self.device = device
        self.latents = autoencoder.encode_all(work, device)
        self.meanings = Meanings(scenes)
        self.pools = caption_pools(work, device, scenes)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (words [count, length, 128], lengths [count], latents [count, 16, h, w], noise), all float32."""
        pool = self.pools[length]
        chosen = pool.pick(count, self.generator)
        noise = torch.randn((count, *self.latents.shape[1:]), generator=self.generator)
        draws = torch.rand((count, CANDIDATES), generator=self.generator, dtype=torch.float64).numpy()
        rows, wish = np.empty((count, CANDIDATES), np.int64), wishes(noise).numpy()
        for i, number in enumerate(chosen.tolist()):
            fitting = self.meanings.wished(self.meanings.rows(pool.said[number]), wish[i])
            rows[i] = fitting[(draws[i] * len(fitting)).astype(np.int64)]
        candidates = self.latents[torch.from_numpy(rows)].float()
        best = couple(candidates.flatten(2), noise.flatten(1))
        latents = candidates[torch.arange(count), best]
        words = pool.words[chosen].float()
        words, lengths, latents, noise = (
            tensor.to(self.device) for tensor in (words, pool.lengths[chosen], latents, noise)
        )
        return words, lengths, latents, noise


def layout_of(scene: Scene) -> tuple[str, str, str]:
    """Return what decides where a scene has something: (arrangement, size, place)."""
    return scene.arrangement, scene.size, scene.place


LAYOUT_NAMES = [("one", size, place) for size, place in LAYOUTS]
LAYOUT_NAMES += [(arrangement, "small", "centre") for arrangement in ARRANGEMENTS]
LAYOUT_NUMBERS = {layout: number for number, layout in enumerate(LAYOUT_NAMES)}


def covered() -> torch.Tensor:
    """Return which patches have something in each layout, float32 [layouts, 8, 8] of 0 and 1."""
    masks = torch.zeros(len(LAYOUT_NAMES), PICTURE_SIDE // PATCH, PICTURE_SIDE // PATCH)
    for mask, layout in zip(masks, LAYOUT_NAMES, strict=True):
        side = SIZES[layout[1]] // PATCH
        for x, y in corners(*layout):
            mask[y // PATCH :, x // PATCH :][:side, :side] = 1
    return masks


COVERED = covered()
BONUS = torch.tensor([LARGER_WISHES.get(size, 0.0) for _, size, _ in LAYOUT_NAMES])


def wishes(noise: torch.Tensor) -> torch.Tensor:
    """Return how much each noise [B, 16, h, w] wishes each layout, float32 [B, layouts].

    Each layout's number is a normal number, so none is preferred but by its bonus.
    """
    patches = torch.nn.functional.pixel_unshuffle(noise[:, WISH_CHANNEL : WISH_CHANNEL + 1], 2)  # [B, 4, h / 2, w / 2]
    says = (patches * torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 4, 1, 1)).sum(1) / 2
    return torch.einsum("bhw,lhw->bl", says, COVERED) / COVERED.sum((1, 2)).sqrt() + BONUS


def couple(candidates: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return which of its candidates [B, K, n] each noise [B, n] resembles most, int64 [B].

    Candidates are compared by their direction from their common mean, so that each wins about equally often: no
    picture is preferred for being plain.
    """
    away = candidates - candidates.mean(1, keepdim=True)
    away = away / away.square().sum(2, keepdim=True).sqrt().clamp_min(1e-6)
    return torch.einsum("bkn,bn->bk", away, noise).argmax(1)


def caption_pools(work: Path, device: torch.device, scenes: list[Scene]) -> dict[int, Pool]:
    """Embed captions of training scenes once: pools of 32 and of 64 tokens; kept on disk."""
    cache = work / "captions.pt"
    if not cache.exists():
        kinds, rng = text_encoder.balanced_scenes(), random.Random(4)
        tokenizer, model = text_encoder.load_tokenizer(work), text_encoder.load(work, device)
        idle = text_encoder.idle_words(work)
        captions: list[Caption] = []
        for count, empty, long in ((CAPTIONS, 0.10, 0.0), (LONG_CAPTIONS, 0.0, 1.0)):
            for _ in range(count):
                made = random_caption(rng.choice(rng.choice(kinds)), rng, empty, long)
                captions.append(text_encoder.decorate(made, rng, idle))
        # similar lengths together, else padding would double the work
        captions.sort(key=lambda c: len(c.text))
        embeddings = text_encoder.embed(model, tokenizer, [c.text for c in captions], device)
        saved = {}
        for length in (32, 64):
            keep = [i for i, e in enumerate(embeddings) if padded(len(e)) == length]
            words, lengths = stack_words([embeddings[i].bfloat16().cpu() for i in keep])
            saved[length] = (words, lengths, [vars(captions[i].said) for i in keep])
            logger.info("captions of up to %d tokens: %d", length, len(keep))
        with replacing(cache) as file:
            torch.save(saved, file)
    loaded = torch.load(cache, weights_only=True)
    return {
        length: Pool(words, lengths, [Said(**s) for s in said]) for length, (words, lengths, said) in loaded.items()
    }
