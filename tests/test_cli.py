"""The command line: in a process of its own, as a user runs it, wherever only a process can show what is held."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

import cli
from core import metadata
from core.events import Event, progress_text
from tests.helpers import pictures
from tests.helpers.command_line import Command

ROOT = Path(__file__).parent.parent
PROCESS_SECONDS = 240  # far more than any command here takes; a machine may be busy


@pytest.fixture
def here(command_here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process, where no weights but the miniature's are to be found."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setenv("Z_IMAGE_MODELS", "")
    return command_here


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_CACHE": str(cwd / "no-cache"), "Z_IMAGE_MODELS": ""},
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )


Made = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder with an image in it, and the run that made it."""
    folder = tmp_path_factory.mktemp("made")
    prompt = "a large red apple in the middle on a blue background"
    return folder, command("generate", prompt, "--seed", 7, "--out", "apple.png", "--offline", cwd=folder)


def test_generate_writes_the_image_and_its_parameters(made: Made) -> None:
    folder, done = made
    assert done.returncode == 0, done.stderr
    assert done.stdout == "apple.png\n"
    assert "step 8 of 8" in done.stderr
    assert "miniature" in done.stderr
    with Image.open(folder / "apple.png") as image:
        assert image.size == (128, 128)
    assert json.loads((folder / "apple.json").read_text())["request"]["seed"] == 7


