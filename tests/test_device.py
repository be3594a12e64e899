"""The choice of device and dtype, the memory plan, the environment, and the host's memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import device
from device import GIB, Accelerator, MemoryPlan, decide, memory_plan
from errors import RequestError

ROOT = Path(__file__).parent.parent

HOPPER = Accelerator("cuda", "H100", 80 * GIB, 79 * GIB, (9, 0))
AMPERE = Accelerator("cuda", "RTX 3060", 12 * GIB, 11 * GIB, (8, 6))
TURING = Accelerator("cuda", "RTX 2080 Ti", 11 * GIB, 10 * GIB, (7, 5))
APPLE = Accelerator("mps", "Apple GPU", 48 * GIB, 48 * GIB)
CPU = Accelerator("cpu", "x86_64 CPU, 8 cores", 32 * GIB, 20 * GIB)


@pytest.mark.parametrize(
    ("asked", "present", "kind", "dtype"),
    [
        ("auto", [HOPPER, CPU], "cuda", "bfloat16"),
        ("auto", [AMPERE, CPU], "cuda", "bfloat16"),
        ("auto", [TURING, CPU], "cuda", "float32"),
        ("auto", [APPLE, CPU], "mps", "bfloat16"),
        ("auto", [CPU], "cpu", "float32"),
        ("cpu", [HOPPER, CPU], "cpu", "float32"),
        ("mps", [APPLE, CPU], "mps", "bfloat16"),
    ],
)
def test_device_and_dtype(asked: str, present: list[Accelerator], kind: str, dtype: str) -> None:
    chosen = decide(asked, present)
    assert (chosen.kind, chosen.dtype) == (kind, dtype)
    one = next(one for one in present if one.kind == kind)
    assert (chosen.name, chosen.total_bytes, chosen.free_bytes) == (one.name, one.total_bytes, one.free_bytes)


def test_the_reason_names_device_and_dtype() -> None:
    assert "fp16 overflows" in decide("auto", [APPLE, CPU]).reason
    assert "compute capability 7.5 has no bf16" in decide("auto", [TURING, CPU]).reason
    assert "as asked" in decide("cpu", [HOPPER, CPU]).reason
    assert "neither a CUDA card nor" in decide("auto", [CPU]).reason


@pytest.mark.parametrize("asked", ["cuda", "mps", "tpu", ""])
def test_a_device_that_is_not_there_is_refused_with_what_is(asked: str) -> None:
    with pytest.raises(RequestError) as raised:
        decide(asked, [CPU])
    assert raised.value.values["field"] == "device"
    assert raised.value.values["allowed"] == "auto, cpu on this machine"


def test_this_machine_has_a_device() -> None:
    chosen = device.choose_device("cpu")
    assert (chosen.kind, chosen.dtype) == ("cpu", "float32")
    assert chosen.total_bytes is not None and chosen.free_bytes is not None
    assert 0 < chosen.free_bytes <= chosen.total_bytes


# --- memory plans


def card(gigabytes: int, mode: str = "generate", host: int = 64, dtype: device.Dtype | None = None) -> MemoryPlan:
    """Plan for a card sold as so many GB, of which a driver takes a little, in a machine with so many GB."""
    total = int(gigabytes * GIB * 0.985)
    return memory_plan("cuda", total, total - 300_000_000, host * GIB, mode, dtype=dtype)


ALL = ("transformer", "text_encoder", "vae")


@pytest.mark.parametrize(
    ("gigabytes", "mode", "resident", "both", "offload"),
    [
        (8, "generate", ("vae",), True, True),
        (12, "generate", ("vae",), True, True),
        (16, "generate", ("transformer", "vae"), True, True),
        (24, "generate", ALL, False, False),
        (24, "controlnet", ALL, True, True),
        (32, "controlnet", (*ALL, "controlnet"), False, False),
        (40, "generate", ALL, True, False),
        (48, "generate", ALL, True, False),
        (48, "controlnet", (*ALL, "controlnet"), True, False),
        (80, "upscale", ALL, True, False),
        (141, "generate", ALL, True, False),
    ],
)
def test_plans_for_cards(gigabytes: int, mode: str, resident: tuple[str, ...], both: bool, offload: bool) -> None:
    plan = card(gigabytes, mode)
    assert (plan.resident, plan.keep_both_transformers, plan.offload, plan.fits) == (resident, both, offload, True)
    # DiffSynth's limit belongs to its management, counts in GiB, and stays below the card.
    assert (plan.vram_limit_gb is not None) == offload
    if plan.vram_limit_gb is not None:
        assert gigabytes - 1.5 < plan.vram_limit_gb < gigabytes
    assert any("ControlNet" in reason for reason in plan.reasons) == (mode == "controlnet")


def test_what_is_planned_resident_leaves_headroom() -> None:
    for gigabytes in range(8, 150):
        for mode in ("generate", "controlnet"):
            plan = card(gigabytes, mode)
            held = sum(device.SIZES[part] for part in plan.resident)
            if plan.keep_both_transformers and not plan.offload:
                held += device.SIZES["transformer"]
            assert held + device.HEADROOM <= gigabytes * GIB * 0.985 - 300_000_000


def test_memory_that_others_hold_counts() -> None:
    busy = memory_plan("cuda", 24 * GIB, 12 * GIB, 64 * GIB, "generate")
    assert busy.offload
    assert busy.vram_limit_gb == 11.5


def test_a_small_host_keeps_one_transformer_and_a_tiny_one_is_told_so() -> None:
    assert not card(12, host=24).keep_both_transformers
    assert card(12, host=24).fits
    tiny = card(12, host=16)
    assert not tiny.fits
    assert "GB of host memory" in tiny.reasons[-1]


def test_a_card_below_the_floor_is_told_so() -> None:
    plan = card(6)
    assert not plan.fits
    assert "below the 8 GB" in plan.reasons[-1]


def test_weights_in_fp32_take_twice_the_room() -> None:
    assert not card(24, dtype="bfloat16").offload
    assert card(24, dtype="float32").offload
    assert card(48, dtype="float32").resident == ALL


@pytest.mark.parametrize(
    ("gigabytes", "both", "fits"), [(8, False, False), (24, False, False), (48, False, True), (128, True, True)]
)
def test_plans_for_cpus(gigabytes: int, both: bool, fits: bool) -> None:
    plan = memory_plan("cpu", gigabytes * GIB, gigabytes * GIB // 2, gigabytes * GIB, "generate")
    assert (plan.resident, plan.keep_both_transformers, plan.fits) == (ALL, both, fits)
    assert (plan.offload, plan.vram_limit_gb) == (False, None)  # DiffSynth's management crashes on a CPU
    assert ("run out of memory" in plan.reasons[-1]) != fits


@pytest.mark.parametrize(("gigabytes", "both", "fits"), [(12, False, False), (24, False, True), (48, True, True)])
def test_plans_for_apple(gigabytes: int, both: bool, fits: bool) -> None:
    plan = memory_plan("mps", gigabytes * GIB, None, gigabytes * GIB * 4 // 3, "generate")
    assert (plan.keep_both_transformers, plan.fits) == (both, fits)
    assert (plan.offload, plan.vram_limit_gb) == (False, None)  # no mem_get_info there


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_the_miniature_needs_no_plan(kind: device.Kind) -> None:
    plan = memory_plan(kind, 2 * GIB, GIB, 4 * GIB, "controlnet", "mini")
    assert plan.resident == (*ALL, "controlnet")
    assert plan.keep_both_transformers and plan.fits
    assert (plan.offload, plan.vram_limit_gb, plan.tiled_vae_above) == (False, None, device.TILED_AT_MOST)


def test_the_vae_is_tiled_earlier_on_smaller_cards() -> None:
    above = [card(gigabytes).tiled_vae_above for gigabytes in (24, 28, 32)]
    assert device.TILED_AT_LEAST <= above[0] < above[1] < above[2]
    assert card(141).tiled_vae_above == device.TILED_AT_MOST
    assert memory_plan("cpu", 8 * GIB, GIB, 8 * GIB, "generate").tiled_vae_above == device.TILED_AT_LEAST


def test_the_sizes_are_those_of_the_models() -> None:
    import math

    from sparse import official_shapes

    for part, size in device.SIZES.items():
        shapes = official_shapes("turbo" if part == "transformer" else part)
        assert sum(math.prod(shape) for shape in shapes.values()) * 2 == size


# --- environment


def test_the_environment_is_completed_and_not_overruled() -> None:
    environ = {"DIFFSYNTH_ATTENTION_IMPLEMENTATION": "flash_attention_2", "PATH": "/bin"}
    added = device.prepare_environment(environ)
    assert environ["DIFFSYNTH_ATTENTION_IMPLEMENTATION"] == "flash_attention_2"
    assert environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environ["DIFFSYNTH_DOWNLOAD_SOURCE"] == "huggingface"
    assert set(added) == set(device.ENVIRONMENT) - {"DIFFSYNTH_ATTENTION_IMPLEMENTATION"}
    assert device.prepare_environment(environ) == {}


def test_diffsynth_uses_torchs_attention_whatever_else_is_installed(tmp_path: Path) -> None:
    # A package that DiffSynth would prefer to SDPA, so that its own choice differs from ours.
    (tmp_path / "sageattention.py").write_text("def sageattn(*args, **kwargs): raise AssertionError\n")
    code = """
