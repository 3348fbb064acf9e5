"""Finds out how many cores and how much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Number of cores by affinity, or fewer if the container or job has a quota of processor time.

    A quota of less than a core counts as one. With more threads than the quota, the kernel stops
    all of them for a part of every period.

    Args:
        cgroups: where the control groups are mounted.
        own: the file that names the control groups of this process.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for folder in _folders(cgroups, own, "cpu") if (quota := _quota(folder))]
    return max(1, min([cores, *(int(quota) for quota in quotas)]))


def usable_memory(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of the machine's memory, or fewer if the container or job has a limit.

    Args:
        cgroups, own: as in `usable_cores`.
    """
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *filter(None, map(_limit, _folders(cgroups, own, "memory")))])


def fit_threads(threads: int) -> int:
    """Use ``threads`` threads, or fewer if this process's quota is smaller.

    If a launcher or user has set ``OMP_NUM_THREADS``, that value is kept.
    """
    return threads if os.environ.get("OMP_NUM_THREADS") else min(threads, usable_cores())


def _folders(cgroups: Path, own: Path, controller: str) -> list[Path]:
    """This process's control groups for cpu or memory, and their parents, of either version."""
    tops = {cgroups: "/"}
    try:
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                tops[cgroups] = path
            elif controller in controllers.split(","):
                names = (controller, controllers, "cpu,cpuacct")
                tops |= {cgroups / name: path for name in names}
    except (OSError, ValueError):
        pass
    folders = []
    for top, path in tops.items():
        # In a container the path may be the host's: its own group is then mounted at the top.
        inner = top / path.lstrip("/")
        folders += [
            folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents
        ]
    return folders


def _quota(folder: Path) -> float | None:
    """Number of cores that the time in each period is worth; None without a limit."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):  # "max", or no such file
        return None


def _limit(folder: Path) -> int | None:
    """Bytes of memory that the group may use; None without a limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # "max", or no such file
            continue
    return None
