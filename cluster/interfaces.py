"""Addresses of this machine's network interfaces."""

import fcntl
import socket
import struct

from outrider.speculation.errors import InvalidConfigError

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""


def address_of(interface: str) -> str:
    """The interface's IPv4 address.

    Raises:
        InvalidConfigError: there is no such interface on this node, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            name = struct.pack("256s", interface.encode()[:15])
            reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, name)
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise InvalidConfigError(
                f"network interface {interface!r} has no address on {socket.gethostname()}: "
                f"{error.strerror}; it has {known}"
            ) from None
    return socket.inet_ntoa(reply[20:24])
