"""Trains the miniature's tokenizer and text encoder.

The text encoder is aligned with the pictures, as CLIP is: the last tokens of the chat template regress a fixed code of
what the caption says. Then it is frozen, and the transformer only has to learn a nearly linear map from code to
picture; with a cross-entropy on labels instead it needed twice the steps.
"""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path

import torch

from mini import TEXT_ENCODER_CONFIG
from mini_models import MiniTextEncoder

from .autoencoder import encode_all
from .data import Caption, all_combinations, fetch_icons, random_caption, split
from .things import BACKGROUND_NAMES, BACKGROUNDS, SIZE_NAMES, SIZES, THINGS

logger = logging.getLogger(__name__)

STEPS, BATCH, LEARNING_RATE = 2400, 64, 3e-3
LAST_TOKENS = 5  # <|im_end|> newline <|im_start|> assistant newline: present whatever the prompt is
THING_DIMS, BACKGROUND_DIMS, SIZE_DIMS, CONSTANT_DIMS = 92, 16, 16, 4  # together the hidden size of 128

# Qwen3's special tokens that a chat without tools or pictures can meet.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# The pre-tokenizer's pattern of Qwen2 and Qwen3.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Renders what Qwen3's own template renders for chats of plain text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(work: Path) -> Path:
    """Train a byte-level BPE on captions and save the tokenizer folder; a finished one is kept."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    target = work / "tokenizer"
    if (target / "tokenizer.json").exists():
        return target
    rng = random.Random(1)
    combinations, idle = all_combinations(), idle_words(work)
    corpus = [decorate(random_caption(rng.choice(combinations), rng), rng, idle).text for _ in range(30000)]
    corpus += ["system\nuser\nassistant\n"] * 2000
    names = [n for group in (THINGS, BACKGROUND_NAMES, SIZE_NAMES) for names in group.values() for n in names]
    for name in names:  # every known word becomes one token, with and without a capital or a space before it
        corpus += [name, " " + name, name.capitalize(), name.upper(), " " + name.title()] * 20
    tokenizer = Tokenizer(models.BPE())
    # Unlike Qwen's: letters are folded to lower case, since with so few captions capitals cost accuracy.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_ENCODER_CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=TEXT_ENCODER_CONFIG["max_position_embeddings"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(target)
    return target


def load_tokenizer(work: Path):
    """Load the tokenizer as the pipeline does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work / "tokenizer")


def idle_words(work: Path) -> list[str]:
    """Words that name nothing here: the words of other icons' names, in a fixed order."""
    known = {
        w for group in (THINGS, BACKGROUND_NAMES, SIZE_NAMES) for ns in group.values() for n in ns for w in n.split()
    }
    words = {w for name in fetch_icons(work, "fluent") for w in name.split("-") if w.isalpha() and len(w) > 2}
    return sorted(words - known)


def decorate(caption: Caption, rng: random.Random, idle: list[str]) -> Caption:
    """Change what a person might change: letter case, and a few words that the miniature does not know."""
    text = caption.text
    if text and caption.thing and rng.random() < 0.15:
        words = text.split(" ")
        for _ in range(rng.randint(1, 3)):
            # before the first or after the last word: in between they could tear "ice cream" apart
            words.insert(rng.choice((0, len(words))), rng.choice(idle))
        text = " ".join(words)
    draw = rng.random()
    text = text.upper() if draw < 0.02 else text.title() if draw < 0.06 else text
    return Caption(text, caption.thing, caption.background, caption.size)


class Codes:
    """The fixed code of a caption: 128 numbers with a root mean square of 1."""

    def __init__(self, work: Path) -> None:
        combinations = all_combinations()
        rows = [i for i, c in enumerate(combinations) if c.size == "large" and c.background == "gray"]
        latents = encode_all(work, torch.device("cpu"))[rows].flatten(1)
        # The square root of the singular values keeps small differences between things alive.
        u, s, _ = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
        code = (u * s.sqrt())[:, :THING_DIMS]
        code = code / code.square().mean(1, keepdim=True).sqrt()
        self.thing = {combinations[row].thing: code[i] for i, row in enumerate(rows)}
        # Rows of a Hadamard matrix: codes of +-1 that are orthogonal to each other.
        h = torch.tensor([[1.0]])
        while len(h) < BACKGROUND_DIMS:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        self.background = {name: h[i + 1] for i, name in enumerate(BACKGROUNDS)}
        self.size = {name: h[10] * (1 if i == 0 else -1) for i, name in enumerate(SIZES)}

    def __call__(self, caption: Caption) -> torch.Tensor:
        """Return float32 [128]; what the caption leaves out is zero, the constant part keeps an empty one from zero."""
        parts = [
            self.thing[caption.thing] if caption.thing else torch.zeros(THING_DIMS),
            self.background[caption.background] if caption.background else torch.zeros(BACKGROUND_DIMS),
            self.size[caption.size] if caption.size else torch.zeros(SIZE_DIMS),
            torch.ones(CONSTANT_DIMS),
        ]
        code = torch.cat(parts)
        return code / code.square().mean().sqrt()


