"""A real S3 server on this machine, behind a proxy that can refuse requests."""

from __future__ import annotations

import http.client
import http.server
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

BUCKET = "activations"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CLIENT_GIVES_UP_S = 6.0
"""The client inside pyarrow asks again every 0.2 s for so long; after that it is up to us."""


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    """with the query"""
    phase: str
    """what the test said was going on"""
    at: float
    """monotonic time"""

    @property
    def reads_rows(self) -> bool:
        return self.method == "GET" and "/shards/train-" in self.path


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server, or answers 503 where `rule` says so. Keeps what it was asked."""

    daemon_threads = True

    def __init__(self, backend: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend, self.port = backend, self.server_address[1]
        self._lock = threading.Lock()
        self.reset()

    def reset(self, rule: Callable[[Request], bool] = lambda request: False) -> None:
        """rule: whether to refuse a request; called for one at a time."""
        with self._lock:
            self.rule, self.phase = rule, ""
            self.served: list[Request] = []
            self.refused: list[Request] = []

    def refuses(self, method: str, path: str) -> bool:
        with self._lock:
            request = Request(method, path, self.phase, time.monotonic())
            refuse = self.rule(request)
            (self.refused if refuse else self.served).append(request)
            return refuse


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses(self.command, self.path):
            self.send_response(503, "Slow Down")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        back = http.client.HTTPConnection("127.0.0.1", self.server.backend)
        back.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            back.putheader(name, value)
        back.endheaders([body] if chunked else body or None, encode_chunked=chunked)
        answer = back.getresponse()
        content = answer.read()
        back.close()
        self.send_response_only(answer.status, answer.reason)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        for name in ("transfer-encoding", "connection"):
            headers.pop(name, None)
        for name, value in ({"content-length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args) -> None:
        pass  # a line for every request


class Bucket:
    """A new bucket on the S3 server at this address, which is <host>:<port>; KEYS must be in the environment."""

    def __init__(self, address: str):
        self.address = address
        self.files = fs.S3FileSystem(
            endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        self.files.create_dir(BUCKET)

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def upload(self, folder: Path, prefix: str) -> None:
        """Every file below a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                with self.files.open_output_stream(f"{BUCKET}/{prefix}/{path.relative_to(folder)}") as stream:
                    stream.write(path.read_bytes())

    def names(self, prefix: str) -> list[str]:
        """Of every file below a prefix, whole."""
        below = fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        return [info.path for info in self.files.get_file_info(below) if info.type == fs.FileType.File]

    def content(self, prefix: str) -> dict[str, bytes]:
        """Every file below a prefix, by its name there."""
        found = {}
        for info in self.files.get_file_info(
            fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        ):
            if info.type == fs.FileType.File:
                with self.files.open_input_file(info.path) as file:
                    found[info.path.removeprefix(f"{BUCKET}/{prefix}/")] = file.read()
        return found

    def copy(self, prefix: str, folder: Path) -> Path:
        """The folder, with every file below a prefix in it."""
        for name, content in self.content(prefix).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


class S3(Bucket):
    """The server with its proxy and one bucket, which is filled and read past the proxy."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        self.proxy = Proxy(self.port)
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        super().__init__(f"127.0.0.1:{self.port}")

    def url(self, prefix: str, proxy: bool = False) -> str:
        direct = super().url(prefix)
        return direct.replace(self.address, f"127.0.0.1:{self.proxy.port}") if proxy else direct

    def stop(self) -> None:
        self.proxy.shutdown()
        self.proxy.server_close()
        self._server.stop()


class Share:
    """A rule that refuses a seeded share of certain requests: which ones does not depend on the order in which threads
    ask.
    """

    def __init__(self, share: float, seed: int, of: Callable[[Request], bool]):
        self.share, self.seed, self.of = share, seed, of
        self._asked: Counter[str] = Counter()

    def __call__(self, request: Request) -> bool:
        if not self.of(request):
            return False
        self._asked[request.path] += 1
        return random.Random(f"{self.seed} {request.path} {self._asked[request.path]}").random() < self.share


class Burst:
    """A rule that refuses every request for so many seconds, from the first of certain ones on; then leaves it to
    another.
    """

    def __init__(self, seconds: float, first: Callable[[Request], bool], then: Callable[[Request], bool]):
        self.seconds, self.first, self.then, self.end = seconds, first, then, math.inf

    def __call__(self, request: Request) -> bool:
        if self.end == math.inf and self.first(request):
            self.end = request.at + self.seconds
        return (self.end < math.inf and request.at < self.end) or self.then(request)
