"""The choice among the checkpoints that are found: shown where there are some, and what choosing changes."""

from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save_file

from hub import inventory
from tests.helpers.browsing import PATIENCE, PROMPT, Open, advanced, finished, generate, set_steps, settled, write
from tests.helpers.layouts import in_comfyuis_names, read
from tests.helpers.serving import Server, server


@pytest.fixture(scope="module")
def with_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server that finds two checkpoints, both the miniature's."""
    folder = tmp_path_factory.mktemp("own")
    for model in ("turbo", "base"):
        own = read(inventory.choose("mini", "generate", model).files[model][0])
        save_file(in_comfyuis_names(own), folder / f"icons_{model}.safetensors")
    return server("--models", str(folder))


def choices(page: Page) -> list[str]:
    page.locator("#generate-controls .checkpoint input").click()
    return [text.splitlines()[-1] for text in page.get_by_role("option").all_inner_texts()]  # the chosen one is ticked


@pytest.mark.browser
def test_a_checkpoint_is_chosen_with_its_model_and_draws(with_checkpoints: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(with_checkpoints.url)
    settled(page)
    advanced(page)
    assert choices(page) == ["As published", "icons_base", "icons_turbo"]
    page.get_by_role("option", name="icons_base").click()
    expect(page.get_by_role("radio", name="Base")).to_be_checked()
    expect(page.get_by_label("number input for Steps")).to_have_value("25")
    set_steps(page, 2)
    write(page, PROMPT)
    generate(page)
    finished(page)
    expect(page.locator("#generate-controls .drawer")).to_contain_text("Base, icons_base, 2 steps")
    expect(page.locator("#generate-status")).to_contain_text("Base, icons_base, 2 steps")
    page.close()


@pytest.mark.browser
def test_without_any_there_is_no_choice(open_page: Open) -> None:
    page = open_page()
    advanced(page)
    expect(page.locator("#generate-controls .checkpoint")).to_have_count(0)


def test_programs_name_those_that_are_found_and_no_other_file(with_checkpoints: Server, tmp_path: Path) -> None:
    client = Client(with_checkpoints.url, verbose=False)
    ask = {"prompt": PROMPT, "steps": 1, "seed": 7, "api_name": "/generate"}
    _, sidecar = client.predict(checkpoint="icons_turbo.safetensors", **ask)
    assert sidecar["checkpoint"]["name"] == "icons_turbo"
    secret = tmp_path / "secret_turbo.safetensors"
    secret.touch()
    with pytest.raises(AppError, match=r"one of \['icons|one of icons"):
        client.predict(checkpoint=str(secret), **ask)
    client.close()
