"""Servers on one machine: network namespaces with an address each, joined by a bridge in a namespace of its own.

For sockets they are as good as machines: no shared loopback, and a cable that can be pulled. They share files,
processes and the host name. Linux, and root or CAP_SYS_ADMIN; the machine's own network is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class NotPermitted(RuntimeError):
    """Namespaces cannot be made here; the message says at which step."""


@dataclass(frozen=True)
class Server:
    """One namespace."""

    name: str
    address: str

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        """Runs a command on this server, in a process group of its own."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], start_new_session=True, **options)

    def pull_cable(self) -> None:
        """Packets to and from this server are lost from now on; nobody is told."""
        _ip(f"-n {self.name} link set eth0 down")

    def plug_in(self) -> None:
        _ip(f"-n {self.name} link set eth0 up")


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[Server]]:
    """That many connected servers, gone with all their processes at the end.

    Raises:
        NotPermitted: no `ip` command, or no right to make namespaces.
    """
    if shutil.which("ip") is None:
        raise NotPermitted("the ip command is not installed")
    prefix = f"srv{os.getpid()}"
    made = [Server(f"{prefix}n{n}", f"10.213.8.{n + 1}") for n in range(count)]
    switch = f"{prefix}sw"
    try:
        try:
            _ip(f"netns add {switch}", f"-n {switch} link add br0 type bridge", f"-n {switch} link set br0 up")
            for n, server in enumerate(made):
                _ip(
                    f"netns add {server.name}",
                    f"link add eth0 netns {server.name} type veth peer name port{n} netns {switch}",
                    f"-n {switch} link set port{n} master br0 up",
                    f"-n {server.name} addr add {server.address}/24 dev eth0",
                    f"-n {server.name} link set eth0 up",
                    f"-n {server.name} link set lo up",
                )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise NotPermitted(f"network namespaces are not permitted here: {reason}") from error
        yield made
    finally:
        for name in [*(server.name for server in made), switch]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-9", *inside], capture_output=True) if inside else None
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*steps: str) -> None:
    for step in steps:
        subprocess.run(["ip", *step.split()], check=True, capture_output=True, text=True)
