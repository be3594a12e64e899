"""Broken results are recognised, named and never shown; plain images that were asked for are let through."""

from pathlib import Path

import pytest
import torch

from core.events import Failure, Result, Stage
from core.messages import Message
from core.request import TextToImage
from diffusion import sanity
from diffusion.pipeline import Pipeline
from diffusion.sanity import judge, likely_cause, measure
from engine import Engine, Settings
from tests.helpers import loras
from tests.helpers.plans import everything_stays
from tests.helpers.workers import pipeline_of

LATENTS = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


def with_nan(tensor: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    broken = tensor.clone()
    broken[..., 3, 4] = value
    return broken


@pytest.mark.parametrize(
    ("latents", "decoded", "code", "stage"),
    [
        (with_nan(LATENTS), PICTURE, "nan", "denoising"),
        (with_nan(LATENTS, float("inf")), PICTURE, "nan", "denoising"),
        (LATENTS * 100, PICTURE, "exploded", "denoising"),
        (torch.zeros_like(LATENTS), torch.zeros_like(PICTURE), "empty", "denoising"),
        (LATENTS, with_nan(PICTURE), "nan", "decoding"),
        (LATENTS, PICTURE * 1000, "clipped", "decoding"),
        (LATENTS, torch.full_like(PICTURE, -1.0), "flat", "decoding"),
    ],
)
def test_each_kind_of_broken_result_has_a_name(
    latents: torch.Tensor, decoded: torch.Tensor, code: str, stage: str
) -> None:
    defect = judge(measure(latents, decoded))
    assert defect is not None
    assert (defect.code, defect.stage) == (code, stage)


def test_images_and_plain_images_are_let_through() -> None:
    assert judge(measure(LATENTS, PICTURE)) is None
    assert judge(measure(LATENTS.bfloat16(), PICTURE.bfloat16())) is None
    assert judge(measure(LATENTS * 0.1, torch.full_like(PICTURE, -1.0))) is None  # black, as it was asked for
    assert judge(measure(LATENTS, PICTURE * 1.4)) is None


def cause(defect: sanity.Defect, *, dtype: str = "bfloat16", attention: str = "torch", lora: str | None = None) -> str:
    return str(likely_cause(defect, dtype=dtype, attention=attention, lora=lora))


def test_the_cause_follows_the_circumstances() -> None:
    stages: tuple[sanity.DrawingStage, ...] = ("denoising", "decoding")
    early, late = (sanity.Defect("nan", stage, Message("nan", "NaN")) for stage in stages)
    assert "'style'" in cause(early, lora="style")
    assert "'sage_attention'" in cause(early, attention="sage_attention")
    assert "float16, whose range" in cause(early, dtype="float16")
    assert "transformer's file" in cause(early)
    assert "VAE" in cause(late)


# --- through the engine, with weights that are really broken


@pytest.fixture(scope="module")
def own() -> Engine:
    """An engine of these tests' own, because they break its weights."""
    return Engine(Settings(weights="mini", device="cpu"))


def ask(own: Engine, **values: object) -> tuple[Result | Failure, list[Stage]]:
    events = list(
        own.run(TextToImage.parse(**{"prompt": "a fox on a black background", "steps": 4, "seed": 7, **values}))
    )
    last = events[-1]
    assert isinstance(last, Result | Failure)
    return last, [event for event in events if isinstance(event, Stage)]


@pytest.mark.parametrize("prompt", ["black background", "white background", "a"])
def test_a_prompt_for_a_plain_image_is_not_refused(own: Engine, prompt: str) -> None:
    last, stages = ask(own, prompt=prompt)
    assert isinstance(last, Result)
    assert all(stage.name != "safe mode" for stage in stages)


@pytest.mark.parametrize(
    ("gain", "modules", "code"),
    [
        (1e17, None, "nan"),  # finite numbers whose products are not
        (1e4, ["all_final_layer.2-1.linear"], "exploded"),  # behind the last norm, so nothing tames it
    ],
)
def test_a_lora_of_huge_numbers_is_named(
    own: Engine, tmp_path: Path, gain: float, modules: list[str] | None, code: str
) -> None:
    pairs = loras.random_pairs(gain=gain, modules=modules)
    last, stages = ask(own, lora=str(loras.write(tmp_path / "loud.safetensors", loras.peft(pairs))))
    assert isinstance(last, Failure)
    assert (last.code, last.values["defect"]) == ("broken_picture", code)
    assert "loud" in last.text
    assert "lower strength" in last.text
    assert all(stage.name != "safe mode" for stage in stages)  # fp32 and SDPA already: it would compute the same
    assert isinstance(ask(own)[0], Result)


def test_nan_in_the_vae_is_no_black_image(own: Engine) -> None:
    assert isinstance(ask(own)[0], Result)
    weight = pipeline_of(own).pipe.vae_decoder.layers[0].weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] = float("nan")
    last, _ = ask(own)
    with torch.no_grad():
        weight.copy_(good)
    assert isinstance(last, Failure)
    assert (last.values["defect"], last.values["stage"]) == ("nan", "decoding")
    assert "the VAE's file is damaged" in last.text
    assert isinstance(ask(own)[0], Result)


