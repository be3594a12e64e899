"""The real models' width with few layers, as files without data: what the program loads like the real weights.

Layers are alike, so a few of them tell what thirty cost, and fit any machine. The VAE is the real one in full. The
files are sparse and take no room on the disk; what is loaded from them are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.core.loader import hash_model_file
from diffsynth.models.z_image_controlnet import ZImageControlNet
from diffsynth.models.z_image_dit import ZImageDiT
from diffsynth.models.z_image_text_encoder import ZImageTextEncoder
from transformers import Qwen3Config, Qwen3Model

from core.messages import Message
from hub.inventory import Chosen
from hub.parts import MINI_ROOT
from mini.config import TEXT_ENCODER_CONFIG
from tests.helpers import sparse


class FewLayersTextEncoder(ZImageTextEncoder):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's text encoder, Qwen3-4B, with few layers, and the vocabulary of the miniature's tokenizer.

    Args:
        layers: how many; the last one's result is never used.
    """

    def __init__(self, layers: int) -> None:
        torch.nn.Module.__init__(self)
        config = Qwen3Config(
            vocab_size=TEXT_ENCODER_CONFIG["vocab_size"],
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        )
        self.model = Qwen3Model(config)


@dataclass(frozen=True)
class FewLayers:
    """How many layers of each model; the ControlNet's lie beside every other one of the transformer's."""

    transformer: int = 3
    text_encoder: int = 3

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Keyword arguments of DiffSynth's classes, by its pipe's attribute."""
        return {
            "dit": {"n_layers": self.transformer},
            "text_encoder": {"layers": self.text_encoder},
            "controlnet": {"control_layers_places": tuple(range(0, self.transformer, 2))},
            "vae_encoder": {"use_conv_attention": False},
            "vae_decoder": {"use_conv_attention": False},
        }

    def write(self, folder: Path) -> Chosen:
        """Write the files, tell DiffSynth what they hold, and return them as the weights of a request."""
        parts: tuple[tuple[str, str, str, type[torch.nn.Module]], ...] = (
            ("turbo", "dit", "z_image_dit", ZImageDiT),
            ("text_encoder", "text_encoder", "z_image_text_encoder", FewLayersTextEncoder),
            ("controlnet", "controlnet", "z_image_controlnet", ZImageControlNet),
        )
        files: dict[str, tuple[Path, ...]] = {"tokenizer": (MINI_ROOT / "Z-Image-Turbo" / "tokenizer",)}
        for part, attribute, name, model_class in parts:
            path, config = folder / f"{part}.safetensors", self.configs[attribute]
            sparse.write_sparse(path, _shapes(model_class, config))
            _register(path, name, model_class, config)
            files[part] = (path,)
        sparse.write_part(folder, "vae")
        files["vae"] = tuple((folder / "vae").glob("*.safetensors"))
        return Chosen("full", files, "nowhere", Message("few_layers", "few layers of random numbers"))


def _shapes(model_class: type[torch.nn.Module], config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(values.shape) for name, values in model_class(**config).state_dict().items()}


def _register(path: Path, name: str, model_class: type[torch.nn.Module], config: dict[str, Any]) -> None:
    entry = {
        "model_hash": hash_model_file(str(path)),
        "model_name": name,
        "model_class": f"{model_class.__module__}.{model_class.__qualname__}",
        "extra_kwargs": config,
    }
    if entry not in MODEL_CONFIGS:
        MODEL_CONFIGS.append(entry)
