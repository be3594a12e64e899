"""The preprocessor "pose": people in an image as OpenPose skeletons, found by BlazePose.

Two small models of MediaPipe's, whose files lie in weights/blazepose: one finds people, the other finds the joints of
one person in an upright crop. Both run on the processor in LiteRT. The numbers that go around them (anchors, crops)
are those of MediaPipe's own graphs (modules/pose_detection and modules/pose_landmark), named where they stand.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODELS = Path(__file__).parent.parent / "weights" / "blazepose"
DETECTOR, LANDMARKS = "pose_detection.tflite", "pose_landmark_full.tflite"

# pose_detection_cpu.pbtxt: side of the square input, and the anchors' grids (stride, anchors per cell).
_DETECTOR_SIDE = 224
_GRIDS = ((8, 2), (16, 2), (32, 6))
_LEAST_SCORE, _SAME_PERSON = 0.5, 0.3
# pose_landmark_by_roi_cpu.pbtxt and pose_detection_to_roi.pbtxt.
_LANDMARKS_SIDE = 256
_LEAST_PRESENCE = 0.5
_CROP_SCALE = 1.25
_LEAST_VISIBILITY = 0.5  # of a joint that is drawn
MOST_PEOPLE = 10

# OpenPose's 18 joints (nose, neck, right arm, left arm, right leg, left leg, eyes, ears; right is the person's) as
# BlazePose's 33 landmarks; the neck lies between the shoulders.
_JOINTS = (0, None, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
_SHOULDERS = (11, 12)
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
# One colour a joint, once around the wheel; limb number i has colour number i. ControlNets were trained on these.
_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)),
    *((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)),
    *((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
_LIMB_BRIGHTNESS = 0.6
_THICKNESS = 4 / 512  # of a limb, by the image's shorter side

Crop = tuple[np.ndarray, float, float]  # of one person: centre, side and angle of a square, in the image's pixels

_lock = threading.Lock()  # an interpreter holds its input and output, so one image at a time


def skeletons(image: Image.Image) -> tuple[Image.Image, int]:
    """Draw the skeletons of the people in an RGB image on black, at its size; return also how many there are."""
    found = joints(np.asarray(image))
    return draw(found, image.size), len(found)


def joints(pixels: np.ndarray) -> list[np.ndarray]:
    """Find people: [height, width, 3] uint8 -> [18, 2] pixel positions of each, NaN where not to be seen.

    The person found most surely comes first; at most MOST_PEOPLE.
    """
    with _lock:
        crops = _detect(pixels)
        found = [landmarks for crop in crops if (landmarks := _landmarks(pixels, crop)) is not None]
    return [_openpose(landmarks, pixels.shape[1::-1]) for landmarks in found]


def draw(people: list[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """Draw [18, 2] arrays of joints, as OpenPose draws them, on a black image of `size` (width, height)."""
    import cv2

    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    thick = max(1, round(min(size) * _THICKNESS))
    for person in people:
        seen = ~np.isnan(person).any(axis=1)
        at = [
            tuple(round(float(value)) for value in joint) if ok else (0, 0)
            for joint, ok in zip(person, seen, strict=True)
        ]
        for (start, end), colour in zip(_LIMBS, _COLOURS, strict=False):
            if seen[start] and seen[end]:
                dim = tuple(int(_LIMB_BRIGHTNESS * part) for part in colour)
                middle = [(a + b) // 2 for a, b in zip(at[start], at[end], strict=True)]
                length = math.dist(at[start], at[end])
                angle = math.degrees(math.atan2(at[end][1] - at[start][1], at[end][0] - at[start][0]))
                outline = cv2.ellipse2Poly(middle, (int(length / 2), thick), int(angle), 0, 360, 1)
                cv2.fillConvexPoly(canvas, np.asarray(outline), dim)
        for joint, colour, ok in zip(at, _COLOURS, seen, strict=True):
            if ok:
                cv2.circle(canvas, joint, thick, colour, thickness=-1)
    return Image.fromarray(canvas)


def _openpose(landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[33, 3] (x, y, visibility) -> [18, 2], NaN where hidden or outside the image of `size` (width, height)."""
    neck = landmarks[list(_SHOULDERS)]
    neck = np.array([*neck[:, :2].mean(axis=0), neck[:, 2].min()])
    chosen = np.stack([neck if index is None else landmarks[index] for index in _JOINTS])
    inside = ((chosen[:, :2] >= 0) & (chosen[:, :2] < size)).all(axis=1)
    return np.where((inside & (chosen[:, 2] >= _LEAST_VISIBILITY))[:, None], chosen[:, :2], np.nan)


