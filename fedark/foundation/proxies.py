"""Proxies that the environment names (`http_proxy` and the like), and who may use them.

They are meant for the world outside. A connection to this machine never goes through one: a child
process that serves or reaches loopback gets an environment without them, and a client says itself
which proxy it uses.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from fedark.foundation.errors import InputError

__all__ = ["direct", "is_loopback", "proxy_for", "through", "without_proxies"]

_NAMES = {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "ftp_proxy", "socks_proxy"}
_hiding = threading.Lock()


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own loopback."""
    name = host.strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that names no proxy."""
    return {name: value for name, value in environment.items() if name.lower() not in _NAMES}


def proxy_for(host: str, named: str = "") -> str:
    """The HTTP proxy on the way to `host`: the one that was named, else the environment's; "" for
    none, as to every loopback address.

    Raises:
        InputError: it is no HTTP proxy.
    """
    if is_loopback(host):
        return ""
    found = named
    if not named:
        known = getproxies_environment()
        # As other programs take them: IPv6 networks, and addresses in brackets.
        direct = [entry.strip().strip("[]") for entry in known.get("no", "").split(",")]
        if not proxy_bypass_environment(host, {"no": ",".join(filter(None, direct))}):
            found = known.get("https") or known.get("all") or ""
    if found and "://" not in found:
        found = f"http://{found}"
    try:
        parts = urlsplit(found)
        good = not found or bool(
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )
    except ValueError:
        good = False
    if not good:
        raise InputError(
            "The proxy that is named for the connection to the host cannot be used.",
            safe="Nothing was sent.",
            fix='Name one in party.toml, proxy = "http://HOST:PORT", or in https_proxy.',
        )
    return found


def through(proxy: str) -> dict[str, str]:
    """The variables that send a child's connections through `proxy`, but for those to loopback."""
    return {"https_proxy": proxy, "no_proxy": "127.0.0.1,localhost,::1"} if proxy else {}


@contextmanager
def direct() -> Iterator[None]:
    """While open, this process's environment names no proxy: for making a client that looks there
    and cannot be told otherwise.
    """
    with _hiding:
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in _NAMES}
        try:
            yield
        finally:
            os.environ.update(hidden)
