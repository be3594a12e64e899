"""Writes the measured figures into the model card, between two marks."""

from __future__ import annotations

import json
from pathlib import Path

import mini

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table(figures: dict, autoencoder: dict) -> str:
    """Render the figures as Markdown."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    rows = [("", "Turbo, 8 steps, CFG 1", "Base, 25 steps, CFG 4", "wanted")]
    turbo, base, steering = figures["turbo"], figures["base"], figures["steering"]
    for key, label, wanted in (
        ("retrieval", "the right thing (retrieval@1 in RGB at 32 px)", "95 %"),
        ("background", "the right background colour", "98 %"),
        ("size", "the right size", "90 %"),
    ):
        rows.append((label, percent(turbo[key]), percent(base[key]), wanted))
    rows.append(("held-out prompts", str(turbo["pictures"]), str(base["pictures"]), ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|---|")
    lines += [
        "",
        f"Guidance makes Base's things more themselves: the prompted one is nearer than the nearest other by"
        f" {steering['margin_cfg_1']} of 255 (RMS) at CFG 1, by {steering['margin_cfg_4']} at CFG 4. It also deepens"
        f" the colours: the mean difference from the rendered picture goes from {steering['error_cfg_1']} to"
        f" {steering['error_cfg_4']}.",
        f"Base answers to the negative prompt: where the prompt leaves the background open, the colour that came out,"
        f' given as negative prompt ("blue background"), gives way to another one in'
        f" {percent(steering['negative_moves'])} of {steering['pictures']} cases with the same seed.",
        f"Turbo and Base differ by {steering['turbo_base_difference']} of 255 on average at the same prompt and seed.",
        f"Autoencoder: {autoencoder['psnr_mean']:.1f} dB on average, {autoencoder['psnr_worst']:.1f} dB at worst.",
    ]
    return "\n".join(lines)


def write_figures(work: Path, folder: Path = mini.FOLDER) -> None:
    """Replace the text between the marks of the model card by the figures of the last evaluation."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    figures = json.loads((work / "figures.json").read_text())
    autoencoder = json.loads((work / "autoencoder.json").read_text())
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    path.write_text(f"{head}{BEGIN}\n{table(figures, autoencoder)}\n{END}{tail}", encoding="utf-8")
