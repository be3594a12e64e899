"""Draws the pictures of the empty page with the miniature, into web/assets/mosaic/: to be run again for new weights.

    .venv/bin/python docs/mosaic.py

Each picture is named by the number of its prompt in `mini.notes.MOSAIC`, drawn with the seed that stands beside it, and
enlarged to 256 x 256 by the fast Real-ESRGAN network, as the page shows pictures of the miniature.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import environment

environment.prepare_environment(os.environ)

from PIL import Image

from core.request import TextToImage, Upscale
from engine import Engine, Settings
from mini.notes import MOSAIC

FOLDER = ROOT / "web" / "assets" / "mosaic"
QUALITY = 80  # of WebP: 2 to 6 kB a picture


def main() -> None:
    """Draw and write all of them."""
    engine = Engine(Settings(weights="mini", device="cpu"))
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.png"
        for number, (prompt, seed) in enumerate(MOSAIC):
            small.write_bytes(engine.draw(TextToImage.parse(prompt=prompt, seed=seed)).png)
            large = engine.draw(Upscale.parse(image=str(small), upscaler="fast", denoise=0, seed=seed))
            image = Image.open(io.BytesIO(large.png)).convert("RGB")
            image.save(FOLDER / f"{number}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
