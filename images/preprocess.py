"""Control images, made by the preprocessors."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.errors import RequestError
from core.messages import Message
from core.request import PREPROCESSORS, Preprocess, Preprocessor
from core.sizes import ImageSizes
from core.upload import Upload
from hub import inventory
from images.reading import decode, fit


@dataclass(frozen=True)
class Control:
    """A control image of the size that the image will have, RGB; `digest` is of the file that it was made from."""

    image: Image.Image
    digest: str
    notes: tuple[Message, ...] = ()

    def png(self) -> bytes:
        """Return the image as a PNG file."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


def control(request: Preprocess, upload: Upload, sizes: ImageSizes) -> Control:
    """Decode a request's image, fit it to `sizes` and run its preprocessor.

    Raises:
        RequestError: the image cannot be used, or the preprocessor finds nothing in it to work with.
        WeightsMissing: the preprocessor's model is not on this machine.
    """
    opened = decode(upload)
    fitted = fit(opened.image, sizes)
    made = make(fitted.image, request.preprocessor, request.canny_low, request.canny_high)
    if made is None:
        allowed = Message("no_person", "a picture with a person in it, for the preprocessor pose")
        raise RequestError("image", upload.name, allowed)
    notes = [*opened.notes, *fitted.notes]
    if request.preprocessor != "none":
        if is_edges(opened.image):
            text = "The picture looks like outlines already: {better} may fit better."
            notes.append(Message("already_edges", text, better=_title("none")))
        if made.getbbox() is None:  # it is black all over
            text = "{preprocessor} finds nothing in this picture, so the prompt decides."
            notes.append(Message("empty_control", text, preprocessor=_title(request.preprocessor)))
    return Control(made, opened.digest, tuple(notes))


def _title(preprocessor: Preprocessor) -> Message:
    return Message("preprocessor", PREPROCESSORS[preprocessor].title)


def make(image: Image.Image, preprocessor: Preprocessor, low: int = 100, high: int = 200) -> Image.Image | None:
    """Return what a preprocessor makes of an RGB image, RGB of its size; None where it finds nothing to draw.

    Args:
        image: RGB.
        preprocessor: its name.
        low: Canny's low threshold, as `canny`.
        high: Canny's high threshold.

    Raises:
        WeightsMissing: the preprocessor's model is not on this machine.
    """
    if preprocessor == "canny":
        return canny(image, low, high)
    return _MAKERS[preprocessor](image)


def is_edges(image: Image.Image) -> bool:
    """Return whether an RGB image is a control image of outlines: thin white lines on black."""
    import cv2

    small = image.copy()
    small.thumbnail((1024, 1024), Image.Resampling.BOX)
    pixels = np.asarray(small)
    gray = pixels.max(axis=2)
    white = gray > 96
    if not ((gray < 48).mean() > 0.7 and white.mean() > 0.002):
        return False
    if (pixels[white].min(axis=1) < 0.8 * gray[white]).mean() > 0.05:  # coloured
        return False
    # Lines vanish when a hundredth of the image is taken off from either side; silhouettes stay.
    thick = max(3, round(0.02 * max(small.size)))
    return bool(cv2.erode(white.astype(np.uint8), np.ones((thick, thick), np.uint8)).sum() < 0.1 * white.sum())


def canny(image: Image.Image, low: int, high: int) -> Image.Image:
    """Return an RGB image's edges, one pixel wide; in a colour image, of the strongest channel at each place.

    Args:
        image: RGB.
        low: how steep an edge must be to go on, in OpenCV's sum of both directions' differences.
        high: how steep it must be to begin.
    """
    import cv2

    return _white_on_black(cv2.Canny(np.asarray(image), low, high))


def _soft_edge(image: Image.Image) -> Image.Image:
    """Return the steepness of the smoothed image, the steepest 1 % white."""
    import cv2

    smooth = cv2.GaussianBlur(np.asarray(image).astype(np.float32), (0, 0), 1.0)
    steep = np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)).max(axis=2)
    # Below a step of 8 in 255 over one pixel (a Scharr kernel sums to 16), it is grain and not an edge.
    return _white_on_black(np.clip(steep * (255 / max(np.percentile(steep, 99), 16.0 * 8)), 0, 255))


def _line_art(image: Image.Image) -> Image.Image:
    """Return what is darker than its surroundings, the lines of a drawing, in white."""
    import cv2

    pixels = np.asarray(image).astype(np.float32)
    around = cv2.GaussianBlur(pixels, (0, 0), max(image.size) / 80)
    darker = np.clip((around - pixels).min(axis=2), 0, None)
    lines = darker[darker > 8]
    strength = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return _white_on_black(np.clip(darker * (127 / strength), 0, 255))


def _scribble(image: Image.Image) -> Image.Image:
    """Return thick outlines without small detail: the edges of the smoothed image, as drawn with a felt pen."""
    import cv2

    unit = max(image.size) / 512
    smooth = cv2.GaussianBlur(np.asarray(image), (0, 0), max(2.0 * unit, 0.8))
    pen = max(3, 2 * round(3 * unit) + 1)
    thick = cv2.dilate(cv2.Canny(smooth, 40, 80), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (pen, pen)))
    return _white_on_black(thick)


def _gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _depth(image: Image.Image) -> Image.Image:
    found = inventory.find("depth")  # before torch is imported
    from images import depth

    return depth.depth(image, found.files[0])


def _pose(image: Image.Image) -> Image.Image | None:
    from images import pose

    drawn, people = pose.skeletons(image)
    return drawn if people else None


def _white_on_black(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


_MAKERS: Mapping[Preprocessor, Callable[[Image.Image], Image.Image | None]] = {
    "softedge": _soft_edge,
    "lineart": _line_art,
    "scribble": _scribble,
    "gray": _gray,
    "depth": _depth,
    "pose": _pose,
    "none": lambda image: image,
}
