"""The language that every room speaks: requests, events, errors, and what a picture says about itself."""

from core.errors import StudioError
from core.events import Event, Failure, Note, Result
from core.request import ControlNet, Preprocess, Request, TextToImage, Upscale

__all__ = [
    "ControlNet",
    "Event",
    "Failure",
    "Note",
    "Preprocess",
    "Request",
    "Result",
    "StudioError",
    "TextToImage",
    "Upscale",
]
