"""A Space on ZeroGPU, as far as it runs without one: started by test_zerogpu.py in processes of their own.

`page`: the app, its requests carried out by the fork workers of the real package `spaces`. That package is loaded as
where torch is not installed: then it schedules, forks and streams, and leaves CUDA alone, which is not here; the
miniature draws on the CPU.

`direct`: the same, for one task without a page, closed in the middle; prints what became of it.

`retried`: the same, for three tasks after each other, of which the first two are aborted; prints what came of each.

`emulated`: `spaces` with its emulation of CUDA, as on a Space before a GPU is lent; prints where the models lie before
the launch, and what the launch packed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from engine import worker_zerogpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def _spaces_without_cuda() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    import spaces  # noqa: F401
    import spaces.zero.config as config

    del sys.modules["torch"]
    if card := os.environ.get("TEST_CARD"):  # in place of /proc/driver/nvidia, where the package reads it
        config._read_gpu_information = lambda: f"Model: {card}"
        config.get_config.cache_clear()


def _task() -> worker_zerogpu.Task:
    """Return a task that needs the least of a GPU's time."""
    from core.messages import Message
    from core.request import TextToImage
    from engine import worker_zerogpu
    from engine.mode import Job, Prepared
    from hub.inventory import Chosen

    request = TextToImage.parse(prompt="a fox").resolved("mini")
    return worker_zerogpu.Task(
        Job(request, Chosen("mini", {}, "", Message("test", "a test")), Prepared((128, 128))), 20.0
    )


def page() -> None:
    _spaces_without_cuda()
    import web.server
    from engine import Engine, Settings

    web.server.serve(Engine(Settings(weights="mini", device="cpu")))


def direct() -> None:
    _spaces_without_cuda()
    from types import SimpleNamespace

    import gradio as gr
    from gradio.context import LocalContext

    from core.events import Step
    from engine import worker_zerogpu
    from engine.mode import Drawing

    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"

        def draw(*_: object) -> Drawing:
            try:
                for index in range(100):
                    with seen.open("a") as file:
                        file.write("step\n")
                    yield Step(index + 1, 100)
                    time.sleep(0.05)
            except GeneratorExit:
                with seen.open("a") as file:
                    file.write(f"closed in {'the parent' if os.getpid() == parent else 'a fork'}\n")
                raise
            raise AssertionError("closed before its end")

        parent = os.getpid()
        worker_zerogpu.share(SimpleNamespace(draw=draw))
        with gr.Blocks() as blocks:
            pass
        blocks.launch(prevent_thread_lock=True, quiet=True)
        visitor = SimpleNamespace(headers=SimpleNamespace(get=lambda name: None))
        LocalContext.request.set(visitor)  # type: ignore[arg-type]  # as much of a request as is read
        events = worker_zerogpu.carry_out(_task())
        first = [next(events), next(events)]
        events.close()
        lines = seen.read_text().splitlines()
        blocks.close()
    print(json.dumps({"first": [vars(event) for event in first], "steps": lines.count("step"), "last": lines[-1]}))


def retried() -> None:
    _spaces_without_cuda()
    from types import SimpleNamespace

    import gradio as gr
    from gradio.context import LocalContext
    from PIL import Image

    from core.errors import StudioError
    from engine import worker_zerogpu
    from engine.mode import Drawing, Drawn
    from engine.timing import Returning

    def draw(*_: object) -> Drawing:
        yield from ()
        return Drawn(Image.new("RGB", (8, 8)))

    worker_zerogpu.share(SimpleNamespace(draw=draw))
    with gr.Blocks() as blocks:
        pass
    blocks.launch(prevent_thread_lock=True, quiet=True)
    visitor = SimpleNamespace(headers=SimpleNamespace(get={"x-ip-token": "a.e30.b"}.get))
    LocalContext.request.set(visitor)  # type: ignore[arg-type]  # as much of a request as is read
    runs = []
    for _ in ("aborted", "aborted twice", "quota"):
        outcome: list[str] = []
        events = Returning(worker_zerogpu.carry_out(_task()))
        try:
            outcome.extend(type(event).__name__ for event in events)
            outcome += [type(events.value).__name__, *map(str, events.value.notes)]
        except StudioError as error:
            outcome += [type(error).__name__, str(error)]
        runs.append(outcome)
    blocks.close()
    print(json.dumps(runs))


def emulated() -> None:
    import web.server  # noqa: F401 - imports `spaces` before torch can be used
    from core.request import WeightsChoice
    from engine import Settings, worker_zerogpu

    weights = cast(WeightsChoice, os.environ.get("TEST_WEIGHTS", "mini"))  # the test names one
    worker = worker_zerogpu.PackedWorker(Settings(weights=weights))
    worker.pack()
    pipeline = worker.pipeline
    assert pipeline is not None
    pipe = pipeline.pipe
    parts: dict[str, torch.nn.Module | None] = {
        "text_encoder": pipe.text_encoder,
        "vae_encoder": pipe.vae_encoder,
        "vae_decoder": pipe.vae_decoder,
        "controlnet": pipe.controlnet,
        **{str(name): transformer for name, transformer in pipeline.transformers.items()},
    }
    models = {name: model for name, model in parts.items() if model is not None}
    devices = {name: sorted({str(weight.device) for weight in model.parameters()}) for name, model in models.items()}
    size = sum(weight.numel() * weight.element_size() for model in models.values() for weight in model.parameters())
    offload = Path(os.environ["ZEROGPU_OFFLOAD_DIR"])
    before = sum(file.stat().st_size for file in offload.rglob("*") if file.is_file())

    import gradio as gr

    with gr.Blocks() as blocks:
        pass
    blocks.launch(prevent_thread_lock=True, quiet=True)
    packed = sum(file.stat().st_size for file in offload.rglob("*") if file.is_file())
    for file in os.environ.get("TEST_DELETE", "").split(os.pathsep):
        Path(file).unlink() if file else None
    chosen = worker.weights("generate", "turbo", "auto")
    blocks.close()
    facts = {"devices": devices, "bytes": size, "before": before, "packed": packed, "kind": chosen.kind}
    print(json.dumps(facts | {"fingerprints": worker.fingerprints(chosen)}))


if __name__ == "__main__":
    {"page": page, "direct": direct, "emulated": emulated, "retried": retried}[sys.argv[1]]()
