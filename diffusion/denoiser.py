"""The transformer and the ControlNet without what DiffSynth's `model_fn` computes again, or in vain.

What does not depend on the step is done once: the refined prompt, positions, what the control image becomes before it
meets the latents. Both halves of a guided step share what their prompts do not change, and each layer's weights where
those are fetched. The numbers are those of `model_fn_z_image_turbo`, bit by bit, as tests hold: every operation that is
left has the same inputs in the same shapes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from diffsynth.core.attention import attention
from diffsynth.core.vram.layers import AutoTorchModule
from diffsynth.models.z_image_dit import SEQ_MULTI_OF, ZImageDiT, ZImageTransformerBlock

from diffusion.loader import StudioPipe
from lora.adapter import loras_of

PATCH = "2-1"  # DiffSynth's name for patches of 2 x 2 latents of one frame
CAPTIONS_BYTES = 64 << 20  # of refined prompts and what they were refined from: 13 kB a token at full size in bf16
POSITIONS_KEPT = 4  # of sizes and lengths of prompts: 16 MB each at 2048 x 2048


@dataclass(frozen=True)
class ControlStates:
    """A control image as the ControlNet's first layer takes it, which no step changes.

    Attributes:
        states: [1, tokens, width], to be added to the latents' own.
        scale: how strictly it is kept.
    """

    states: torch.Tensor
    scale: float


@dataclass
class _Half:
    """One prompt's part of a step: the states of latents and prompt together, and of the ControlNet beside them."""

    rope: torch.Tensor
    states: torch.Tensor
    control: torch.Tensor | None


