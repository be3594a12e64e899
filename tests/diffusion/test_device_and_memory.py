"""The choice of device and dtype, the memory plan, the environment, and the host's memory."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from core import environment
from core.errors import RequestError
from core.messages import Message
from diffusion import device, host_memory, memory
from diffusion.device import Accelerator, decide
from diffusion.measure import Dtype
from diffusion.memory import GIB, MemoryPlan, memory_plan

ROOT = Path(__file__).parent.parent.parent

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
    expected = next(accelerator for accelerator in present if accelerator.kind == kind)
    assert (chosen.name, chosen.total_bytes, chosen.free_bytes) == (
        expected.name,
        expected.total_bytes,
        expected.free_bytes,
    )


def test_the_reason_names_device_and_dtype() -> None:
    assert "fp16 overflows" in str(decide("auto", [APPLE, CPU]).reason)
    assert "compute capability 7.5 has no bf16" in str(decide("auto", [TURING, CPU]).reason)
    assert "as asked" in str(decide("cpu", [HOPPER, CPU]).reason)
    assert "neither a CUDA card nor" in str(decide("auto", [CPU]).reason)


@pytest.mark.parametrize("asked", ["cuda", "mps", "tpu", ""])
def test_a_device_that_is_not_there_is_refused_with_what_is(asked: str) -> None:
    with pytest.raises(RequestError) as raised:
        decide(asked, [CPU])
    assert raised.value.values["field"] == "device"
    assert raised.value.values["allowed"] == Message("devices", "{names} on this machine", names=["auto", "cpu"])
    assert "allowed: auto, cpu on this machine" in str(raised.value)


def test_this_machine_has_a_device() -> None:
    chosen = device.choose_device("cpu", "mini")
    assert (chosen.kind, chosen.dtype) == ("cpu", "float32")
    assert chosen.total_bytes is not None
    assert chosen.free_bytes is not None
    assert 0 < chosen.free_bytes <= chosen.total_bytes


# --- memory plans


def card(gigabytes: int, mode: str = "generate", host: int = 64, dtype: Dtype | None = None) -> MemoryPlan:
    """Plan for a card sold as so many GB, of which a driver takes a little, in a machine with so many GB."""
    total = int(gigabytes * GIB * 0.985)
    return memory_plan("cuda", total, total - 300_000_000, host * GIB, mode, dtype=dtype)


def where(plan: MemoryPlan) -> str:
    """Say where transformer, text encoder and ControlNet wait: d(evice), h(ost) or on (dis)k."""
    letters = {"device": "d", "host": "h", "disk": "k"}
    names = ("transformer", "text_encoder", "controlnet")
    return "".join(letters[plan.parts[name].at] for name in names if name in plan.parts)


ALL = ("transformer", "text_encoder", "vae")


@pytest.mark.parametrize(
    ("gigabytes", "host", "mode", "waits", "other"),
    [
        (6, 8, "generate", "kk", "stays"),
        (6, 16, "generate", "kk", "stays"),
        (6, 32, "generate", "hh", "goes"),
        (6, 64, "generate", "hh", "stays"),
        (8, 16, "controlnet", "kkk", "stays"),
        (8, 32, "generate", "hh", "goes"),
        (8, 64, "controlnet", "hhh", "stays"),
        (12, 64, "generate", "hh", "stays"),
        (12, 256, "controlnet", "hhh", "stays"),
        (16, 8, "generate", "dk", "goes"),
        (16, 64, "generate", "dh", "moves"),
        (16, 64, "controlnet", "dhh", "moves"),
        (24, 8, "generate", "dd", "goes"),
        (24, 64, "controlnet", "dhd", "moves"),
        (24, 8, "controlnet", "dkd", "goes"),
        (32, 64, "controlnet", "ddd", "moves"),
        (40, 64, "generate", "dd", "stays"),
        (48, 64, "controlnet", "ddd", "stays"),
        (80, 64, "upscale", "dd", "stays"),
        (141, 256, "controlnet", "ddd", "stays"),
    ],
)
def test_plans_for_cards(gigabytes: int, host: int, mode: str, waits: str, other: str) -> None:
    plan = card(gigabytes, mode, host)
    assert (where(plan), plan.other_transformer, plan.fits) == (waits, other, True)
    assert plan.parts["vae"].at == "device"  # never managed: small, and DiffSynth asks for it by a wrong name
    # DiffSynth's limit belongs to its management, counts in GiB, and stays below the card.
    assert (plan.vram_limit_gb is not None) == plan.offload
    if plan.vram_limit_gb is not None:
        assert gigabytes - 1.5 < plan.vram_limit_gb < gigabytes
    assert any("ControlNet" in str(reason) for reason in plan.reasons) == (mode == "controlnet")
    assert any("on the disk" in str(reason) for reason in plan.reasons) == ("k" in waits)


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
@pytest.mark.parametrize(
    ("gigabytes", "host", "mode", "waits", "held", "other"),
    [
        (6, 16, "generate", "kk", "bfloat16", "stays"),
        (8, 64, "controlnet", "hhh", "bfloat16", "stays"),
        (11, 32, "generate", "hh", "bfloat16", "goes"),
        (16, 64, "controlnet", "dhh", "bfloat16", "goes"),
        (24, 64, "generate", "dd", "bfloat16", "goes"),
        (24, 64, "controlnet", "dhd", "bfloat16", "goes"),
        (32, 8, "controlnet", "ddd", "bfloat16", "goes"),
        (48, 64, "generate", "dd", "float32", "moves"),
        (80, 256, "controlnet", "ddd", "float32", "stays"),
    ],
)
def test_plans_for_cards_without_bf16(
    capability: tuple[int, int], gigabytes: int, host: int, mode: str, waits: str, held: str, other: str
) -> None:
    on = decide("auto", [Accelerator("cuda", "an old card", gigabytes * GIB, None, capability), CPU])
    plan = card(gigabytes, mode, host, on.dtype)
    assert (where(plan), plan.parts["transformer"].held) == (waits, held)
    assert (plan.other_transformer, plan.fits, plan.vae_dtype) == (other, True, "float32")


def test_no_plan_promises_more_than_there_is() -> None:
    """Every kind of device, 6 to 141 GB, in machines of 8 to 256 GB, every mode and dtype."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    for gigabytes, host, mode, dtype in itertools.product(
        range(6, 142), (8, 16, 24, 32, 48, 64, 256), ("generate", "controlnet", "upscale"), dtypes
    ):
        room = int(gigabytes * GIB * 0.985) - 300_000_000
        for kind in ("cuda", "mps", "cpu"):
            plan = memory_plan(kind, gigabytes * GIB, room, host * GIB, mode, dtype=dtype)
            assert plan.fits
            assert plan.resident_bytes + memory.HEADROOM[dtype] <= plan.room == room
            waiting = sum(memory.PART_BYTES[part] for part, placed in plan.parts.items() if placed.at == "host")
            if plan.other_transformer == "moves" or (
                plan.other_transformer == "stays" and plan.parts["transformer"].at == "host"
            ):
                waiting += memory.PART_BYTES["transformer"]
            assert not waiting or (kind == "cuda" and waiting + memory.HOST_RESERVE <= host * GIB)
            assert (plan.vram_limit_gb is not None) == (kind == "cuda" and plan.offload)
            assert str(plan.reasons[0]).startswith(f"{room / 1e9:.0f} GB ")


