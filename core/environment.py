"""The environment that a process starts in: what must be set before torch, DiffSynth and Gradio are imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping

# What must be set before torch, DiffSynth and Gradio are imported, and why.
ENVIRONMENT: Mapping[str, str] = {
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # operations that MPS lacks run on the CPU instead of failing
    # DiffSynth takes whatever attention it finds installed, also for CPU and MPS; Sage's corrupts Z-Image.
    "DIFFSYNTH_ATTENTION_IMPLEMENTATION": "torch",
    "DIFFSYNTH_DOWNLOAD_SOURCE": "huggingface",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # prompts are short, and a fork after parallel use only warns
}


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set what ENVIRONMENT lists and the user has not set; return what was set."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in environ}
    environ.update(added)
    return added


@contextlib.contextmanager
def without_proxies(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Let nothing of this process be asked by way of a proxy meanwhile, whatever the environment or the system names.

    Gradio asks its own address, and its HTTP client (httpx) sends that to a proxy too, or fails when it is made: at a
    kind of proxy that it lacks a package for, and at an exception that is none to it. That is made at import already.
    """
    names = [name for name in environ if name.lower() == "no_proxy"] or ["no_proxy"]
    before = {name: environ.get(name) for name in names}
    environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del environ[name]
            else:
                environ[name] = value


def on_space(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a Hugging Face Space, whose visitors cannot change how it was started."""
    return "SPACE_ID" in environ
