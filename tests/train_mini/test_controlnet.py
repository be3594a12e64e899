"""The training code of the miniature's ControlNet, held against DiffSynth's own function."""

import pytest
import torch

import mini.config
from mini.models import MiniControlNet
from train_mini import control_forward, transformer

pytestmark = pytest.mark.slow

Models = tuple[torch.nn.Module, MiniControlNet]  # DiffSynth brings no types for its transformer


@pytest.fixture(scope="module")
def models() -> Models:
    """A transformer and a ControlNet of random weights, every part of which does something."""
    from diffusion.pipeline import follow_weight_dtype

    model = transformer.build()
    net = control_forward.build(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (model, net):
            for name, parameter in module.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1)
    follow_weight_dtype(model.t_embedder)
    return model.eval(), net.eval()


@pytest.mark.parametrize("tokens", [5, 32, 40])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_forward_equals_diffsynths(models: Models, tokens: int, scale: float) -> None:
    from diffsynth.pipelines.z_image import model_fn_z_image_turbo

    model, net = models
    generator = torch.Generator().manual_seed(tokens)
    latents, control = (torch.randn(2, channels, 16, 16, generator=generator) for channels in (16, 33))
    embeddings = [torch.randn(length, 128, generator=generator) for length in (tokens, tokens - 3)]
    sigma = torch.tensor([0.9, 0.3])
    words, lengths = transformer.stack_words(embeddings)
    rope = transformer.rope_table(model, words.shape[1], 8, 8, "cpu")
    with torch.no_grad():
        ours = control_forward.forward(model, net, latents, sigma, words, lengths, rope, control, scale)
        for number, embedding in enumerate(embeddings):
            if transformer.padded(len(embedding)) != words.shape[1]:
                continue
            theirs = model_fn_z_image_turbo(
                model,
                net,
                latents=latents[number : number + 1],
                timestep=1000 * sigma[number : number + 1],
                prompt_embeds=[embedding],
                control_context=control[number : number + 1].unsqueeze(2),
                control_scale=scale,
            )
            assert (ours[number] - theirs[0]).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_a_new_controlnet_changes_nothing() -> None:
    model = transformer.build()
    net = control_forward.build(model)
    latents, control = torch.randn(2, 16, 16, 16), torch.randn(2, 33, 16, 16)
    words, lengths = transformer.stack_words([torch.randn(7, 128), torch.randn(9, 128)])
    rope, sigma = transformer.rope_table(model, 32, 8, 8, "cpu"), torch.tensor([0.5, 0.8])
    with torch.no_grad():
        free = transformer.forward(model, latents, sigma, words, lengths, rope)
        led = control_forward.forward(model, net, latents, sigma, words, lengths, rope, control)
    torch.testing.assert_close(led, free, atol=1e-5, rtol=1e-5)


def test_the_controlnet_starts_from_the_blocks_beside_it() -> None:
    model = transformer.build()
    net = control_forward.build(model)
    for place, index in net.control_layers_mapping.items():
        ours, origin = net.control_layers[index].state_dict(), model.layers[place].state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in origin.items())
        assert set(ours) - set(origin) <= {
            "before_proj.weight", "before_proj.bias", "after_proj.weight", "after_proj.bias"
        }  # fmt: skip
    assert list(net.control_layers_mapping) == mini.config.CONTROLNET_CONFIG["control_layers_places"]
