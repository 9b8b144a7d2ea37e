"""Hosts on one machine: network namespaces, each with a cable to this one that can be pulled out. Needs root."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from typing import Self

_NUMBERS = itertools.count()


def why_no_hosts() -> str | None:
    """What is missing for them, None where nothing is."""
    if shutil.which("ip") is None:
        return "there is no `ip`: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"fewstep-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return "this kernel, or this container, lets nobody make network namespaces"
    _ip("netns", "delete", name)
    return None


class Host:
    """A network namespace; ``gateway`` is this machine's address as it is seen from there, ``address`` its own."""

    def __init__(self) -> None:
        number = next(_NUMBERS)
        self.name = f"fewstep-{os.getpid()}-{number}"
        self._near, self._far = f"fs{os.getpid()}-{number}", "eth0"
        # A network of four addresses, another for each process and each of its hosts.
        network = (os.getpid() % 2**14 << 8) | (4 * number % 256)
        self.gateway, self.address = (
            f"10.{64 + (network >> 16)}.{network >> 8 & 255}.{network & 255 | last}" for last in (1, 2)
        )

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return "ip", "netns", "exec", self.name

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        try:
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
            _ip("address", "add", f"{self.gateway}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            there = ("-netns", self.name)
            _ip(*there, "address", "add", f"{self.address}/30", "dev", self._far)
            for device in ("lo", self._far):
                _ip(*there, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # With the namespace its end of the cable goes, and with that the other end.
        _ip("netns", "delete", self.name)

    def cut(self) -> None:
        """Pull the cable out: whatever is sent is dropped, and nobody is told."""
        _ip("link", "set", self._near, "down")

    def heal(self) -> None:
        """Put it in again."""
        _ip("link", "set", self._near, "up")


def reached_from(*hosts: Host) -> list[str]:
    """Options of a redis-server here without a password that those hosts, and nobody else, shall reach."""
    return ["--bind", "127.0.0.1", *(host.gateway for host in hosts), "--protected-mode", "no"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
