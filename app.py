"""What a Space starts, and Gradio's own tools: the page, served.

Importing it loads no torch, draws nothing and listens to nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from core import environment
from hub import space_cache

# First: Gradio and huggingface_hub read the environment when they are imported.
environment.prepare_environment()
if environment.on_space():
    space_cache.settle(os.environ)

from core.errors import StudioError

with environment.without_proxies():
    from engine import Engine
    from web import page
    from web import server as server

if TYPE_CHECKING:
    import gradio as gr


def __getattr__(name: str) -> gr.Blocks:
    """Build `demo`, the name that Gradio's own tools look for, when somebody asks for it."""
    if name == "demo":
        globals()["demo"] = demo = page.build(Engine())
        return demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Z-Image Studio's page, as a Space starts it; cli.py serve has more.")
    parser.add_argument("--models", metavar="FOLDER", help="a folder with models to look in first (Z_IMAGE_MODELS)")
    if (models := parser.parse_args().models) is not None:
        os.environ["Z_IMAGE_MODELS"] = models
    try:
        server.serve()
    except StudioError as error:
        sys.exit(str(error))
