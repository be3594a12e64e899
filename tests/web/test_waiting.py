"""Runs that wait for their turn: how they wait, and what becomes of them when nobody reads any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import gradio as gr
import pytest

from core.request import TextToImage
from engine import Engine
from web import run
from web.endpoints import stream
from web.readers import READERS

WAITING = 40


def listeners(engine: Engine) -> list[AsyncIterator[Any]]:
    def ask(session: str) -> Iterator[Any]:
        return stream(engine, TextToImage, gr.Request(session_hash=session), {"prompt": "a fox", "steps": 1, "seed": 7})

    return [run.unhurried(ask)(str(number)) for number in range(WAITING)]


def test_waiting_takes_no_threads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> list[int]:
        one_thread = anyio.CapacityLimiter(1)
        monkeypatch.setattr(run, "_threads", lambda: one_thread)
        waiting = listeners(engine)
        told = [(await anext(one))[1]["ahead"] for one in waiting]
        later = [asyncio.ensure_future(anext(one)) for one in waiting]
        first.close()
        last = await later[0]
        while not last[0]:
            last = await anext(waiting[0])
        for one, task in zip(waiting, later, strict=True):
            task.cancel()
            await asyncio.wait([task])
            await one.aclose()  # type: ignore[attr-defined]
        return told

    first = engine.run(TextToImage.parse(prompt="a fox", steps=100))
    next(first)
    assert asyncio.run(wait()) == list(range(1, WAITING + 1))
    assert not engine.is_full()
    assert next(engine.run(TextToImage.parse(prompt="a fox"))) is not None


def test_a_run_that_nobody_reads_is_not_carried_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody_reads() -> list[Any]:
        gr.context.LocalContext.event_id.set("nobody's")
        return [update async for update in listeners(engine)[0]]

    monkeypatch.setattr(READERS, "have_gone", lambda names, since: "nobody's" in names)
    assert asyncio.run(nobody_reads()) == []
    assert not vars(engine)["_turns"]._waiting
    assert vars(engine)["_turns"]._working is None
