"""Whether two checkouts behave alike: the same requests to both, and their results compared byte for byte.

    .venv/bin/python bench/replay.py OLD NEW [--only PATTERN ...] [--keep FOLDER]

OLD and NEW are folders or git revisions. Why: code that is moved about must do what it did. So this goes only by what
the outside may count on: the commands of `cli.py`, and the page and its endpoints over HTTP, where parts of the page
are named by their ids or their labels. Everything runs on the processor, offline, on the miniature, with one thread
and a home of its own; a folder is copied as git sees it, so that neither weights nor results of earlier runs count.

Prints each case that differs with the beginning of the difference, and ends with 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("old", "new")
FAULT = "fault.txt"  # why a case could not be asked
START_SECONDS = 120  # far more than the server takes; a machine may be busy
ANSWER_SECONDS = 120  # as long as an answer may take to begin

# --- the cases


@dataclass(frozen=True)
class Command:
    """A command line, as in a shell after `cli.py`; `@` stands for the folder of the inputs."""

    name: str
    line: str


@dataclass(frozen=True)
class Ask:
    """Something asked of the running server.

    Attributes:
        name: of the case.
        target: `GET /path`; `/endpoint` as programs call it; or `PART EVENT`, a listener of the page.
        language: what the visitor's browser prefers.
        values: by the name of the parameter or of the part of the page; what begins with `@` is an input to upload.
    """

    name: str
    target: str
    language: str = "en"
    values: Mapping[str, Any] = field(default_factory=dict)


Case = Command | Ask

APPLE = '"a red apple on a blue background"'
FOX = "a fox on a green background"
KINDS = ("canny", "softedge", "lineart", "scribble", "gray", "depth", "pose", "none")
HELP = ("", "serve", "generate", "controlnet", "upscale", "preprocess", "inspect", "models", "doctor")

COMMANDS: tuple[Command, ...] = (
    Command("turbo", f"generate {APPLE} --seed 7"),
    Command("turbo, json", f"generate {APPLE} --seed 7 --json"),
    Command("turbo, one step", 'generate "three turtles, purple background" --seed 1 --steps 1'),
    Command("turbo, many steps", 'generate "three turtles, purple background" --seed 1 --steps 20'),
    Command("turbo, size given", f"generate {APPLE} --width 128 --height 128 --seed 4294967295"),
    Command("turbo, miniature asked for", f"generate {APPLE} --weights mini --offline --memory 6 --seed 7"),
    Command("base", f"generate {APPLE} --model base --seed 7"),
    Command("base, without guidance", f"generate {APPLE} --model base --steps 4 --cfg 1 --seed 7"),
    Command("base, negative", f'generate {APPLE} --model base --steps 6 --cfg 7.5 --negative "leaf, 蓝色" --seed 7'),
    Command("base, json", f"generate {APPLE} --model base --steps 4 --seed 2 --json"),
    Command("prompt, Chinese", 'generate "蓝色背景上的红苹果" --seed 7'),
    Command("prompt, one word", "generate apple --seed 11"),
    Command("prompt, unknown words", 'generate "a dinosaur beside a zeppelin on mars" --seed 7 --json'),
    Command("prompt, too long", f'generate "{"a red apple, " * 300}" --steps 2 --seed 7'),
    Command("prompt, marks and lines", "generate 'Steps: 3, \"a fox\",\nNegative prompt: none' --steps 2 --seed 7"),
    Command("name given", f"generate {APPLE} --steps 2 --seed 7 --out named.png"),
    Command("lora, faint", f"generate {APPLE} --lora @gold.safetensors:0.3 --seed 7"),
    Command("lora, usual", f"generate {APPLE} --lora @gold.safetensors --seed 7 --json"),
    Command("lora, strong", f"generate {APPLE} --lora @gold.safetensors:1.5 --seed 7"),
    Command("lora, none of it", f"generate {APPLE} --lora @gold.safetensors:0 --seed 7"),
    Command("lora, by its bare name", f"generate {APPLE} --lora gold:1 --seed 7"),
    Command("lora, base", f"generate {APPLE} --model base --steps 4 --lora gold:1 --seed 7"),
    Command("lora, too strong", f"generate {APPLE} --lora @gold.safetensors:5.1"),
    Command("lora, of another model", f"generate {APPLE} --lora @sdxl.safetensors"),
    Command("lora, of the real weights", f"generate {APPLE} --lora @real.safetensors --json"),
    Command("lora, cut off", f"generate {APPLE} --lora @cut.safetensors"),
    Command("lora, absent", f"generate {APPLE} --lora absent --json"),
    Command("from our picture", "generate --from @drawn.png"),
    Command("from our picture, another seed", "generate --from @drawn.png --seed 8 --json"),
    Command(
        "from A1111's picture", "generate --from @a1111.png --model base --width 128 --height 128 --steps 4 --seed 7"
    ),
    Command("from A1111's picture, as it is", "generate --from @a1111.png"),
    Command("from a picture with a lora", "generate --from @golden.png"),
    Command("from a picture with a lora, given", "generate --from @golden.png --lora @gold.safetensors:0.5"),
    Command("from a picture of another mode", "upscale --from @drawn.png"),
    Command("from a plain picture", "generate --from @apple.png --json"),
    *(
        Command(f"controlnet, {kind}", f'controlnet "{FOX}" --image @person.jpg --preprocessor {kind} --seed 7')
        for kind in KINDS
    ),
    Command("controlnet, json", f'controlnet "{FOX}" --image @sketch.png --preprocessor none --seed 7 --json'),
    Command("controlnet, depth, json", f'controlnet "{FOX}" --image @sketch.png --preprocessor depth --json'),
    Command("controlnet, low scale", f'controlnet "{FOX}" --image @sketch.png --scale 0.4 --steps 4 --seed 7'),
    Command("controlnet, no scale", f'controlnet "{FOX}" --image @sketch.png --scale 0 --steps 4 --seed 7'),
    Command("controlnet, high scale", f'controlnet "{FOX}" --image @sketch.png --scale 2 --steps 4 --seed 7'),
    Command("controlnet, too high a scale", f'controlnet "{FOX}" --image @sketch.png --scale 2.1'),
    Command(
        "controlnet, thresholds", f'controlnet "{FOX}" --image @person.jpg --canny-low 20 --canny-high 60 --seed 7'
    ),
    Command("controlnet, lora", f'controlnet "{FOX}" --image @sketch.png --lora gold:1 --steps 4 --seed 7'),
    Command("controlnet, unknown words", 'controlnet "zeppelin" --image @sketch.png --steps 4 --seed 7'),
    Command("controlnet, blank picture", f'controlnet "{FOX}" --image @blank.png --steps 4 --seed 7'),
    Command("controlnet, from", "controlnet --from @controlled.png --image @sketch.png"),
    Command("controlnet, no picture", f'controlnet "{FOX}"'),
    Command("controlnet, no prompt", "controlnet --image @sketch.png"),
    *(
        Command(f"preprocess, {kind}", f"preprocess --image @person.jpg --preprocessor {kind} --out {kind}.png")
        for kind in KINDS
    ),
    Command("preprocess, json", "preprocess --image @odd.png --preprocessor gray --out gray.png --json"),
    Command("preprocess, depth, json", "preprocess --image @odd.png --preprocessor depth --out depth.png --json"),
    Command("preprocess, transparent", "preprocess --image @clear.png --out canny.png --canny-low 10 --canny-high 30"),
    Command("preprocess, frames", "preprocess --image @frames.gif --out canny.png --json"),
    Command("preprocess, thresholds crossed", "preprocess --image @odd.png --out a.png --canny-low 90 --canny-high 30"),
    Command("preprocess, unknown", "preprocess --image @odd.png --out a.png --preprocessor fog --json"),
    Command("preprocess, no person", "preprocess --image @blank.png --preprocessor pose --out pose.png --json"),
    Command("preprocess, text for a picture", "preprocess --image @text.png --out a.png"),
    Command("preprocess, wrong ending", "preprocess --image @odd.png --out a.jpg"),
    Command("upscale, best", "upscale --image @small.png --seed 7"),
    Command("upscale, fast, odd", "upscale --image @odd.png --upscaler fast --seed 7 --json"),
    Command("upscale, fast, tiles", "upscale --image @wide.png --upscaler fast --denoise 0 --seed 7"),
    Command("upscale, transparent", "upscale --image @clear.png --upscaler fast --seed 7"),
    Command("upscale, frames", "upscale --image @frames.gif --upscaler fast --seed 7 --json"),
    Command(
        "upscale, refined", f"upscale --prompt {APPLE} --image @apple64.png --upscaler fast --denoise 0.33 --seed 7"
    ),
    Command(
        "upscale, refined in tiles",
        f"upscale --prompt {APPLE} --image @odd.png --denoise 0.2 --steps 3 --seed 7 --json",
    ),
    Command("upscale, too large", "upscale --image @long.png"),
    Command("upscale, text for a picture", "upscale --image @text.png --json"),
    Command("upscale, cut off", "upscale --image @cut.png"),
    Command("upscale, absent", "upscale --image absent.png"),
    Command("upscale, too much denoise", "upscale --image @odd.png --denoise 1.1 --json"),
    Command("inspect, our picture", "inspect @drawn.png"),
    Command("inspect, our picture, json", "inspect @drawn.png --json"),
    Command("inspect, with a lora", "inspect @golden.png --json"),
    Command("inspect, A1111's picture", "inspect @a1111.png"),
    Command("inspect, A1111's picture, json", "inspect @a1111.png --json"),
    Command("inspect, plain picture", "inspect @apple.png"),
    Command("inspect, text for a picture", "inspect @text.png --json"),
    Command("inspect, absent", "inspect absent.png --json"),
    Command("inspect, lora", "inspect @gold.safetensors"),
    Command("inspect, lora, json", "inspect @gold.safetensors --json"),
    Command("inspect, lora of the real weights", "inspect @real.safetensors --json"),
    Command("inspect, lora of another model", "inspect @sdxl.safetensors --json"),
    Command("inspect, lora cut off", "inspect @cut.safetensors"),
    Command("models", "models"),
    Command("models list", "models list turbo depth"),
    Command("models list, json", "models list --json"),
    Command("models list, unknown", "models list everything --json"),
    Command("models verify", "models verify"),
    Command("models verify, json", "models verify --json"),
    Command("models verify, broken", "models verify depth turbo"),
    Command("models verify, broken, json", "models verify depth --json"),
    Command("models download, offline", "models download --offline"),
    Command("models download, offline, json", "models download all --offline --json"),
    Command("doctor", "doctor"),
    Command("doctor, json", "doctor --json"),
    Command("doctor, memory", "doctor --memory 24 --json"),
    Command("doctor, no memory", "doctor --memory 0"),
    Command("doctor, no such device", "doctor --device toaster --json"),
    Command("error, no prompt", "generate"),
    Command("error, blank prompt", 'generate " " --json'),
    Command("error, size", f"generate {APPLE} --width 1000"),
    Command("error, size, json", f"generate {APPLE} --height 130 --json"),
    Command("error, steps", f"generate {APPLE} --steps many"),
    Command("error, too many steps", f"generate {APPLE} --steps 101 --json"),
    Command("error, seed", f"generate {APPLE} --seed 4294967296"),
    Command("error, guidance of turbo", f"generate {APPLE} --cfg 3 --json"),
    Command("error, negative of turbo", f"generate {APPLE} --negative leaf"),
    Command("error, guidance", f"generate {APPLE} --model base --cfg nan"),
    Command("error, model", f"generate {APPLE} --model edit"),
    Command("error, weights", f"generate {APPLE} --weights big"),
    Command("error, real weights missing", f"generate {APPLE} --weights full"),
    Command("error, real weights missing, json", f"generate {APPLE} --model base --weights full --json"),
    Command("error, where to write", f"generate {APPLE} --out nowhere/a.png"),
    Command("error, memory", f"generate {APPLE} --memory much"),
    Command("error, command", "draw"),
    Command("error, flag", f"generate {APPLE} --speed 9"),
    Command("error, open address", "serve --host 0.0.0.0"),
    Command("error, password", "serve --auth nobody --json"),
    *(Command(f"help {command}".strip(), f"{command} --help") for command in HELP),
)


def both(name: str, target: str, **values: Any) -> tuple[Ask, Ask]:
    """Return a case in English and in Chinese."""
    return Ask(f"{name}, en", target, "en-GB,en", values), Ask(f"{name}, zh", target, "zh-CN,zh;q=0.9", values)


GOLD = "@gold.safetensors"
DRAWN = {"prompt": FOX, "Steps": 2, "Seed": 7}
PERSON = {"controlnet-image": "@person.jpg"}
CONTROLLED = {"controlnet-prompt": FOX, "Steps": 2, "Seed": 7}
REFINED = {"denoise": 0.3, "upscaler": "fast", "Steps": 2, "Seed": 7}

ASKS: tuple[Ask, ...] = (
    Ask("page", "GET /"),
    Ask("page, config", "GET /config"),
    Ask("page, endpoints", "GET /gradio_api/info"),
    Ask("page, script", "GET /studio-assets/page.js"),
    Ask("page, no such asset", "GET /studio-assets/absent.js"),
    *both("/generate", "/generate", prompt=FOX, seed=7),
    *both("/generate, unknown words", "/generate", prompt="a zeppelin", seed=7, steps=2),
    *both("/generate, base", "/generate", prompt=FOX, model="base", cfg=3, steps=4, seed=7),
    *both("/generate, lora", "/generate", prompt=FOX, steps=4, seed=7, lora=GOLD),
    *both("/generate, lora of another model", "/generate", prompt=FOX, lora="@sdxl.safetensors"),
    *both("/generate, blank", "/generate", prompt=" "),
    *both("/generate, size", "/generate", prompt=FOX, width=1000),
    *both("/generate, real weights missing", "/generate", prompt=FOX, weights="full"),
    *both("/controlnet", "/controlnet", image="@person.jpg", prompt=FOX, seed=7),
    *both("/controlnet, lora", "/controlnet", image="@sketch.png", prompt=FOX, steps=2, seed=7, lora=GOLD),
    *both("/controlnet, depth", "/controlnet", image="@person.jpg", prompt=FOX, preprocessor="depth"),
    *both("/controlnet, not uploaded", "/controlnet", image={"path": "/etc/hosts"}, prompt=FOX),
    *both("/preprocess, pose", "/preprocess", image="@person.jpg", preprocessor="pose"),
    *both("/preprocess, no person", "/preprocess", image="@blank.png", preprocessor="pose"),
    *both("/preprocess, thresholds crossed", "/preprocess", image="@odd.png", canny_low=300),
    *both("/upscale", "/upscale", image="@odd.png", upscaler="fast", seed=7),
    *both("/upscale, refined", "/upscale", image="@odd.png", upscaler="fast", denoise=0.3, steps=2, seed=7),
    *both("/upscale, text for a picture", "/upscale", image="@text.png"),
    *both("/upscale, too large", "/upscale", image="@long.png"),
    *both("arriving", "page load"),
    *both("Generate", "generate click", **DRAWN),
    *both("Generate, base", "generate click", **DRAWN, model="base", CFG=3, **{"Negative prompt": "green"}),
    *both("Generate, lora", "generate click", **DRAWN, **{"Use a LoRA": True, "LoRA file": GOLD}),
    *both("Generate, unknown words", "generate click", **{**DRAWN, "prompt": "a zeppelin over mars"}),
    *both("Generate, one word", "generate click", **{**DRAWN, "prompt": "apple"}),
    *both("Generate, too long", "generate click", **{**DRAWN, "prompt": "a red apple, " * 300}),
    *both("Generate, two pictures", "generate click", **DRAWN, Pictures=2),
    *both("Generate, blank", "generate click", **{**DRAWN, "prompt": " "}),
    *both("Generate, seed", "generate click", **{**DRAWN, "Seed": 2**32}),
    *both("counting tokens", "prompt change", prompt=FOX),
    *both("choosing Base", "model input", model="base"),
    *both("a LoRA", "LoRA file upload", **{"LoRA file": GOLD}),
    *both("a LoRA of another model", "LoRA file upload", **{"LoRA file": "@sdxl.safetensors"}),
    *both("a LoRA cut off", "LoRA file upload", **{"LoRA file": "@cut.safetensors"}),
    *both("ControlNet", "controlnet-generate click", **CONTROLLED, **PERSON),
    *both("ControlNet, depth", "controlnet-generate click", **CONTROLLED, **PERSON, preprocessor="depth"),
    *both("ControlNet, no picture", "controlnet-generate click", **CONTROLLED),
    *both("control image, line art", "preprocessor change", **PERSON, preprocessor="lineart"),
    *both("control image, no person", "preprocessor change", preprocessor="pose", **{"controlnet-image": "@blank.png"}),
    *both("control image, cut off", "preprocessor change", **{"controlnet-image": "@cut.png"}),
    *both("Upscale", "upscale-start click", upscaler="fast", Seed=7, **{"upscale-image": "@odd.png"}),
    *both("Upscale, refined", "upscale-start click", **REFINED, **{"upscale-image": "@apple64.png"}),
    *both("Upscale, too large", "upscale-start click", **{"upscale-image": "@long.png"}),
    *both("estimate", "upscaler change", upscaler="fast", denoise=0.3, **{"upscale-image": "@odd.png"}),
    *both("estimate, text for a picture", "upscaler change", **{"upscale-image": "@text.png"}),
    *both("restoring", "restore upload", restore="@drawn.png"),
    *both("restoring, with a lora", "restore upload", restore="@golden.png"),
    *both("restoring, A1111's picture", "restore upload", restore="@a1111.png"),
    *both("restoring, plain picture", "restore upload", restore="@apple.png"),
    Ask("what the server said", "LOG"),  # the last
)
CASES: tuple[Case, ...] = (*COMMANDS, *ASKS)

# --- what may differ: each with the reason why it does from run to run

VOLATILE_KEYS: Mapping[str, str] = {
    "created": "the date of a picture",
    "seconds": "how long its stages took",
    "memory": "what is free of this machine's memory",
    "app_id": "drawn by Gradio at each start",
}
VOLATILE_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("the date of a picture", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+\d\d:\d\d|Z)", "<date>"),
    ("log lines: when, and by which module", r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \S+ (?=[A-Z]+ )", ""),
    ("seconds taken or left", r"\b\d+(\.\d+)? (s\b|min\b|秒|分钟)", r"<time> \2"),
    ("the speed of a step that the doctor measures", r"[\d.]+(e\+\d+)? times as fast", "<speed> times as fast"),
    ("the speeds that the doctor measures", r"[\d.]+(e\+\d+)? GFLOP/s in fp32, [\d.]+(e\+\d+)? in", "<speed>"),
    ("the doctor's free memory", r"[\d.]+ [GM]B of (?=[\d.]+ [GM]B free)", "<size> of "),
    ("where Python keeps a function", r" at 0x[0-9a-f]+", ""),
    ("how long a picture's stages took, on the page", r"(?s)&quot;seconds&quot;: \{.*?\}", "<seconds>"),
    ("the server's port", r"127\.0\.0\.1:\d+", "127.0.0.1:<port>"),
    ("files in Gradio's cache, by digests that hold a date; pictures are compared themselves", r"/[0-9a-f]{64}/", "/"),
)


def settled(text: str) -> str:
    """Return a text without what differs from run to run; where it is JSON, laid out line by line."""
    try:
        found = json.loads(text)
    except ValueError:
        return _settled_text(text)
    return json.dumps(_settled_value(found), ensure_ascii=False, indent=1) + "\n"


def _settled_text(text: str) -> str:
    for _, pattern, put in VOLATILE_TEXTS:
        text = re.sub(pattern, put, text)
    return text


def _settled_value(value: Any) -> Any:
    if isinstance(value, str):
        return _settled_text(value)
    if isinstance(value, list):
        return [_settled_value(item) for item in value]
    if isinstance(value, dict):
        return {
            name: f"<{VOLATILE_KEYS[name]}>" if name in VOLATILE_KEYS else _settled_value(item)
            for name, item in value.items()
        }
    return value


# --- comparing


def compare(old: Path, new: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return what differs between two folders of results: lines by the name of the case."""
    found = {}
    for name in names:
        before, after = (folder / slug(name) for folder in (old, new))
        files = sorted({file.relative_to(side) for side in (before, after) for file in side.glob("**/*.*")})
        lines = [line for file in files for line in _file_difference(before / file, after / file)]
        if not files:
            lines = ["no results of either"]
        if Path(FAULT) in files:  # also where both have it: such a case shows nothing
            faults = {side.parent.name: side / FAULT for side in (before, after)}
            lines = [f"{side}: {file.read_text(encoding='utf-8')}" for side, file in faults.items() if file.is_file()]
        if lines:
            found[name] = lines
    return found


