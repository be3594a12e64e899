"""The docs that are made: they agree with the code."""

from docs.reference import PAGE, reference


def test_the_reference_is_what_the_requests_and_the_parser_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: .venv/bin/python docs/reference.py"


def test_the_reference_names_every_command() -> None:
    text = reference()
    for heading in ("generate", "controlnet", "upscale", "preprocess", "serve", "models", "inspect"):
        assert f"## {heading}: " in text


def test_the_reference_names_every_route() -> None:
    text = reference()
    for route in ("POST /images/generations", "POST /images/edits", "GET /models", "POST /jobs", "DELETE /jobs/{id}"):
        assert f"| `{route}` | " in text
    for field in ("guidance_scale", "partial_images", "seconds_left", "expires"):
        assert f"| `{field}` | " in text
