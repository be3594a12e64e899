"""The models of Z-Image around DiffSynth's pipe: loading, both transformers, one call per mode.

Importing this module imports torch and diffsynth, so the engine does it on the first request, after
`core.environment.prepare_environment`. Plain values go in, and a generator yields a `Stage` or a `Step` after each
piece of work. Closing the generator stops the work there.

DiffSynth's own `ZImagePipeline.__call__` cannot yield, and `from_pretrained` drops its `ModelPool`; so the pipe is put
together here, and the step loop runs over the same units and `step` as `__call__` does.
"""

from __future__ import annotations

import gc
import logging
import sys
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.core.attention import attention
from diffsynth.diffusion.base_pipeline import ControlNetInput
from diffsynth.models.model_loader import ModelPool
from diffsynth.models.z_image_dit import TimestepEmbedder, ZImageDiT
from diffsynth.pipelines.z_image import (
    ZImageUnit_InputImageEmbedder,
    ZImageUnit_PAIControlNet,
    ZImageUnit_PromptEmbedder,
)
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import mini.config
from core.events import Stage, Step, TileDone
from core.messages import Message
from core.request import Model
from core.sizes import WeightsKind
from diffusion import loader, preview, sanity
from diffusion.denoiser import Denoiser
from diffusion.encoded_images import EncodedImages, key_of
from diffusion.image_to_image import InputImageUnit, redraw
from diffusion.loader import StudioPipe
from diffusion.memory import MemoryPlan
from diffusion.prompt_encoder import PromptEncoder, PromptUnit
from diffusion.variety import varied, varied_steps
from hub.inventory import Chosen
from lora.adapter import Adapter, Adapters, KeptCopies, applied

log = logging.getLogger(__name__)

SIGMA_SHIFT = 3.0  # scheduler_config.json of both official models

Progress = Generator[Stage | Step | TileDone, None, "Picture"]


@dataclass(frozen=True)
class Picture:
    """A decoded image, RGB, 8 bit; the latents it came from, (1, 16, height / 8, width / 8); the health of both."""

    image: Image.Image
    latents: torch.Tensor
    notes: tuple[Message, ...]
    health: sanity.Health


