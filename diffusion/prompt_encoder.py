"""Prompts as the text encoder's numbers: Qwen's chat template, the cut at its limit, and the last embeddings kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cachetools import LRUCache
from diffsynth.pipelines.z_image import ZImageUnit_PromptEmbedder

from core.messages import Message
from diffusion.loader import StudioPipe
from diffusion.tokens import MAX_TEXT_TOKENS

KEPT_BYTES = 64 << 20  # of embeddings: at full size 5 kB a token in bf16, so 24 of the longest prompts


@dataclass(frozen=True)
class EncodedPrompt:
    """What the transformer is given of a prompt.

    Attributes:
        embedding: [tokens, width].
        note: what was cut off, where the prompt is too long.
    """

    embedding: torch.Tensor
    note: Message | None = None


class PromptEncoder:
    """The text encoder and the tokenizer of a pipe, and the embeddings of the prompts used last.

    DiffSynth's own unit pads every prompt to 512 tokens and encodes the padding too: half a minute on a CPU at full
    size, for numbers that are then thrown away. It also cuts a long prompt together with the end of the chat template,
    and does not report it.

    Args:
        pipe: whose models are used; they may be loaded later.
    """

    def __init__(self, pipe: StudioPipe) -> None:
        self._pipe = pipe
        self._kept: LRUCache[str, EncodedPrompt] = LRUCache(KEPT_BYTES, getsizeof=lambda kept: kept.embedding.nbytes)

    def __len__(self) -> int:
        return len(self._kept)

    def encode(self, prompt: str) -> EncodedPrompt:
        """Return a prompt's embedding; call it without gradients."""
        if prompt not in self._kept:
            self._kept[prompt] = self._encode(prompt)
        return self._kept[prompt]

    def _encode(self, prompt: str) -> EncodedPrompt:
        pipe = self._pipe
        pipe.load_models_to_device(["text_encoder"])
        ids, note = self.tokenize(prompt)
        tokens = torch.tensor([ids], device=pipe.device)
        hidden = pipe.text_encoder(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens).bool(),
            output_hidden_states=True,
            use_cache=False,  # keys and values are for writing on
        ).hidden_states[-2]
        return EncodedPrompt(hidden[0].to(pipe.torch_dtype), note)

    def tokenize(self, prompt: str) -> tuple[list[int], Message | None]:
        """Return the ids of a prompt in the chat template, at most MAX_TEXT_TOKENS, and a note of what was cut."""
        ids = self.templated_ids(prompt)
        surplus = len(ids) - MAX_TEXT_TOKENS
        if surplus <= 0:
            return ids, None
        # Cut the prompt's own end, so that the template that tells the encoder where it ends stays whole.
        tokenizer = self._pipe.tokenizer
        words = tokenizer(prompt, add_special_tokens=False).input_ids
        kept = words[: len(words) - surplus]
        while len(ids := self.templated_ids(tokenizer.decode(kept))) > MAX_TEXT_TOKENS:
            kept = kept[:-1]
        return ids, Message(
            "prompt_cut",
            'The text encoder takes {limit} tokens: the last {tokens} were cut, from "{start}" on.',
            limit=MAX_TEXT_TOKENS,
            tokens=len(words) - len(kept),
            start=tokenizer.decode(words[len(kept) :])[:60].strip(),
        )

    def templated_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt in Qwen's chat template, however many there are."""
        text = self._pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids: list[int] = self._pipe.tokenizer(text).input_ids
        return ids


class PromptUnit(ZImageUnit_PromptEmbedder):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's unit for the prompts, with our encoder."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self._encoder = encoder

    def process(self, pipe: StudioPipe, prompt: str, edit_image: None = None) -> dict[str, object]:
        """Return `prompt_embeds`, a list of one embedding, and `prompt_note`, which the models ignore."""
        encoded = self._encoder.encode(prompt)
        return {"prompt_embeds": [encoded.embedding], "prompt_note": encoded.note}
