"""Reading models under a memory plan: DiffSynth's VRAM management, given a place for each part, and mapped files.

DiffSynth moves a managed model's layers between where they wait and where they compute; a part that stays on the device
is read plainly, and on the CPU mapped from its files. What DiffSynth cannot read, other names and packed numbers, is
converted first. `StudioPipe` lets that work on every kind of device. The VAE is never managed: it is small, and
DiffSynth's image-to-image asks for it by a name that does not exist.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.core import ModelConfig
from diffsynth.core.vram.layers import AutoWrappedLinear, AutoWrappedModule
from diffsynth.models.model_loader import ModelPool
from diffsynth.pipelines.z_image import ZImagePipeline
from torch.overrides import TorchFunctionMode

from core.errors import RequestError
from core.messages import Message
from diffusion import convert, host_memory, vae_tiles
from diffusion.measure import Dtype
from diffusion.memory import MemoryPlan, Placement
from hub import packing
from hub.checkpoint import hash_of
from hub.naming import Layout, Shape, encoder_layout_of, layout_of
from hub.packing import Stored
from hub.parts import CONTROLNET_LITE


class StudioPipe(ZImagePipeline):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's pipe, whose management also runs on the CPU, and whose VAE can work in tiles.

    Attributes:
        tiled_vae_above: pixels above which it does; None is never.
    """

    tiled_vae_above: int | None = None

    def in_tiles(self, half: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Apply one half of the VAE to images or latents, [1, C, h, w]; tile by tile where they are large."""
        encodes = half is self.vae_encoder
        pixels = inputs.shape[-2] * inputs.shape[-1] * (1 if encodes else vae_tiles.FACTOR**2)
        if self.tiled_vae_above is None or pixels <= self.tiled_vae_above:
            whole: torch.Tensor = half(inputs)
            return whole
        return vae_tiles.finished((vae_tiles.encode if encodes else vae_tiles.decode)(half, inputs))

    def generate_noise(self, shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        """Return a seed's noise in the dtype that is computed in, drawn in fp32.

        Drawn in bf16, a seed's numbers depend on the release of torch: 2.11 gives others than 2.14, which rounds these.
        """
        noise: torch.Tensor = super().generate_noise(shape, **{**options, "rand_torch_dtype": torch.float32})
        return noise

    def load_models_to_device(self, model_names: Sequence[str]) -> None:
        """Offload every managed model but the named ones, and make those ready."""
        if not self.vram_management_enabled:
            return
        managed = {name: model for name, model in self.named_children() if is_managed(model)}
        for name, model in managed.items():
            if name not in model_names:
                offload(model)
        if self.device_type != "cpu":  # torch.cpu has no cache, and no function of that name
            getattr(torch, self.device_type).empty_cache()
        for name, model in managed.items():
            if name in model_names:
                _each(model, "onload")


def is_managed(model: torch.nn.Module) -> bool:
    """Whether DiffSynth moves the model's layers."""
    return getattr(model, "vram_management_enabled", False)


def offload(model: torch.nn.Module) -> None:
    """Send a managed model's layers back to where they wait; a plain model stays where it is."""
    if is_managed(model):
        _each(model, "offload")


def _each(model: torch.nn.Module, action: str) -> None:
    for module in model.modules():
        if hasattr(module, action):
            getattr(module, action)()


def read(pipe: ZImagePipeline, files: Sequence[Path], part: str, plan: MemoryPlan, emulated: bool = False) -> ModelPool:
    """Return one model, recognised by DiffSynth and read from its files.

    A transformer may be spelled in ComfyUI's names, a text encoder in llama.cpp's, and weights may be packed. On the
    CPU weights are mapped: what the files hold in the dtype asked for takes no memory that the system could not take
    back. A model that waits on the disk is mapped as it lies there, whatever dtype that is; packed weights are widened
    all the same, and take memory.

    Args:
        pipe: what the model is for; its device is computed on, and its dtype in.
        files: the model's.
        part: "transformer", "text_encoder", "controlnet" or "vae".
        plan: where the part waits, and what text encoder and VAE compute in.
        emulated: read to the CPU first, since safetensors would look for the real device.

    Raises:
        FileNotFoundError, ValueError: a file is absent, or DiffSynth does not know what it holds.
        RequestError: packed weights are to wait on the disk, and widened they are more than this machine has free.
    """
    stored = packing.stored(files)
    layout = layout_in(stored.shapes, part)
    spelled = layout if layout is not None and stored.shapes != layout.own else None
    foreign = spelled is not None or stored.packed
    paths = [str(path) for path in files]
    config = ModelConfig(path=paths if len(paths) > 1 else paths[0])
    dtypes = {"vae": plan.vae_dtype, "text_encoder": plan.text_dtype}
    computed = getattr(torch, dtypes[part]) if part in dtypes else pipe.torch_dtype
    config.computation_dtype = computed
    placement = plan.parts[part] if part != "vae" else Placement("device", plan.vae_dtype)
    limit = plan.vram_limit_gb if part != "vae" else None
    on_cpu = pipe.device == "cpu" and not emulated
    mapped = None
    if on_cpu or foreign:
        held = None if placement.at == "disk" else placement.held
        if stored.packed and placement.at == "disk":
            _check_room(files[0], stored)
        mapped = map_weights(files, held, stored, spelled.sources if spelled else stored.shapes)
        config.state_dict = mapped.tensors if spelled is None else in_own_names(mapped.tensors, spelled)
        # A mapping waits nowhere else on the CPU; a card's layers come from it as from the host's memory.
        placement = Placement("device" if on_cpu or placement.at == "device" else "host", mapped.held)
    manage(config, placement, pipe.device, computed, limit is not None)
    moved = emulated and config.computation_device is None
    if moved:
        config.computation_device = "cpu"
    with host_memory.freed_at_once(), _MetaStaysEmpty():  # dtypes are changed tensor by tensor
        if not foreign:
            pool = pipe.download_and_load_models([config], vram_limit=limit)
        else:
            pool = _load_as(spelled.own if spelled else stored.shapes, config, pipe, limit)
    if moved:
        pool.model = [model.to(pipe.device) for model in pool.model]
    if placement.at == "host":
        for model in pool.model:
            keep_originals(model)
    if mapped is not None and mapped.whole:
        for model in pool.model:
            _in_files.add(model)
    if stored.packed:
        for model in pool.model:
            _widened.add(model)
    return pool


def keep_originals(model: torch.nn.Module) -> None:
    """Let a managed model's layers go back to the very weights that wait in the host's memory.

    DiffSynth copies them from the device each time, 20 GB a picture, though nobody has changed them. Plans count with
    their memory whether they are in use or not.
    """
    for layer in model.modules():
        if isinstance(layer, (AutoWrappedLinear, AutoWrappedModule)) and layer.state == 0 and not layer.disk_offload:
            originals = [
                (owner, name, parameter, parameter.data)
                for owner in layer.modules()
                for name, parameter in owner.named_parameters(recurse=False)
            ]
            layer.offload = functools.partial(_put_back, layer, originals)


def _put_back(layer: Any, originals: Sequence[tuple[torch.nn.Module, str, torch.nn.Parameter, torch.Tensor]]) -> None:
    if layer.state != 0:
        for owner, name, parameter, values in originals:
            parameter.data = values  # `to`, by which a layer is moved, changes this, or puts another parameter there
            owner._parameters[name] = parameter
        layer.state = 0


# The ControlNet's small file (VideoX-Fun, config/z_image/z_image_control_2.1_lite.yaml), which DiffSynth does not list.
CONTROLNET_LITE_PLACES = (0, 10, 20)
_LITE = {
    "model_hash": CONTROLNET_LITE,
    "model_name": "z_image_controlnet",
    "model_class": "diffsynth.models.z_image_controlnet.ZImageControlNet",
    "extra_kwargs": {"control_layers_places": CONTROLNET_LITE_PLACES},
}
if _LITE not in MODEL_CONFIGS:
    MODEL_CONFIGS.append(_LITE)

_LAYOUTS: Mapping[str, Callable[[Mapping[str, Shape]], Layout | None]] = {
    "transformer": layout_of,
    "text_encoder": encoder_layout_of,
}


def layout_in(shapes: Mapping[str, Shape], part: str) -> Layout | None:
    """Return how files with such tensors spell a part, where it is one that has several spellings."""
    return _LAYOUTS[part](shapes) if part in _LAYOUTS else None


def in_own_names(tensors: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Return a model's tensors by DiffSynth's names; what a file holds as one is cut, and not copied."""
    named = {}
    for name, targets in layout.sources.items():
        row = 0
        for target in targets:
            shape = layout.own[target]
            part = tensors[name] if len(targets) == 1 else tensors[name][row : row + shape[0]]
            named[target] = part.reshape(shape)
            row += shape[0]
    return named


def _load_as(own: Mapping[str, Shape], config: ModelConfig, pipe: ZImagePipeline, limit: float | None) -> ModelPool:
    """Return the models that have such tensors; DiffSynth would recognise them by what is in their files.

    Raises:
        ValueError: DiffSynth knows none.
    """
    identity = hash_of(own)
    places = config.vram_config()
    places["computation_device"] = places["computation_device"] or pipe.device
    pool = ModelPool()
    for entry in (entry for entry in MODEL_CONFIGS if entry["model_hash"] == identity):
        model = pool.load_model_file(entry, config.path, places, vram_limit=limit, state_dict=config.state_dict)
        pool.model.append(model)
        pool.model_name.append(entry["model_name"])
        pool.model_path.append(config.path)
    if not pool.model:
        raise ValueError(f"{config.path} holds an unknown model ({identity})")
    return pool


_in_files: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_widened: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def lies_in_files(model: torch.nn.Module) -> bool:
    """Whether a model's weights are mapped from its files, so that giving it up frees no memory that others lack."""
    return model in _in_files


def was_widened(model: torch.nn.Module) -> bool:
    """Whether a model's weights were packed in its files, so that they are in memory wherever they wait."""
    return model in _widened


@dataclass(frozen=True)
class MappedWeights:
    """Weights that are read when they are first used.

    Attributes:
        tensors: by their names in the files.
        held: their dtype.
        whole: whether all of them are mapped; those that files hold in another dtype are copies.
    """

    tensors: dict[str, torch.Tensor]
    held: Dtype
    whole: bool


def map_weights(
    files: Sequence[Path], held: Dtype | None, stored: Stored, names: Collection[str] | None = None
) -> MappedWeights:
    """Map the tensors of files into memory; those that are in another dtype are read, and widened.

    DiffSynth copies each of them, so that a text encoder of 8 GB takes those 8 GB beside the transformer. A mapping
    takes nothing that the system could not take back, and is there at once.

    Args:
        files: of one model.
        held: the dtype to hold weights in; None takes what most of the numbers have in the files, if that is bf16 or
            fp32, else bf16.
        stored: what the files hold.
        names: which tensors; all of them where none are named.

    Raises:
        FileNotFoundError: a file is absent.
    """
    held = held or ("float32" if stored.dtype == "F32" else "bfloat16")
    dtype = getattr(torch, held)
    tensors = convert.tensors(files, stored, stored.tensors if names is None else names, dtype)
    whole = {stored.tensors[name].dtype for name in tensors} == {"F32" if held == "float32" else "BF16"}
    return MappedWeights(tensors, held, whole)


def _check_room(file: Path, stored: Stored) -> None:
    """Refuse packed weights that do not fit into the host's memory: other files would be mapped, these are widened."""
    needed = stored.numbers * torch.bfloat16.itemsize
    _, free = host_memory.total_and_free()
    if needed > free:
        text = (
            "a file in bf16 or fp16, which is read from the disk while it is used, or a machine with more memory: this "
            "one is {stored}, takes {needed} GB once it is widened, and {free} GB are free"
        )
        figures = {"needed": f"{needed / 1e9:.1f}", "free": f"{free / 1e9:.1f}"}
        raise RequestError("weights", file.name, Message("packed_too_large", text, stored=stored.title, **figures))


class _MetaStaysEmpty(TorchFunctionMode):
    """Leaves out filling a tensor of the meta device, which has no numbers, with random ones.

    A model is made there before its weights are read. In torch, that filling alone imports its compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            filled: torch.Tensor = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def manage(config: ModelConfig, placement: Placement, device: str, dtype: torch.dtype, gated: bool) -> None:
    """Fill in a ModelConfig's places and dtypes; it stays as it is where nothing needs to be managed.

    A layer goes through four states in DiffSynth: offloaded while another model works, on-loaded when its own does,
    preparing (where it stays until it is offloaded) once there was room for it, and computation for one call.

    Args:
        config: what is filled in.
        placement: where the part waits, and in which dtype.
        device: a torch device name.
        dtype: what is computed in.
        gated: whether a `vram_limit` will keep layers from filling the device. Without one, a layer fetched would
            stay until the model is offloaded, so it is fetched again for each call instead.
    """
    held = getattr(torch, placement.held)
    if placement.at == "device" and held == dtype:
        return
    waits = {"disk": ("disk", "disk"), "host": (held, "cpu"), "device": (held, device)}[placement.at]
    ready = (dtype, device) if gated and placement.at != "device" else waits
    config.offload_dtype, config.offload_device = waits
    config.onload_dtype, config.onload_device = waits
    config.preparing_dtype, config.preparing_device = ready
    config.computation_dtype, config.computation_device = dtype, device


def keep_own_dtype(model: torch.nn.Module, answer: torch.dtype | None = None) -> None:
    """Let a model take inputs of any dtype and compute in its weights', from now on.

    Args:
        model: called with one tensor.
        answer: the dtype to answer in; None leaves it as it is computed.
    """

    def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])

    model.register_forward_pre_hook(before)
    if answer is not None:
        model.register_forward_hook(lambda module, inputs, output: output.to(answer))
