"""Image files from outside: opened, checked, set upright and brought to RGB of 8 bits, and to a possible size.

Two policies bring an image to a size: `fit` resizes and cuts (ControlNet), `pad` extends and restores (Upscale).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from core.errors import RequestError
from core.messages import Message
from core.sizes import ImageSizes
from core.upload import IMAGE_FILE, Upload

if TYPE_CHECKING:
    from PIL._imagingcms import CmsProfile

MAX_PIXELS = 80_000_000  # 240 MB as RGB; below Pillow's own bound (89 million), so that the error is ours
GROUND = (255, 255, 255)  # what shows through transparent places: paper, on which most line drawings are made
STEP = 16  # the VAE's factor 8 times the transformer's patch of 2

# Not opened: EPS and WMF are drawn by programs outside Pillow, which an untrusted file must not start.
_NOT_OPENED = {"EPS", "WMF"}

# HEIC is read where somebody has installed what reads it; it is no dependency.
HEIF_FILE = Message(
    "heif_file",
    "{wanted}; HEIC is read where the package pillow-heif is installed (pip install pillow-heif): install it, or save "
    "the picture as JPEG",
    wanted=IMAGE_FILE,
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}

_PNG_DEPTH = 24  # the byte with the bits of a sample: the header is a PNG's first chunk

# EXIF tag 0x0112 -> what sets the image upright (CIPA DC-008, orientation).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Opened:
    """An image from outside: `image` is upright RGB of 8 bits, `digest` the file's "sha256:…"."""

    image: Image.Image
    digest: str
    notes: tuple[Message, ...] = ()


def open_image(path: Path, field: str = "image", longest: int | None = None) -> Opened:
    """Read an image file and decode it, as `decode`.

    Raises:
        RequestError: there is no such file, it is no picture, it is damaged, or it is too large.
    """
    return decode(Upload.open(path, field), field, longest)


