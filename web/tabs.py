"""The registry of tabs: a mode's form and its endpoint. A new mode is a row here, and a row in `engine.modes`."""

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from core.request import ControlNet, DrawRequest, TextToImage, Upscale
from engine import Engine
from web import tab_controlnet, tab_generate, tab_upscale
from web.form import Form


@dataclass(frozen=True)
class Tab:
    """One tab.

    Attributes:
        mode: the request that its form becomes.
        title: what it is called.
        lay_out: lays the tab out below the line that says which weights draw, and returns its form.
        publish: adds its endpoints, which programs call by name.
        offer: what a finished picture of any tab is offered for here, where the mode starts from an image.
    """

    mode: type[DrawRequest]
    title: str
    lay_out: Callable[[Engine, gr.Tab, gr.HTML], Form]
    publish: Callable[[Engine], None]
    offer: str = ""


TABS: list[Tab] = [
    Tab(TextToImage, "Text to Image", tab_generate.lay_out, tab_generate.endpoint),
    Tab(ControlNet, "ControlNet", tab_controlnet.lay_out, tab_controlnet.endpoints, "Use as control"),
    Tab(Upscale, "Upscale", tab_upscale.lay_out, tab_upscale.endpoint, "Upscale this"),
]
