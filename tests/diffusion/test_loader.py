"""Models read under a memory plan: the same images wherever parts wait, and what is done when memory runs out."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffsynth.core import ModelConfig
from diffsynth.core.vram.layers import AutoTorchModule
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from safetensors.torch import save_file

import mini.config
from core.errors import RequestError
from core.messages import Message
from core.request import Model
from diffusion import convert, host_memory, loader, memory
from diffusion.measure import Dtype
from diffusion.memory import Placement, Where, memory_plan
from diffusion.pipeline import Picture, Pipeline
from hub import gguf_header, inventory, packing
from tests.helpers import comfyui
from tests.helpers.layouts import (
    Tensors,
    in_comfyuis_names,
    in_fp8,
    in_llama_cpps_names,
    out_of_fp8,
    read,
    write_gguf,
)
from tests.helpers.plans import everything_stays, plan_with
from tests.helpers.sparse import official_shapes, write_sparse
from tests.helpers.workers import worker_of

ROOT = Path(__file__).parent.parent.parent


def draw(built: Pipeline, model: Model, mode: str = "generate") -> Picture:
    """Load what a mode needs, and draw two steps."""
    from PIL import Image

    mode_of_model = mode if model == "turbo" else "generate"
    chosen = inventory.choose("mini", mode_of_model, model)
    for _ in built.load(chosen, model):
        pass
    control = (Image.linear_gradient("L").resize((128, 128)).convert("RGB"), 0.8) if mode == "controlnet" else None
    drawing = built.text_to_image(
        prompt="a fox", negative_prompt="", steps=2, cfg=1.0, width=128, height=128, seed=3, control=control
    )
    while True:
        try:
            next(drawing)
        except StopIteration as done:
            picture: Picture = done.value
            return picture


class Plain:
    """Pictures as a pipeline draws them all of whose parts stay where they are used; each is drawn once."""

    def __init__(self) -> None:
        self.pipeline = Pipeline("cpu", torch.float32, everything_stays())
        self.drawn = functools.cache(lambda model, mode: draw(self.pipeline, model, mode))


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


@pytest.mark.parametrize(
    ("at", "held", "mapped"),
    [
        ("disk", "float32", False),
        ("host", "float32", False),
        ("device", "bfloat16", False),
        ("disk", "float32", True),
        ("device", "bfloat16", True),
    ],
)
def test_where_parts_wait_changes_no_image(plain: Plain, at: Where, held: Dtype, mapped: bool) -> None:
    # The miniature's weights are stored in bf16, so that holding them in it loses nothing.
    # Files are mapped on a processor, unless it stands for a card: DiffSynth reads them then.
    managed = Pipeline("cpu", torch.float32, plan_with(at, held), emulated=not mapped)
    models: tuple[tuple[Model, str], ...] = (
        ("turbo", "generate"),
        ("base", "generate"),
        ("turbo", "controlnet"),
        ("base", "generate"),
    )
    for model, mode in models:
        expected, found = plain.drawn(model, mode), draw(managed, model, mode)
        assert torch.equal(expected.latents, found.latents)
        assert expected.image.tobytes() == found.image.tobytes()
    assert managed.pipe.vram_management_enabled
    assert not plain.pipeline.pipe.vram_management_enabled
    assert not loader.is_managed(managed.pipe.vae_decoder)
    for transformer in managed.transformers.values():
        held_bytes = sum(weight.nbytes for weight in transformer.parameters() if not weight.is_meta)
        everything = sum(weight.nbytes for weight in plain.pipeline.transformers["turbo"].parameters())
        # From the disk, only what belongs to no layer is in memory between requests.
        assert held_bytes < everything / (50 if at == "disk" and not mapped else 1) + 1
        assert loader.lies_in_files(transformer) == mapped
        assert all(getattr(module, "state", 0) == 0 for module in transformer.modules())


@pytest.mark.parametrize(("dtype", "whole"), [("bfloat16", True), ("float32", False)])
def test_what_files_hold_as_it_is_used_is_mapped(dtype: Dtype, whole: bool) -> None:
    files = inventory.choose("mini", "generate", "turbo").files["turbo"]
    mapped = loader.map_weights(files, dtype, packing.stored(files))
    assert (mapped.held, mapped.whole) == (dtype, whole)
    assert {str(tensor.dtype) for tensor in mapped.tensors.values()} == {f"torch.{dtype}"}
    assert loader.map_weights(files, None, packing.stored(files)).held == "bfloat16"
    with safe_open(files[0], framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            assert torch.equal(mapped.tensors[name], opened.get_tensor(name).to(getattr(torch, dtype)))


def drawn_with(files: Mapping[str, Sequence[Path]], plan: memory.MemoryPlan | None = None, **how: Any) -> bytes:
    """Return the pixels that files of the miniature draw."""
    chosen = inventory.choose("mini", "generate", "turbo")
    chosen.files.update({part: tuple(paths) for part, paths in files.items()})
    built = Pipeline("cpu", torch.float32, plan or everything_stays(), **how)
    list(built.load(chosen, "turbo"))
    return draw(built, "turbo").image.tobytes()


@pytest.fixture(scope="module")
def miniature() -> dict[str, Path]:
    """The miniature's files by part."""
    files = inventory.choose("mini", "generate", "turbo").files
    return {part: files[part][0] for part in ("turbo", "text_encoder")}


