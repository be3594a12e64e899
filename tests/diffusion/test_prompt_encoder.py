"""Prompts are encoded as DiffSynth encodes them, cut with a note, and kept for a while."""

import pytest
import torch
from diffsynth.pipelines.z_image import ZImageUnit_PromptEmbedder

from diffusion import prompt_encoder
from diffusion.pipeline import Pipeline
from diffusion.prompt_encoder import PromptEncoder
from diffusion.tokens import MAX_TEXT_TOKENS

PROMPT = "a large fox on a black background"


@pytest.mark.parametrize("prompt", [PROMPT, "fox", "", "a red apple, " * 30])
def test_unpadded_prompt_is_encoded_as_diffsynth_encodes_it(
    pipeline: Pipeline, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ZImageUnit_PromptEmbedder()
    last = pipeline.pipe.text_encoder.model.layers[-1]
    with torch.no_grad(), monkeypatch.context() as plain:
        ours = pipeline.prompts.encode(prompt)
        plain.delattr(last, "forward")  # the layer's own again
        padded = theirs.encode_prompt(pipeline.pipe, prompt, "cpu")[0]
    assert ours.embedding.shape == padded.shape
    assert ours.note is None
    # fp32 rounding alone: the padded batch takes other matrix kernels.
    torch.testing.assert_close(ours.embedding, padded, atol=2e-5, rtol=2e-5)


def test_what_the_last_layer_and_a_cache_would_hold_is_not_computed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline.pipe.text_encoder.model
    wanted = {"input_ids": torch.tensor([pipeline.prompts.templated_ids(PROMPT)]), "output_hidden_states": True}
    with torch.no_grad(), monkeypatch.context() as plain:
        ours = pipeline.prompts.encode(PROMPT).embedding
        called: list[int] = []
        hook = model.layers[-1].self_attn.register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(model(**wanted, use_cache=False).hidden_states[-2][0], ours)
        assert not called
        plain.delattr(model.layers[-1], "forward")
        assert torch.equal(model(**wanted, use_cache=True).hidden_states[-2][0], ours)
        hook.remove()
    assert called


def test_long_prompt_is_cut_and_the_cut_is_reported(pipeline: Pipeline) -> None:
    long = f"{PROMPT} " * 100
    ids, note = pipeline.prompts.tokenize(long)
    assert len(ids) <= MAX_TEXT_TOKENS
    assert note is not None
    assert note.code == "prompt_cut"
    assert note.values["tokens"] > 0
    assert str(note.values["limit"]) in str(note)
    # The template that closes the prompt survives the cut.
    assert ids[-5:] == pipeline.prompts.templated_ids("fox")[-5:]


def test_embeddings_are_kept_for_recent_prompts_only(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        one = PromptEncoder(pipeline.pipe).encode("a fox").embedding.nbytes
        monkeypatch.setattr(prompt_encoder, "KEPT_BYTES", 3 * one)
        prompts = PromptEncoder(pipeline.pipe)
        first = prompts.encode("a fox")
        assert prompts.encode("a fox") is first
        for animal in ("dog", "cat", "owl"):
            prompts.encode(f"a {animal}")
        assert len(prompts) == 3
        again = prompts.encode("a fox")
    assert again is not first
    assert torch.equal(again.embedding, first.embedding)
