"""A fault at each stage of a picture: it is told, the engine stays usable, and the next picture has the same bytes.

The faults come in by the seams that torch and the system have (hooks before a module's forward, limits of a process),
so that all of ours is the real thing. A download's faults are in tests/hub/test_download.py.
"""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from torch.nn.modules.module import register_module_forward_pre_hook

from core.events import Event, Failure, Result
from core.request import TextToImage
from engine import Engine, Settings
from tests.helpers.serving import server
from tests.helpers.workers import pipeline_of

DISK = OSError(errno.ENOSPC, "No space left on device")
NETWORK = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
STAGES = {"encode": "text_encoder", "step": "dit.all_final_layer.2-1", "decode": "vae_decoder"}


@contextmanager
def failing(module: type[torch.nn.Module], fault: Exception, times: int = 1000) -> Iterator[list[int]]:
    """Raise `fault` whenever a module of a class is about to compute, so many times; yield how often it was raised."""
    raised: list[int] = []

    def before(called: torch.nn.Module, _: object) -> None:
        if isinstance(called, module) and len(raised) < times:
            raised.append(1)
            raise fault

    hook = register_module_forward_pre_hook(before)
    try:
        yield raised
    finally:
        hook.remove()


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_a_stage_leaves_the_engine_as_it_was(stage: str) -> None:
    engine = Engine(Settings(weights="mini", device="cpu"))

    def ends(prompt: str = "a fox") -> Event:
        *_, last = engine.run(TextToImage.parse(prompt=prompt, seed=7, steps=1, model="turbo"))
        return last

    first = ends()
    assert isinstance(first, Result)
    module = type(pipeline_of(engine).pipe.get_submodule(STAGES[stage]))
    # Prompts of their own, since what was encoded once is not encoded again.
    for prompt, fault, times, code in (
        ("an apple", DISK, 1, "internal"),
        ("a boat", NETWORK, 1, "internal"),
        ("a car", MemoryError(), 1, None),  # drawn once more, with less
        ("a duck", torch.OutOfMemoryError("as if"), 1000, "out_of_memory"),
    ):
        with failing(module, fault, times) as raised:
            last = ends(prompt)
        assert raised, fault
        assert (last.code if isinstance(last, Failure) else None) == code, last
        if code is None:
            assert isinstance(last, Result)
            assert "less_memory" in [note.code for note in last.notes]
        after = ends()
        assert isinstance(after, Result)
        assert after.png == first.png, fault


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits are set on Linux alone")
def test_a_server_whose_disk_is_full_goes_on_when_there_is_room_again() -> None:
    import resource

    running = server()
    client = Client(running.url, verbose=False, download_files=False)

    def by_name() -> bytes:
        drawn = client.predict("a fox", steps=1, seed=7, api_name="/generate")
        return httpx.get(drawn[0]["url"], timeout=60).content

    def by_address() -> bytes:
        asked = {"prompt": "a fox", "n": 1, "response_format": "url", "seed": 7}
        answer = httpx.post(f"{running.url}v1/images/generations", json=asked, timeout=60)
        if answer.status_code != 200:
            raise AppError(answer.text)
        return httpx.get(answer.json()["data"][0]["url"], timeout=60).content

    ways: list[Callable[[], bytes]] = [by_name, by_address]
    first = [way() for way in ways]
    before = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (1000, before[1]))  # no file may be larger, the log neither
    try:
        for way in ways:
            with pytest.raises(AppError, match="could not be written") as told:
                way()
            assert tempfile.gettempdir() not in str(told.value)
    finally:
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, before)
    assert [way() for way in ways] == first
    client.close()
