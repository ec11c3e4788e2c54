"""Which addresses, interfaces and ports are this machine's: what a node asks before it starts its ranks."""

from __future__ import annotations

import errno
import socket

from common.rank_table.servers import ip_address


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
    import psutil  # not above: launch.sh says in a line where it is missing

    found = psutil.net_if_addrs().items()
    return next((name for name, own in found if name != "lo" and wanted in {one.address for one in own}), None)


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