def decode(upload: Upload, field: str = "image", longest: int | None = None) -> Opened:
    """Decode any image file that Pillow can: upright, opaque, sRGB of 8 bits, the first frame where there are several.

    Transparent places show GROUND. More than 8 bits are scaled, not clipped: whole numbers from 0..65535, others from
    0..1, and numbers beyond that from their own lowest to their own highest.

    Args:
        upload: the file.
        field: the request's field that errors name.
        longest: the most pixels that it may have on a side, whatever its area.

    Raises:
        RequestError: it is no picture, it is damaged, or it is too large.
    """
    notes = []
    try:
        # A file that claims too many pixels is refused by Pillow or below, before any pixel is decoded.
        with Image.open(io.BytesIO(upload.data), formats=_formats()) as file:
            if file.width * file.height > MAX_PIXELS:
                raise _too_large(upload, field, f"{file.width} x {file.height}")
            if longest is not None and max(file.size) > longest:
                value = f"{upload.name} ({file.width} x {file.height} pixels)"
                allowed = Message("too_large", "a picture of up to {pixels} pixels a side", pixels=longest)
                raise RequestError(field, value, allowed)
            if not file.width * file.height:
                raise ValueError("no pixels")
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a photo with its extras
            file.seek(0)
            file.load()
            if frames > 1:
                text = "The picture has {frames} frames or pages; the first one is used."
                notes.append(Message("first_frame", text, frames=frames))
            upright = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1))
            if file.format == "PNG":
                _scale_transparent_value(file, upload.data[_PNG_DEPTH])
            image = _opaque_rgb(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(upload, field, "too many") from None
    except (RequestError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise RequestError(field, upload.name, HEIF_FILE if _is_heif(upload.data) else IMAGE_FILE) from None
    except Exception as error:  # whatever a damaged file leads one of Pillow's forty decoders into
        text = "{wanted} that is whole; this one cannot be read ({problem})"
        allowed = Message("damaged", text, wanted=IMAGE_FILE, problem=str(error))
        raise RequestError(field, upload.name, allowed) from error
    if upright is not None:
        image = image.transpose(upright)
    return Opened(image, upload.digest, tuple(notes))


def _too_large(upload: Upload, field: str, pixels: str) -> RequestError:
    allowed = Message("too_large", "a picture of up to {pixels} million pixels", pixels=MAX_PIXELS // 1_000_000)
    return RequestError(field, f"{upload.name} ({pixels} pixels)", allowed)


def _formats() -> list[str]:
    Image.init()
    not_opened = _NOT_OPENED
    try:
        import pillow_heif
    except ImportError:
        not_opened = _NOT_OPENED | {"HEIF"}
    else:
        pillow_heif.register_heif_opener()
    return [name for name in Image.ID if name not in not_opened]


def _is_heif(data: bytes) -> bool:
    """Whether a file begins as HEIC and its kin do: with the brands of ISO/IEC 23008-12, annex B."""
    length = int.from_bytes(data[:4], "big")
    brands = {data[at : at + 4] for at in range(8, min(length, 256), 4)}
    return data[4:8] == b"ftyp" and not brands.isdisjoint(_HEIF_BRANDS)


def _scale_transparent_value(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent value, which has the file's own bits, to the 8 that Pillow reads its pixels with."""
    value = image.info.get("transparency")
    scale = {2: 85.0, 4: 17.0, 16: 1 / 256}.get(depth)
    if scale is None:
        return
    if image.mode == "L" and isinstance(value, int):
        image.info["transparency"] = int(value * scale)
    elif image.mode == "RGB" and isinstance(value, tuple):
        image.info["transparency"] = tuple(int(part * scale) for part in value)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image of any mode as RGB of 8 bits: colours in sRGB, over GROUND where it is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        opaque = Image.fromarray(_eight_bits(values)).convert("RGB")
        if isinstance(transparent := image.info.get("transparency"), int):  # one value, of a PNG of 16 bits
            opaque.paste(GROUND, mask=Image.fromarray(values == transparent))
        return opaque
    if image.mode == "LAB":
        return _in_srgb(image, ImageCms.createProfile("LAB"))
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*GROUND, 255))
        ground.alpha_composite(image)
        return _with_profile(ground.convert("RGB"), profile)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _with_profile(image, profile)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """[height, width] numbers of any kind -> uint8: by the range of their kind, or by their own where they leave it."""
    usual = 65535.0 if values.dtype.kind in "iu" else 1.0
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= usual:
        low, high = 0.0, usual
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _with_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply an embedded colour profile (phones save in Display P3); one that does not fit the image is ignored."""
    if profile:
        try:
            return _in_srgb(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | CmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # only an in-place conversion returns None
    return converted


# --- sizes: the fit policy ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """An image brought to a possible size; `cut` are the pixels lost in width and height, at that size's scale."""

    image: Image.Image
    cut: tuple[int, int]
    notes: tuple[Message, ...] = ()


def fit(image: Image.Image, sizes: ImageSizes, area: int | None = None) -> Fitted:
    """Resize an image to about `area` pixels, keeping its shape, and cut it to whole steps of `sizes`.

    At most 15 pixels go from each of width and height, evenly from both ends. A shape that is not possible within
    `sizes` (or any but the one shape, where there is one size only) loses more; the note then states how much.

    Args:
        image: RGB.
        sizes: what is possible.
        area: pixels to aim at; the square of the native side where none is given.
    """
    size, scale = fitted_size(image.size, sizes, area)
    kept = [side / scale for side in size]
    left, top = ((whole - part) / 2 for whole, part in zip(image.size, kept, strict=True))
    # Cut and resized at once: the whole of a long, thin image could be enormous at that scale.
    box = (max(left, 0), max(top, 0), min(left + kept[0], image.width), min(top + kept[1], image.height))
    resized = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS, box)
    across, down = (max(0, round(whole * scale) - side) for whole, side in zip(image.size, size, strict=True))
    return Fitted(resized, (across, down), _cut_note(image.size, size, (across, down)))


def fitted_size(size: tuple[int, int], sizes: ImageSizes, area: int | None = None) -> tuple[tuple[int, int], float]:
    """Return the size that `fit` gives an image of `size`, and the scale that it is resized by before the cut."""
    width, height = size
    ratio = width / height

    def possible(side: float) -> float:
        return min(max(side, sizes.minimum), sizes.maximum)

    across = possible(math.sqrt((area or sizes.native**2) * ratio))
    across = possible(possible(across / ratio) * ratio)  # what bounds the height bounds the width too
    down = possible(across / ratio)
    # A little more before rounding down, for a side that falls short of whole steps by rounding error.
    columns, rows = (int(side + 1e-6) // sizes.step * sizes.step for side in (across, down))
    return (columns, rows), max(across / width, down / height)


def _cut_note(size: tuple[int, int], target: tuple[int, int], cut: tuple[int, int]) -> tuple[Message, ...]:
    if not any(cut):
        return ()
    known = {"size": f"{size[0]} × {size[1]}", "target": f"{target[0]} × {target[1]}"}
    if max(cut) < STEP:
        text = "The picture of {size} was brought to {target}: {losses} were cut off."
        return (Message("image_cut", text, **known, losses=_few_pixels(*cut)),)
    shares = [pixels / (pixels + kept) for pixels, kept in zip(cut, target, strict=True)]
    text = (
        "The picture of {size} was brought to {target}: its shape is not possible here, so {part:.1%} of its {side} "
        "was cut off, half at each end."
    )
    side = Message("width", "width") if shares[0] > shares[1] else Message("height", "height")
    return (Message("image_cut", text, **known, part=max(shares), side=side),)


def _few_pixels(across: int, down: int) -> Message:
    if across and down:
        text = "{width} pixels of its width and {height} pixels of its height"
        return Message("pixels_cut", text, width=across, height=down)
    if across:
        return Message("pixels_cut", "{width} pixels of its width", width=across)
    return Message("pixels_cut", "{height} pixels of its height", height=down)


# --- sizes: the pad-and-restore policy ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """An image whose sides are whole steps: `size` is what it was before. What was added lies right and below."""

    image: Image.Image
    size: tuple[int, int]

    def restore(self, image: Image.Image) -> Image.Image:
        """Return what belongs to the original, of an image made from the padded one, perhaps enlarged.

        Raises:
            ValueError: its size is not a whole multiple of the padded image's.
        """
        factor = image.width // self.image.width
        if factor < 1 or image.size != (self.image.width * factor, self.image.height * factor):
            raise ValueError(f"a picture of {image.size} was not made from one of {self.image.size}")
        width, height = self.size
        return image.crop((0, 0, width * factor, height * factor))


def pad(image: Image.Image, step: int = STEP, least: int = 0) -> Padded:
    """Extend an RGB image by its own mirror image, so that nothing of it is lost or moved.

    Args:
        image: RGB.
        step: both sides become whole steps.
        least: both sides become at least so long, which is whole steps.
    """
    right, below = (max(-side % step, least - side) for side in image.size)
    if not (right or below):
        return Padded(image, image.size)
    pixels = np.pad(np.asarray(image), ((0, below), (0, right), (0, 0)), mode="symmetric")
    return Padded(Image.fromarray(pixels), image.size)
