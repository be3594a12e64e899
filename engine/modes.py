"""The registry of modes: a new one is a row here, and a row in `web.tabs`."""

from __future__ import annotations

from typing import Any

from engine.mode import Mode
from engine.mode_controlnet import ControlNetMode
from engine.mode_generate import TextToImageMode
from engine.mode_upscale import UpscaleMode

# Any: each mode takes resolved requests of its own type, and is asked for by the name that such a request has.
MODES: dict[str, Mode[Any]] = {mode.request.mode: mode for mode in (TextToImageMode(), ControlNetMode(), UpscaleMode())}
