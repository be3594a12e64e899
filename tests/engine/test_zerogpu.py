"""ZeroGPU: how much is asked for, what its errors mean, and the app in the fork workers of the real `spaces`."""

import contextlib
import dataclasses
import http.server
import importlib.resources
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from core.errors import GpuAborted, GpuBusy, GpuNoVisitor, GpuQuota, InternalError, SpaceOutOfMemory, StudioError
from core.messages import Message
from core.request import ControlNet, Resolved, TextToImage, Upscale
from core.upload import Upload
from diffusion import memory
from diffusion.device import Device
from diffusion.memory import MemoryPlan, memory_plan
from engine import Settings, estimate, worker_zerogpu, zerogpu
from engine.estimate import Work
from engine.mode import Drawn, Job, Prepared
from engine.modes import MODES
from engine.worker_zerogpu import PackedWorker, Task
from hub.inventory import Chosen
from hub.parts import PARTS
from tests.helpers import sparse

ROOT = Path(__file__).parent.parent.parent
SPACE = ROOT / "tests" / "helpers" / "zerogpu_space.py"
VAE = PARTS["vae"]
NATIVE = (1024, 1024)
CONFIGS = Path(str(importlib.resources.files("spaces"))) / "zero" / "configs.json"


ROOMY = memory_plan("cuda", 80 << 30, None, 64 << 30, "controlnet")


def turbo(**values: object) -> Resolved:
    return TextToImage.parse(prompt="a fox", **values).resolved("full")


def base(**values: object) -> Resolved:
    return turbo(model="base", **values)


def controlnet(**values: object) -> Resolved:
    return ControlNet.parse(prompt="a fox", image="x.png", **values).resolved("full", {"image": Upload("x.png", b"x")})


def upscale(**values: object) -> Resolved:
    return Upscale.parse(image="x.png", **values).resolved("full")


def work(request: Resolved, size: tuple[int, int]) -> Work:
    return MODES[request.mode].work(request, "full", size, ROOMY)


def seconds(request: Resolved, size: tuple[int, int] = NATIVE) -> float:
    """The seconds that a request is taken to hold the GPU."""
    return zerogpu.estimate(work(request, size), ROOMY, lora=bool(request.lora_name))


def task(request: Resolved, size: tuple[int, int] = NATIVE, **values: Any) -> Task:
    return Task(
        Job(request, Chosen("full", {}, "", Message("test", "a test")), Prepared(size)),
        seconds(request, size),
        **values,
    )


# --- how many seconds ---------------------------------------------------------------------------------------------


def test_elsewhere_the_decorator_is_the_identity_and_needs_no_spaces() -> None:
    code = (
        "import sys; sys.modules['spaces'] = None; from engine import worker_zerogpu, zerogpu; "
        "print(zerogpu.ACTIVE, worker_zerogpu.on_gpu.__module__)"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SPACES_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "engine.worker_zerogpu"], done.stderr

    def lent() -> None: ...

    assert zerogpu.lend(duration=5)(lent) is lent


def test_the_estimate_grows_with_model_steps_area_controlnet_and_lora() -> None:
    plain = seconds(turbo())
    assert seconds(base()) > plain
    assert seconds(turbo(steps=16)) > plain
    assert seconds(turbo(), (2048, 2048)) > plain
    assert seconds(turbo(lora="x.safetensors")) > plain
    assert seconds(controlnet(steps=8)) > plain
    # ControlNet's size is its image's, which the request does not hold
    assert seconds(controlnet(), (2048, 2048)) > seconds(controlnet())