class Denoiser:
    """Predicts the noise in latents, with the transformer and the ControlNet that a pipe holds.

    Args:
        pipe: whose models are used; others may take their place between images. They have to be ready on the device.
    """

    def __init__(self, pipe: StudioPipe) -> None:
        self._pipe = pipe
        self._kept: LRUCache[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = LRUCache(POSITIONS_KEPT)
        self._captions: LRUCache[Hashable, tuple[torch.Tensor, torch.Tensor]] = LRUCache(
            CAPTIONS_BYTES, getsizeof=lambda pair: sum(values.nbytes for values in pair)
        )

    def caption(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return what `refined` does, and keep it for this transformer with the LoRA that it has now."""
        key = (weakref.ref(self._pipe.dit), loras_of(self._pipe.dit), attention.ATTENTION_IMPLEMENTATION, id(embedding))
        if key not in self._captions:
            self._captions[key] = embedding, self.refined(embedding)  # an id is the embedding's while that is kept
        return self._captions[key][1]

    def refined(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return a prompt's embedding, [tokens, width], as the layers take it: [1, a multiple of 32, width]."""
        dit: ZImageDiT = self._pipe.dit
        padding = -len(embedding) % SEQ_MULTI_OF
        states: torch.Tensor = dit.cap_embedder(torch.cat([embedding, embedding[-1:].repeat(padding, 1)]))
        states[len(embedding) :] = dit.cap_pad_token.to(states)
        states, rope = states.unsqueeze(0), self._caption_rope(len(states), embedding.device)
        for layer in dit.context_refiner:
            states = layer(x=states, attn_mask=None, freqs_cis=rope)
        return states

    def control(self, context: torch.Tensor, scale: float) -> ControlStates:
        """Return what the pipeline's unit makes of a control image, [1, channels, 1, height, width], for `predict`."""
        net = self._pipe.controlnet
        states = net.control_all_x_embedder[PATCH](self._patches(context[0]))
        states = self._padded(states, context.shape[-2:])
        return ControlStates(net.control_noise_refiner[0].before_proj(states), scale)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        captions: Sequence[torch.Tensor],
        control: ControlStates | None = None,
    ) -> list[torch.Tensor]:
        """Return the noise in latents, as each prompt sees it.

        Args:
            latents: [1, 16, height, width], both even.
            timestep: [1], of DiffSynth's schedule: 1000 is noise alone.
            captions: of prompts, made with the same transformer.
            control: of a control image of the latents' size, made with the same ControlNet.

        Returns:
            Tensors shaped like `latents`, one for each caption.
        """
        dit: ZImageDiT = self._pipe.dit
        _, _, height, width = latents.shape
        time = dit.t_embedder(1000 - timestep)
        embedded = dit.all_x_embedder[PATCH](self._patches(latents[0].unsqueeze(1)))
        embedded = self._padded(embedded, (height, width))
        # Positions begin where those of the prompt end: prompts that are equally long share what is refined alone.
        refined, halves = {}, []
        for caption in captions:
            image_rope, rope = self._positions(caption.shape[1], height, width, latents.device)
            if caption.shape[1] not in refined:
                refined[caption.shape[1]] = self._refined(embedded, image_rope, time, control)
            image, beside = refined[caption.shape[1]]
            halves.append(_Half(rope, _joined(image, caption), None if beside is None else _joined(beside, caption)))
        self._through_layers(halves, time, control)
        return [self._noise(half.states, time, (1, height, width)) for half in halves]

    def _refined(
        self, states: torch.Tensor, rope: torch.Tensor, time: torch.Tensor, control: ControlStates | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the latents' own states refined, and the ControlNet's states."""
        now = {"attn_mask": None, "freqs_cis": rope, "adaln_input": time}
        beside = None
        blocks: Any = () if control is None else self._pipe.controlnet.control_noise_refiner
        for index, layer in enumerate(self._pipe.dit.noise_refiner):
            if control is not None:
                beside = control.states + states if beside is None else beside
                beside = _without_hints(blocks[index], beside, now)
            states = layer(x=states, **now)
            if control is not None:
                states = states + blocks[index].after_proj(beside) * control.scale
        return states, beside

    def _through_layers(self, halves: Sequence[_Half], time: torch.Tensor, control: ControlStates | None) -> None:
        """Let all halves go through each layer before the next, and each hint of the ControlNet be used at once."""
        net = None if control is None else self._pipe.controlnet
        for place, layer in enumerate(self._pipe.dit.layers):
            block = None
            if net is not None and place in net.control_layers_mapping:
                block = net.control_layers[net.control_layers_mapping[place]]
            with fetched_once([layer, *([] if block is None else [block])] if len(halves) > 1 else []):
                for half in halves:
                    now = {"attn_mask": None, "freqs_cis": half.rope, "adaln_input": time}
                    hint = None
                    if block is not None and control is not None and half.control is not None:
                        if block.block_id == 0:
                            half.control = block.before_proj(half.control) + half.states
                        half.control = _without_hints(block, half.control, now)
                        hint = block.after_proj(half.control) * control.scale
                    half.states = layer(x=half.states, **now)
                    if hint is not None:
                        half.states = half.states + hint

    def _noise(self, states: torch.Tensor, time: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
        dit: ZImageDiT = self._pipe.dit
        (image,) = dit.unpatchify([dit.all_final_layer[PATCH](states, time)[0]], [size])
        noise: torch.Tensor = -image.transpose(0, 1)
        return noise

    def _patches(self, image: torch.Tensor) -> torch.Tensor:
        """Return an image, [channels, 1, height, width], as patches, whose number is a multiple of 32."""
        patches, _, _ = self._pipe.dit._patchify_image(image, 2, 1)
        return torch.cat([patches, patches[-1:].repeat(-len(patches) % SEQ_MULTI_OF, 1)])

    def _padded(self, states: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return embedded patches of latents of a size, [tokens, width], as [1, tokens, width], with the padding's."""
        states[size[0] * size[1] // 4 :] = self._pipe.dit.x_pad_token.to(states)
        return states.unsqueeze(0)

    def _positions(
        self, caption: int, height: int, width: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of latents of a size that follow a prompt of so many tokens, and with the prompt's."""
        if (key := (caption, height, width)) not in self._kept:
            dit: ZImageDiT = self._pipe.dit
            places = dit.create_coordinate_grid((1, height // 2, width // 2), (caption + 1, 0, 0), device).flatten(0, 2)
            padding = places.new_zeros((-len(places) % SEQ_MULTI_OF, 3))
            image: torch.Tensor = dit.rope_embedder(torch.cat([places, padding])).unsqueeze(0)
            self._kept[key] = image, _joined(image, self._caption_rope(caption, device))
        return self._kept[key]

    def _caption_rope(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Return the positions of a prompt, [1, tokens, half the width of a head], complex."""
        dit: ZImageDiT = self._pipe.dit
        rope: torch.Tensor = dit.rope_embedder(
            dit.create_coordinate_grid((tokens, 1, 1), (1, 0, 0), device).flatten(0, 2)
        )
        return rope.unsqueeze(0)


def _joined(image: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
    return torch.cat([image, caption], dim=1)


def _without_hints(block: Any, states: torch.Tensor, now: dict[str, Any]) -> torch.Tensor:
    """Apply one of the ControlNet's blocks as a plain layer: its own forward copies all layers' states each time."""
    after: torch.Tensor = ZImageTransformerBlock.forward(block, states, **now)
    return after


@contextmanager
def fetched_once(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let layers under DiffSynth's VRAM management keep what they fetch for a call until the block ends.

    It takes the memory of all of these layers, in the dtype that is computed in.
    """
    with ExitStack() as undo:
        for module in (module for block in blocks for module in block.modules()):
            if isinstance(module, AutoTorchModule):
                name = "computation_module" if hasattr(type(module), "computation_module") else "computation"
                setattr(module, name, functools.cache(getattr(module, name)))
                undo.callback(delattr, module, name)
        yield