def slug(name: str) -> str:
    """Return the name of a case as the name of its folder."""
    return re.sub(r"\W+", "-", name).strip("-") if name[0] != "/" else "endpoint-" + slug(name[1:])


def _file_difference(old: Path, new: Path) -> list[str]:
    for file, side in ((old, "old"), (new, "new")):
        if not file.is_file():
            return [f"{file.name}: not made by the {side} one"]
    before, after = old.read_bytes(), new.read_bytes()
    if before == after:
        return []
    if old.suffix == ".png":
        return [f"{old.name}: {_image_difference(before, after)}"]
    try:
        lines = _text_difference(settled(before.decode()), settled(after.decode()))
    except UnicodeDecodeError:
        return [f"{old.name}: {len(before)} and {len(after)} other bytes"]
    return [f"{old.name}: {line}" for line in lines]


def _text_difference(old: str, new: str) -> list[str]:
    """Return the first lines that differ, cut to where they begin to."""
    if old == new:
        return []
    before, after = old.splitlines() or [""], new.splitlines() or [""]
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changes = [block for block in blocks if block[0] != "equal"]
    _, first, last, first_new, last_new = changes[0] if changes else ("", 0, 1, 0, 1)  # only the last line's end
    was, now = "\n".join(before[first:last]), "\n".join(after[first_new:last_new])
    same = next((place for place, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    begin = max(same - 30, 0)
    lines = [f"{'...' if begin else ''}{was[begin:][:160]!r} became {now[begin:][:160]!r}"]
    return lines + ([f"and {len(changes) - 1} more"] if len(changes) > 1 else [])


def _image_difference(old: bytes, new: bytes) -> str:
    import numpy as np
    from PIL import Image

    before, after = (Image.open(io.BytesIO(data)) for data in (old, new))
    if (before.size, before.mode) != (after.size, after.mode):
        return f"{before.size} {before.mode} became {after.size} {after.mode}"
    apart = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int))
    if apart.any():
        return f"{np.count_nonzero(apart)} of {apart.size} numbers differ, by up to {apart.max()}"
    texts = [json.dumps(image.info, default=str, ensure_ascii=False) for image in (before, after)]
    return "the same pixels; " + "; ".join(_text_difference(*texts) or ["other bytes"])


