"""Writes the trained parts in the official repositories' layout under `weights/mini/`, in bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mini.config
from core.whole_file import replacing

from . import autoencoder, text_encoder
from .scenes import AtlasPainter, Painter
from .things import THINGS
from .vocabulary import vocabulary

SCHEDULER_CONFIG = {  # as in the official repositories
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}
MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["mini.models", "MiniAutoencoder"],
}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write weights in bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().bfloat16().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, path, {"format": "pt", **metadata})
    path.chmod(0o644)  # safetensors writes files that only their owner may read


def export_transformer(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write `transformer/`, `scheduler/` and `model_index.json` of one of the two repositories."""
    write_weights(folder / mini.config.TRANSFORMER_FILE, state)
    config = {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        **mini.config.TRANSFORMER_CONFIG,
    }
    _write_json(folder / "transformer" / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    _write_json(folder / "model_index.json", MODEL_INDEX)


def export_text_encoder(folder: Path, work: Path) -> None:
    """Write `text_encoder/` and `tokenizer/`; the names are those of Qwen3ForCausalLM, as in the official file."""
    from transformers import Qwen3Config

    model = text_encoder.load(work, torch.device("cpu"))
    write_weights(folder / mini.config.TEXT_ENCODER_FILE, model.state_dict())
    config = Qwen3Config(**mini.config.TEXT_ENCODER_CONFIG).to_dict()
    config |= {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    _write_json(folder / "text_encoder" / "config.json", config)
    shutil.copytree(work / "tokenizer", folder / mini.config.TOKENIZER_FOLDER, dirs_exist_ok=True)


def export_autoencoder(folder: Path, work: Path) -> None:
    """Write `vae/`, encoder and decoder in one file."""
    write_weights(folder / mini.config.VAE_FILE, autoencoder.load(work, torch.device("cpu")).state_dict())
    config = {
        "_class_name": "MiniAutoencoder",
        "latent_channels": 16,
        "block_out_channels": [1, 1, 1, 1],  # four levels: tells pipelines that a latent is 8 pixels wide
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    _write_json(folder / "vae" / "config.json", config)


def export_atlas(path: Path, work: Path) -> None:
    """Write every thing's icon, small, into one picture, from which `AtlasPainter` paints."""
    painter, side, columns = Painter(work), AtlasPainter.SIDE, AtlasPainter.COLUMNS
    atlas = Image.new("RGBA", (columns * side, -(-len(THINGS) // columns) * side))
    for i, thing in enumerate(THINGS):
        icon = painter.icon(thing, 128).resize((side, side), Image.Resampling.BOX)
        atlas.paste(icon, (i % columns * side, i // columns * side))
    atlas.save(path, optimize=True)


def take_back(folder: Path, work: Path) -> None:
    """Put the parts of an exported miniature into `work`, to continue from; files there are kept.

    Autoencoder and tokenizer are final; text encoder and Base are where their training starts.
    """
    turbo, base = folder / mini.config.TURBO_FOLDER.name, folder / mini.config.BASE_FOLDER.name
    for source, name in (
        (turbo / mini.config.VAE_FILE, "autoencoder.pt"),
        (turbo / mini.config.TEXT_ENCODER_FILE, "text_encoder_start.pt"),
        (base / mini.config.TRANSFORMER_FILE, "start.pt"),
    ):
        if not (work / name).exists():
            with replacing(work / name) as file:
                torch.save({key: value.float() for key, value in load_file(source).items()}, file)
    if not (work / "tokenizer").exists():
        shutil.copytree(turbo / mini.config.TOKENIZER_FOLDER, work / "tokenizer")


def export(work: Path, folder: Path = mini.config.FOLDER) -> None:
    """Write the miniature into `folder` and its atlas of icons into `work`.

    A transformer that is not trained yet is taken from its state file.
    """
    turbo, base = folder / mini.config.TURBO_FOLDER.name, folder / mini.config.BASE_FOLDER.name
    states = {}
    for name in ("base", "turbo"):
        finished, running = work / f"{name}.pt", work / f"{name}_state.pt"
        if finished.exists():
            states[name] = torch.load(finished, map_location="cpu", weights_only=True)
        elif running.exists():
            states[name] = torch.load(running, map_location="cpu", weights_only=True)["model"]
        elif name == "turbo":
            states[name] = states["base"]
        else:
            from .transformer import build

            states[name] = build().state_dict()
    export_transformer(base, states["base"])
    export_transformer(turbo, states["turbo"])
    export_text_encoder(turbo, work)
    export_autoencoder(turbo, work)
    _write_json(folder / mini.config.VOCABULARY_FILE, vocabulary())
    export_atlas(work / "icons.png", work)
