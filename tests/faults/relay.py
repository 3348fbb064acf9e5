"""A slow cable: frames between taps in two network namespaces, each so many milliseconds late.

``relay.py NAMESPACE_A TAP_A NAMESPACE_B TAP_B MILLISECONDS``, as root; for kernels without netem.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0002, 0x1000, 0x40000000


def open_tap(namespace: str, name: str) -> int:
    """A new tap device in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def main() -> None:
    """Carry frames until killed."""
    first, first_tap, second, second_tap, delay = sys.argv[1:]
    taps = [open_tap(first, first_tap), open_tap(second, second_tap)]
    print("ready", flush=True)
    under_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
        ready, _, _ = select.select(taps, [], [], wait)
        for tap in ready:
            other = taps[1 - taps.index(tap)]
            count += 1
            due = time.monotonic() + float(delay) / 1000
            heapq.heappush(under_way, (due, count, other, os.read(tap, 65_536)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(under_way)
            try:
                os.write(tap, frame)
            except OSError:
                continue  # the device is down: a lost frame


if __name__ == "__main__":
    main()
