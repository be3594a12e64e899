"""Makes the miniature: `python -m train_mini` runs every stage that is not done yet, from icons to the model card."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from . import autoencoder, base, card, evaluate, export, text_encoder, turbo
from .loop import WORK

STAGES = ("autoencoder", "text_encoder", "base", "turbo", "export", "evaluate")


def main() -> None:
    """Parse the command line and run the stages in order."""
    parser = argparse.ArgumentParser(prog="python -m train_mini", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="the training's folder (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run")
    parser.add_argument("--start", type=Path, help="an exported miniature to continue from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turbo-pictures", type=int, default=100, help="pictures of Turbo for every kind of scene")
    parser.add_argument("--base-pictures", type=int, default=40, help="pictures of Base for every kind")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work, device = arguments.work, torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("train_mini")
    if arguments.start:
        export.take_back(arguments.start, work)
    if "autoencoder" in arguments.stages:
        autoencoder.train(work, device)
        log.info("autoencoder %s", autoencoder.evaluate(work, device))
    if "text_encoder" in arguments.stages:
        text_encoder.train(work, device)
        log.info("text encoder %s", text_encoder.evaluate(work, device))
    if "base" in arguments.stages:
        base.train_base(work, device)
    if "turbo" in arguments.stages:
        turbo.train_turbo(work, device)
    if "export" in arguments.stages:
        export.export(work)
    if "evaluate" in arguments.stages:
        evaluate.evaluate(work, arguments.turbo_pictures, arguments.base_pictures)
        card.write_figures(work)


if __name__ == "__main__":
    main()
