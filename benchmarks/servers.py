"""A server of a folder's files on the loopback, HTTP and S3 in one, slow or faulty on purpose.

It answers `GET` and `HEAD` of `/FOLDER/PATH` with the file, and `GET /FOLDER?list-type=2` with
S3's list of objects: all that a client needs to list and read the bucket FOLDER, of this folder's
name. Moto's server does far more, and is too slow to be fair: 600 GETs a second on a core, where
this one answers 7,000. Signatures are not looked at. HTTP/1.1, connections are kept.

- Latency is waited for before each answer, of any kind; what connecting takes is not imitated.
- A fault hits an attempt, by a random number from the seed, the path and the number of the
  attempt: `503` (an answer with that status), `reset` (the connection is reset in the middle of
  the body), `short` (it is closed there) and `hang` (nothing more comes: half of them before the
  answer, half in the middle of the body). Only GETs of files have faults.

It listens on 127.0.0.1 alone, prints its port, and ends when its standard input does, which is
when whoever started it ends, or after `MAX_SECONDS`.

    python benchmarks/servers.py FOLDER --latency-ms 50 --faults 503=0.05 hang=0.01
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

MAX_SECONDS = 4 * 3600
HANG_SECONDS = 300  # of one answer
COUNTS = "/-/counts"
FAULTS = ("503", "reset", "short", "hang")


@dataclass
class Server:
    """A running server.

    Attributes:
        port: On 127.0.0.1.
        name: Of its folder: the first part of each path, and the bucket.
    """

    port: int
    name: str

    @property
    def url(self) -> str:
        """Of the folder, over HTTP, with no slash at the end."""
        return f"http://127.0.0.1:{self.port}/{quote(self.name)}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which clients of S3 come here: botocore's, obstore's and fsspec's."""
        endpoint = f"http://127.0.0.1:{self.port}"
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def counts(self) -> Counter[str]:
        """Requests since the last call, by method (LIST is a GET of a list), and faults.

        Attempts are counted from the first again: whoever asks next meets the same faults.
        """
        url = f"http://127.0.0.1:{self.port}{COUNTS}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=30) as answer:
            return Counter(json.load(answer))


@contextlib.contextmanager
def serving(
    folder: Path, latency_ms: float = 0, faults: dict[str, float] | None = None, seed: int = 0
) -> Iterator[Server]:
    """Serve a folder from a process of its own.

    Args:
        folder: Its files, and those of its subfolders, as they are now.
        latency_ms: Before each answer, in milliseconds.
        faults: Share of the attempts, 0 to 1, that each of `FAULTS` hits.
        seed: Of the faults.
    """
    command = [sys.executable, __file__, str(folder), "--latency-ms", str(latency_ms)]
    command += ["--seed", str(seed)]
    command += ["--faults", *(f"{kind}={share}" for kind, share in (faults or {}).items())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Server(int(process.stdout.readline()), folder.name)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Bucket:
    """A folder's files, and how requests for them are answered."""

    def __init__(self, folder: Path, latency: float, faults: dict[str, float], seed: int) -> None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in files}
        self.name, self.latency, self.faults, self.seed = folder.name, latency, faults, seed
        self.counts: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # IncompleteReadError is the end of the connection.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                if not await self.answer(method, target, reader, writer):
                    break
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def answer(
        self, method: str, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False where the connection is to be closed."""
        parts = urlsplit(target)
        path, query = unquote(parts.path), parse_qs(parts.query)
        if path == COUNTS:
            writer.write(response(200, json.dumps(self.counts).encode(), method))
            self.counts.clear()
            self.attempts.clear()
            return True
        self.counts["LIST" if "list-type" in query else method] += 1
        bucket, _, key = path.removeprefix("/").partition("/")
        fault = self.fault_of(key) if method == "GET" and key in self.files else None
        await asyncio.sleep(self.latency)
        if fault:
            return await self.fail(fault, key, reader, writer)
        if bucket != self.name or method not in ("GET", "HEAD"):
            writer.write(response(404, error("NoSuchBucket"), method))
        elif key:
            writer.write(self.file_response(key, method))
        else:
            prefix = query.get("prefix", [""])[0]
            writer.write(response(200, self.listing(prefix), method, "application/xml"))
        return True

    def file_response(self, key: str, method: str) -> bytes:
        if key not in self.files:
            return response(404, error("NoSuchKey"), method)
        return response(200, self.files[key].read_bytes(), method, "application/octet-stream")

    def listing(self, prefix: str) -> bytes:
        """All objects below a prefix, in one page."""
        objects = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><ETag>&quot;{len(key)}&quot;</ETag><Size>{path.stat().st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key, path in self.files.items()
            if key.startswith(prefix)
        ]
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{escape(self.name)}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(objects)}</KeyCount><MaxKeys>{len(objects)}</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{''.join(objects)}</ListBucketResult>"
        ).encode()

    def fault_of(self, key: str) -> str | None:
        """What befalls the next attempt to get a file."""
        self.attempts[key] += 1
        left = random.Random(f"{self.seed} {key} {self.attempts[key]}").random()
        for kind, share in self.faults.items():
            left -= share
            if left < 0:
                self.counts[f"{kind} faults"] += 1
                return kind
        return None

    async def fail(
        self, fault: str, key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if fault == "503":
            writer.write(response(503, error("SlowDown"), "GET"))
            return True
        if fault != "hang" or self.counts["hang faults"] % 2:
            whole = self.file_response(key, "GET")
            writer.write(whole[: len(whole) - self.files[key].stat().st_size // 2 - 1])
            await writer.drain()
        if fault == "hang":
            with contextlib.suppress(TimeoutError):  # else until the client hangs up
                await asyncio.wait_for(reader.read(), HANG_SECONDS)
        if fault == "reset":
            await asyncio.sleep(0.01)  # for the first half to leave
            linger = b"\1\0\0\0\0\0\0\0"  # for no time: what is unsent is dropped, and RST sent
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return False


def error(code: str) -> bytes:
    """The body of S3's errors."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>-</Message></Error>".encode()


def response(status: int, body: bytes, method: str, kind: str = "application/xml") -> bytes:
    """A whole answer, whose body is left out for HEAD."""
    reasons = {200: "OK", 404: "Not Found", 503: "Slow Down"}
    head = (
        f"HTTP/1.1 {status} {reasons[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nLast-Modified: {formatdate(1767225600, usegmt=True)}\r\n"
        f'ETag: "{len(body)}"\r\nDate: {formatdate(usegmt=True)}\r\n\r\n'
    )
    return head.encode() + (b"" if method == "HEAD" else body)


async def serve(bucket: Bucket) -> None:
    """Until standard input ends."""
    server = await asyncio.start_server(bucket.serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([ended], timeout=MAX_SECONDS)
    os._exit(0)  # open connections, and the thread that reads, would be waited for


def share_of(text: str) -> tuple[str, float]:
    """A kind of fault, and the share of the attempts that it hits: of `503=0.05`."""
    kind, _, share = text.partition("=")
    if kind not in FAULTS:
        raise argparse.ArgumentTypeError(f"one of {FAULTS}=SHARE. Received: {text}")
    return kind, float(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--faults", type=share_of, nargs="*", default=[], metavar="KIND=SHARE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.resolve()
    bucket = Bucket(folder, options.latency_ms / 1000, dict(options.faults), options.seed)
    asyncio.run(serve(bucket))


if __name__ == "__main__":
    main()