@cache
def _interpreter(name: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped]  # LiteRT brings no types

    interpreter = Interpreter(str(MODELS / name), num_threads=2)
    interpreter.allocate_tensors()
    return interpreter


def _run(name: str, tensor: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """Run a model on [height, width, 3] float32; return its outputs by shape, which no two of the used ones share."""
    interpreter = _interpreter(name)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensor[None].astype(np.float32))
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    return {tuple(int(side) for side in output["shape"]): interpreter.get_tensor(output["index"]) for output in outputs}


@cache
def _anchors() -> np.ndarray:
    """Return the centres of the detector's [2254, 2] anchors, in 0..1."""
    rows = []
    for stride, each in _GRIDS:
        side = _DETECTOR_SIDE // stride
        centres = (np.arange(side) + 0.5) / side
        x, y = np.meshgrid(centres, centres)
        rows.append(np.stack([x, y], axis=-1).reshape(-1, 2).repeat(each, axis=0))
    return np.concatenate(rows)


def _detect(pixels: np.ndarray) -> list[Crop]:
    """Return the crop of each person, the surest first."""
    import cv2

    height, width = pixels.shape[:2]
    side = max(height, width)
    scale = _DETECTOR_SIDE / side
    offset = np.array([side - width, side - height]) / 2  # of the image in a square
    matrix = np.array([[scale, 0, offset[0] * scale], [0, scale, offset[1] * scale]])
    square = cv2.warpAffine(pixels, matrix, (_DETECTOR_SIDE, _DETECTOR_SIDE), flags=cv2.INTER_AREA)
    outputs = _run(DETECTOR, square / 127.5 - 1)
    count = len(_anchors())
    raw, logits = outputs[1, count, 12][0], outputs[1, count, 1][0, :, 0]
    scores = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -100, 100)))
    boxes: list[np.ndarray] = []
    kept: list[Crop] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] < _LEAST_SCORE or len(kept) == MOST_PEOPLE:
            break
        centre, extent = raw[index, :2] / _DETECTOR_SIDE + _anchors()[index], raw[index, 2:4] / _DETECTOR_SIDE
        box = np.concatenate([centre - extent / 2, centre + extent / 2])
        if any(_overlap(box, other) > _SAME_PERSON for other in boxes):
            continue
        boxes.append(box)
        kept.append(_crop_around(*(raw[index, 4:8].reshape(2, 2) / _DETECTOR_SIDE + _anchors()[index]) * side - offset))
    return kept


def _crop_around(hips: np.ndarray, top: np.ndarray) -> Crop:
    """Return the crop of a person, from the middle of the hips and a point above the head on a circle around all."""
    angle = math.pi / 2 - math.atan2(hips[1] - top[1], top[0] - hips[0])
    return hips, 2 * math.dist(hips, top) * _CROP_SCALE, angle


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return intersection over union of two boxes (left, top, right, bottom)."""
    common = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
    both = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common
    return float(common / both) if both > 0 else 0.0


def _landmarks(pixels: np.ndarray, crop: Crop) -> np.ndarray | None:
    """Return the [33, 3] landmarks (x, y in the image's pixels, visibility) of one person, None where there is none.

    Twice: the first pass finds a better crop than the detector's, as from one frame of a film to the next.
    """
    import cv2

    found = None
    for _ in range(2):
        centre, side, angle = crop
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        corner = centre - turn @ np.full(2, side / 2)
        to_image = np.concatenate([turn * side / _LANDMARKS_SIDE, corner[:, None]], axis=1)
        upright = cv2.warpAffine(
            pixels, to_image, (_LANDMARKS_SIDE, _LANDMARKS_SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
        outputs = _run(LANDMARKS, upright / 255)
        if float(outputs[1, 1][0, 0]) < _LEAST_PRESENCE:
            break
        values = outputs[1, 195].reshape(39, 5)  # x, y, z, visibility, presence
        positions = values[:, :2] @ to_image[:, :2].T + to_image[:, 2]
        visible = 1 / (1 + np.exp(-values[:, 3:4].astype(np.float64)))
        found = np.concatenate([positions, visible], axis=1)[:33]
        crop = _crop_around(positions[33], positions[34])  # two landmarks that are there for this, and no joints
    return found