def test_upscale_counts_what_comes_out_and_redraws_large_images_in_tiles() -> None:
    def computing(side: int, **values: object) -> float:
        return seconds(upscale(**values), (side, side)) - zerogpu.START_SECONDS

    assert computing(4096) > 16 * computing(1024)
    assert computing(2048, steps=10) > 1.8 * computing(2048)
    # the enlargement alone: 9.4 TFLOP from 512 x 512
    assert computing(1024, denoise=0) * zerogpu.FLOP_PER_SECOND == pytest.approx(9.4e12, rel=0.01)
    assert computing(1024, denoise=0, upscaler="fast") < computing(1024, denoise=0) / 20


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (task(turbo()), 60),
        (task(base(steps=100), (2048, 2048)), 180),
        (task(base(steps=100), (2048, 2048), multiplier=2), 180),
        (task(turbo(), at_most=25), 25),
        (task(base(steps=100), (2048, 2048), at_most=100), 100),
        (task(turbo(), at_most=500), 60),
    ],
)
def test_what_is_asked_for_is_clamped(wanted: Task, asked: int) -> None:
    assert wanted.seconds == asked


def test_the_multiplier_counts_before_clamping() -> None:
    large = task(base(), (2048, 2048))
    assert 60 < large.seconds < 180
    assert zerogpu.granted(large.seconds) == pytest.approx(large.expected, abs=2)  # what is charged is what is given
    assert task(base(), (2048, 2048), multiplier=2).seconds == 180
    assert task(turbo(), multiplier=2).seconds == 120  # twice the least


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_what_is_asked_for_stays_within_its_limits_and_covers_the_work(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zerogpu, "card", lambda: zerogpu.Card(factor, None))
    for expected in (0.0, 10.0, 59.5, 60.0, 90.0, 119.9, 120.0, 200.0, 270.0, 1e4):
        for multiplier in (1.0, 2.0):
            asked = zerogpu.seconds_asked(expected, multiplier)
            assert 60 <= asked <= 180
            assert zerogpu.granted(asked) >= round(min(expected, 180 * factor))
            # no more than the work takes, beyond the least
            assert asked <= max(60, expected / factor + 1) * multiplier


def test_whatever_fits_a_day_without_an_account_is_asked_for_within_it() -> None:
    a_day = 60 * zerogpu.MINUTES_A_DAY["none"]
    assert zerogpu.granted(zerogpu.seconds_asked(0.0)) == 90
    for expected in range(a_day + 1):
        assert zerogpu.granted(zerogpu.seconds_asked(expected)) <= a_day
    assert zerogpu.estimate(work(turbo(), (2048, 2048)), ROOMY) <= a_day


# --- what its errors mean -----------------------------------------------------------------------------------------

QUOTA = "You have exceeded your free ZeroGPU quota (120s requested vs. 30s left). Try again in 1:23:45. "
ANONYMOUS = "You have exceeded your ZeroGPU quota (90s requested vs. 30s left). Try again in 1:23:45. "


@pytest.mark.parametrize(
    ("title", "message", "kind", "words"),
    [
        # the numbers of the quota, not those that were asked for
        ("ZeroGPU quota exceeded", QUOTA, GpuQuota, ["30 s left", "120 s", "1:23:45"]),
        ("ZeroGPU quota exceeded", QUOTA.replace("free", "Pro"), GpuQuota, ["your GPU quota has 30 s left"]),
        ("ZeroGPU quota exceeded", ANONYMOUS, GpuQuota, ["30 s left", "90 s", "sign in", "5 minutes", "1:23:45"]),
        ("ZeroGPU quota exceeded", ANONYMOUS.replace("90s", "135s"), GpuQuota, ["135 s", "2 minutes", "sign in"]),
        ("ZeroGPU quota exceeded", "No GPU was available after 60s. Try …", GpuBusy, ["within a minute", "signed in"]),
        ("ZeroGPU quota exceeded", "Space app has reached its GPU limit. Try …", GpuQuota, ["sign in", "token"]),
        (
            "ZeroGPU quota exceeded",
            "You have exceeded your ZeroGPU runs limit. ",
            GpuQuota,
            ["number of pictures", "sign in"],
        ),
        ("ZeroGPU pending credits exceeded", "You have too many …", GpuQuota, ["wait"]),
        (
            "ZeroGPU illegal duration",
            "The requested GPU duration (60s) is larger …",
            GpuQuota,
            ["90 s", "smaller", "sign in"],
        ),
        ("ZeroGPU queue timeout", "No GPU was available after 60s", GpuBusy, ["try again"]),
        ("ZeroGPU client error", "No GPU was available", GpuBusy, ["few minutes"]),
        ("ZeroGPU client error", "Expired ZeroGPU proxy token", GpuBusy, ["reload"]),
        ("ZeroGPU worker error", "GPU task aborted", GpuAborted, ["after 90 s"]),
        ("ZeroGPU worker error", "OutOfMemoryError", InternalError, ["OutOfMemoryError"]),
        ("ZeroGPU something new", "Unheard of", GpuBusy, ["Unheard of"]),
    ],
)
def test_each_error_of_the_space_is_a_sentence(title: str, message: str, kind: type, words: list[str]) -> None:
    refusal = zerogpu.refusal_of(gr.Error(message, title=title, print_exception=False), 60)
    assert type(refusal) is kind
    assert all(word in str(refusal) for word in words), str(refusal)


