"""Refuse addresses that are not public: of this machine, of its network, of a cloud's metadata."""

import socket
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from aiohttp import ThreadedResolver

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NOT_PUBLIC = [
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32"),  # the last one answers inside of Azure
        *("2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
UNICAST = IPv6Network("2000::/3")
MAPPED, TRANSLATED, SIX_TO_FOUR = IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16")


class PrivateAddress(OSError):
    """A host whose address is not public and in no network that is allowed."""


@lru_cache(maxsize=4096)
def literal(host: str) -> Address | None:
    """Parse a host that is an address, also in the decimal, octal, hexadecimal and short forms of IPv4."""
    host = host.strip("[]").partition("%")[0].rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(host)
    except ValueError:
        try:
            return IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None


def _in_ipv4(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for, other addresses as they are."""
    if isinstance(address, IPv6Address):
        if address in MAPPED or address in TRANSLATED:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        if address in SIX_TO_FOUR:
            return IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public internet."""
    address = _in_ipv4(address)
    if address.version == 6 and address not in UNICAST:
        return False
    return not any(address in network for network in NOT_PUBLIC)


def check_host(host: str, allowed: Sequence[Network] = ()) -> None:
    """Check a host that is an address itself.

    Args:
        allowed: networks whose addresses may be asked though they are not public.

    Raises:
        PrivateAddress: it may not be asked.
    """
    address = literal(host)
    if address is not None and not _is_allowed(address, allowed):
        raise PrivateAddress(_refusal(host, address))


def _is_allowed(address: Address, allowed: Sequence[Network]) -> bool:
    given = (address, _in_ipv4(address))
    return is_public(address) or any(one in network for network in allowed for one in given)


class PublicResolver(ThreadedResolver):
    """Look up hosts and keep the addresses that may be connected to; aiohttp connects to no others.

    Args:
        allowed: networks whose addresses may be connected to though they are not public.
    """

    def __init__(self, allowed: Sequence[str] = ()):
        super().__init__()
        self._allowed = [ip_network(network) for network in allowed]

    def check(self, host: str) -> None:
        """Check a host that is an address itself: such hosts are not looked up.

        Raises:
            PrivateAddress: it may not be connected to.
        """
        check_host(host, self._allowed)

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        """Look up a host.

        Raises:
            PrivateAddress: none of its addresses may be connected to.
        """
        answers = await super().resolve(host, port, family)
        allowed = [answer for answer in answers if _is_allowed(_parsed(answer["host"]), self._allowed)]
        if answers and not allowed:
            raise PrivateAddress(_refusal(host, _parsed(answers[0]["host"])))
        return allowed


def _parsed(address: str) -> Address:
    return ip_address(address.partition("%")[0])


def _refusal(host: str, address: Address) -> str:
    where = str(address) if host == str(address) else f"{host} is {address}"
    return f"{where}: this address is not public; fetch.allow_networks: [{_in_ipv4(address)}] lets it be asked"
