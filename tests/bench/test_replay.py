"""The comparison of two checkouts: what it reports of prepared results, and what it lets pass."""

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from bench import replay

NAME = "turbo, json"
FACTS = {"seed": 7, "seconds": {"total": 0.4}, "created": "2026-11-26T19:30:00+00:00", "notes": ["It is small."]}
STDERR = "step 8 of 8\n2026-11-26 19:30:00,123 engine WARNING out of memory\nseed 7, 0.4 s.\n"


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same results, but for the time and the module that logged."""
    old, new = tmp_path / "old", tmp_path / "new"
    later = FACTS | {"seconds": {"total": 12.0}, "created": "2026-11-27T08:00:00+00:00"}
    moved = STDERR.replace("26 19:30", "27 08:00").replace(" engine ", " studio.engine ").replace("0.4 s", "12.0 s")
    for side, facts, stderr in ((old, FACTS, STDERR), (new, later, moved)):
        folder = side / replay.slug(NAME)
        folder.mkdir(parents=True)
        (folder / "exit.txt").write_text("0\n")
        (folder / "stdout.txt").write_text(json.dumps(facts))
        (folder / "stderr.txt").write_text(stderr)
        save(folder / "z-image-7.png", "red", "a fox")
    return old, new


def save(path: Path, colour: str, prompt: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", prompt)
    Image.new("RGB", (4, 4), colour).save(path, pnginfo=chunks)


def reported(old: Path, new: Path) -> str:
    return "; ".join(replay.compare(old, new, [NAME]).get(NAME, []))


def test_what_differs_from_run_to_run_is_no_difference(sides: tuple[Path, Path]) -> None:
    assert reported(*sides) == ""


@pytest.mark.parametrize(
    ("file", "was", "now", "reason"),
    [
        ("exit.txt", "0", "2", "'0' became '2'"),
        ("stderr.txt", "WARNING out of", "ERROR out of", "'WARNING out of memory' became 'ERROR out of memory'"),
        ("stderr.txt", "seed 7", "seed 8", "stderr.txt: 'seed 7, "),
        ("stdout.txt", "small", "large", 'large."'),
    ],
)
def test_a_changed_text_is_reported(sides: tuple[Path, Path], file: str, was: str, now: str, reason: str) -> None:
    path = sides[1] / replay.slug(NAME) / file
    path.write_text(path.read_text().replace(was, now))
    assert reason in reported(*sides)


@pytest.mark.parametrize(
    ("colour", "prompt", "reason"),
    [("#fe0000", "a fox", "16 of 48 numbers differ, by up to 1"), ("red", "a lion", "the same pixels; ")],
)
def test_a_changed_image_is_reported(sides: tuple[Path, Path], colour: str, prompt: str, reason: str) -> None:
    save(sides[1] / replay.slug(NAME) / "z-image-7.png", colour, prompt)
    assert reason in reported(*sides)


def test_missing_results_are_reported(sides: tuple[Path, Path]) -> None:
    old, new = sides
    (new / replay.slug(NAME) / "z-image-7.png").unlink()
    assert reported(old, new) == "z-image-7.png: not made by the new one"
    assert replay.compare(old, new, ["base"]) == {"base": ["no results of either"]}


def test_a_case_that_neither_could_be_asked_does_not_pass(sides: tuple[Path, Path]) -> None:
    for side in sides:
        (side / replay.slug(NAME) / replay.FAULT).write_text("the page has no button")
    assert reported(*sides) == "old: the page has no button; new: the page has no button"


def test_every_case_has_a_folder_of_its_own() -> None:
    assert len(replay.CASES) >= 60
    assert len({replay.slug(case.name) for case in replay.CASES}) == len(replay.CASES)