def test_the_titles_are_those_of_the_installed_package() -> None:
    import spaces.zero

    source = "".join(file.read_text() for file in Path(spaces.zero.__file__).parent.glob("*.py"))
    ours = (ROOT / "engine" / "zerogpu.py").read_text()
    known = {line.split('"')[1] for line in ours.splitlines() if line.strip().startswith('case "ZeroGPU')}
    assert len(known) == 6
    assert all(f'error("{title}"' in source for title in known)
    raised = {piece.split('"')[0] for piece in source.split(' error("')[1:]}
    assert raised == known


# --- the card that is lent ----------------------------------------------------------------------------------------

RTX = "Model: \t\t NVIDIA RTX PRO 6000 Blackwell Server Edition\nIRQ: 1\n"


def test_the_figures_are_those_of_the_installed_package() -> None:
    import spaces.zero.client

    (told,) = [card for card in json.loads(CONFIGS.read_text()) if "RTX PRO 6000" in card["model"]]
    assert (told["duration_factor"], told["xlarge_threshold"]) == dataclasses.astuple(zerogpu.USUAL_CARD)
    assert told["memory"] // 2 >= zerogpu.LENT_BYTES
    assert zerogpu.MINUTES_A_DAY["pro"] == spaces.zero.client.PRO_QUOTA_MINUTES


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the Space's package says of the card; a test changes it before it asks."""
    import spaces.zero.config

    monkeypatch.setattr(spaces.zero.config, "_read_gpu_information", lambda: RTX)
    monkeypatch.setattr(zerogpu, "ACTIVE", True)
    spaces.zero.config.get_config.cache_clear()
    zerogpu.card.cache_clear()
    yield cast(dict[str, Any], spaces.zero.config.get_config())
    spaces.zero.config.get_config.cache_clear()
    zerogpu.card.cache_clear()


def test_the_installed_package_goes_before_our_figures(told: dict[str, Any]) -> None:
    told |= {"duration_factor": 1.25, "xlarge_threshold": None}
    assert zerogpu.card() == zerogpu.Card(1.25, None)
    assert zerogpu.granted(60) == 75


