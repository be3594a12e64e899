"""The docs that are made: they agree with the code."""

from docs.reference import PAGE, reference


def test_the_reference_is_what_the_requests_and_the_parser_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: .venv/bin/python docs/reference.py"


def test_the_reference_names_every_command() -> None:
    text = reference()
    for heading in ("generate", "controlnet", "upscale", "preprocess", "serve", "models", "inspect"):
        assert f"## {heading}: " in text