# --- what is given to both


def make_inputs(folder: Path) -> None:
    """Write the files that requests name: from this checkout's own, or made here."""
    import numpy as np
    from PIL import Image, ImageDraw, PngImagePlugin
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests/data/astronaut.jpg", folder / "person.jpg")
    shutil.copy(ROOT / "weights/mini/loras/gold.safetensors", folder)
    with Image.open(ROOT / "docs/apple.png") as file:
        apple = file.convert("RGB")
    with Image.open(ROOT / "docs/page.png") as file:
        page = file.convert("RGB")
    apple.save(folder / "apple.png")
    apple.resize((64, 64)).save(folder / "apple64.png")
    apple.resize((32, 24)).save(folder / "small.png")
    apple.resize((71, 45)).save(folder / "odd.png")
    page.crop((500, 200, 800, 370)).save(folder / "wide.png")
    Image.new("RGB", (2064, 16), "navy").save(folder / "long.png")
    Image.new("RGB", (96, 96), "gray").save(folder / "blank.png")
    sketch = Image.new("RGB", (160, 120), "black")
    ImageDraw.Draw(sketch).ellipse((40, 20, 120, 100), outline="white", width=3)
    sketch.save(folder / "sketch.png")
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ImageDraw.Draw(clear).rectangle((10, 10, 40, 30), fill=(200, 40, 20, 128))
    clear.save(folder / "clear.png")
    sketch.save(folder / "frames.gif", save_all=True, append_images=[sketch.rotate(90)])
    (folder / "text.png").write_text("not a picture\n", encoding="utf-8")
    (folder / "cut.png").write_bytes((folder / "apple.png").read_bytes()[:900])

    request = {"prompt": "three turtles, purple background", "steps": 4, "seed": 5, "weights": "mini"}
    drawn: dict[str, Any] = {"schema": 1, "mode": "generate", "request": {**request, "model": "turbo"}}
    drawn |= {"weights": {"kind": "mini", "fingerprints": {"turbo": "0123456789ab"}}}
    golden = {**drawn, "request": {**drawn["request"], "lora": "gold.safetensors", "lora_strength": 0.8}}
    control = {**request, "image": "sketch.png", "preprocessor": "canny", "canny_low": 50, "scale": 0.7}
    numbers = "Steps: 30, Sampler: DPM++ 2M, CFG scale: 7, Seed: -1, Size: 512x768, Clip skip: 2"
    for name, chunk, text in (
        ("drawn", "z-image-studio", json.dumps(drawn)),
        ("golden", "z-image-studio", json.dumps({**golden, "inputs": {"lora": "sha256:00"}})),
        ("controlled", "z-image-studio", json.dumps({**drawn, "mode": "controlnet", "request": control})),
        ("a1111", "parameters", f"a lion\nNegative prompt: blue\n{numbers}"),
    ):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(chunk, text)
        apple.save(folder / f"{name}.png", pnginfo=chunks)

    def pair(module: str, width: int) -> dict[str, Any]:
        down, up = np.full((4, width), 0.01, np.float32), np.full((width, 4), 0.01, np.float32)
        return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}

    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(pair(unet, 640), folder / "sdxl.safetensors")
    save_file(pair("diffusion_model.layers.0.attention.to_q", 3840), folder / "real.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "gold.safetensors").read_bytes()[:5000])


# --- one side


@contextlib.contextmanager
def checked_out(wanted: str, to: Path) -> Iterator[Path]:
    """Lay out a folder's or a revision's files in `to`, as git sees them; a revision's worktree is removed again."""
    if not Path(wanted).is_dir():
        git(ROOT, "worktree", "add", "--detach", "--quiet", str(to), wanted)
        try:
            yield to
        finally:
            git(ROOT, "worktree", "remove", "--force", str(to))
        return
    listed = git(Path(wanted), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (file := Path(wanted, name)).is_file():  # one may be deleted and not yet committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to / name)
    yield to


def git(folder: Path, *arguments: str) -> str:
    """Return what a git command prints in a folder."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


@dataclass(frozen=True)
class Side:
    """One of the two: its folder holds the checkout, a home and temporary files; results may go elsewhere."""

    folder: Path
    results: Path
    inputs: Path

    @property
    def checkout(self) -> Path:
        """Where its program lies."""
        return self.folder / "checkout"

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes: nothing of the user's settings, caches and cards."""
        ours = re.compile(r"(Z_IMAGE|HF|HUGGINGFACE|MODELSCOPE|DIFFSYNTH|GRADIO|SPACE|PYTHON|XDG|OMP|MKL|CUDA)_?\w*")
        kept = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        home, temporary = self.folder / "home", self.folder / "tmp"
        for path in (home, temporary):
            path.mkdir(parents=True, exist_ok=True)
        return kept | {
            "HOME": str(home),
            "USERPROFILE": str(home),
            "TMPDIR": str(temporary),
            "TEMP": str(temporary),
            "TMP": str(temporary),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # sums in one order
            "CUDA_VISIBLE_DEVICES": "",
            "Z_IMAGE_MEMORY": "12",  # plans do not depend on what is free at the moment
            "COLUMNS": "100",
            "LC_ALL": "C.UTF-8",
            "PYTHONUTF8": "1",
            "PYTHONHASHSEED": "0",
            "no_proxy": "127.0.0.1",
        }

    def run(self, cases: Sequence[Case]) -> None:
        """Carry out cases and write what they give."""
        # What lies in `models` of the checkout is found there, and reported as broken.
        depth = self.checkout / "models/depth-anything/Depth-Anything-V2-Small-hf/model.safetensors"
        depth.parent.mkdir(parents=True, exist_ok=True)
        depth.write_bytes(b"broken")
        commands = [case for case in cases if isinstance(case, Command)]
        asks = [case for case in cases if isinstance(case, Ask)]
        if commands:
            named = [str(path) for path in (self.folder, self.results, self.inputs)]
            program = [sys.executable, str(Path(__file__).resolve()), "--drive", *named]
            lines = json.dumps([[case.name, case.line] for case in commands])
            subprocess.run(program, input=lines, text=True, env=self.environment(), check=True)
        if asks:
            with serving(self) as visitor:
                for ask in asks:
                    visitor.carry_out(ask)

    def write(self, case: str, file: str, text: str) -> None:
        """Write a part of a case's result, paths of this side told as both sides' are."""
        folder = self.results / slug(case)
        folder.mkdir(parents=True, exist_ok=True)
        for path, shown in ((self.results, "<results>"), (self.folder, "<side>"), (self.inputs, "@")):
            text = text.replace(str(path), shown)
        (folder / file).write_text(text, encoding="utf-8")


def drive(side: Side, commands: Sequence[tuple[str, str]]) -> None:
    """Carry out command lines in this process, each as `python cli.py` would, in a folder of its own."""
    sys.path[0] = str(side.checkout)
    program = str(side.checkout / "cli.py")
    for name, line in commands:
        here = side.results / slug(name)
        here.mkdir(parents=True)
        os.chdir(here)
        sys.argv = ["cli.py", *shlex.split(line.replace("@", f"{side.inputs}/"))]
        code: object = None
        with capturing() as printed:
            try:
                runpy.run_path(program, run_name="__main__")
            except SystemExit as left:
                code = left.code or 0
            except BaseException:  # a fault is a result too
                traceback.print_exc(limit=0)
        os.chdir(side.folder)
        side.write(name, "exit.txt", f"{code}\n")
        for stream, text in printed.items():
            side.write(name, f"{stream}.txt", text)


@contextlib.contextmanager
def capturing() -> Iterator[dict[str, str]]:
    """Catch all that this process prints meanwhile, by file descriptors: loggers keep the stream they began with."""
    printed: dict[str, str] = {}
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in streams}
        saved = {name: os.dup(stream.fileno()) for name, stream in streams.items()}
        for name, stream in streams.items():
            stream.flush()
            os.dup2(files[name].fileno(), stream.fileno())
        try:
            yield printed
        finally:
            for name, stream in streams.items():
                stream.flush()
                os.dup2(saved[name], stream.fileno())
                os.close(saved[name])
                files[name].seek(0)
                printed[name] = files[name].read().decode(errors="replace")


# --- the server, as a browser or a program meets it


class Visitor:
    """Asks a running server, and writes down what it answers."""

    def __init__(self, side: Side, url: str, log: Path) -> None:
        import httpx

        self._side, self._log, self._http_error = side, log, httpx.HTTPError
        self._http = httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)
        config = self._http.get("/config").raise_for_status().json()
        self._parts = {part["id"]: part for part in config["components"]}
        self._listeners: list[dict[str, Any]] = config["dependencies"]
        endpoints = self._http.get("/gradio_api/info").raise_for_status().json()["named_endpoints"]
        self._parameters: Mapping[str, list[dict[str, Any]]] = {
            name: endpoint["parameters"] for name, endpoint in endpoints.items()
        }

    def carry_out(self, ask: Ask) -> None:
        """Ask, and write the answer with the files that it names."""
        if ask.target == "LOG":
            self._side.write(ask.name, "log.txt", self._log.read_text(encoding="utf-8"))
            return
        try:
            if ask.target.startswith("GET "):
                self._get(ask)
            else:
                self._call(ask)
        except (LookupError, OSError, self._http_error) as error:
            self._side.write(ask.name, FAULT, f"{type(error).__name__}: {error}")

    def _get(self, ask: Ask) -> None:
        answer = self._http.get(ask.target.removeprefix("GET "), headers={"Accept-Language": ask.language})
        text = answer.text
        if ask.target == "GET /config":
            config = json.loads(text)
            for listener in config["dependencies"]:
                if listener["api_visibility"] == "private":
                    del listener["api_name"]  # a function's name
            text = json.dumps(config)
        # The page holds its configuration too, which is a case of its own.
        text = re.sub(r"window\.gradio_config = .*?;</script>", "window.gradio_config = <config>;</script>", text)
        self._side.write(ask.name, "answer.txt", text)
        self._side.write(ask.name, "status.txt", f"{answer.status_code} {answer.headers.get('content-type')}\n")

    def _call(self, ask: Ask) -> None:
        values = {name: self._given(value) for name, value in ask.values.items()}
        answers: list[dict[str, Any]] = []
        known: set[str] = set()
        for listener in self._listeners_of(ask.target):
            if ask.target.startswith("/"):
                named = {each["parameter_name"]: each["parameter_default"] for each in self._parameters[ask.target]}
                data = list({**named, **values}.values())
            else:
                parts = [self._parts[number] for number in listener["inputs"]]
                data = [values.get(_called(part), part["props"].get("value")) for part in parts]
                named = dict.fromkeys(map(_called, parts))
            known |= named.keys()
            answers.append(self._queued(listener["id"], data, ask.language))
        if unknown := values.keys() - known:
            raise LookupError(f"{ask.target} takes {', '.join(sorted(known))}; not {', '.join(unknown)}")
        self._side.write(ask.name, "answer.json", json.dumps(answers, ensure_ascii=False, indent=1))
        for number, url in enumerate(dict.fromkeys(_files(answers)), 1):
            path = self._side.results / slug(ask.name) / f"{number}-{url.rsplit('/', 1)[-1]}"
            path.write_bytes(self._http.get(url).raise_for_status().content)

    def _given(self, value: Any) -> Any:
        """Return a value as it is sent: a file's is uploaded first."""
        if not (isinstance(value, str) and value.startswith("@")):
            return value
        file = self._side.inputs / value[1:]
        sent = self._http.post("/gradio_api/upload", files={"files": (file.name, file.read_bytes())})
        path = sent.raise_for_status().json()[0]
        return {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def _listeners_of(self, target: str) -> list[dict[str, Any]]:
        """Return an endpoint, or the listeners of an event of a part of the page: of the first one called so."""
        if target.startswith("/"):
            return [listener for listener in self._listeners if listener["api_name"] == target[1:]]
        called, _, event = target.rpartition(" ")
        parts: list[int | None] = [number for number, part in self._parts.items() if _called(part) == called]
        for part in parts or [None]:  # none: the page itself
            if found := [each for each in self._listeners if each["backend_fn"] and self._hears(each, part, event)]:
                return found
        raise LookupError(f"the page has no {target}")

    def _hears(self, listener: Mapping[str, Any], part: int | None, event: str) -> bool:
        return any(
            on == event and (number == part or (part is None and number not in self._parts))
            for number, on in listener["targets"]
        )

    def _queued(self, listener: int, data: list[Any], language: str) -> dict[str, Any]:
        """Return the last message of a run of a listener."""
        session = uuid.uuid4().hex
        asked = {"data": data, "fn_index": listener, "session_hash": session, "event_data": None, "trigger_id": None}
        headers = {"Accept-Language": language}
        self._http.post("/gradio_api/queue/join", json=asked, headers=headers).raise_for_status()
        with self._http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    told = {name: message["output"].get(name) for name in ("data", "error", "title")}
                    return {"success": message["success"], **told}
        raise ConnectionError("the server ended the answer early")


def _called(part: Mapping[str, Any]) -> str:
    """Return what a case calls a part of the page: its id, else its label in English, else its kind."""
    props = part["props"]
    if props.get("elem_id"):
        return str(props["elem_id"])
    if "lora-file" in (props.get("elem_classes") or []):  # its label changes with the model
        return "LoRA file"
    label = str(props.get("label") or part["type"])
    translated = re.search(r'"key": "(.*?)"', label)
    return translated[1] if translated else label


def _files(answer: Any) -> Iterator[str]:
    """Find the addresses of the files that an answer names."""
    if isinstance(answer, dict):
        if isinstance(answer.get("path"), str) and isinstance(answer.get("url"), str):
            yield answer["url"]
        yield from itertools.chain.from_iterable(map(_files, answer.values()))
    elif isinstance(answer, list):
        yield from itertools.chain.from_iterable(map(_files, answer))


@contextlib.contextmanager
def serving(side: Side) -> Iterator[Visitor]:
    """Run a side's server meanwhile."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", side.folder / "server.txt"
    command = [sys.executable, "cli.py", "serve", "--port", str(port)]
    with open(log, "wb") as file:
        server = subprocess.Popen(
            command, cwd=side.checkout, env=side.environment(), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, trust_env=False)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        yield Visitor(side, url, log)
    finally:
        server.terminate()
        server.wait()


# --- both


def main() -> int:
    """Carry out the cases with both; return 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="a folder or a git revision")
    parser.add_argument("new", metavar="NEW", help="a folder or a git revision")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="cases of such names: 'lora*'")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to leave the results of both")
    args = parser.parse_args()
    if args.keep and any((args.keep / name).exists() for name in SIDES):
        parser.error(f"{args.keep} holds results already")
    cases = [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in args.only)]
    names = [case.name for case in cases]
    with contextlib.ExitStack() as stack:
        # Not named after this program: the names of folders must not end up in what is compared.
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="both-"))).resolve()
        inputs, kept = temporary / "inputs", args.keep.resolve() if args.keep else temporary / "results"
        make_inputs(inputs)
        sides = [Side(temporary / name, kept / name, inputs) for name in SIDES]
        for side, wanted in zip(sides, (args.old, args.new), strict=True):
            side.results.mkdir(parents=True)
            side.folder.mkdir()
            stack.enter_context(checked_out(wanted, side.checkout))
        with ThreadPoolExecutor(len(sides)) as both_at_once:
            list(both_at_once.map(lambda side: side.run(cases), sides))
        different = compare(sides[0].results, sides[1].results, names)
        print(_tally(sides[0].results))
    for name, lines in different.items():
        print(f"{name}: {'; '.join(lines)}")
    print(f"{len(cases)} cases, {len(different)} differ")
    return 1 if different else 0


def _tally(results: Path) -> str:
    """Return what the cases came to, so that a run in which everything fails is not taken for a good one."""
    codes = Counter(file.read_text(encoding="utf-8").strip() for file in results.glob("*/exit.txt"))
    answers = Counter(
        answer["success"]
        for file in results.glob("*/answer.json")
        for answer in json.loads(file.read_text(encoding="utf-8"))
    )
    exits = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
    images = len(list(results.glob("*/*.png")))
    return f"old: {images} pictures; exit codes {exits}; {answers[True]} answers and {answers[False]} refusals"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(Side(*map(Path, sys.argv[2:])), json.load(sys.stdin))
    else:
        sys.exit(main())
