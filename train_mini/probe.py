"""Numbers to watch while a transformer trains: fixed held-out captions, and what the samples show.

A sample is compared, as latents, with the requested picture and with its rivals: the same scene with one
thing changed. The nearest one tells what went wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from core.whole_file import replacing

from . import autoencoder, text_encoder
from .autoencoder import to_pictures
from .captions import EVERYTHING, describe
from .pools import wishes
from .scenes import LAYOUTS, Painter, Scene, contact_sheet, kind_of, test_scenes
from .things import BACKGROUNDS, CLASHES, COLOURABLE, COLOURS, COUNTS, PLACES, SIZES, THINGS
from .transformer import Predict, stack_words

PROBES = {"single": 48, "coloured": 16, "pair": 24, "count": 16}
OPEN = 26  # prompts that say no more than "a fox"
STEPS, SHIFT = 8, 3.0  # of the samples: Turbo's official settings


def turbo_sigmas() -> torch.Tensor:
    """Return the noise levels of 8 steps at shift 3 and the end, float32 [9] from 1 down to 0."""
    u = torch.linspace(1, 0, STEPS + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def rivals(scene: Scene, rng: random.Random, others: int = 12) -> list[Scene]:
    """Return the scene both ways round, then scenes that differ from it in one thing."""
    strangers = [thing for thing in rng.sample(list(THINGS), others + 2) if thing not in (scene.thing, scene.second)]
    changed = [replace(scene, thing=thing) for thing in strangers[:others] if not scene.colour or thing in COLOURABLE]
    changed += [replace(scene, background=name) for name in BACKGROUNDS if (scene.colour, name) not in CLASHES]
    match kind_of(scene):
        case "pair":
            changed += [replace(scene, second=thing) for thing in strangers[:others]]
            changed.append(replace(scene, thing=scene.second or "", second=scene.thing))
            changed += [replace(scene, arrangement=name) for name in ("beside", "above")]
        case "count":
            changed += [replace(scene, arrangement=name) for name in COUNTS]
            changed += [replace(scene, arrangement="one", size=size) for size in SIZES]
        case _:
            changed += [replace(scene, place=place) for place in PLACES if scene.size != "large"]
            changed += [replace(scene, size=size) for size in SIZES if size != "large" or scene.place == "centre"]
            changed += [replace(scene, colour=colour) for colour in COLOURS if scene.colour]
    right = replace(scene, mirrored=False)
    return [right, replace(scene, mirrored=True), *(c for c in dict.fromkeys(changed) if c not in (scene, right))]


@dataclass
class Probe:
    """Held-out captions with their embeddings, noise, and the latents of what they may be mistaken for."""

    scenes: list[Scene]
    rivals: list[list[Scene]]
    latents: list[torch.Tensor]  # of each scene's rivals, bfloat16 [N, 16, 16, 16]
    words: torch.Tensor
    lengths: torch.Tensor
    wrong_words: torch.Tensor  # the same captions with other things
    wrong_lengths: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def make(work: Path, device: torch.device) -> Probe:
        """Take held-out scenes of every kind, each described in full, and things of which nothing else is said."""
        rng = random.Random(6)
        scenes = [scene for kind, count in PROBES.items() for scene in test_scenes(kind, count)]
        noise = torch.randn((len(scenes) + OPEN, 16, 16, 16), generator=torch.Generator().manual_seed(6))
        competing = [rivals(scene, rng) for scene in scenes]
        plain = [thing for thing in THINGS if thing not in COLOURABLE]
        for thing, wish in zip(rng.sample(plain, OPEN), wishes(noise[-OPEN:])[:, : len(LAYOUTS)], strict=True):
            scenes.append(Scene(thing, "white", *LAYOUTS[int(wish.argmax())]))
            competing.append([Scene(thing, name, *layout) for layout in LAYOUTS for name in BACKGROUNDS])
        cache = work / "probe.pt"
        if not cache.exists():
            vae, painter = autoencoder.load(work, device), Painter(work)
            latents = [autoencoder.encode(vae, painter, group, device) for group in competing]
            with replacing(cache) as file:
                torch.save(latents, file)
        model, tokenizer = text_encoder.load(work, device), text_encoder.load_tokenizer(work)
        embedded: list[torch.Tensor] = []
        wrong = [replace(s, thing=o.thing) for s, o in zip(scenes, [*scenes[1:], scenes[0]], strict=True)]
        for shown in (scenes, wrong):
            texts = [
                describe(scene, random.Random(i), EVERYTHING if i < len(scenes) - OPEN else frozenset()).text
                for i, scene in enumerate(shown)
            ]
            embedded += stack_words(text_encoder.embed(model, tokenizer, texts, device))
        tensors = [x.to(device) for x in (*embedded, noise)]
        return Probe(scenes, competing, torch.load(cache, weights_only=True), *tensors)

    @torch.no_grad()
    def gap(self, predict: Predict) -> tuple[float, float]:
        """Return the x0 error at sigma 0.97 with the right caption and with one naming another thing."""
        said = len(self.scenes) - OPEN
        wanted = torch.stack([latents[0] for latents in self.latents[:said]]).float().to(self.noise.device)
        sigma = torch.full((said,), 0.97, device=self.noise.device)
        x = 0.03 * wanted + 0.97 * self.noise[:said]
        errors = []
        for words, lengths in (
            (self.words[:said], self.lengths[:said]),
            (self.wrong_words[:said], self.wrong_lengths[:said]),
        ):
            errors.append((x - 0.97 * predict(x, sigma, words, lengths) - wanted).square().mean().item())
        return errors[0], errors[1]

    @torch.no_grad()
    def sample(self, predict: Predict) -> torch.Tensor:
        """Return latents after Euler steps without guidance, float32 [N, 16, 16, 16]."""
        x, sigmas = self.noise, turbo_sigmas()
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = x + (b - a) * predict(x, torch.full((len(x),), a, device=x.device), self.words, self.lengths)
        return x

    def judge(self, samples: torch.Tensor) -> dict[str, float]:
        """Return latent errors, and for each kind of scene the share of samples that are nearest to theirs.

        `mse` is the mean squared error of the single things, to the nearer of both ways round; `open` the share of
        open prompts laid out as their noise wishes, `open_mse` their error to the nearest picture of that thing.
        """
        wins: dict[str, list[bool]] = {kind: [] for kind in (*PROBES, "open")}
        errors: dict[str, list[float]] = {"mse": [], "open_mse": []}
        wrong: dict[str, int] = {}
        said = len(self.scenes) - OPEN
        for number, (scene, group, latents, sample) in enumerate(
            zip(self.scenes, self.rivals, self.latents, samples.cpu(), strict=True)
        ):
            distances = (latents.float() - sample).square().flatten(1).mean(1)
            best = group[int(distances.argmin())]
            if number >= said:
                wins["open"].append((best.size, best.place) == (scene.size, scene.place))
                errors["open_mse"].append(distances.min().item())
                continue
            kind, right = kind_of(scene), replace(best, mirrored=scene.mirrored) == scene
            wins[kind].append(right)
            if kind == "single":
                errors["mse"].append(distances[:2].min().item())
            if not right:
                for field in ("thing", "second", "background", "size", "place", "colour", "arrangement"):
                    if getattr(best, field) != getattr(scene, field):
                        wrong[f"wrong {field}"] = wrong.get(f"wrong {field}", 0) + 1
        means = {key: round(sum(values) / len(values), 4) for key, values in errors.items()}
        shares = {kind: round(sum(w) / len(w), 3) for kind, w in wins.items()}
        return {**means, **shares, **dict(sorted(wrong.items()))}


def write_sheet(work: Path, latents: torch.Tensor, target: Path, device: torch.device, columns: int = 13) -> None:
    """Decode latents and write them as one PNG."""
    with torch.no_grad():
        p = autoencoder.load(work, device).decoder(latents).clamp(-1, 1)
    contact_sheet(list(to_pictures(p)), target, columns)