@pytest.fixture(scope="module")
def usual(miniature: dict[str, Path]) -> bytes:
    """What the miniature draws."""
    return drawn_with({})


@pytest.mark.parametrize(
    ("at", "held", "emulated"),
    [("device", "float32", False), ("disk", "float32", False), ("device", "float32", True), ("disk", "float32", True)],
)
def test_a_transformer_in_comfyuis_names_draws_the_same_picture(
    at: Where, held: Dtype, emulated: bool, tmp_path: Path, miniature: dict[str, Path], usual: bytes
) -> None:
    file = tmp_path / "z_image_turbo_bf16.safetensors"
    save_file(in_comfyuis_names(read(miniature["turbo"]), "model.diffusion_model."), file)
    assert drawn_with({"turbo": [file]}, plan_with(at, held), emulated=emulated) == usual


def loaded(file: Path, part: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return the weights of a part of the miniature as they are read into its model."""
    mini.config.register()
    held: Dtype = "float32" if dtype == torch.float32 else "bfloat16"
    built = Pipeline("cpu", dtype, everything_stays(held, text_dtype=held))
    pool = loader.read(built.pipe, [file], part, built.plan)
    weights: Tensors = pool.model[0].state_dict()
    return weights


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("plain", torch.float8_e4m3fn),
        ("plain", torch.float8_e5m2),
        ("old", torch.float8_e4m3fn),
        ("marked", torch.float8_e5m2),
        ("rows", torch.float8_e4m3fn),
    ],
)
def test_fp8_is_widened_to_the_numbers_that_it_stands_for(
    part: str, way: str, dtype: torch.dtype, tmp_path: Path, miniature: dict[str, Path]
) -> None:
    own = read(miniature["turbo" if part == "transformer" else part])
    packed = in_fp8(in_comfyuis_names(own) if part == "transformer" else own, way, dtype)
    save_file(packed, tmp_path / "fp8.safetensors")
    save_file(out_of_fp8(packed), tmp_path / "bf16.safetensors")
    found = loaded(tmp_path / "fp8.safetensors", part, torch.bfloat16)
    assert_same(found, loaded(tmp_path / "bf16.safetensors", part, torch.bfloat16))
    for name, tensor in own.items():
        # fp8 has 3 or 2 bits behind the point; what is below its smallest number is lost where nothing scales it.
        error = (found[name].float() - tensor.float()).abs().max() / tensor.float().abs().max()
        assert error < 2 ** (-3 if dtype == torch.float8_e4m3fn else -2)


@pytest.mark.parametrize(("at", "emulated"), [("disk", False), ("disk", True)])
def test_a_managed_model_in_fp8_draws(
    at: Where, emulated: bool, tmp_path: Path, miniature: dict[str, Path], usual: bytes
) -> None:
    packed = in_fp8(in_comfyuis_names(read(miniature["turbo"])), "marked")
    save_file(packed, tmp_path / "fp8.safetensors")
    save_file(out_of_fp8(packed), tmp_path / "bf16.safetensors")
    expected = drawn_with({"turbo": [tmp_path / "bf16.safetensors"]})
    plan = plan_with(at, "bfloat16")
    assert drawn_with({"turbo": [tmp_path / "fp8.safetensors"]}, plan, emulated=emulated) == expected
    difference = np.frombuffer(expected, np.uint8).astype(float) - np.frombuffer(usual, np.uint8)
    assert 0 < np.abs(difference).mean() < 60  # another picture, and no noise


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("kind", ["BF16", "F32", "F16", "Q8_0"])
def test_gguf_is_widened_to_the_numbers_that_it_stands_for(
    part: str, kind: str, tmp_path: Path, miniature: dict[str, Path]
) -> None:
    of = GGMLQuantizationType[kind]
    own = read(miniature["turbo" if part == "transformer" else part])
    named = in_comfyuis_names(own) if part == "transformer" else in_llama_cpps_names(own)
    file = write_gguf(tmp_path / "a.gguf", named, of, "lumina2" if part == "transformer" else "qwen3")
    assert packing.stored([file]).title == {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}.get(kind, f"GGUF {kind}")
    expected = {name: tensor.float() for name, tensor in own.items()}
    if kind in ("F16", "Q8_0"):
        matrices = [name for name, tensor in own.items() if tensor.ndim == 2 and 1 not in tensor.shape]
        for name in matrices:
            expected[name] = torch.from_numpy(dequantize(quantize(expected[name].numpy(), of), of)).reshape(
                own[name].shape
            )
            assert (expected[name] - own[name].float()).abs().max() < own[name].float().abs().max() / 100
    assert_same(loaded(file, part), expected)


def test_packed_weights_are_refused_where_they_would_not_fit(
    tmp_path: Path, miniature: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that reads from the disk is one for little memory, and these take it all the same."""
    chosen = inventory.choose("mini", "generate", "turbo")
    built = Pipeline("cpu", torch.bfloat16, plan_with("disk", "bfloat16", other_transformer="stays"))
    for name in ("one", "two"):
        save_file(in_fp8(in_comfyuis_names(read(miniature["turbo"])), "marked"), tmp_path / f"{name}.safetensors")
    for name in ("one", "two"):
        chosen.files["turbo"] = (tmp_path / f"{name}.safetensors",)
        list(built.load(dataclasses.replace(chosen, checkpoint=name), "turbo"))
        assert len(built.transformers) == 1  # two would take twice what the check has seen
    assert isinstance(built.pipe.dit, torch.nn.Module)
    # A machine with less memory is not to be had.
    monkeypatch.setattr(host_memory, "total_and_free", lambda: (2_000_000, 1_000_000))
    built = Pipeline("cpu", torch.bfloat16, plan_with("disk", "bfloat16"))
    with pytest.raises(RequestError, match=r"^weights: 'two.safetensors' is not possible; .*bf16 or fp16.* 0.0 GB are"):
        list(built.load(chosen, "turbo"))
    chosen.files["turbo"] = (miniature["turbo"],)
    list(built.load(chosen, "turbo"))


def test_a_model_in_gguf_draws_the_same_picture(tmp_path: Path, miniature: dict[str, Path], usual: bytes) -> None:
    transformer, encoder = (
        in_comfyuis_names(read(miniature["turbo"])),
        in_llama_cpps_names(read(miniature["text_encoder"])),
    )
    halves = [dict(list(transformer.items())[:50]), dict(list(transformer.items())[50:])]  # as llama.cpp splits files
    files = {
        "turbo": [
            write_gguf(tmp_path / f"turbo-{number:05}-of-00002.gguf", half, GGMLQuantizationType.BF16, "lumina2")
            for number, half in enumerate(halves, 1)
        ],
        "text_encoder": [write_gguf(tmp_path / "encoder.gguf", encoder, GGMLQuantizationType.BF16, "qwen3")],
    }
    assert drawn_with(files, plan_with("disk", "bfloat16"), emulated=True) == usual


@pytest.mark.parametrize("kind", [kind for kind in gguf_header.KINDS.values() if kind.name not in gguf_header.PLAIN])
def test_every_packed_type_is_widened_in_pieces(
    kind: gguf_header.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = GGMLQuantizationType[kind.name]
    packed = np.random.default_rng(1).integers(0, 60, (3, 2 * kind.bytes), np.uint8)  # halves of fp16 that are small
    writer = GGUFWriter(tmp_path / "a.gguf", "lumina2")
    writer.add_tensor("a.weight", packed, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(convert, "GGUF_BLOCK", 5 * kind.numbers)
    files = [tmp_path / "a.gguf"]
    mapped = loader.map_weights(files, None, packing.stored(files))
    expected = torch.from_numpy(dequantize(packed, of))
    assert expected.shape == (3, 2 * kind.numbers)
    assert torch.equal(mapped.tensors["a.weight"], expected.bfloat16())
    assert (mapped.held, mapped.whole) == ("bfloat16", False)


def test_large_tensors_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scales = torch.randn(7, 5).to(torch.float8_e4m3fn), torch.rand(7, 1)
    for scale in (torch.tensor(0.3), scales, scales[:, 0]):
        whole = convert.scaled(packed, scale, torch.bfloat16)
        assert torch.equal(whole, (packed.float() * scale.reshape(-1, 1)).to(torch.bfloat16))
        with monkeypatch.context() as patch:
            patch.setattr(convert, "BLOCK", 10)
            assert torch.equal(convert.scaled(packed, scale, torch.bfloat16), whole)


def test_files_in_half_precision_of_another_kind_are_held_in_bf16(tmp_path: Path) -> None:
    half, most = tmp_path / "half.safetensors", tmp_path / "most.safetensors"
    save_file({"a": torch.ones(4, dtype=torch.float16), "b": torch.ones(1)}, half)
    mapped = loader.map_weights([half], None, packing.stored([half]))
    assert (mapped.held, mapped.whole) == ("bfloat16", False)
    save_file({"a": torch.ones(4), "b": torch.ones(1, dtype=torch.bfloat16)}, most)
    assert loader.map_weights([most], None, packing.stored([most])).held == "float32"


def test_a_mapped_transformer_is_kept_since_giving_it_up_frees_nothing() -> None:
    """As the official Base, whose files are in bf16, beside Turbo on a processor that computes in it."""
    built = Pipeline("cpu", torch.bfloat16, everything_stays("bfloat16", other_transformer="goes"))
    draw(built, "turbo")
    turbo = built.transformers["turbo"]
    draw(built, "base")
    assert built.transformers["turbo"] is turbo


def test_a_transformer_that_moves_aside_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card with room for one. There is no second device here, so that the moves are written down instead."""
    moves: list[tuple[str, str]] = []
    moved = torch.nn.Module.to

    def noted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        for model, transformer in built.transformers.items():
            if module is transformer:
                moves.append((model, args[0]))
        return moved(module, *args, **kwargs)

    built = Pipeline("cpu", torch.float32, everything_stays(other_transformer="moves"))
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    first = draw(built, "turbo")
    turbo = built.transformers["turbo"]
    draw(built, "base")
    del moves[:]
    monkeypatch.setattr(built, "_read", None)  # nothing is read any more
    again = draw(built, "turbo")
    assert built.transformers["turbo"] is turbo
    assert moves == [("base", "cpu"), ("turbo", built.pipe.device)]  # out of the way before the other comes
    assert again.image.tobytes() == first.image.tobytes()


def test_a_text_encoder_may_compute_in_another_dtype_than_the_transformer(plain: Plain) -> None:
    exact = plain.drawn("turbo", "generate")
    parts = {**everything_stays().parts, "text_encoder": Placement("device", "bfloat16")}
    built = Pipeline("cpu", torch.float32, everything_stays(parts=parts, text_dtype="bfloat16"))
    near = draw(built, "turbo")
    assert next(built.pipe.text_encoder.parameters()).dtype == torch.bfloat16
    assert not loader.is_managed(built.pipe.text_encoder)
    assert near.latents.dtype == torch.float32
    difference = np.asarray(near.image).astype(float) - np.asarray(exact.image).astype(float)
    assert 0 < np.abs(difference).mean() < 2


def test_positions_are_exact_whatever_dtype_weights_have() -> None:
    exact = draw_text_encoder("float32", None)
    for parts_at in (None, "disk"):
        assert torch.equal(draw_text_encoder("bfloat16", parts_at), exact)


def draw_text_encoder(dtype: Dtype, at: Where | None) -> torch.Tensor:
    """Return a text encoder's rotations, cosines in fp32, of 500 positions, however its weights are held."""
    plan = everything_stays(dtype) if at is None else plan_with(at, dtype, text_dtype=dtype, vae_dtype=dtype)
    built = Pipeline("cpu", getattr(torch, dtype), plan, emulated=at is not None)
    draw(built, "turbo")
    rotary = built.pipe.text_encoder.model.rotary_emb
    cosines: torch.Tensor = rotary(torch.ones(1), torch.arange(500)[None])[0]
    return cosines


def test_what_waits_in_the_hosts_memory_is_not_copied_back() -> None:
    built = Pipeline("cpu", torch.float32, plan_with("host", "bfloat16"), emulated=True)
    list(built.load(inventory.choose("mini", "generate", "turbo"), "turbo"))
    transformer = built.pipe.dit
    layers = [layer for layer in transformer.modules() if isinstance(layer, AutoTorchModule)]

    def places() -> list[tuple[int, torch.dtype]]:
        return [(values.data_ptr(), values.dtype) for layer in layers for values in layer.parameters()]

    waiting, numbers = places(), [values.clone() for values in transformer.parameters()]
    for layer in layers:  # another dtype stands for another device: layers are moved there in the same way
        layer.onload_dtype = torch.float32
    for _ in range(2):
        loader._each(transformer, "onload")
        assert {dtype for _, dtype in places()} == {torch.float32}
        loader.offload(transformer)
        assert places() == waiting
        assert all(layer.state == 0 for layer in layers)
    assert all(map(torch.equal, numbers, transformer.parameters()))


def test_a_lora_is_applied_to_a_managed_model(tmp_path: Path) -> None:
    import lora.file
    from tests.helpers import loras

    file = lora.file.read(loras.write(tmp_path / "one.safetensors", loras.peft(loras.random_pairs())))
    found = []
    for plan in (everything_stays(), plan_with("disk")):
        built = Pipeline("cpu", torch.float32, plan)
        bare = draw(built, "turbo")
        drawing = built.text_to_image(
            prompt="a fox", negative_prompt="", steps=2, cfg=1.0, width=128, height=128, seed=3
        )
        with built.lora(built.loras.get(file), 0.8):
            while True:
                try:
                    next(drawing)
                except StopIteration as done:
                    found.append(done.value.latents)
                    break
        assert not torch.equal(found[-1], bare.latents)
        assert torch.equal(draw(built, "turbo").latents, bare.latents)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("placement", "on", "gated", "states"),
    [
        (Placement("device", "bfloat16"), "cuda", False, None),
        (Placement("host", "bfloat16"), "cuda", True, ("cpu", "cpu", "cuda", "cuda")),
        (Placement("disk", "bfloat16"), "cuda", True, ("disk", "disk", "cuda", "cuda")),
        (Placement("disk", "bfloat16"), "mps", False, ("disk", "disk", "disk", "mps")),
    ],
)
def test_what_diffsynth_is_told(placement: Placement, on: str, gated: bool, states: tuple[str, ...] | None) -> None:
    """For devices that are not here: the very values that DiffSynth's management goes by."""
    config = ModelConfig(path="file.safetensors")
    loader.manage(config, placement, on, torch.bfloat16, gated)
    found = config.vram_config()
    if states is None:
        assert set(found.values()) == {None}  # not managed at all
        return
    names = ("offload", "onload", "preparing", "computation")
    assert tuple(found[f"{name}_device"] for name in names) == states
    dtypes = [found[f"{name}_dtype"] for name in names]
    assert dtypes == ["disk" if state == "disk" else torch.bfloat16 for state in states]


def test_apples_gpu_is_named_to_diffsynth_whose_own_default_is_the_cpu() -> None:
    built = Pipeline("mps", torch.bfloat16, memory_plan("mps", 24 * 10**9, None, 32 * 10**9, "generate"))
    assert (built.pipe.device, built.pipe.device_type, built.pipe.torch_dtype) == ("mps", "mps", torch.bfloat16)
    assert built.plan.vram_limit_gb is None  # DiffSynth would ask MPS for a figure that it does not have


def test_steps_compute_nothing_in_float64() -> None:
    """Apple's GPU has none; what is made once on the CPU, the position table, is made by the first step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    built = Pipeline("cpu", torch.float32, everything_stays())
    draw(built, "turbo")
    found: set[str] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        def __torch_dispatch__(
            self,
            function: Callable[..., object],
            types: Sequence[type],
            args: Sequence[object] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                # One number or a schedule of steps stays on the CPU; an image's tensors would not.
                if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.numel() > 64:
                    found.add(str(function))
            return result

    with Watch():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        draw(built, "turbo")
    assert not found


# --- running out of memory, for real

OUT_OF_MEMORY = """
import json, os, resource, sys
from core import environment
environment.prepare_environment(os.environ)
from engine import Engine, Settings
from core.events import Result
from core.request import TextToImage


def limit(spare):
    # What allocations may come to: what they do now, and a little more.
    lines = open("/proc/self/status").read().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + (spare << 20), resource.RLIM_INFINITY))


