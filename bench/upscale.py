"""What an enlargement is worth and what it takes: parity with ncnn, tiles, quality on photographs, memory.

    .venv/bin/python bench/upscale.py parity|tiles|quality|refinement|memory [--upscaler best|fast]

Why: the claims in docs/upscaling.md rest on this. The photographs are scikit-image's; all crops are small, because
Real-ESRGAN takes some 36 million operations for each pixel that goes in. Prints JSON on the last line.

parity      our network's output beside that of the ncnn runtime on the very files it was decoded from
tiles       an enlargement in tiles beside one without, and the steepness along the tiles' borders beside elsewhere
quality     photographs at half their size, enlarged again, beside the originals
refinement  what the miniature does to a picture of its own at 0 and at 0.33
memory      the process's peak while 1024 x 1024 becomes 2048 x 2048: a tile of Real-ESRGAN, and all of a refinement
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import device

device.prepare_environment(os.environ)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import upscaler_weights  # noqa: E402
import upscaling  # noqa: E402
import weights  # noqa: E402
from engine import Engine, Settings  # noqa: E402
from request import UPSCALER_OVERLAP, TextToImage, Upscale  # noqa: E402

# A part of each of scikit-image's photographs that come with its wheel: name -> left, top of a square.
PHOTOGRAPHS: Mapping[str, tuple[int, int]] = {
    "astronaut": (160, 50),
    "chelsea": (110, 60),
    "coffee": (210, 110),
}
SIDE = 128  # of the squares


def photograph(name: str, side: int = SIDE) -> Image.Image:
    """Return the square of a photograph, RGB."""
    from skimage import data

    left, top = PHOTOGRAPHS[name]
    return Image.fromarray(getattr(data, name)()).crop((left, top, left + side, top + side))


def halved(image: Image.Image) -> Image.Image:
    """Return a picture at half its size."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def psnr(one: Any, other: Any) -> float:
    """Return the peak signal-to-noise ratio of two pictures of 8 bits, in dB."""
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def whole(work: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end; return what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def ncnn_output(pixels: np.ndarray, choice: str) -> np.ndarray:
    """Run the package's own files in the ncnn runtime: uint8 [h, w, 3] -> float [4 h, 4 w, 3] in 0..255."""
    import ncnn

    packaged = upscaler_weights.PACKAGED[choice]
    file = upscaler_weights.package_file(packaged)
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    # Its shortcuts in half precision would be compared, not the weights.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    assert net.load_param(str(file.with_suffix(".param"))) == 0 and net.load_model(str(file)) == 0
    run = net.create_extractor()
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / 255
    given = ncnn.Mat(values)  # looks into the array, and nobody but these names keeps either alive
    run.input("data", given)
    _, out = run.extract("output")
    return np.array(out).transpose(1, 2, 0).clip(0, 1) * 255


def our_output(pixels: np.ndarray, choice: str) -> np.ndarray:
    """Run the same network here, before anything is halved."""
    import torch

    import upscaler

    model = upscaler.load(upscaler_weights.find(choice, {}), "cpu")
    with torch.inference_mode():
        values = torch.from_numpy(pixels.copy()).float().permute(2, 0, 1)[None] / 255
        return (model(values)[0].permute(1, 2, 0) * 255).numpy()


def parity(choice: str) -> dict[str, float]:
    """Return the PSNR between ours and ncnn's of each photograph, in dB."""
    crops = {name: np.asarray(photograph(name, 32)) for name in PHOTOGRAPHS}
    return {name: psnr(our_output(crop, choice), ncnn_output(crop, choice)) for name, crop in crops.items()}


def tiled(choice: str, name: str = "chelsea", side: int = 96, tile: int = 64) -> dict[str, float]:
    """Compare an enlargement in tiles with one without.

    Returns the PSNR in dB, and how much steeper the tiled picture is across the middle of the tiles' overlaps than the
    untiled one at the very same place: 1 is no seam.
    """
    import tiles
    import upscaler

    model = upscaler.load(upscaler_weights.find(choice, {}), "cpu")
    image = photograph(name, side)
    plain = np.rint(upscaler.twice(np.asarray(image), model).clip(0, 255))
    cut = np.asarray(whole(upscaler.enlarge(image, model, tile)), np.float64)
    borders = seams([span for span in tiles.spans(side, tile, UPSCALER_OVERLAP)], 2)
    return {"psnr": psnr(cut, plain), "seam": steepness(cut, borders) / steepness(plain, borders)}


def seams(along: list[tuple[int, int]], scale: int) -> list[int]:
    """Return the places where one tile's picture takes over from the next one's."""
    return [scale * (end + begin) // 2 for (_, end), (begin, _) in itertools.pairwise(along)]


def steepness(pixels: np.ndarray, at: list[int]) -> float:
    """Return the mean step between the columns and rows on either side of the given places."""
    pixels = np.asarray(pixels, np.float64)
    across = [np.abs(pixels[:, place] - pixels[:, place - 1]).mean() for place in at]
    down = [np.abs(pixels[place] - pixels[place - 1]).mean() for place in at]
    return float(np.mean(across + down))


def quality() -> dict[str, dict[str, dict[str, float]]]:
    """Return, by photograph and way to enlarge, SSIMULACRA 2 (100 is the original), SSIM and PSNR."""
    import tempfile

    from skimage.metrics import structural_similarity
    from ssimulacra2 import compute_ssimulacra2

    import upscaler

    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PHOTOGRAPHS:
            original = photograph(name)
            small = halved(original)
            ways = {"Lanczos": upscaling.plain(small)}
            for choice in ("best", "fast"):
                model = upscaler.load(upscaler_weights.find(choice, {}), "cpu")
                ways[choice] = whole(upscaler.enlarge(small, model, 256))
            original.save(f"{folder}/original.png")
            for way, image in ways.items():
                image.save(f"{folder}/{way}.png")
                found.setdefault(name, {})[way] = {
                    "ssimulacra2": compute_ssimulacra2(f"{folder}/original.png", f"{folder}/{way}.png"),
                    "ssim": float(structural_similarity(np.asarray(original), np.asarray(image), channel_axis=2)),
                    "psnr": psnr(original, image),
                }
    return found


def refinement() -> dict[str, float]:
    """Return the PSNR in dB between a picture and what the miniature refines it to, by denoise."""
    import tempfile

    engine = Engine(Settings(weights="mini", device="cpu"))
    drawn = engine.draw(TextToImage.parse(prompt="a red apple on a blue background", seed=7))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "drawn.png").write_bytes(drawn.png)
        for choice in ("0", "0.33"):
            request = Upscale.parse(
                image=f"{folder}/drawn.png",
                prompt="a red apple on a blue background",
                upscaler="fast",
                seed=7,
                denoise=choice,
            )
            (Path(folder) / f"{choice}.png").write_bytes(engine.draw(request).png)
        plain = np.asarray(Image.open(f"{folder}/0.png").convert("RGB"))
        found["0.33"] = psnr(plain, Image.open(f"{folder}/0.33.png").convert("RGB"))
    return found


def memory() -> dict[str, float]:
    """Return the process's peak so far in GiB, with the models loaded, after Real-ESRGAN and after the refinement."""
    import torch

    from pipeline import Pipeline

    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    engine = Engine(Settings(weights="mini", device="cpu"))
    on, plan = engine._planned(Upscale.mode, "mini")
    pipeline = Pipeline("cpu", torch.float32, keep_both=True)
    whole(pipeline.load(weights.choose("mini", Upscale.mode, "turbo"), "turbo"))
    found = {"loaded": peak()}

    # The canvas is there from the first tile on, and one tile needs what any other does.
    enlarging = upscaling.enlarge(Image.fromarray(pixels), "best", on.kind, plan)
    while not hasattr(next(enlarging), "index"):
        pass
    enlarging.close()
    found["enlarged"] = peak()

    request = Upscale.parse(image="-", denoise=0.33, steps=1, seed=1).resolved("mini")
    large = upscaling.plain(Image.fromarray(pixels))
    refined, _ = whole(upscaling.refine(pipeline, large, request, "mini", plan))
    assert refined.size == (2048, 2048)
    found["refined"] = peak()
    return found


def peak() -> float:
    """Return the process's peak resident memory, in GiB."""
    # Not getrusage: what it says begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / (1 << 20)


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "tiles", "quality", "refinement", "memory"])
    parser.add_argument("--upscaler", choices=["best", "fast"], default="best")
    args = parser.parse_args()
    choice = args.upscaler
    measured = {
        "parity": lambda: parity(choice),
        "tiles": lambda: tiled(choice),
        "quality": quality,
        "refinement": refinement,
        "memory": memory,
    }[args.what]()
    print(json.dumps({args.what: measured, "upscaler": choice}))


if __name__ == "__main__":
    main()
