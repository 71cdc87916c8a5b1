"""Answers of servers in trouble."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from tests.support import body

Answer = Callable[[BaseHTTPRequestHandler], None]


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other; the last for ever."""
    left = list(answers)
    lock = threading.Lock()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(handler)

    return answer


def failing(code: int, **headers: str) -> Answer:
    """A status whose connection can be used again."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in ({"Content_Length": "0"} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def moved(location: str) -> Answer:
    return failing(302, Location=location)


def short(handler: BaseHTTPRequestHandler) -> None:
    body(b"cont", Content_Length="100")(handler)
    handler.close_connection = True


def cut_after(start: bytes) -> Answer:
    """So many bytes of an answer, from its head on."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        handler.close_connection = True

    return answer


def cut_between_chunks(handler: BaseHTTPRequestHandler) -> None:
    _chunked(handler, b"4\r\ncont\r\n")


def cut_in_a_chunk(handler: BaseHTTPRequestHandler) -> None:
    _chunked(handler, b"64\r\ncont")


def broken_chunk(handler: BaseHTTPRequestHandler) -> None:
    _chunked(handler, b"4\r\ncont\r\nnonsense\r\n")


def _chunked(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(content)
    handler.close_connection = True


def chunked(*chunks: bytes) -> Answer:
    """An answer whose length is told chunk by chunk, and that comes whole."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in (*chunks, b""):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    return answer


def reset(handler: BaseHTTPRequestHandler) -> None:
    """A body that stops, and a connection that is torn down: not even its end is sent."""
    body(b"cont", Content_Length="100000")(handler)
    _tear_down(handler)


def reset_at_once(handler: BaseHTTPRequestHandler) -> None:
    _tear_down(handler)


def _tear_down(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Say nothing until whoever asked hangs up."""
    handler.connection.recv(1)


def hang_in_the_body(handler: BaseHTTPRequestHandler) -> None:
    body(b"cont", Content_Length="100")(handler)
    hang(handler)


def dripping(start: bytes, drop: bytes) -> Answer:
    """So many bytes at once, then the same few again and again, for two seconds."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        handler.close_connection = True
        for _ in range(200):
            handler.wfile.write(drop)
            time.sleep(0.01)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100_000):  # 6 GB, if nobody hangs up
        handler.wfile.write(bytes(2**16))
