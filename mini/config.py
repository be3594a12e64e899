"""The embedded miniature: its configs, its registration with DiffSynth and its vocabulary.

The model classes are in `mini.models`, which imports torch; here they are named by their dotted path.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from core.request import Preprocessor

NATIVE_SIZE = 128  # pixels; the only size that the miniature was trained at

FOLDER = Path(__file__).parent.parent / "weights" / "mini"
# The two hub repositories' layout; text encoder, VAE and tokenizer are stored once, in Turbo's folder.
TURBO_FOLDER = FOLDER / "Z-Image-Turbo"
BASE_FOLDER = FOLDER / "Z-Image"
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER_FILE = "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
VOCABULARY_FILE = "vocabulary.json"
TRAITS_FILE = "traits.json"

# Keyword arguments of DiffSynth's ZImageDiT (and of diffusers' ZImageTransformer2DModel).
TRANSFORMER_CONFIG: dict[str, Any] = {
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "cap_feat_dim": 128,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 64, 64],
}

# Keyword arguments of `mini.models.MiniControlNet`, in the shape of the Union's: control layers beside every other
# transformer layer; 16 channels of the control image, 1 of an inpainting mask and 16 of the image under it.
CONTROLNET_FILE = "Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors"
CONTROLNET_FOLDER = FOLDER / "Z-Image-Turbo-Fun-Controlnet-Union-2.1"
CONTROLNET_CONFIG: dict[str, Any] = {"control_layers_places": [0, 2, 4], "n_refiner_layers": 1, "control_in_dim": 33}

CONTROLS: tuple[Preprocessor, ...] = ("canny", "gray", "scribble")  # the preprocessors that it was trained with

# Keyword arguments of transformers' Qwen3Config.
TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_cache": False,
}

# DiffSynth finds a model by the md5 of its file's tensor names and shapes; Base and Turbo share one.
TRANSFORMER_HASH = "87a5ca02d725630eb8007ad83654adb4"
TEXT_ENCODER_HASH = "cbb963e40affccf4cca87efb94719fc4"
VAE_HASH = "db586bf62efdeec038ee33d705b7ec2a"
CONTROLNET_HASH = "368812adebd469580d516965502d75f1"

MODEL_CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_hash": TRANSFORMER_HASH,
        "model_name": "z_image_dit",
        "model_class": "diffsynth.models.z_image_dit.ZImageDiT",
        "extra_kwargs": TRANSFORMER_CONFIG,
    },
    {
        "model_hash": TEXT_ENCODER_HASH,
        "model_name": "z_image_text_encoder",
        "model_class": "mini.models.MiniTextEncoder",
    },
    {
        "model_hash": VAE_HASH,
        "model_name": "flux_vae_encoder",
        "model_class": "mini.models.MiniVAEEncoder",
        "state_dict_converter": "mini.models.vae_encoder_state_dict",
    },
    {
        "model_hash": VAE_HASH,
        "model_name": "flux_vae_decoder",
        "model_class": "mini.models.MiniVAEDecoder",
        "state_dict_converter": "mini.models.vae_decoder_state_dict",
    },
    {
        "model_hash": CONTROLNET_HASH,
        "model_name": "z_image_controlnet",
        "model_class": "mini.models.MiniControlNet",
    },
)


# DiffSynth's VRAM management knows which layers to move by a model's class: ours have the layers of these.
MANAGED_LIKE: dict[str, str] = {
    "mini.models.MiniTextEncoder": "diffsynth.models.z_image_text_encoder.ZImageTextEncoder",
    "mini.models.MiniControlNet": "diffsynth.models.z_image_controlnet.ZImageControlNet",
}


def register() -> None:
    """Add the miniature to DiffSynth's registry, so that its ModelPool loads the folder's files; safe to repeat."""
    from diffsynth.configs import MODEL_CONFIGS as registry
    from diffsynth.configs import VRAM_MANAGEMENT_MODULE_MAPS as layers

    for config in MODEL_CONFIGS:
        if config not in registry:
            registry.append(config)
    for ours, theirs in MANAGED_LIKE.items():
        layers[ours] = layers[theirs]


# --- vocabulary --------------------------------------------------------------------------------------------------


@cache
def vocabulary() -> dict[str, Any]:
    """Return the vocabulary file.

    `things`, `backgrounds`, `colours`, `sizes`, `ways` and `places` map usual names to all English names, `chinese`
    lists the Chinese terms, `other_words` the words that only join the others.
    """
    words: dict[str, Any] = json.loads((FOLDER / VOCABULARY_FILE).read_text(encoding="utf-8"))
    return words


@cache
def traits() -> dict[str, Any]:
    """Return what was measured of each thing, by its usual name; `train_mini.traits` makes the file.

    `errors` maps sizes to Turbo's mean difference from the icon (of 255), `own_colours` lists the colours of the icon,
    `colourable` is whether a prompt can give it others.
    """
    measured: dict[str, Any] = json.loads((FOLDER / TRAITS_FILE).read_text(encoding="utf-8"))
    return measured


def _names(*groups: str) -> list[str]:
    return [name for group in groups for names in vocabulary()[group].values() for name in names]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


@cache
def _thing_phrases() -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(_words(name)) for name in _names("things"))


@cache
def _free_words() -> frozenset[str]:
    """Words that mean something on their own; "engine" of "fire engine" does not."""
    single = {phrase[0] for phrase in _thing_phrases() if len(phrase) == 1}
    others = (*_names("backgrounds", "colours", "sizes", "ways", "places"), *vocabulary()["other_words"])
    return frozenset(single | {word for text in others for word in _words(text)})


@cache
def _chinese_terms() -> re.Pattern[str]:
    # Chinese has no spaces between words: the longest term that fits is taken.
    return re.compile("|".join(re.escape(term) for term in sorted(vocabulary()["chinese"], key=len, reverse=True)))


def unknown_words(prompt: str) -> list[str]:
    """Return the prompt's words that the miniature was never taught, each once, in order, in lower case.

    A word that is known only as part of a name ("engine" of "fire engine") counts as unknown outside that name.
    """
    words = _words(_chinese_terms().sub(" ", prompt.casefold()))
    named = [False] * len(words)
    for phrase in _thing_phrases():
        for start in range(len(words) - len(phrase) + 1):
            if tuple(words[start : start + len(phrase)]) == phrase:
                named[start : start + len(phrase)] = [True] * len(phrase)
    unknown = [word for word, part in zip(words, named, strict=True) if not part and word not in _free_words()]
    return list(dict.fromkeys(unknown))


def known_things(language: str = "en") -> list[str]:
    """Return the usual names of all things that the miniature draws, sorted: in Chinese for "zh…", else in English."""
    if language.startswith("zh"):
        return sorted(names[0] for names in vocabulary()["chinese_names"]["things"].values())
    return sorted(vocabulary()["things"])