import os, device
device.prepare_environment(os.environ)
from diffsynth.core.attention import attention
import torch
print(attention.ATTENTION_IMPLEMENTATION)
q, k, v = torch.randn(3, 1, 2, 8, 4)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
print(torch.equal(attention.attention_forward(q, k, v, *["b n s d"] * 4), expected))
del os.environ["DIFFSYNTH_ATTENTION_IMPLEMENTATION"]
print(attention.initialize_attention_priority())
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DIFFSYNTH_")}
    environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "True", "sage_attention"]


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, device; print('torch' in sys.modules or 'psutil' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- host memory


def test_host_memory_is_plausible() -> None:
    total, available = device.host_memory()
    assert 0 < available <= total


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    # Version 2, as in a Docker container: the mount is the container's own group.
    mount = tmp_path / "v2"
    write(tmp_path / "v2.cgroup", "0::/\n")
    write(mount / "memory.max", f"{8 * GIB}\n")
    write(mount / "memory.current", f"{5 * GIB}\n")
    write(mount / "memory.stat", f"anon {2 * GIB}\ninactive_file {3 * GIB}\n")
    assert device.cgroup_memory(mount, tmp_path / "v2.cgroup") == (8 * GIB, 2 * GIB)


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/user.slice/app.scope\n")
    write(tmp_path / "m" / "user.slice" / "memory.max", f"{4 * GIB}\n")
    write(tmp_path / "m" / "user.slice" / "memory.current", f"{GIB}\n")
    write(tmp_path / "m" / "user.slice" / "app.scope" / "memory.max", "max\n")
    write(tmp_path / "m" / "user.slice" / "app.scope" / "memory.current", f"{GIB}\n")
    assert device.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (4 * GIB, GIB)


def test_the_older_control_groups_count_too(tmp_path: Path) -> None:
    # The path is the host's and not visible here: the mounted root holds the container's own numbers.
    write(tmp_path / "cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    write(tmp_path / "m" / "memory" / "memory.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path / "m" / "memory" / "memory.usage_in_bytes", f"{GIB}\n")
    write(tmp_path / "m" / "memory" / "memory.stat", "cache 0\ntotal_inactive_file 1024\n")
    assert device.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (2 * GIB, GIB - 1024)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert device.cgroup_memory(tmp_path / "none", tmp_path / "none.cgroup") == (None, 0)
    write(tmp_path / "cgroup", "0::/\n")
    write(tmp_path / "m" / "memory.max", "max\n")
    assert device.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (None, 0)


def test_copies_for_a_lora_take_only_what_the_plan_leaves() -> None:
    copies = {
        gigabytes: device.memory_plan("cuda", gigabytes * 10**9, None, 64 * 10**9, "generate").lora_copies
        for gigabytes in (12, 24, 48, 80)
    }
    assert copies[12] == 0  # streamed: hooks
    assert copies[24] < copies[48] < device.SIZES["transformer"] < copies[80]
    assert device.memory_plan("cpu", None, None, 8 * 10**9, "generate", "mini").lora_copies > 10**8