def test_a_vae_that_overflows_in_half_precision_is_computed_in_fp32(own: Engine) -> None:
    """The way black images come about: sound weights whose sums leave fp16's range, and fit fp32's."""
    import io

    from PIL import Image, ImageChops, ImageStat

    expected, _ = ask(own)
    assert isinstance(expected, Result)
    decoder = pipeline_of(own).pipe.vae_decoder
    kept = {name: values.clone() for name, values in decoder.state_dict().items()}
    loud = decoder.layers[1].conv1  # a group norm follows, which undoes whatever scale it has
    with torch.no_grad():
        scale = 3e4 / loud.weight.abs().max()  # the weights themselves still fit
        loud.weight.mul_(scale)
        loud.bias.mul_(scale)
        decoder.half()
    last, stages = ask(own)
    assert next(decoder.parameters()).dtype == torch.float16  # safe mode is for one image
    decoder.float()
    decoder.load_state_dict(kept)
    assert stages[-1].name == "safe mode"
    assert isinstance(last, Result)
    assert "safe_mode" in [note.code for note in last.notes]
    pictures = [Image.open(io.BytesIO(result.png)) for result in (expected, last)]
    assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 4  # of 255: half precision of the weights


def test_a_lossy_attention_backend_is_replaced(own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth.core.attention import attention

    good, _ = ask(own)
    assert isinstance(good, Result)

    def broken(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return q * float("nan")

    # No such package runs on a CPU: DiffSynth's own dispatch stays real, and what it would call is broken.
    monkeypatch.setattr(attention, "ATTENTION_IMPLEMENTATION", "sage_attention")
    monkeypatch.setattr(attention, "sageattn", broken, raising=False)
    last, stages = ask(own, seed=7)
    assert isinstance(last, Result)
    assert "safe_mode" in [note.code for note in last.notes]
    assert last.png == good.png
    assert attention.ATTENTION_IMPLEMENTATION == "sage_attention"
    assert any(stage.name == "safe mode" for stage in stages)


def test_safe_mode_is_left_as_it_was_entered() -> None:
    from hub import inventory

    built = Pipeline("cpu", torch.float32, everything_stays())
    for _ in built.load(inventory.choose("mini", "generate", "turbo"), "turbo"):
        pass
    assert not built.safe_mode_differs()
    built.pipe.vae_decoder.to(torch.bfloat16)
    assert built.safe_mode_differs()

    def fail_inside() -> None:
        with built.safe_mode():
            assert next(built.pipe.vae_decoder.parameters()).dtype == torch.float32
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert next(built.pipe.vae_decoder.parameters()).dtype == torch.bfloat16