def test_memory_that_others_hold_counts() -> None:
    busy = memory_plan("cuda", 24 * GIB, 12 * GIB, 64 * GIB, "generate")
    assert busy.offload
    # What DiffSynth compares with this is all that is taken on the card, by others too: the card may be full but for
    # the margin.
    assert busy.vram_limit_gb == 23.2  # 0.5 is kept free, and a layer of 0.33


def test_a_card_below_the_floor_is_warned_of_and_may_try() -> None:
    plan = card(6)
    assert plan.fits
    assert "below the 8 GB" in str(plan.reasons[-1])
    assert not card(3).fits
    assert "expect to run out of memory" in str(card(3).reasons[-1])


def test_what_computes_in_fp32_holds_bf16_where_fp32_does_not_fit() -> None:
    held = {gigabytes: card(gigabytes, dtype="float32").parts["transformer"].held for gigabytes in (24, 48, 80)}
    assert held == {24: "bfloat16", 48: "float32", 80: "float32"}
    plan = card(24, dtype="float32")
    assert not plan.offload
    assert plan.lora_copies == 0  # a LoRA's changed copies would be of weights in another dtype than is computed in
    assert "held in bf16 and computed in fp32" in str(plan.reasons[0])


@pytest.mark.parametrize(
    ("gigabytes", "waits", "held", "other", "fits"),
    [
        (2, "kk", "bfloat16", "stays", False),
        (8, "kk", "bfloat16", "stays", True),
        (16, "dk", "bfloat16", "goes", True),
        (24, "dk", "bfloat16", "goes", True),
        (40, "dk", "bfloat16", "stays", True),
        (64, "dk", "float32", "stays", True),
        (128, "dk", "float32", "stays", True),
        (256, "dk", "float32", "stays", True),
    ],
)
def test_plans_for_cpus(gigabytes: int, waits: str, held: str, other: str, fits: bool) -> None:
    total = gigabytes * GIB
    plan = memory_plan("cpu", total, total - total // 20, total, "generate")
    assert (where(plan), plan.parts["transformer"].held, plan.other_transformer) == (waits, held, other)
    assert plan.fits == fits
    assert plan.vram_limit_gb is None  # torch.cpu has no mem_get_info
    assert ("run out of memory" in str(plan.reasons[-1])) != fits
    assert (plan.vae_dtype, plan.parts["vae"].held) == ("float32", "float32")


@pytest.mark.parametrize(
    ("gigabytes", "mode", "waits", "other"),
    [
        (6, "generate", "kk", "stays"),
        (16, "generate", "dk", "goes"),
        (24, "generate", "dd", "goes"),
        (36, "generate", "dd", "stays"),
        (24, "controlnet", "dkd", "goes"),
        (96, "controlnet", "ddd", "stays"),
    ],
)
def test_plans_for_apple(gigabytes: int, mode: str, waits: str, other: str) -> None:
    plan = memory_plan("mps", gigabytes * GIB, None, gigabytes * GIB * 4 // 3, mode)
    assert (where(plan), plan.other_transformer, plan.fits) == (waits, other, True)
    assert plan.vram_limit_gb is None  # no mem_get_info there; and its memory is the host's, so nothing waits in it
    assert plan.parts["transformer"].held == "bfloat16"
    assert plan.vae_dtype == "float32"  # half precision has made black images there


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_the_miniature_needs_no_plan(kind: device.DeviceKind) -> None:
    plan = memory_plan(kind, 2 * GIB, GIB, 4 * GIB, "controlnet", "mini")
    assert set(plan.resident) == {*ALL, "controlnet"}
    assert plan.other_transformer == "stays"
    assert plan.fits
    assert (plan.offload, plan.vram_limit_gb, plan.tiled_vae_above) == (False, None, memory.TILED_AT_MOST)


def test_the_vae_is_tiled_earlier_on_smaller_cards() -> None:
    above = [card(gigabytes).tiled_vae_above for gigabytes in (24, 28, 32)]
    assert memory.TILED_AT_LEAST <= above[0] < above[1] < above[2]
    assert card(141).tiled_vae_above == memory.TILED_AT_MOST


def test_the_users_limit_on_memory_counts() -> None:
    total = 24 * GIB
    less = memory_plan("cuda", total, total, 64 * GIB, "generate", allowed=12 * 10**9)
    more = memory_plan("cuda", total, total, 64 * GIB, "generate", allowed=48 * 10**9)
    assert (where(less), where(more)) == ("hh", "dd")
    assert str(less.reasons[0]).startswith("12 GB allowed")
    assert less.vram_limit_gb == round(12 * 10**9 / GIB - 0.83, 1)
    assert more.other_transformer == "stays"


@pytest.mark.parametrize("given", ["0", "-3", "much", "nan", "inf"])
def test_memory_that_is_no_number_is_refused(given: str) -> None:
    with pytest.raises(RequestError) as raised:
        memory.plan_for(device.choose_device("cpu", "mini"), "generate", "full", memory_gb=given)
    assert raised.value.values["field"] == "memory"


def test_memory_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    on = device.choose_device("cpu", "mini")
    monkeypatch.setenv("Z_IMAGE_MEMORY", "17")
    assert memory.plan_for(on, "generate", "full").room == 17 * 10**9
    assert memory.plan_for(on, "generate", "full", memory_gb=5).room == 5 * 10**9


@pytest.mark.parametrize("gigabytes", [6, 16, 24, 48, 141])
def test_each_tighter_plan_takes_less_until_the_tightest(gigabytes: int) -> None:
    total = gigabytes * GIB
    plans = [memory_plan("cuda", total, None, 64 * GIB, "controlnet", tighter=tighter) for tighter in range(9)]
    taken = [plan.resident_bytes for plan in plans]
    assert taken == sorted(taken, reverse=True)
    last = next(index for index, plan in enumerate(plans) if plan.tightest)
    assert last >= 1  # there is always something to give up: at least the VAE works in tiles
    assert where(plans[last]) == "hhh"
    assert all(plan.tiled_vae_above == memory.TILED_AT_LEAST and plan.lora_copies == 0 for plan in plans[1:])
    assert "did not suffice" in str(plans[1].reasons[1])


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_failures(error: Exception, is_memory: bool) -> None:
    assert memory.is_out_of_memory(error) == is_memory


def test_torchs_own_allocator_is_understood() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(raised.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_the_sizes_are_those_of_the_models() -> None:
    import math

    from tests.helpers.sparse import official_shapes

    for part, size in memory.PART_BYTES.items():
        shapes = official_shapes("turbo" if part == "transformer" else part)
        assert sum(math.prod(shape) for shape in shapes.values()) * 2 == size


# --- environment


def test_the_environment_is_completed_and_not_overruled() -> None:
    environ = {"DIFFSYNTH_ATTENTION_IMPLEMENTATION": "flash_attention_2", "PATH": "/bin"}
    added = environment.prepare_environment(environ)
    assert environ["DIFFSYNTH_ATTENTION_IMPLEMENTATION"] == "flash_attention_2"
    assert environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environ["DIFFSYNTH_DOWNLOAD_SOURCE"] == "huggingface"
    assert set(added) == set(environment.ENVIRONMENT) - {"DIFFSYNTH_ATTENTION_IMPLEMENTATION"}
    assert environment.prepare_environment(environ) == {}


@pytest.mark.parametrize("arguments", [["generate", "apple", "--steps", "1", "--device", "cpu"], ["doctor"]])
def test_the_environment_is_there_before_torch_is_imported(arguments: list[str], tmp_path: Path) -> None:
    code = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch after", os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"), file=sys.stderr, flush=True)
            os._exit(0)  # what comes then takes seconds, and shows nothing more

sys.meta_path.insert(0, Watch())
import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    environ = {name: value for name, value in os.environ.items() if name not in environment.ENVIRONMENT}
    command = [sys.executable, "-c", code, *arguments]
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch after 1\n" in done.stderr


def test_diffsynth_uses_torchs_attention_whatever_else_is_installed(tmp_path: Path) -> None:
    # A package that DiffSynth would prefer to SDPA, so that its own choice differs from ours.
    (tmp_path / "sageattention.py").write_text("def sageattn(*args, **kwargs): raise AssertionError\n")
    code = """
import os
from core import environment
environment.prepare_environment(os.environ)
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
    code = "import sys, diffusion.device; print('torch' in sys.modules or 'psutil' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- host memory


def test_host_memory_is_plausible() -> None:
    total, available = host_memory.total_and_free()
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
    assert host_memory.cgroup_memory(mount, tmp_path / "v2.cgroup") == (8 * GIB, 2 * GIB)


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/user.slice/app.scope\n")
    write(tmp_path / "m" / "user.slice" / "memory.max", f"{4 * GIB}\n")
    write(tmp_path / "m" / "user.slice" / "memory.current", f"{GIB}\n")
    write(tmp_path / "m" / "user.slice" / "app.scope" / "memory.max", "max\n")
    write(tmp_path / "m" / "user.slice" / "app.scope" / "memory.current", f"{GIB}\n")
    assert host_memory.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (4 * GIB, GIB)


def test_the_older_control_groups_count_too(tmp_path: Path) -> None:
    # The path is the host's and not visible here: the mounted root holds the container's own numbers.
    write(tmp_path / "cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    write(tmp_path / "m" / "memory" / "memory.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path / "m" / "memory" / "memory.usage_in_bytes", f"{GIB}\n")
    write(tmp_path / "m" / "memory" / "memory.stat", "cache 0\ntotal_inactive_file 1024\n")
    assert host_memory.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (2 * GIB, GIB - 1024)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert host_memory.cgroup_memory(tmp_path / "none", tmp_path / "none.cgroup") == (None, 0)
    write(tmp_path / "cgroup", "0::/\n")
    write(tmp_path / "m" / "memory.max", "max\n")
    assert host_memory.cgroup_memory(tmp_path / "m", tmp_path / "cgroup") == (None, 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_what_is_freed_while_weights_are_read_goes_back_to_the_system() -> None:
    """In the manner of DiffSynth's loading, where a tensor is cast, copied, and the cast dropped."""
    code = """
import torch
from diffusion import host_memory

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

file = torch.zeros(3840, 3840)  # the shape of the transformer's attention
begun, kept = anonymous(), []
with host_memory.freed_at_once():
    for _ in range(16):
        kept.append(file.to(torch.bfloat16).clone())
print((anonymous() - begun) / sum(tensor.nbytes for tensor in kept))
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2


def test_copies_for_a_lora_take_only_what_the_plan_leaves() -> None:
    copies = {
        gigabytes: memory.memory_plan("cuda", gigabytes * 10**9, None, 64 * 10**9, "generate").lora_copies
        for gigabytes in (12, 24, 48, 80)
    }
    assert copies[12] == 0  # streamed: hooks
    assert copies[24] < copies[48] < memory.PART_BYTES["transformer"] < copies[80]
    assert memory.memory_plan("cpu", None, None, 8 * 10**9, "generate", "mini").lora_copies > 10**8