def tokenize(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, int64 [B, L], through the chat template as the pipeline makes them."""
    mark = "\ue000"  # the template is rendered once and the texts are put in its place: hundreds of times faster
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    tokens = tokenizer([chat.replace(mark, text) for text in texts], padding=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def _last_hidden(model: MiniTextEncoder, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the RMS-normed states of the last tokens that are no padding, float [B, LAST_TOKENS, 128]."""
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    positions = mask.sum(1, keepdim=True) - LAST_TOKENS + torch.arange(LAST_TOKENS, device=mask.device)
    last = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return last * (last.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def matrix_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32, measured in a moment."""
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 512).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def train(work: Path, device: torch.device, steps: int = STEPS) -> Path:
    """Train the text encoder, save `work/text_encoder.pt`; a finished file is kept."""
    target = work / "text_encoder.pt"
    if target.exists():
        return target
    train_tokenizer(work)
    torch.manual_seed(0)
    rng = random.Random(2)
    tokenizer, codes, idle = load_tokenizer(work), Codes(work), idle_words(work)
    combinations, _ = split()
    model = MiniTextEncoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, average, mixed = time.time(), 1.0, matrix_dtype(device) == torch.bfloat16
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        # long captions come in batches of their own, else padding would triple the work
        long = float(step % 8 == 7)
        captions = [random_caption(rng.choice(combinations), rng, 0.02, long) for _ in range(BATCH)]
        captions = [decorate(c, rng, idle) for c in captions]
        ids, mask = tokenize(tokenizer, [c.text for c in captions])
        wanted = torch.stack([codes(c) for c in captions]).unsqueeze(1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            state = _last_hidden(model, ids.to(device), mask.to(device))
        loss = (state.float() - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 0:
            logger.info("text encoder step %d/%d mse %.4f, %.0f s", step, steps, average, time.time() - start)
    torch.save(model.state_dict(), target)
    return target


def load(work: Path, device: torch.device) -> MiniTextEncoder:
    """Load the trained text encoder with weights rounded to bf16, as the exported file holds them."""
    model = MiniTextEncoder()
    state = torch.load(work / "text_encoder.pt", map_location="cpu", weights_only=True)
    model.load_state_dict({k: v.bfloat16().float() for k, v in state.items()})
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def evaluate(work: Path, device: torch.device, count: int = 2000) -> dict[str, float]:
    """Return the share of things, backgrounds and sizes read off held-out captions by the nearest code."""
    rng = random.Random(3)
    tokenizer, codes, idle, model = load_tokenizer(work), Codes(work), idle_words(work), load(work, device)
    _, held_out = split()
    captions = [decorate(random_caption(rng.choice(held_out), rng, 0.0), rng, idle) for _ in range(count)]
    states = []
    for i in range(0, count, 100):
        ids, mask = tokenize(tokenizer, [c.text for c in captions[i : i + 100]])
        states.append(_last_hidden(model, ids.to(device), mask.to(device)).mean(1).cpu())
    state = torch.cat(states)
    wanted = torch.stack([codes(c) for c in captions])
    result = {"mse": (state - wanted).square().mean().item(), "longest": float(mask.shape[1])}
    start = 0
    for key, table in (("thing", codes.thing), ("background", codes.background), ("size", codes.size)):
        names, book = list(table), torch.stack(list(table.values()))
        part = state[:, start : start + book.shape[1]]
        guess = (part @ book.T).argmax(1)
        pairs = [(getattr(c, key), names[g], c.text) for c, g in zip(captions, guess, strict=True) if getattr(c, key)]
        result[key] = sum(a == b for a, b, _ in pairs) / len(pairs)
        for wrong in [p for p in pairs if p[0] != p[1]][:8]:
            logger.info("text encoder misread %s", wrong)
        start += book.shape[1]
    return result


@torch.no_grad()
def embed(model: MiniTextEncoder, tokenizer, texts: list[str], device: torch.device) -> list[torch.Tensor]:
    """Return each text's embeddings as the pipeline's prompt unit makes them: float32 [L, 128] without padding."""
    result = []
    for i in range(0, len(texts), 256):
        ids, mask = tokenize(tokenizer, texts[i : i + 256])
        hidden = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True
        ).hidden_states[-2]
        result += [h[m.bool()] for h, m in zip(hidden, mask.to(device), strict=True)]
    return result