def test_a_package_that_tells_nothing_leaves_our_figures(
    told: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    del told["duration_factor"]
    assert zerogpu.card() == zerogpu.USUAL_CARD
    assert "duration_factor" in caplog.text


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_seconds_are_counted_as_the_package_counts_them(factor: float, told: dict[str, Any]) -> None:
    from datetime import timedelta

    import spaces.zero.client

    told["duration_factor"] = factor
    for asked in range(1, 181):
        counted = spaces.zero.client.get_duration_seconds(timedelta(seconds=asked), "large")
        assert zerogpu.granted(asked) == round(counted)


def emulated(total: int) -> Device:
    """The card as the page's process sees it: whole, and empty."""
    return Device("cuda", "a card", total, total - 309_002_240, "bfloat16", Message("test", "a test"), (12, 0))


def packed_plan(total: int = 101_973_950_464) -> tuple[Device, MemoryPlan]:
    device = zerogpu.lent(emulated(total))
    plan = memory.plan_for(device, "controlnet", "full")
    return device, worker_zerogpu.for_every_request(plan, "full", device.dtype)


def test_the_plan_counts_with_the_half_that_is_lent() -> None:
    device, plan = packed_plan()
    assert device.total_bytes == device.free_bytes == plan.room == 48_000_000_000
    assert plan.other_transformer == "stays"
    assert set(plan.resident) == {"transformer", "text_encoder", "vae", "controlnet"}
    assert plan.room - plan.resident_bytes > 8e9
    processor = dataclasses.replace(emulated(10**12), kind="cpu")
    assert zerogpu.lent(processor) is processor


def test_what_is_packed_stays_below_the_limit_of_whole_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = packed_plan()
    assert 39e9 < plan.resident_bytes < 45_097_156_608
    for limit in range(20, 80, 3):
        monkeypatch.setattr(zerogpu, "card", lambda limit=limit: zerogpu.Card(1.5, limit * 10**9))
        for total in (48, 96, 102, 140):
            _, plan = packed_plan(total * 10**9)
            assert plan.resident_bytes <= limit * 10**9


def test_the_largest_requests_fit_beside_the_copies_for_a_lora() -> None:
    _, plan = packed_plan()
    assert plan.lora_copies > 1e9
    for request in (turbo(), base(), controlnet(), upscale()):
        for side in (1024, 1536, 2048):
            asked = work(request, (side, side))
            estimate.check(asked, plan, "bfloat16", zerogpu.SPEED)
            copies = 0 if isinstance(request, Upscale) else plan.lora_copies
            assert estimate.peak_bytes(asked, plan, "bfloat16") + copies <= plan.room
    # What is decoded at once fits beside the copies too.
    side = math.isqrt(plan.tiled_vae_above)
    decoded = Work("full", 1, side, side)
    assert 1024 <= side < 2048
    assert estimate.peak_bytes(decoded, plan, "bfloat16") + plan.lora_copies <= plan.room
    assert worker_zerogpu.for_every_request(ROOMY, "mini", "float32") is ROOMY


def test_estimates_are_for_the_card_that_is_lent() -> None:
    worker = PackedWorker(Settings())
    device, plan = packed_plan()
    found = worker.forecast.estimate(work(turbo(), NATIVE), device, plan)
    assert found.seconds == pytest.approx(zerogpu.SPEED.seconds(work(turbo(), NATIVE), plan))
    processor = dataclasses.replace(device, kind="cpu")
    assert worker.forecast.estimate(work(turbo(), NATIVE), processor, plan).seconds > 10 * found.seconds


def test_a_second_transformer_that_has_no_room_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = PackedWorker(Settings(weights="mini", device="cpu"))
    plans = memory.plan_for

    def narrow(*given: Any, **more: Any) -> MemoryPlan:  # as on a card where one transformer fits
        return dataclasses.replace(plans(*given, **more), other_transformer="goes")

    monkeypatch.setattr("engine.worker.plan_for", narrow)
    worker.pack()
    assert {model for _, model in worker._chosen} == {"turbo"}
    assert "no room for it: base" in caplog.text


def test_only_this_module_knows_the_titles() -> None:
    others = [path for path in ROOT.glob("*/*.py") if path.name not in ("zerogpu.py", Path(__file__).name)]
    assert not [path.name for path in others if "GPU task aborted" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("first", "refusal", "second"),
    [
        (task(base(), (2048, 1536)), GpuAborted("-"), {"multiplier": 2.0}),
        (task(base(), (2048, 1536), multiplier=2.0), GpuAborted("-"), None),
        (task(base(steps=100), (2048, 2048)), GpuAborted("-"), None),  # at 180 already
        (task(turbo()), GpuQuota("-", fits=40), {"at_most": 40}),
        (task(turbo()), GpuQuota("-", fits=20), {"at_most": 20}),  # 30 with the card's factor, which is enough
        (task(turbo()), GpuQuota("-", fits=10), None),  # the image itself takes longer
        (task(turbo(), multiplier=2.0), GpuQuota("-", fits=50), None),  # 60 did not suffice
        (task(turbo(), multiplier=2.0), GpuQuota("-", fits=80), {"at_most": 80}),
        (task(turbo(), at_most=40), GpuQuota("-", fits=30), None),  # once
        (task(turbo()), GpuQuota("-"), None),
        (task(turbo()), GpuBusy("-"), None),
    ],
)
def test_what_is_tried_again(first: Task, refusal: StudioError, second: dict[str, Any] | None) -> None:
    found = worker_zerogpu.another_try(first, refusal)
    assert found == (second and Task(**{**vars(first), **second}))


def test_a_task_is_pickled_whole() -> None:
    image = Image.new("RGB", (16, 16), "red")
    prepared = Prepared((16, 16), image, inputs={"image": "sha256:0"})
    for request in (controlnet(), upscale(), turbo()):
        sent = Task(Job(request, Chosen("full", {}, "", Message("test", "a test")), prepared), 1.0)
        arrived = pickle.loads(pickle.dumps(sent))
        assert arrived.job.request == request
        assert arrived.job.request.uploads == request.uploads
        assert arrived.job.prepared.image.tobytes() == image.tobytes()
    drawn = Drawn(image, seconds={"total": 1.0})
    assert pickle.loads(pickle.dumps(drawn)).image.tobytes() == image.tobytes()
    assert worker_zerogpu.on_gpu.__qualname__ == "on_gpu"  # at module level: a fork finds it by its name


def test_without_a_visitor_it_is_refused() -> None:
    with pytest.raises(GpuNoVisitor) as refused:
        next(worker_zerogpu.carry_out(task(turbo())))
    assert refused.value.http_status == 503
    assert "gradio_client" in str(refused.value)


def test_where_memory_ends_a_task_fails_and_the_models_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    worker = PackedWorker(Settings(weights="mini", device="cpu"))
    worker.pack()
    chosen = worker.weights("generate", "turbo", "auto")
    pipeline, calls = worker.pipeline, []

    def exhausted(**_: object) -> None:  # in place of a card that is too small, which cannot be arranged here
        calls.append(1)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "text_to_image", exhausted)
        with pytest.raises(SpaceOutOfMemory, match="ask for a smaller one"):  # what a visitor can do, and nothing else
            list(worker.draw(TextToImage.parse(prompt="a fox").resolved("mini"), chosen))
    assert len(calls) == 1
    assert worker.pipeline is pipeline
    assert list(worker.draw(TextToImage.parse(prompt="a fox", steps=1).resolved("mini"), chosen))