def run(**values):
    *_, last = engine.run(TextToImage(prompt="a fox", steps=2, seed=5, **values))
    notes = [note.code for note in last.notes] if isinstance(last, Result) else []
    found.append({"kind": type(last).__name__, "code": getattr(last, "code", ""), "notes": notes,
                  "text": getattr(last, "text", ""), "png": getattr(last, "png", b"").hex()})


engine, found = Engine(Settings(weights="mini", device="cpu")), []
run()
limit(int(sys.argv[1]))
run(**json.loads(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run()
print(json.dumps(found))
"""


def run_limited(spare: int, **values: str) -> list[dict[str, Any]]:
    """Draw an image; draw one with `values` and so many MiB to spare; draw the first again without a limit."""
    # What is freed goes back to the system at once, so that it counts again.
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(spare), json.dumps(values)]
    environ = {**os.environ, **freed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux alone")
def test_out_of_memory_is_a_failure_and_the_next_request_works(tmp_path: Path) -> None:
    from hub.naming import weight_shapes
    from tests.helpers import loras

    # A LoRA of 90 MB: more than is to spare, even with all models given up (some 30 MB).
    shapes = {name: shape for name, shape in weight_shapes("mini").items() if name in loras.random_pairs()}
    pairs = {name: (torch.randn(1024, columns), torch.randn(rows, 1024)) for name, (rows, columns) in shapes.items()}
    large = loras.write(tmp_path / "large.safetensors", loras.peft(pairs))
    first, failed, after = run_limited(4, lora=str(large))
    assert (failed["kind"], failed["code"]) == ("Failure", "out_of_memory"), failed["text"]
    assert "smaller width and height" in failed["text"]
    assert after["kind"] == "Result"
    assert after["png"] == first["png"]  # read from the disk now, and the same image


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux alone")
def test_where_memory_ends_a_tighter_plan_draws() -> None:
    # Base beside Turbo takes 20 MB and is too much; one layer at a time is not.
    first, tight, after = run_limited(12, model="base")
    assert tight["kind"] == "Result", tight["text"]
    assert "less_memory" in tight["notes"]
    assert "less_memory" not in first["notes"]
    assert after["png"] == first["png"]


@pytest.mark.parametrize(("space", "advice", "absent"), [("", "--memory", "owner"), ("me/it", "owner", "--memory")])
def test_a_machine_too_small_is_refused_before_anything_is_read(
    space: str, advice: str, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.events import Failure
    from core.request import TextToImage
    from engine import Engine, Settings

    if space:
        monkeypatch.setenv("SPACE_ID", space)
    full = inventory.Chosen("full", {}, "nowhere", Message("test", "a test"))
    engine = Engine(Settings(device="cpu", memory_gb=1))
    monkeypatch.setattr(engine.worker, "weights", lambda *_: full)  # no real weights on a test machine
    *_, last = engine.run(TextToImage.parse(prompt="a fox", seed=1))
    assert isinstance(last, Failure)
    assert last.code == "out_of_memory"
    assert "1 GB allowed" in last.text
    assert advice in last.text
    assert absent not in last.text


def test_the_page_shows_what_stays_in_memory() -> None:
    from core.request import TextToImage
    from engine import Engine
    from web.situation import Situation
    from web.words import weights_sentence

    engine = Engine()
    assert engine.memory_in_use() is None
    # As after the first picture with the real weights, which no test machine has.
    worker = worker_of(engine)
    worker.plan, worker.kind = memory_plan("cuda", 16 * 10**9, None, 64 * 10**9, "generate"), "full"
    line = weights_sentence(Situation.of(engine, TextToImage, "turbo"))
    assert "16 GB of video memory free" in line


def test_the_vae_may_compute_in_another_dtype_than_the_transformer() -> None:
    """As on Apple's GPU: bf16 with an fp32 VAE. Its control image and its latents are in the transformer's dtype."""
    plan = dataclasses.replace(plan_with("device", "bfloat16"), vae_dtype="float32")
    built = Pipeline("cpu", torch.bfloat16, plan)
    picture = draw(built, "turbo", "controlnet")
    assert picture.latents.dtype == torch.bfloat16
    assert {next(half.parameters()).dtype for half in (built.pipe.vae_encoder, built.pipe.vae_decoder)} == {
        torch.float32
    }
    assert built.pipe.vae_decoder(picture.latents).dtype == torch.float32
    assert not built.safe_mode_differs()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_full_size_files_load_within_the_smallest_plan() -> None:
    """Sparse files with the official names and shapes, 52 GB of them: found, recognised, and mapped from the disk."""
    command = [sys.executable, "bench/memory.py", "--device", "cpu", "--memory", "5", "--load-only"]
    done = subprocess.run(
        [*command, "--model", "both", "--mode", "controlnet"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    sizes = {**memory.PART_BYTES, "turbo": memory.PART_BYTES["transformer"], "base": memory.PART_BYTES["transformer"]}
    del sizes["transformer"]
    assert facts["loaded"] == sizes  # every number of every part has a place
    assert {part for part, placed in facts["plan"]["parts"].items() if placed["at"] == "disk"} == {
        "transformer",
        "text_encoder",
        "controlnet",
    }
    # The VAE in fp32, and the modules themselves: weights are mapped, those of 25 GB in fp32 and of 27 GB in bf16.
    assert facts["anonymous_peak"] - facts["anonymous_before_loading"] < 0.6e9


@pytest.mark.slow
def test_comfyuis_files_of_full_size_load(tmp_path: Path) -> None:
    """Sparse files: every number has a place, and none is copied on a processor that computes in bf16."""
    comfyui.write_folder(tmp_path / "ComfyUI" / "models")
    environ = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path)}
    found = {one.part.name: one.files for one in inventory.find_all(environ) if one.present}
    found["tokenizer"] = inventory.choose("mini", "generate", "turbo").files["tokenizer"]
    chosen = inventory.Chosen("full", found, "a test", Message("test", "a test"))
    plan = memory_plan("cpu", 64 << 30, None, 64 << 30, "controlnet", dtype="bfloat16")
    built = Pipeline("cpu", torch.bfloat16, plan)
    list(built.load(chosen, "turbo"))
    models = {
        "text_encoder": built.pipe.text_encoder,
        "transformer": built.pipe.dit,
        "controlnet": built.pipe.controlnet,
    }
    for part, model in models.items():
        assert 2 * sum(weight.numel() for weight in model.parameters()) == memory.PART_BYTES[part]
        assert loader.lies_in_files(model)
    assert {weight.dtype for weight in built.pipe.vae_decoder.parameters()} == {torch.bfloat16}
    small = tmp_path / "Z-Image-Turbo-Fun-Controlnet-Union-2.1-lite-2602-8steps.safetensors"
    write_sparse(small, official_shapes("controlnet_lite"))
    built.pipe.controlnet = None
    chosen.files["controlnet"] = (small,)
    list(built.load(chosen, "turbo"))
    assert built.pipe.controlnet.control_layers_mapping == {0: 0, 10: 1, 20: 2}
    assert loader.lies_in_files(built.pipe.controlnet)


def test_a_seeds_noise_is_drawn_in_fp32_whatever_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = loader.StudioPipe(device="cpu", torch_dtype=torch.bfloat16)
    shape, drawn, randn = (1, 16, 8, 8), [], torch.randn

    def noted(*given: Any, **options: Any) -> torch.Tensor:
        drawn.append(options["dtype"])
        return randn(*given, **options)

    monkeypatch.setattr(torch, "randn", noted)
    noise = pipe.generate_noise(shape, seed=7, rand_device="cpu", rand_torch_dtype=torch.bfloat16)
    assert drawn == [torch.float32]  # in bf16, torch 2.11 and 2.14 draw different numbers
    assert torch.equal(noise, randn(shape, generator=torch.Generator("cpu").manual_seed(7)).bfloat16())
