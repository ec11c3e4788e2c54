"""Addresses of this host as others see it."""

from __future__ import annotations

import socket


def address_towards(host: str) -> str | None:
    """The local IPv4 address that a packet to `host` would carry, None without a route; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None
