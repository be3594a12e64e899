"""The command line where the miniature's files pass for the real weights: `python tests/helpers/small_models.py serve`.

The registry of parts is the real one, but for the hashes by which files are recognised; everything else is the program.
`repositories` is what a hub has then.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:  # started as a script, Python looks beside it alone
    sys.path.insert(0, str(ROOT))

from hub import checkpoint, parts

MINI = parts.MINI_ROOT / "Z-Image-Turbo"
FILES = {
    "turbo": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def repositories() -> dict[str, dict[str, bytes]]:
    """Return what a hub has of these weights, in both editions: repository -> file name -> content."""
    from safetensors.torch import save

    from tests.helpers.layouts import in_comfyuis_names, read

    official = {
        path.relative_to(MINI).as_posix(): path.read_bytes() for path in sorted(MINI.rglob("*")) if path.is_file()
    }
    again = {part: parts.PARTS[part].in_edition("repackaged") for part in FILES}
    repackaged = {again[part].pattern: official[file] for part, file in FILES.items()}
    repackaged[again["turbo"].pattern] = save(in_comfyuis_names(read(MINI / FILES["turbo"])))
    return {parts.PARTS["turbo"].repo: official, again["turbo"].repo: repackaged}


def let_the_miniature_pass() -> None:
    """Change the registry; to be called before what looks at it is imported."""
    registry = parts.PARTS
    assert isinstance(registry, dict)
    for part, file in FILES.items():
        registry[part] = replace(registry[part], hash=checkpoint.hash_of(checkpoint.read_header(MINI / file).shapes))


if __name__ == "__main__":
    let_the_miniature_pass()
    import cli
    from core import environment
    from mini import config

    if "serve" not in sys.argv:  # there, the miniature draws first, and is known to DiffSynth from then on
        environment.prepare_environment()
        config.register()
    sys.exit(cli.main(sys.argv[1:]))