# --- with the real package ----------------------------------------------------------------------------------------


@dataclass
class Lender:
    """A stand-in for the service that lends GPUs, which answers on loopback in its protocol; the rest is real.

    `answers` are what the next requests for a GPU get: "lend" (also when there are none left), "abort": lend, and kill
    the process that takes it; or a status and a JSON body.
    """

    url: str = ""
    answers: list[Any] = field(default_factory=list)
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    aborting: bool = False
    idle: bool = False

    def named(self, name: str) -> list[dict[str, str]]:
        return [values for path, values in self.calls if path == name]


@contextlib.contextmanager
def lending() -> Iterator[Lender]:
    lender = Lender()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            parts = urlsplit(self.path)
            values = {name: value[0] for name, value in parse_qs(parts.query).items()}
            lender.calls.append((parts.path, values))
            status, body = 200, {}
            if parts.path == "/schedule":
                answer = lender.answers.pop(0) if lender.answers else "lend"
                lender.aborting = answer == "abort"
                body = {"idle": lender.idle, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}
                if not isinstance(answer, str):
                    status, body = answer
            self.send_response(status)
            data = json.dumps(body).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            if parts.path == "/allow":
                lender.pids.append(int(values["pid"]))
                if lender.aborting:  # what the Space does when the seconds are over
                    os.kill(lender.pids[-1], signal.SIGKILL)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lender.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield lender
        server.shutdown()


