"""The memory of this machine, or of the container that this process runs in, and keeping less of it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MIB = -3, -1, 1 << 20  # glibc's malloc.h


def total_and_free() -> tuple[int, int]:
    """Return the host's memory in bytes, all and what is available, within a container's limit where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, max(0, min(memory.available, limit - used))


# cgroup version -> (folder under the mount, limit, usage, the line of memory.stat that can be reclaimed)
_CGROUPS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def cgroup_memory(mount: Path, membership: Path) -> tuple[int | None, int]:
    """Return the memory limit of this process's control group (None without one) and what the group uses, in bytes.

    The tightest group on the way up counts. Cached file pages that the kernel can drop are not counted as used:
    weights that were read once would fill the limit otherwise.

    Args:
        mount: where control groups are mounted, usually /sys/fs/cgroup.
        membership: the list of this process's groups, usually /proc/self/cgroup.
    """
    limits = [
        (limit, _number(group / usage) - _reclaimable(group / "memory.stat", line))
        for group, limit_file, usage, line in _groups(mount, membership)
        if (limit := _number(group / limit_file)) > 0
    ]
    return min(limits, default=(None, 0))


def _groups(mount: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield this process's groups and their parents, with the names of the files to read there."""
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        folder, limit, usage, reclaimable = _CGROUPS[version]
        parts = path.strip("/").split("/")
        # Inside a container the path may be the host's, which is not visible there: the mount itself is the group then.
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(folder, *parts[:depth]), limit, usage, reclaimable


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # not Linux, or no such group
        return ""


def _number(path: Path) -> int:
    """Read a count of bytes; 0 where there is none, as with the limit "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0


def _reclaimable(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _text(path).splitlines() if line.split()[0] == name), 0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Give large blocks that are freed inside the block back to the system at once (with glibc).

    glibc keeps blocks of up to 32 MiB in its heap once it has seen one freed, and torch's, which are aligned, do not
    fit into the holes that others of the same size leave: reading 12.3 GB of weights in another dtype left 4.8 GB of
    holes. A value of the environment variable MALLOC_MMAP_THRESHOLD_ is kept.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _MIB)
    try:
        yield
    finally:  # the upper end of glibc's own rule: computing asks for large blocks all the time
        mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        mallopt(_TRIM_THRESHOLD, 64 * _MIB)
