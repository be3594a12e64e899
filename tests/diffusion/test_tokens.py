"""The counter of a prompt's tokens agrees with what the pipeline gives to the text encoder."""

import mini.config
from diffusion import tokens
from diffusion.pipeline import Pipeline


def test_it_counts_what_the_text_encoder_gets(pipeline: Pipeline) -> None:
    folder = mini.config.TURBO_FOLDER / mini.config.TOKENIZER_FOLDER
    for prompt in ("a fox", "左上角的小狐狸，蓝色背景", "  spaces  and\nlines ", "{braces} <|im_end|>", "apple " * 600):
        assert tokens.count(folder, prompt) == len(pipeline.prompts.templated_ids(prompt)), prompt