def environment(lender: Lender, folder: Path) -> dict[str, str]:
    cgroup = folder / "cgroup"
    cgroup.write_text("0::/space\n")
    return os.environ | {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": lender.url,
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(cgroup),
        "ZEROGPU_OFFLOAD_DIR": str(folder / "offload"),
        "SPACE_ID": "someone/z-image-studio",
        "HF_HUB_CACHE": str(folder / "hub"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(folder / "models"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Space:
    lender: Lender
    client: Client
    log: Path


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    folder = tmp_path_factory.mktemp("space")
    sparse.write_hub_snapshot(folder / "hub", VAE.repo, ["vae"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with lending() as lender, open(folder / "log.txt", "wb") as log:
        # As on a Space: address and port come from the environment alone.
        environ = environment(lender, folder) | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
        process = subprocess.Popen(
            [sys.executable, str(SPACE), "page"],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Space(lender, _client(f"http://127.0.0.1:{port}", process, folder / "log.txt"), folder / "log.txt")
        finally:
            process.terminate()
            process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):  # its forks wait for more tasks, and would stay
                os.killpg(process.pid, signal.SIGKILL)


def _client(url: str, process: subprocess.Popen[bytes], log: Path) -> Client:
    deadline = time.monotonic() + 180  # far more than it takes; a machine may be busy
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return Client(url, verbose=False)
        except Exception:  # whatever a server that is not there yet makes of it
            time.sleep(0.5)
    raise AssertionError(f"the Space did not start:\n{log.read_text()}")


@pytest.fixture
def lender(space: Space) -> Lender:
    space.lender.calls.clear()
    space.lender.answers.clear()
    return space.lender


def test_an_image_is_drawn_in_a_fork_that_a_gpu_is_lent_to(space: Space, lender: Lender) -> None:
    _, facts = space.client.predict("a fox on a black background", seed=7, api_name="/generate")
    assert facts["request"]["seed"] == 7
    (asked,) = lender.named("/schedule")
    assert asked["durationSeconds"] == "60"
    assert asked["gpuSize"] == "large"
    assert len(lender.named("/allow")) == 1
    assert lender.pids[-1] != 0
    assert [done["fail"] for done in lender.named("/release")] == ["false"]


def test_a_space_links_what_was_preloaded(space: Space) -> None:
    link = space.log.parent / "models" / VAE.repo / VAE.pattern
    assert link.is_symlink()
    assert link.resolve().parent.name == "blobs"


def test_an_aborted_task_is_tried_once_more(space: Space, lender: Lender) -> None:
    lender.answers[:] = ["abort"]
    job = space.client.submit("a fox on a black background", seed=7, api_name="/generate")
    _, facts = job.result()
    assert [asked["durationSeconds"] for asked in lender.named("/schedule")] == ["60", "120"]
    text = "The Space took its GPU back after 60 s; trying once more with 120 s."
    assert text in facts["notes"]
    assert {"progress": "retry", "text": text} in [facts for _, facts in job.outputs()]


def test_it_is_tried_once_more_and_not_twice(space: Space, lender: Lender) -> None:
    lender.answers[:] = ["abort", "abort", "lend"]
    with pytest.raises(AppError, match="took its GPU back after 120 s"):
        space.client.predict("a fox", api_name="/generate")
    assert len(lender.named("/schedule")) == 2


def test_an_image_is_enlarged_and_refined_in_a_fork(space: Space, lender: Lender, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(tmp_path / "small.png")
    client = Client(space.client.src, verbose=False, download_files=str(tmp_path))
    file, facts = client.predict(
        handle_file(tmp_path / "small.png"), denoise=0.3, steps=2, upscaler="fast", api_name="/upscale"
    )
    with Image.open(file) as enlarged:
        assert enlarged.size == (128, 96)
    assert facts["request"]["denoise"] == 0.3
    assert len(lender.named("/schedule")) == len(lender.named("/allow")) == 1


def test_what_is_wrong_is_refused_before_a_gpu_is_asked_for(space: Space, lender: Lender) -> None:
    with pytest.raises(AppError, match="weights"):
        space.client.predict("a fox", weights="full", api_name="/generate")
    assert not lender.named("/schedule")


def test_the_visitors_quota_is_a_sentence(space: Space, lender: Lender) -> None:
    lender.answers[:] = [(429, {"left": 5, "wait": "PT1H"})]
    with pytest.raises(AppError, match="sign in to Hugging Face"):
        space.client.predict("a fox", api_name="/generate")
    space.client.predict("a fox", seed=3, api_name="/generate")  # the next request works


def test_the_quotas_rest_is_used_where_it_suffices(space: Space, lender: Lender) -> None:
    signed_in = {"x-ip-token": "a.e30.b"}
    client = Client(space.client.src, headers=signed_in, verbose=False)
    lender.answers[:] = [(429, {"left": 40, "wait": "PT1H"})]
    client.predict("a fox", seed=3, api_name="/generate")
    assert [asked["durationSeconds"] for asked in lender.named("/schedule")] == ["60", "40"]


@pytest.mark.slow
def test_closing_the_generator_stops_the_fork(tmp_path: Path) -> None:
    with lending() as lender:
        done = subprocess.run(
            [sys.executable, str(SPACE), "direct"], cwd=ROOT, env=environment(lender, tmp_path), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        facts = json.loads(done.stdout.splitlines()[-1])
        assert [event["index"] for event in facts["first"]] == [1, 2]
        assert facts["steps"] < 50
        assert facts["last"] == "closed in a fork"
        assert [release["fail"] for release in lender.named("/release")] == ["false"]


@pytest.mark.slow
def test_aborted_and_overdrawn_tasks_are_tried_once_more(tmp_path: Path) -> None:
    with lending() as lender:
        lender.answers[:] = ["abort", "lend", "abort", "abort", (429, {"left": 40, "wait": "PT1H"}), "lend"]
        done = subprocess.run(
            [sys.executable, str(SPACE), "retried"], cwd=ROOT, env=environment(lender, tmp_path), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        once, twice, quota = json.loads(done.stdout.splitlines()[-1])
        assert once == ["Retry", "Drawn", "The Space took its GPU back after 60 s; trying once more with 120 s."]
        assert twice[:2] == ["Retry", "GpuAborted"]
        assert "after 120 s" in twice[2]
        assert quota == ["Drawn"]
        assert [asked["durationSeconds"] for asked in lender.named("/schedule")] == ["60", "120"] * 2 + ["60", "40"]


def test_todays_card_counts_half_as_much_again(tmp_path: Path) -> None:
    with lending() as lender:
        lender.answers[:] = ["abort", "lend", "abort", "abort", (429, {"left": 60, "wait": "PT1H"}), "lend"]
        done = subprocess.run(
            [sys.executable, str(SPACE), "retried"],
            cwd=ROOT,
            env=environment(lender, tmp_path) | {"TEST_CARD": RTX.split("\t")[-1].split("\n")[0].strip()},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
        once, twice, quota = json.loads(done.stdout.splitlines()[-1])
        assert once == ["Retry", "Drawn", "The Space took its GPU back after 90 s; trying once more with 180 s."]
        assert "after 180 s" in twice[2]
        assert quota == ["Drawn"]
        charged = [asked["durationSeconds"] for asked in lender.named("/schedule")]
        assert charged == ["90", "180"] * 2 + ["90", "60"]  # the last: all that was left
        assert {asked["gpuSize"] for asked in lender.named("/schedule")} == {"large"}


@pytest.mark.slow
def test_models_lie_on_cuda_before_the_launch_which_packs_them(tmp_path: Path) -> None:
    with lending() as lender:
        done = subprocess.run(
            [sys.executable, str(SPACE), "emulated"], cwd=ROOT, env=environment(lender, tmp_path), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        facts = json.loads(done.stdout.splitlines()[-1])
        assert {"turbo", "base", "text_encoder", "vae_decoder"} <= set(facts["devices"])
        assert set(map(tuple, facts["devices"].values())) == {("cuda:0",)}
        assert facts["before"] == 0
        assert facts["packed"] >= facts["bytes"]
        assert lender.named("/startup-report")