class Pipeline:
    """The models of one kind of weights on one device.

    Args:
        device: a torch device name: "cuda", "mps" or "cpu".
        dtype: what weights are held and computed in, where the plan does not hold them in another.
        plan: where each part waits, and what memory may be used for.
        emulated: whether the device is one that ZeroGPU only emulates as yet.
    """

    def __init__(self, device: str, dtype: torch.dtype, plan: MemoryPlan, *, emulated: bool = False) -> None:
        _send_prints_to_log()
        self.kind: WeightsKind = "full"
        self.plan = plan
        self.emulated = emulated
        self.loras = Adapters()
        self.lora_copies = KeptCopies()
        self.transformers: dict[str, ZImageDiT] = {}  # by their models, those of users' checkpoints by their files
        # DiffSynth's own default device is the CPU on a Mac.
        self.pipe = StudioPipe(device=device, torch_dtype=dtype)
        self.pipe.tiled_vae_above = plan.tiled_vae_above
        self.prompts = PromptEncoder(self.pipe)
        self.denoiser = Denoiser(self.pipe)
        self.encoded_images = EncodedImages()
        ours: dict[type, Callable[[], Any]] = {
            ZImageUnit_PromptEmbedder: lambda: PromptUnit(self.prompts),
            ZImageUnit_PAIControlNet: lambda: ControlUnit(self.encoded_images),
            ZImageUnit_InputImageEmbedder: InputImageUnit,
        }
        self.pipe.units = [ours[type(unit)]() if type(unit) in ours else unit for unit in self.pipe.units]

    def load(self, chosen: Chosen, model: Model) -> Generator[Stage, None, None]:
        """Load what `model` needs and is not in memory yet, yielding a stage before each part.

        The ControlNet is loaded where `chosen` has one, so when its mode is used for the first time.

        Raises:
            FileNotFoundError, ValueError: a file is absent, or DiffSynth does not know what it holds.
        """
        pipe, self.kind = self.pipe, chosen.kind
        if chosen.kind == "mini":
            mini.config.register()
        if pipe.tokenizer is None:
            yield Stage("loading", Message("stage", "tokenizer"))
            pipe.tokenizer = AutoTokenizer.from_pretrained(chosen.files["tokenizer"][0], local_files_only=True)
        if pipe.text_encoder is None:
            yield Stage("loading", Message("stage", "text encoder"))
            pipe.text_encoder = self._read(chosen.files["text_encoder"], "text_encoder").fetch_model(
                "z_image_text_encoder"
            )
            keep_positions_exact(pipe.text_encoder)
            leave_out_last_layer(pipe.text_encoder)
        if pipe.vae_decoder is None:
            yield Stage("loading", Message("stage", "autoencoder"))
            pool = self._read(chosen.files["vae"], "vae")
            pipe.vae_encoder = pool.fetch_model("flux_vae_encoder")
            pipe.vae_decoder = pool.fetch_model("flux_vae_decoder")
            loader.keep_own_dtype(pipe.vae_encoder, answer=pipe.torch_dtype)
            loader.keep_own_dtype(pipe.vae_decoder)  # an image is best rounded once
        if pipe.controlnet is None and "controlnet" in chosen.files:
            yield Stage("loading", Message("stage", "ControlNet"))
            pipe.controlnet = self._read(chosen.files["controlnet"], "controlnet").fetch_model("z_image_controlnet")
            pipe.controlnet.control_layers_mapping = control_places(pipe.controlnet)
        moves = self.plan.other_transformer == "moves"
        name = str(chosen.files[model]) if chosen.checkpoint else model
        if name not in self.transformers or (moves and pipe.dit is not self.transformers[name]):
            yield Stage("loading", Message("stage", "transformer ({model})", model=chosen.checkpoint or model))
        if pipe.dit is not self.transformers.get(name):
            self._make_room()
        if name not in self.transformers:
            self._keep_one_other()
            transformer = self._read(chosen.files[model], "transformer").fetch_model("z_image_dit")
            follow_weight_dtype(transformer.t_embedder)
            self.transformers[name] = transformer
        pipe.dit = self.transformers[name]
        if moves:
            pipe.dit.to(pipe.device)
        pipe.vram_management_enabled = pipe.check_vram_management_state()

    def _make_room(self) -> None:
        """Do with the transformer used last what the plan says, before the other one is used."""
        last, self.pipe.dit = self.pipe.dit, None
        if last is None:
            return
        self.lora_copies.forget()
        loader.offload(last)  # from here on DiffSynth does not see it
        if self.plan.other_transformer == "moves":
            last.to("cpu")
        # One that waits on the disk stays there; but packed weights were widened, and are in memory all the same.
        elif (self.plan.other_transformer == "goes" and not loader.lies_in_files(last)) or (
            self._waits_on_disk() and loader.was_widened(last)
        ):
            self.transformers = {model: kept for model, kept in self.transformers.items() if kept is not last}
            del last
            gc.collect()  # modules hold cycles, and the next load needs the room now

    def _waits_on_disk(self) -> bool:
        return "transformer" in self.plan.parts and self.plan.parts["transformer"].at == "disk"

    def _keep_one_other(self) -> None:
        """Give up all transformers but one, those loaded first, before another comes: plans count with two."""
        in_memory = [name for name, kept in self.transformers.items() if not loader.lies_in_files(kept)]
        for name in in_memory[: max(0, len(in_memory) - 1)]:
            del self.transformers[name]
            gc.collect()  # modules hold cycles

    def text_to_image(
        self,
        *,
        prompt: str,
        negative_prompt: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        seed: int,
        variety: float = 0.0,
        control: tuple[Image.Image, float] | None = None,
    ) -> Progress:
        """Draw one image with the transformer loaded last.

        Args:
            prompt: the text; what does not fit the text encoder is cut, and noted.
            negative_prompt: used when `cfg` is not 1.
            steps: Euler steps, at least 1.
            cfg: guidance in DiffSynth's sense, negative + cfg x (positive - negative); 1 is none.
            width: pixels, a multiple of 16.
            height: pixels, a multiple of 16.
            seed: of the CPU's generator, so that the noise is the same on every device.
            variety: how much each seed changes the prompt in the first steps, 0 to 1; at 0 nothing is changed.
            control: a control image, RGB of `width` x `height`, and how strictly it is kept, 0 to 2; at 0 the image
                is the one without it.

        Returns:
            The image, as the generator's return value.
        """
        pipe = self.pipe
        shared: dict[str, Any] = {  # what DiffSynth's units hand to each other
            "cfg_scale": cfg,
            "height": height,
            "width": width,
            "seed": seed,
            "rand_device": "cpu",
            "num_inference_steps": steps,
        }
        if control is not None and control[1]:
            shared["controlnet_inputs"] = [ControlNetInput(image=control[0], scale=control[1])]
        positive: dict[str, Any] = {"prompt": prompt}
        negative: dict[str, Any] = {"negative_prompt": negative_prompt}
        pipe.scheduler.set_timesteps(steps, denoising_strength=1.0, shift=SIGMA_SHIFT)

        yield Stage("encoding")
        # Grad mode belongs to a thread, and a generator may be driven by several: switched off piece by piece.
        with torch.no_grad():
            for unit in pipe.units:
                shared, positive, negative = pipe.unit_runner(unit, pipe, shared, positive, negative)
        encoded = [positive] if cfg == 1 else [positive, negative]
        notes = tuple(note for prompt_inputs in encoded if (note := prompt_inputs["prompt_note"]))

        yield Stage("denoising")
        pipe.load_models_to_device(pipe.in_iteration_models)
        with torch.no_grad():
            captions = [self.denoiser.caption(inputs["prompt_embeds"][0]) for inputs in encoded]
            first = captions  # of the steps that variety changes
            if variety:
                embedding = varied(positive["prompt_embeds"][0], variety, seed)
                first = [self.denoiser.refined(embedding), *captions[1:]]
            control_states = None
            if "control_context" in shared:
                control_states = self.denoiser.control(shared["control_context"], shared["control_scale"])
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            with torch.no_grad():
                halves = self.denoiser.predict(
                    shared["latents"],
                    timestep.unsqueeze(0).to(dtype=pipe.torch_dtype, device=pipe.device),
                    first if index < varied_steps(steps) else captions,
                    control_states,
                )
                predicted = halves[0] if cfg == 1 else halves[1] + cfg * (halves[0] - halves[1])
                shared["latents"] = pipe.step(pipe.scheduler, progress_id=index, noise_pred=predicted, **shared)
                # Where the remaining steps lead if the prediction stays: the latents themselves are mostly noise.
                rest = pipe.scheduler.sigmas[index + 1] if index + 1 < steps else 0.0
                emerging = preview.project(shared["latents"] - rest * predicted, self.kind)
            yield Step(index + 1, steps, emerging)

        yield Stage("decoding")
        image, health = self.decode(shared["latents"])
        return Picture(image, shared["latents"], notes, health)

    def decode(self, latents: torch.Tensor) -> tuple[Image.Image, sanity.Health]:
        """Decode latents, (1, 16, height / 8, width / 8), in tiles where the memory plan asks for them."""
        pipe = self.pipe
        with torch.no_grad():
            pipe.load_models_to_device(["vae_decoder"])
            decoded = pipe.in_tiles(pipe.vae_decoder, latents)
            pipe.load_models_to_device([])
            return pipe.vae_output_to_image(decoded), sanity.measure(latents, decoded)

    @property
    def dtype_name(self) -> str:
        """What the transformer computes in."""
        return str(self.pipe.torch_dtype).removeprefix("torch.")

    @property
    def attention(self) -> str:
        """DiffSynth's attention backend; "torch" is SDPA."""
        backend: str = attention.ATTENTION_IMPLEMENTATION
        return backend

    def safe_mode_differs(self) -> bool:
        """Whether safe mode would compute anything in another way than usual."""
        return self.attention != "torch" or next(self.pipe.vae_decoder.parameters()).dtype != torch.float32

    @contextmanager
    def safe_mode(self) -> Iterator[None]:
        """Compute with torch's own attention and the VAE in fp32 inside the block."""
        halves = [self.pipe.vae_encoder, self.pipe.vae_decoder]
        usual, dtypes = attention.ATTENTION_IMPLEMENTATION, [next(half.parameters()).dtype for half in halves]
        try:
            attention.ATTENTION_IMPLEMENTATION = "torch"
            for half in halves:
                half.float()
            yield
        finally:
            attention.ATTENTION_IMPLEMENTATION = usual
            for half, dtype in zip(halves, dtypes, strict=True):
                half.to(dtype)

    def image_to_image(
        self, *, image: Image.Image, prompt: str, steps: int, denoise: float, seed: int, side: int
    ) -> Progress:
        """Draw an image again with the transformer loaded last, without guidance.

        Args:
            image: RGB, width and height multiples of 16.
            prompt: the text, as in `text_to_image`.
            steps: Euler steps, at least 1; all of them are taken, whatever `denoise` is.
            denoise: how much of the schedule is drawn, above 0 up to 1.
            seed: of the CPU's generator.
            side: the most that is drawn at once, in pixels of width and height, a multiple of 64; what is larger is
                drawn in tiles.

        Returns:
            The image, as the generator's return value.
        """
        self.pipe.scheduler.set_timesteps(steps, denoising_strength=denoise, shift=SIGMA_SHIFT)
        yield Stage("encoding")
        with torch.no_grad():
            encoded = self.prompts.encode(prompt)
        decoded, latents = yield from redraw(
            self.pipe, self.denoiser, self.encoded_images, image, encoded.embedding, seed, side
        )
        notes = (encoded.note,) if encoded.note else ()
        return Picture(self.pipe.vae_output_to_image(decoded), latents, notes, sanity.measure(latents, decoded))

    @contextmanager
    def lora(self, adapter: Adapter, strength: float) -> Iterator[None]:
        """Apply a LoRA to the transformer loaded last inside the block; afterwards its weights are what they were."""
        # Nothing of it belongs to a thread: what is drawn inside is a generator, which several threads may drive.
        room, dtype = self.plan.lora_copies, self.pipe.torch_dtype
        with applied(self.pipe.dit, adapter, strength, room, dtype, self.lora_copies):
            yield

    def _read(self, files: Sequence[Path], part: str) -> ModelPool:
        return loader.read(self.pipe, files, part, self.plan, self.emulated)


