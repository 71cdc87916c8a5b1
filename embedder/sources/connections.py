"""Connections to web servers: kept, ended at a deadline, and to public addresses if need be."""

import contextlib
import functools
import http.client
import io
import ipaddress
import os
import socket
import threading
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from embedder.errors import ReadError
from embedder.sources.attempts import Limits

# Idle connections kept: to so many servers, so many each. More threads than that open new ones.
_NUM_SERVERS, _NUM_CONNECTIONS = 16, 256
_REFUSED = "redirected to a private address, which --allow-private permits"
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, as networks of IPv6 write them
_lock = threading.Lock()


class _Attempt(threading.local):
    """What the thread is at, for the connections that it uses, which all threads share."""

    limits: Limits


attempt = _Attempt()


def pools_of(is_checked: bool) -> urllib3.PoolManager:
    """Connections that all threads share.

    Args:
        is_checked: Whether they go to public addresses only.
    """
    with _lock:
        return _new_pools(os.getpid(), is_checked)  # a fork shares no connections


@functools.cache
def _new_pools(process: int, is_checked: bool) -> urllib3.PoolManager:  # noqa: ARG001
    pools = urllib3.PoolManager(_NUM_SERVERS, maxsize=_NUM_CONNECTIONS)
    if is_checked:
        pools.pool_classes_by_scheme = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}
    else:
        pools.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pools


class _Timed(io.RawIOBase):
    """What comes from a server, until the deadline of the attempt: of whatever it comes part."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw = raw
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        limits = attempt.limits
        self._connection.settimeout(min(limits.idle_seconds, limits.remaining_seconds()))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """One that ends at its deadline, whatever the server does: drip, or say `100 Continue`."""

    def __init__(self, connection: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), connection))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(_Connection, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _PublicConnection(_Connection):
    """To a public address: the one that is connected to, whatever a name says."""

    def _new_conn(self) -> socket.socket:
        with contextlib.suppress(OSError, UnicodeError):  # connecting tells of it
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            for *_, address in found:
                check_public(address[0])
        connected = super()._new_conn()
        try:
            # A name may lead elsewhere now. Nothing has been sent yet.
            check_public(connected.getpeername()[0])
        except BaseException:
            connected.close()
            raise
        return connected


def check_public(address: object) -> None:
    """Refuse a private, loopback or link-local address, and one that stands for such a one.

    Raises:
        ReadError: It is one.
    """
    parsed = ipaddress.ip_address(str(address))
    if isinstance(parsed, ipaddress.IPv6Address):
        is_wrapped = parsed.ipv4_mapped is not None or parsed in _NAT64
        if is_wrapped:
            parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        elif parsed not in _PUBLIC_IPV6 or parsed.sixtofour is not None:
            raise ReadError(_REFUSED)
    if not parsed.is_global or parsed.is_multicast:
        raise ReadError(_REFUSED)


class _PublicSecureConnection(_PublicConnection, HTTPSConnection):
    pass


class _PublicHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicConnection


class _PublicHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicSecureConnection
