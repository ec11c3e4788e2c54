"""Which addresses, interfaces and ports are this machine's: what a node asks before it starts its ranks."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct

from common.rank_table.servers import ip_address

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def is_own_address(address: str) -> bool:
    """Whether `address`, an IP address or a host name, is this machine."""
    names = [name.lower() for name in (address, socket.gethostname())]
    if names[0] == names[1] or (ip_address(address) is None and names[0].split(".")[0] == names[1].split(".")[0]):
        return True
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)  # the system lets a socket have only addresses of this machine; nothing is sent
    except OSError:
        return False
    return True


def interface_of(address: str) -> str | None:
    """The network interface with the IPv4 address that `address` stands for; None when there is none or it is lo."""
    try:
        wanted = socket.gethostbyname(address)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == wanted and name != "lo":
                return name
    return None


def port_is_taken(port: int) -> bool:
    """Whether another process of this machine listens on the TCP port `port`, on whichever address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that is closing is no obstacle
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