class ControlUnit(ZImageUnit_PAIControlNet):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's unit for a control image, which is encoded once, as is the blank image that goes with it.

    The ControlNet also does inpainting; without a mask, that part of its input is an empty mask and a mid-gray image.
    Encoding that takes as long as encoding the control image: 49 s on a CPU at full size.

    Args:
        kept: where latents are looked for, and kept.
    """

    def __init__(self, kept: EncodedImages) -> None:
        super().__init__()
        self._kept = kept

    def process(
        self, pipe: StudioPipe, controlnet_inputs: list[ControlNetInput] | None, height: int, width: int
    ) -> dict[str, object]:
        """Return `control_context`, (1, 33, 1, height / 8, width / 8), and `control_scale`."""
        if controlnet_inputs is None:
            return {}
        (control_input,) = controlnet_inputs
        control = self._latents(pipe, control_input.image)
        mask = torch.zeros((1, 1, height // 8, width // 8), dtype=pipe.torch_dtype, device=pipe.device)
        context = torch.cat([control, mask, self._latents(pipe, (width, height))], dim=1)
        return {"control_context": context.unsqueeze(2), "control_scale": control_input.scale}

    def _latents(self, pipe: StudioPipe, image: Image.Image | tuple[int, int]) -> torch.Tensor:
        """Return the latents of an image, or of a blank one of a size, which are encoded where they are not kept."""
        key = key_of(pipe.vae_encoder, image, pipe.tiled_vae_above)
        if (kept := self._kept.get(key)) is not None:
            return kept
        pipe.load_models_to_device(self.onload_model_names)
        if isinstance(image, tuple):
            width, height = image
            pixels = torch.zeros((1, 3, height, width), dtype=pipe.torch_dtype, device=pipe.device)
        else:
            pixels = pipe.preprocess_image(image)
        return self._kept.put(key, pipe.in_tiles(pipe.vae_encoder, pixels))


def control_places(controlnet: torch.nn.Module) -> dict[int, int]:
    """Return which control layer goes with which layer of the transformer; DiffSynth knows it of 15 layers alone."""
    layers: Any = controlnet.control_layers
    return {layer.block_id: index for index, layer in enumerate(layers)}


def follow_weight_dtype(embedder: TimestepEmbedder) -> None:
    """Let a timestep embedder compute in the dtype of its layers; DiffSynth's casts to bf16 and fails in any other.

    Under VRAM management a layer may hold another dtype than it computes in; of a quantized one only the bias tells.
    """

    def forward(self: TimestepEmbedder, t: torch.Tensor) -> torch.Tensor:
        frequencies = self.timestep_embedding(t, self.frequency_embedding_size)
        first = self.mlp[0]
        dtype = getattr(first, "computation_dtype", None) or first.bias.dtype
        embedded: torch.Tensor = self.mlp(frequencies.to(dtype))
        return embedded

    embedder.forward = types.MethodType(forward, embedder)


def keep_positions_exact(text_encoder: torch.nn.Module) -> None:
    """Let a text encoder compute its positions in fp32, as transformers and diffusers do.

    DiffSynth casts the frequencies with the weights: in bf16 the fastest is off by a radian at the 500th token.
    """
    for module in text_encoder.modules():
        if isinstance(module, Qwen3RotaryEmbedding):
            exact, _ = module.compute_default_rope_parameters(module.config)
            del module.inv_freq  # a buffer, which is cast whenever the module is; a plain attribute is not
            module.inv_freq = exact  # type: ignore[assignment]  # on purpose, see above


def leave_out_last_layer(text_encoder: torch.nn.Module) -> None:
    """Let a text encoder's last layer hand on what it is given, from now on: Z-Image reads what goes into it."""

    def forward(self: torch.nn.Module, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states

    model: Any = text_encoder.model
    model.layers[-1].forward = types.MethodType(forward, model.layers[-1])


def _send_prints_to_log() -> None:
    """Give every loaded DiffSynth module a `print` of its own, so that stdout stays the command line's."""

    def print_to_log(*values: object, **_: object) -> None:
        log.debug("diffsynth: %s", " ".join(str(value) for value in values))

    for name, module in list(sys.modules.items()):
        if name.startswith("diffsynth."):
            module.__dict__["print"] = print_to_log
