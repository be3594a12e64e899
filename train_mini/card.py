"""Writes the measured figures into the model card, between two marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mini.config
from core.whole_file import write_whole

from .evaluate import KINDS, THRESHOLDS, WORDING_LOSS, WORDINGS

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

TITLES = {
    "single": "one thing",
    "coloured": "a thing in a colour",
    "pair": "two things",
    "count": "two to four of a thing",
}
LABELS = {
    "thing": "the right thing (retrieval@1 of 192)",
    "second": "the right second thing",
    "background": "the right background",
    "size": "the right size",
    "place": "the right place",
    "mirrored": "the right way round (of things that are not symmetric)",
    "colour": "the right colour",
    "arrangement": "stands as said",
    "count": "the right number",
}


def percent(value: float | None) -> str:
    """Render a share: 0.975 as "97.5 %"."""
    return "" if value is None else f"{100 * value:.1f} %"


def table(figures: dict[str, Any], autoencoder: dict[str, float]) -> str:
    """Render the figures as Markdown."""
    head = ("", "Turbo", "Turbo, other wordings", "Turbo, Chinese", "Base", "wanted")
    rows = [head, ("---",) * len(head)]
    for kind in KINDS:
        turbo, base = figures["turbo"][kind], figures["base"][kind]["usual"]
        counts = [str(turbo[wording]["pictures"]) for wording in WORDINGS] + [str(base["pictures"])]
        rows.append((f"**{TITLES[kind]}**, pictures", *counts, ""))
        for key, label in LABELS.items():
            if key in base:
                wanted = THRESHOLDS.get(kind, {}).get(key)
                shares = [percent(turbo[wording].get(key)) for wording in WORDINGS]
                rows.append((label, *shares, percent(base[key]), percent(wanted)))
    diversity, steering = figures["diversity"], figures["steering"]
    return "\n".join(
        [
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            f"Other wordings may lose {100 * WORDING_LOSS:.0f} points against the usual one.",
            f'Seeds: {diversity["things"]} prompts that say no more than "a fox", {diversity["seeds"]} pictures each.'
            f" On average {diversity['backgrounds']:.1f} backgrounds and {diversity['layouts']:.1f} layouts (size and"
            f" place) of a prompt's pictures differ; {percent(diversity['thing'])} show the right thing.",
            f"Base answers to the negative prompt: where the prompt leaves the background open, the colour that came"
            f' out, given as negative prompt ("blue background"), gives way to another one in'
            f" {percent(steering['negative_moves'])} of {steering['pictures']} cases with the same seed.",
            f"Mean difference from the rendered picture, of 255: Turbo {steering['error']['turbo']}, Base"
            f" {steering['error']['base, CFG 1']} at CFG 1 and {steering['error']['base, CFG 4']} at CFG 4.",
            f"Autoencoder: {autoencoder['psnr_mean']:.1f} dB on average, {autoencoder['psnr_worst']:.1f} dB at worst.",
        ]
    )


def write_figures(work: Path, folder: Path = mini.config.FOLDER) -> None:
    """Replace the text between the marks of the model card by the figures of the last evaluation."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    figures = json.loads((work / "figures.json").read_text())
    autoencoder = json.loads((work / "autoencoder.json").read_text())
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    write_whole(path, f"{head}{BEGIN}\n{table(figures, autoencoder)}\n{END}{tail}".encode())
