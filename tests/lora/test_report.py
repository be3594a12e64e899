"""The report of a LoRA file, in English and in another language."""

import json
from pathlib import Path

import pytest
import torch

import lora.file
from core.errors import RequestError
from core.messages import plain
from lora.report import PARTLY, clean, some_of
from tests.helpers import loras
from tests.helpers.loras import RANK, random_pairs, write

PAIRS = random_pairs()
NOWHERE = {
    f"layers.{index}.attention.to_q.lora_{side}.weight": torch.ones(RANK, RANK)
    for index in range(90, 95)
    for side in "AB"
}


def test_warnings_are_messages_with_a_code_of_their_own(tmp_path: Path) -> None:
    report = lora.file.read(write(tmp_path / "style.safetensors", loras.peft(PAIRS) | NOWHERE)).report
    (warning,) = report.warnings()
    assert warning.code == PARTLY
    assert str(warning) == (
        "5 of 47 layers of the LoRA have no place in Z-Image and are left out: layers.90.attention.to_q, "
        "layers.91.attention.to_q, layers.92.attention.to_q and 2 more."
    )
    assert warning.render(lambda text: text.replace("and {more} more", "+ {more}")).endswith(
        "layers.92.attention.to_q + 2."
    )


def test_facts_are_json(tmp_path: Path) -> None:
    facts = lora.file.read(write(tmp_path / "style.safetensors", loras.peft(PAIRS))).report.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["rank"], facts["alpha"], facts["fits"]) == ("4", "none", "the embedded miniature")


def test_a_refusal_is_translated_to_its_last_part(tmp_path: Path) -> None:
    path = tmp_path / "{odd} name.safetensors"  # braces of a name are no places of a template
    path.write_bytes(b"")
    with pytest.raises(
        RequestError, match=r"a \.safetensors file of up to 4 GiB; this one is not a safetensors"
    ) as why:
        lora.file.read(path)
    assert why.value.message.render(lambda text: text.replace("this one", "it")).endswith(
        "; it is not a safetensors file"
    )
    assert json.dumps(plain(why.value.values))


@pytest.mark.parametrize(("text", "cleaned"), [("a\x1b[31m  b\n", "a [31m b"), ("x" * 400, "x" * 300)])
def test_a_text_from_a_file_becomes_one_line_of_bounded_length(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_few_names_are_all_shown() -> None:
    assert some_of(["a", "b", "c"]) == ["a", "b", "c"]
