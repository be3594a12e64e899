"""What an enlargement is worth and what it takes: parity with ncnn, tiles, quality on photographs, memory.

    .venv/bin/python bench/upscale.py parity|half|tiles|quality|picture|refinement|memory [--upscaler best|fast]

Why: the claims in docs/upscaling.md rest on this. The photographs are scikit-image's; all crops are small, because
Real-ESRGAN takes some 36 million operations for each pixel that goes in. Prints JSON on the last line.

parity      our network's output beside that of the ncnn runtime on the very files it was decoded from
half        our network in fp16 beside itself in fp32
tiles       an enlargement in tiles beside one without, and the steepness along the tiles' borders beside elsewhere
quality     photographs at half their size, enlarged again, beside the originals
picture     a part of each of these, as docs/upscaling.png shows them; written to artifacts/upscaling.png
refinement  what the miniature does to a picture of its own at 0 and at 0.33, and to a photograph in many tiles
memory      the process's peak: a tile of Real-ESRGAN, and all of a refinement; --side 2048 is the largest input
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from core import environment

environment.prepare_environment(os.environ)

import numpy as np
from PIL import Image

from core.request import UPSCALER_OVERLAP, TextToImage, Upscale
from core.sizes import IMAGE_SIZES
from diffusion.vae_tiles import FACTOR
from engine import Engine, Settings, mode_upscale
from engine.worker import LocalWorker
from hub import inventory
from images import tiles
from upscaler.weights import PACKAGED, find, package_file

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline

# scikit-image's photographs that come with its wheel, and a place in each that is worth looking at, across and down.
PHOTOGRAPHS: Mapping[str, tuple[int, int]] = {
    "astronaut": (225, 110),
    "chelsea": (140, 85),
    "coffee": (300, 190),
}
SIDE = 256  # of the squares


def photograph(name: str, side: int = SIDE) -> Image.Image:
    """Return a square of a photograph around that place, RGB."""
    from skimage import data

    image = Image.fromarray(getattr(data, name)())
    left, top = (
        min(max(place - side // 2, 0), length - side)
        for place, length in zip(PHOTOGRAPHS[name], image.size, strict=True)
    )
    return image.crop((left, top, left + side, top + side))


def halved(image: Image.Image) -> Image.Image:
    """Return an image at half its size."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def psnr(image: Any, other: Any) -> float:
    """Return the peak signal-to-noise ratio of two images of 8 bits, in dB."""
    error = float(np.mean((np.asarray(image, np.float64) - np.asarray(other, np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def ssim(image: Image.Image, other: Image.Image) -> float:
    """Return the structural similarity of two images: 1 is the same."""
    from skimage.metrics import structural_similarity

    pixels = np.asarray(image), np.asarray(other)
    return float(structural_similarity(*pixels, channel_axis=2))  # type: ignore[no-untyped-call]  # scikit-image's


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

    packaged = PACKAGED[choice]
    file = package_file(packaged)
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    # Its shortcuts in half precision would be compared, not the weights.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    assert net.load_param(str(file.with_suffix(".param"))) == 0
    assert net.load_model(str(file)) == 0
    run = net.create_extractor()
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / 255
    given = ncnn.Mat(values)  # looks into the array, and nobody but these names keeps either alive
    run.input("data", given)
    _, out = run.extract("output")
    return np.array(out).transpose(1, 2, 0).clip(0, 1) * 255


def our_output(pixels: np.ndarray, choice: str) -> np.ndarray:
    """Run the same network here, before anything is halved."""
    import torch

    import upscaler.network

    model = upscaler.network.load(find(choice, {}), "cpu")
    with torch.inference_mode():
        values = torch.from_numpy(pixels.copy()).float().permute(2, 0, 1)[None] / 255
        output: np.ndarray = (model(values)[0].permute(1, 2, 0) * 255).numpy()
    return output


def half(choice: str) -> dict[str, float]:
    """Return the PSNR between our network in fp16 and in fp32, of each photograph at double size, in dB.

    On a CPU: numbers are rounded after each layer as on a card, only summed up in another order.
    """
    import torch

    import upscaler.network

    model = upscaler.network.load(find(choice, {}), "cpu")
    crops = {name: np.asarray(photograph(name, 32)) for name in PHOTOGRAPHS}
    whole_numbers = {name: upscaler.network.twice(crop, model) for name, crop in crops.items()}
    model.half()
    halves = {name: upscaler.network.twice(crop, model) for name, crop in crops.items()}
    model.to(dtype=torch.float32)
    return {name: psnr(whole_numbers[name], halves[name]) for name in crops}


def parity(choice: str) -> dict[str, float]:
    """Return the PSNR between ours and ncnn's of each photograph, in dB."""
    crops = {name: np.asarray(photograph(name, 32)) for name in PHOTOGRAPHS}
    return {name: psnr(our_output(crop, choice), ncnn_output(crop, choice)) for name, crop in crops.items()}


def tiled(choice: str, name: str = "chelsea", side: int = 152, tile: int = 96) -> dict[str, float]:
    """Compare an enlargement in tiles with one without.

    Returns the PSNR in dB, and how much steeper the tiled image is across the middle of the tiles' overlaps than the
    untiled one at the very same place: 1 is no seam.
    """
    import upscaler.network

    model = upscaler.network.load(find(choice, {}), "cpu")
    image = photograph(name, side)
    plain = np.rint(upscaler.network.twice(np.asarray(image), model).clip(0, 255))
    cut = np.asarray(whole(upscaler.network.enlarge(image, model, tile)), np.float64)
    borders = seams(list(tiles.spans(side, tile, UPSCALER_OVERLAP)), 2)
    return {"psnr": psnr(cut, plain), "seam": steepness(cut, borders) / steepness(plain, borders)}


def seams(along: list[tuple[int, int]], scale: int) -> list[int]:
    """Return the places where one tile's image takes over from the next one's."""
    return [scale * (end + begin) // 2 for (_, end), (begin, _) in itertools.pairwise(along)]


def borders(along: list[tuple[int, int]]) -> list[int]:
    """Return the places where a tile begins or ends beside another."""
    return sorted({place for pair in itertools.pairwise(along) for place in (pair[0][1], pair[1][0])})


def steepness(pixels: Image.Image | np.ndarray, at: list[int]) -> float:
    """Return the mean step between the columns and rows on either side of the given places, of a square image."""
    pixels = np.asarray(pixels, np.float64)
    across = [np.abs(pixels[:, place] - pixels[:, place - 1]).mean() for place in at]
    down = [np.abs(pixels[place] - pixels[place - 1]).mean() for place in at]
    return float(np.mean(across + down))


def beside_inside(pixels: Image.Image | np.ndarray, at: list[int]) -> float:
    """Return how much steeper a square image is at borders of tiles than elsewhere: about 1 without a seam.

    Elsewhere is where latents meet, every 8 pixels, as tiles do: the miniature's decoder is steeper there everywhere.
    """
    others = sorted(set(range(FACTOR, len(np.asarray(pixels)), FACTOR)) - set(at))
    return steepness(pixels, at) / steepness(pixels, others)


def quality() -> dict[str, dict[str, dict[str, float]]]:
    """Return, by photograph and way to enlarge, SSIMULACRA 2 (100 is the original), SSIM and PSNR."""
    from ssimulacra2 import compute_ssimulacra2

    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PHOTOGRAPHS:
            original = photograph(name)
            original.save(f"{folder}/original.png")
            for way, image in enlarged(halved(original)).items():
                image.save(f"{folder}/{way}.png")
                found.setdefault(name, {})[way] = {
                    "ssimulacra2": compute_ssimulacra2(f"{folder}/original.png", f"{folder}/{way}.png"),
                    "ssim": ssim(original, image),
                    "psnr": psnr(original, image),
                }
    return found


def enlarged(small: Image.Image) -> dict[str, Image.Image]:
    """Return an image at twice its size, by the way that enlarged it."""
    import upscaler.network

    made = {"Lanczos": mode_upscale.plain(small)}
    for choice in ("best", "fast"):
        model = upscaler.network.load(find(choice, {}), "cpu")
        made[choice] = whole(upscaler.network.enlarge(small, model, 256))
    return made


def picture(side: int = 128, times: int = 2, gap: int = 8) -> str:
    """Draw docs/upscaling.png: of each photograph, a half-size part enlarged by Lanczos, by Real-ESRGAN, and itself."""
    cell = side * times
    sheet = Image.new("RGB", (3 * cell + 2 * gap, len(PHOTOGRAPHS) * (cell + gap) - gap), (26, 22, 20))
    for row, name in enumerate(PHOTOGRAPHS):
        original = photograph(name, side)
        made = enlarged(halved(original))
        for column, image in enumerate((made["Lanczos"], made["best"], original)):
            place = column * (cell + gap), row * (cell + gap)
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), place)
    path = Path(__file__).parent.parent / "artifacts" / "upscaling.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, optimize=True)
    return path.name


def refinement() -> dict[str, float]:
    """Return what the miniature's refinement leaves of an image, in dB of PSNR, and what its tiles show of themselves.

    At 0 nothing is refined, and what was enlarged is the result. For `seam`, see `refined_in_tiles`.
    """
    engine = Engine(Settings(weights="mini", device="cpu"))
    drawn = engine.draw(TextToImage.parse(prompt="a red apple on a blue background", seed=7))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "drawn.png").write_bytes(drawn.png)
        photograph("chelsea", 128).save(path / "photograph.png")
        for name in ("drawn", "photograph"):
            made = {}
            for denoise in (0, 0.33):
                request = Upscale.parse(
                    image=str(path / f"{name}.png"),
                    prompt="a red apple on a blue background" if name == "drawn" else "masterpiece, 8k",
                    upscaler="fast",
                    seed=7,
                    denoise=denoise,
                )
                made[denoise] = np.asarray(Image.open(io.BytesIO(engine.draw(request).png)))
            found[name] = psnr(made[0], made[0.33])
    return found | refined_in_tiles(mini_pipeline(), 512)


def refined_in_tiles(pipeline: Pipeline, side: int) -> dict[str, float]:
    """Redraw a large photograph in the tiles of the miniature, 128 pixels wide, and look for their borders.

    Returns:
        tiles: how many.
        seam: how much steeper the result is where tiles begin, end or take over than elsewhere; the larger of the two.
        alone: the same where each tile is redrawn by itself and laid beside the next one.
    """
    from skimage import data

    native = IMAGE_SIZES["mini"].native
    pixels = data.astronaut()  # type: ignore[no-untyped-call]  # scikit-image leaves it untyped
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    redraw = partial(pipeline.image_to_image, prompt="masterpiece, 8k", steps=5, denoise=0.33, seed=7, side=native)
    together = whole(redraw(image=image)).image
    along = tiles.spans(side, native, native // 4, 16)
    alone = Image.new("RGB", image.size)
    for left, top in itertools.product(range(0, side, native), repeat=2):
        part = image.crop((left, top, left + native, top + native))
        alone.paste(whole(redraw(image=part)).image, (left, top))
    return {
        "tiles": len(along) ** 2,
        "seam": max(beside_inside(together, places) for places in (seams(along, 1), borders(along))),
        "alone": beside_inside(alone, list(range(native, side, native))),
    }


def mini_pipeline() -> Pipeline:
    """Return the miniature's pipeline with Turbo loaded."""
    import torch

    from diffusion.pipeline import Pipeline
    from tests.helpers.plans import everything_stays

    built = Pipeline("cpu", torch.float32, everything_stays())
    whole(built.load(inventory.choose("mini", Upscale.mode, "turbo"), "turbo"))
    return built


def memory(side: int, smaller_tiles: int = 1) -> dict[str, float]:
    """Return the process's peak so far in GiB: with the models loaded, after Real-ESRGAN, after the refinement.

    Args:
        side: of the square image that goes in, in pixels.
        smaller_tiles: by what the sides of Real-ESRGAN's tiles are divided, as those of the image may be.
    """
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    on, plan = LocalWorker(Settings(weights="mini", device="cpu")).machine(Upscale.mode, "mini")
    plan = dataclasses.replace(plan, upscaler_tile=plan.upscaler_tile // smaller_tiles)
    pipeline = mini_pipeline()
    found = {"loaded": peak()}

    # The canvas is there from the first tile on, and one tile needs what any other does.
    enlarging = mode_upscale.enlarge(Image.fromarray(pixels), "best", on.kind, plan)
    while not hasattr(next(enlarging), "index"):
        pass
    enlarging.close()
    found["enlarged"] = peak()

    request = Upscale.parse(image="-", denoise=0.33, steps=1, seed=1).resolved("mini")
    large = mode_upscale.plain(Image.fromarray(pixels))
    refined, _ = whole(mode_upscale.refine(pipeline, large, request, "mini", plan))
    assert refined.size == (2 * side, 2 * side)
    refined.save(io.BytesIO(), "PNG")
    found["refined"] = peak()
    return found


def peak() -> float:
    """Return the process's peak resident memory, in GiB."""
    # Not getrusage: what it reports begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None  # it is in every process's
    return int(found[1]) / (1 << 20)


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "half", "tiles", "quality", "picture", "refinement", "memory"])
    parser.add_argument("--upscaler", choices=["best", "fast"], default="best")
    parser.add_argument("--side", type=int, default=1024, help="of the picture that goes in, for memory")
    parser.add_argument("--tiles", type=int, default=1, help="divide the sides of the tiles by this, for memory")
    args = parser.parse_args()
    choice = args.upscaler
    measures: dict[str, Callable[[], object]] = {
        "parity": lambda: parity(choice),
        "half": lambda: half(choice),
        "tiles": lambda: tiled(choice),
        "quality": quality,
        "picture": picture,
        "refinement": refinement,
        "memory": lambda: memory(args.side, args.tiles),
    }
    print(json.dumps({args.what: measures[args.what](), "upscaler": choice}))


if __name__ == "__main__":
    main()
