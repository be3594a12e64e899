"""The language that every room speaks: requests, events, errors, and what a picture says about itself."""

from core.errors import StudioError
from core.events import Event, Failure, Result
from core.messages import Message
from core.request import ControlNet, Preprocess, Request, TextToImage, Upscale

__all__ = [
    "ControlNet",
    "Event",
    "Failure",
    "Message",
    "Preprocess",
    "Request",
    "Result",
    "StudioError",
    "TextToImage",
    "Upscale",
]