def test_image_shows_what_was_asked_for(made: Made) -> None:
    """Red in the middle, blue around it: in numbers, what anyone sees."""
    folder, _ = made
    image = Image.open(folder / "apple.png").convert("RGB")
    corner = image.getpixel((4, 4))
    assert isinstance(corner, tuple)
    red, green, blue = corner
    assert blue > red + 40
    assert blue > green
    middle = image.crop((40, 40, 88, 96)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(middle, tuple)
    assert middle[0] > middle[2] + 40


@pytest.mark.slow
def test_json_puts_one_object_on_stdout_and_from_replays_an_image(made: Made, here: Command, tmp_path: Path) -> None:
    folder, _ = made
    done = here("generate", "--from", folder / "apple.png", "--out", "again.png", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["seed"] == 7
    assert (tmp_path / facts["file"]).read_bytes() == (folder / "apple.png").read_bytes()


@pytest.mark.slow
def test_default_name_overwrites_nothing(made: Made, here: Command, tmp_path: Path) -> None:
    folder, _ = made
    (tmp_path / "z-image-7.png").write_bytes(b"mine")
    done = here("generate", "--from", folder / "apple.png", cwd=tmp_path)
    assert done.stdout == "z-image-7-2.png\n"
    assert (tmp_path / "z-image-7.png").read_bytes() == b"mine"


def test_a_replay_says_whether_it_is_the_same(made: Made, here: Command, tmp_path: Path) -> None:
    folder, _ = made
    with Image.open(folder / "apple.png") as image:
        chunk = json.loads(image.info["z-image-studio"])
    chunk["weights"]["fingerprints"]["vae"], chunk["app"] = "sha256:0", "Z-Image Studio 0.0"
    pictures.png(tmp_path / "older.png", z_image_studio=json.dumps(chunk))

    done = here("generate", "--from", folder / "apple.png", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["replay"] == {"of": "apple.png", "same_bytes": True, "differs": {}}
    assert "The same as apple.png, byte for byte." in done.stderr
    done = here("generate", "--from", "older.png", "--json", cwd=tmp_path)
    replay = json.loads(done.stdout)["replay"]
    assert (replay["same_bytes"], set(replay["differs"])) == (False, {"version", "vae"})
    assert "vae (sha256:0, now sha256:" in done.stderr
    assert "version (Z-Image Studio 0.0, now " in done.stderr
    done = here("generate", "--from", "older.png", "--steps", 1, "--json", cwd=tmp_path)
    assert "replay" not in json.loads(done.stdout)


DRAWN_TWICE = ("generate", "a red fox", "--steps", 1, "--weights", "mini", "--out-dir", "drawn", "--json")


def test_several_seeds_are_drawn_and_those_that_are_there_are_skipped(here: Command, tmp_path: Path) -> None:
    first = here(*DRAWN_TWICE, "--seed", 12, "--seed", 7, "--count", 2, cwd=tmp_path)
    assert [facts["seed"] for facts in json.loads(first.stdout)["pictures"]] == [12, 13, 7, 8], first.stderr
    here("generate", "a red fox", "--steps", 1, "--weights", "mini", "--seed", 8, "--out", "alone.png", cwd=tmp_path)
    kept = (tmp_path / "drawn" / "z-image-8.png").read_bytes()
    assert kept == (tmp_path / "alone.png").read_bytes()

    (tmp_path / "drawn" / "z-image-7.png").write_bytes(b"mine")
    done = here(*DRAWN_TWICE, "--seed", 7, "--count", 3, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert [Path(picture["file"]).name for picture in facts["pictures"]] == ["z-image-9.png"]
    assert [Path(path).name for path in facts["skipped"]] == ["z-image-7.png", "z-image-8.png"]
    assert f"skipped: {Path('drawn/z-image-7.png')} is there" in done.stderr
    assert (tmp_path / "drawn" / "z-image-7.png").read_bytes() == b"mine"


def test_a_failure_in_the_middle_keeps_what_is_drawn(here: Command, tmp_path: Path) -> None:
    (tmp_path / "drawn" / "z-image-8.json").mkdir(parents=True)
    done = here(*DRAWN_TWICE, "--seed", 7, "--count", 3, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["error"]["code"]) == (1, "not_written")
    assert [Path(picture["file"]).name for picture in facts["pictures"]] == ["z-image-7.png"]
    assert "1 of 3 pictures are drawn." in done.stderr


def test_count_without_a_seed_draws_consecutive_seeds(here: Command, tmp_path: Path) -> None:
    here("generate", "a red fox", "--steps", 1, "--weights", "mini", "--count", 2, cwd=tmp_path)
    seeds = sorted(int(path.stem.removeprefix("z-image-")) for path in tmp_path.glob("z-image-*.png"))
    assert seeds[1] == seeds[0] + 1


def test_out_takes_standard_output(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    drawn = ["generate", "a red fox", "--steps", "1", "--weights", "mini", "--seed", "7", "--out"]
    assert cli.main([*drawn, str(tmp_path / "fox.png")]) == 0
    capfdbinary.readouterr()
    assert cli.main([*drawn, "-"]) == 0
    assert capfdbinary.readouterr().out == (tmp_path / "fox.png").read_bytes()
    assert cli.main([*drawn, "-", "--json"]) == 2


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no pseudo-terminals to look at")
def test_a_terminal_gets_a_bar_over_all_pictures_and_no_picture(
    here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import struct
    import termios

    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        while not shown or not shown[-1].endswith(b"!"):
            shown.append(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        here("generate", "a red fox", "--steps", 2, "--weights", "mini", "--count", 2, cwd=tmp_path)
        patched.setattr(sys, "stdout", stderr)
        assert here("generate", "a red fox", "--weights", "mini", "--out", "-", cwd=tmp_path).returncode == 2
        stderr.write("!")
        stderr.flush()
        reader.join()
    os.close(ours)
    text = b"".join(shown).decode()
    assert "0.0 of 2 pictures" in text
    assert "2.0 of 2 pictures" in text
    assert "z-image-" not in text  # that is standard output


def test_inspect_reads_the_image(made: Made, here: Command) -> None:
    folder, _ = made
    facts = json.loads(here("inspect", "apple.png", "--json", cwd=folder).stdout)
    assert facts["source"] == "z-image-studio"
    assert facts["request"]["prompt"] == "a large red apple in the middle on a blue background"
    assert "turbo" in facts["fingerprints"]
    assert "a large red apple" in here("inspect", "apple.png", cwd=folder).stdout


def is_one_line(done: subprocess.CompletedProcess[str], code: int, reason: str, folder: Path) -> None:
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("generate",), 2, "prompt: "),
        (("generate", " "), 2, "prompt: "),
        (("generate", "fox", "--cfg", "nan"), 2, "cfg: "),
        (("generate", "fox", "--seed", str(2**32)), 2, "seed: "),
        (("generate", "fox", "--model", "edit"), 2, "model: 'edit' is not possible; allowed: turbo, base"),
        (("generate", "fox", "--weights", "big"), 2, "weights: 'big'"),
        (("generate", "fox", "--out", "fox.jpg"), 2, "out: 'fox.jpg'"),
        (("generate", "fox", "--out", "nowhere/fox.png"), 2, "out: "),
        (("generate", "fox", "--width", "1000"), 2, "width: 1000"),
        (("generate", "--from", "absent.png"), 2, "file: 'absent.png'"),
        (("inspect", "absent.png"), 2, "file: 'absent.png'"),
        (("serve", "--auth", "nobody"), 2, "auth: "),
        (("serve", "--port", "-1"), 2, "port: -1"),
        (("serve", "--port", "70000"), 2, "port: 70000"),
        (("serve", "--port", "many"), 2, "--port"),
        (("serve", "--host", "256.1.1.1"), 2, "host: '256.1.1.1'"),
        (("generate", "fox", "--speed", "9"), 2, "--speed"),
        (("generate", "fox", "--seed", "7", "--seed", "x"), 2, "seed: 'x'"),
        (("generate", "fox", "--count", "0"), 2, "count: '0'"),
        (("generate", "fox", "--count", "²"), 2, "count: '²'"),
        (
            ("generate", "fox", "--count", "2", "--out", "fox.png"),
            2,
            "out: 'fox.png' is not possible; allowed: for one",
        ),
        (("generate", "fox", "--out-dir", "x", "--out", "fox.png"), 2, "out: 'fox.png'"),
        (("generate", "fox", "--out-dir", "/dev/null/x"), 2, "out_dir: '/dev/null/x'"),
    ],
)
def test_bad_request_is_one_line_and_an_exit_code(
    arguments: tuple[str, ...], code: int, reason: str, here: Command, tmp_path: Path
) -> None:
    is_one_line(here(*arguments, cwd=tmp_path), code, reason, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("generate", "fox", "--steps", "many"), 2, "steps: 'many'"),
        (("generate", "fox", "--weights", "full"), 3, "Tongyi-MAI/Z-Image-Turbo"),
        (("serve", "--host", "0.0.0.0"), 2, "host: '0.0.0.0'"),
        (("draw",), 2, "draw"),
    ],
)
def test_a_process_ends_with_the_exit_code_and_nothing_but_the_line(
    arguments: tuple[str, ...], code: int, reason: str, tmp_path: Path
) -> None:
    """One of each way to fail: by the request, by the weights, after Gradio's import, by the command line itself."""
    is_one_line(command(*arguments, cwd=tmp_path), code, reason, tmp_path)


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's own folders")


@LINUX
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("/proc/fox.png", "/proc/fox.png cannot (No such file or directory)"),
        ("/sys/kernel/fox.png", "/sys/kernel/fox.png cannot (Permission denied)"),
        (f"{251 * 'x'}.png", "cannot (File name too long)"),  # whose JSON beside it has a letter more
        (f"{300 * 'x'}.png", "cannot (File name too long)"),
        ("taken/fox.png", "fox.json cannot (Is a directory)"),
        ("taken/a.png", "a.png cannot (Too many levels of symbolic links)"),
        ("taken/fox.json/../nowhere/x.png", "in a folder that exists"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    out: str, reason: str, here: Command, tmp_path: Path
) -> None:
    (tmp_path / "taken" / "fox.json").mkdir(parents=True)
    (tmp_path / "taken" / "a.png").symlink_to("a.png")
    before = sorted(tmp_path.rglob("*"))
    done = here("generate", "fox", "--out", out, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("out: '")) == (2, True)
    assert reason in line
    assert sorted(tmp_path.rglob("*")) == before


@LINUX
@pytest.mark.parametrize("folder", ["/proc", "/sys/kernel"])
def test_a_current_folder_that_cannot_be_written_to_is_refused_before_any_work(folder: str, here: Command) -> None:
    done = here("generate", "fox", cwd=Path(folder))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("out: 'z-image.png' is not possible")) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_picture_whose_folder_goes_while_it_is_drawn_is_kept(
    form: tuple[str, ...], here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    progress = progress_text

    def removing(event: Event) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return progress(event)

    monkeypatch.setattr(cli, "progress_text", removing)
    asked = ("generate", "fox", "--seed", 7, "--steps", 1, "--weights", "mini", "--out", "out/fox.png")
    done = here(*asked, *form, cwd=tmp_path)
    kept = tmp_path / "z-image-7.png"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"The picture is in {kept} instead")
    assert metadata.read_picture(kept).values["seed"] == 7
    assert json.loads(done.stdout)["error"]["kept"] == str(kept) if form else not done.stdout


def test_failure_as_json_is_one_object(here: Command, tmp_path: Path) -> None:
    done = here("generate", "fox", "--width", "1000", "--json", cwd=tmp_path)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["field"], error["nearest"]) == ("bad_request", "width", 128)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_with_130_and_leaves_no_file(tmp_path: Path) -> None:
    arguments = [sys.executable, str(ROOT / "cli.py"), "generate", "fox", "--model", "base", "--steps", "100"]
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # What is read ends with the process, and this one is killed where it does not get there.
        killer = threading.Timer(PROCESS_SECONDS, process.kill)
        killer.start()
        for line in process.stderr:
            if line.startswith("step 2"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        killer.cancel()
    assert process.returncode == 130
    assert "step 100" not in rest
    assert rest.splitlines()[-1] == "the request was cancelled"
    assert not list(tmp_path.iterdir())


# --- pictures of other programs ---

TURBO = (
    "a fox\nNegative prompt: rain\n"
    "Steps: 2, Sampler: DPM++ 2M, CFG scale: 0, Seed: 7, Size: 128x128, Model: z_image_turbo"
)


def test_inspect_shows_what_another_programs_picture_holds(here: Command, tmp_path: Path) -> None:
    data = pictures.exif(b"UNICODE\0" + TURBO.encode("utf-16-be"))
    pictures.with_exif(tmp_path / "x.webp", data)
    facts = json.loads(here("inspect", "x.webp", "--json", cwd=tmp_path).stdout)
    assert facts["request"] == {
        **{"prompt": "a fox", "model": "turbo", "steps": 2, "cfg": 1.0, "seed": 7},
        **{"width": 128, "height": 128},
    }
    assert facts["not_restored"] == {"Negative prompt": "rain", "Sampler": "DPM++ 2M"}


def test_from_draws_another_programs_picture_and_names_what_it_leaves_out(here: Command, tmp_path: Path) -> None:
    pictures.png(tmp_path / "x.png", parameters=TURBO)
    done = here("generate", "--from", "x.png", "--weights", "mini", "--out", "y.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Not restored: Sampler: DPM++ 2M, Negative prompt: rain" in done.stderr
    facts = json.loads(done.stdout)
    assert facts["not_restored"] == {"Negative prompt": "rain", "Sampler": "DPM++ 2M"}
    asked = {name: facts["request"][name] for name in ("model", "prompt", "steps", "cfg", "seed")}
    assert asked == {"model": "turbo", "prompt": "a fox", "steps": 2, "cfg": 1.0, "seed": 7}


def test_a_cfg_of_zero_is_taken_for_none(here: Command, tmp_path: Path) -> None:
    cfg = ("--cfg", "0", "--steps", "1", "--weights", "mini")
    assert json.loads(here("generate", "fox", *cfg, "--json", cwd=tmp_path).stdout)["request"]["cfg"] == 1


def test_from_takes_a_value_in_place_of_one_that_is_not_possible(here: Command, tmp_path: Path) -> None:
    text = "a fox\nSteps: 500, CFG scale: 1, Seed: 1102676403634909, Size: 1024x1024"
    pictures.png(tmp_path / "x.png", parameters=text)
    done = here("generate", "--from", "x.png", "--out", "y.png", cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("steps: 500 is not possible")) == (2, True)
    sides = ("--width", 128, "--height", 128, "--weights", "mini")
    done = here("generate", "--from", "x.png", "--steps", 1, "--seed", 5, *sides, "--out", "y.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Not restored" not in done.stderr  # the seed was given


def test_from_notices_that_an_input_picture_has_changed(here: Command, tmp_path: Path) -> None:
    Image.effect_noise((16, 16), 40).convert("RGB").save(tmp_path / "photo.png")
    digest = f"sha256:{hashlib.sha256((tmp_path / 'photo.png').read_bytes()).hexdigest()}"
    described = {
        "mode": "upscale",
        "request": {"image": "photo.png", "upscaler": "fast", "seed": 7, "denoise": 0, "weights": "mini"},
        "weights": {"fingerprints": {}},
        "inputs": {"image": digest},
    }
    pictures.png(tmp_path / "big.png", z_image_studio=json.dumps(described))
    again = ("upscale", "--from", "big.png", "--out", "again.png")
    assert here(*again, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "again.json").read_text())["inputs"] == {"image": digest}
    kept = (tmp_path / "photo.png").rename(tmp_path / "kept.png")
    for changed in (False, True):
        if changed:
            Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
        done = here(*again, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("image: 'photo.png' is not possible; allowed: the file that this picture was")
        assert digest in done.stderr
        assert "--image FILE" in done.stderr
    assert here(*again, "--image", kept, cwd=tmp_path).returncode == 0


STEERS = "a fox\x1b]0;title\x07\x1b[31m\x9b2J\x7f\u202egnp\u2028end"


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_inspect_prints_nothing_that_steers_a_terminal(form: tuple[str, ...], here: Command, tmp_path: Path) -> None:
    text = f"{STEERS}\nSteps: 8, Seed: 3, Sampler: {STEERS}, Size: 8x8\nTemplate{STEERS}: x"
    pictures.png(tmp_path / "x.png", parameters=text)
    described = {"mode": f"generate{STEERS}", "weights": {"fingerprints": {STEERS: STEERS}}, "request": {STEERS: 1}}
    pictures.png(tmp_path / "y.png", z_image_studio=json.dumps(described))
    for name in ("x.png", "y.png"):
        done = here("inspect", name, *form, cwd=tmp_path)
        assert done.returncode == 0
        assert "a fox" in done.stdout or "mode" in done.stdout
        printed = done.stdout.replace("\n", "") + done.stderr.replace("\n", "")
        assert not [letter for letter in printed if not letter.isprintable()]
        if form:
            assert json.dumps(STEERS)[1:-1] in json.dumps(json.loads(done.stdout))  # nothing is lost


def test_inspect_prints_only_numbers_that_json_has(here: Command, tmp_path: Path) -> None:
    pictures.png(tmp_path / "a1111.png", parameters="x\nSteps: 8, Seed: 3, CFG scale: nan, Size: inf")
    described = {
        "mode": "generate",
        "weights": {"fingerprints": {"turbo": math.nan}},
        "request": {"prompt": "x", "cfg": math.nan, "steps": math.inf, "width": [math.nan]},
    }
    pictures.png(tmp_path / "ours.png", z_image_studio=json.dumps(described))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("a1111.png", "ours.png"):
        done = here("inspect", name, "--json", cwd=tmp_path)
        assert json.loads(done.stdout, parse_constant=refuse)["request"]["prompt"] == "x"


def test_a_prompt_of_several_lines_cannot_pass_for_another_fact(here: Command, tmp_path: Path) -> None:
    pictures.png(tmp_path / "a.png", parameters="a\nnot_restored: none\nSteps: 8, Seed: 3, Sampler: y")
    fields = {"prompt": "a\nnot_restored: none", "x\nnot_restored: none": "y"}
    described = {"mode": "generate", "weights": {"fingerprints": {}}, "request": fields}
    pictures.png(tmp_path / "b.png", z_image_studio=json.dumps(described))
    for name in ("a.png", "b.png"):
        lines = here("inspect", name, cwd=tmp_path).stdout.splitlines()
        assert [line for line in lines if line.startswith("not_restored")] == ["not_restored:"]


def test_doctor_names_device_plan_versions_and_weights(here: Command, tmp_path: Path) -> None:
    facts = json.loads(here("doctor", "--json", "--device", "cpu", cwd=tmp_path).stdout)
    assert facts["version"] == metadata.APP_VERSION
    assert "float32" in facts["device"]
    assert set(facts["memory plan"]) == {"generate", "controlnet"}
    # What would be with the real weights, before they are fetched; its reasons begin with what is counted with.
    planned = json.loads(here("doctor", "--json", "--device", "cpu", "--memory", "5", cwd=tmp_path).stdout)
    reasons = planned["memory plan for the real weights"]["controlnet"]
    assert reasons[0].startswith("5 GB allowed: ")
    assert "used from their files" in reasons[0]
    assert {"torch", "diffsynth", "transformers", "gradio"} <= set(facts)
    assert facts["weights"].startswith("mini")
    assert any("Z-Image-Turbo" in str(line) for line in facts["models"])


def test_models_lists_what_is_missing(here: Command, tmp_path: Path) -> None:
    listed = here("models", cwd=tmp_path).stdout
    assert "Tongyi-MAI/Z-Image-Turbo" in listed
    assert "missing" in listed


def test_every_field_of_a_request_has_a_flag() -> None:
    subparsers = cli.build_parser()._subparsers
    assert subparsers is not None
    commands = subparsers._group_actions[0].choices
    assert isinstance(commands, dict)
    for flag in (
        "--model",
        "--negative",
        "--steps",
        "--cfg",
        "--width",
        "--height",
        "--seed",
        "--lora FILE[:STRENGTH]",
    ):
        assert flag in commands["generate"].format_help()


def test_version_is_that_of_the_package() -> None:
    assert f'version = "{metadata.APP_VERSION}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_page_alone_takes_a_folder_of_models_too() -> None:
    done = subprocess.run([sys.executable, "app.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--models FOLDER" in done.stdout


def test_a_folder_of_models_is_what_the_environment_would_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("Z_IMAGE_MODELS", "")
    assert cli.main(["models", "list", "--models", str(tmp_path / "none")]) == 2
    assert "'" + str(tmp_path / "none") in capsys.readouterr().err
    assert cli.main(["models", "list", "--models", str(tmp_path)]) == 0
