"""An S3 server that is a machine of its own in a box."""

from __future__ import annotations

import socket
import subprocess
import time

from s3_server import BUCKET, KEYS, Bucket

from cluster.box import BIN, Box

PORT = 9000
STARTS_S = 300.0


class S3Node(Bucket):
    """Moto's server on a node, and one bucket; KEYS must be in the environment of whoever asks, here and on nodes.

    It keeps everything in memory: `freeze` and `thaw` are an outage, while `restart` comes back empty. `node` is the
    machine, whose cable can be cut or slow.
    """

    def __init__(self, box: Box, name: str = "s3"):
        self.node = box.node(name)
        self.log = self.node.disk / "server.log"
        self._start()
        super().__init__(f"{self.node.address}:{PORT}")

    def _start(self) -> None:
        serve = [BIN / "python", "-m", "moto.server", "--host", "0.0.0.0", "--port", str(PORT)]
        self.process: subprocess.Popen[bytes] = self.node.popen(serve, env=KEYS, log=self.log)
        end = time.monotonic() + STARTS_S
        while True:
            try:
                socket.create_connection((self.node.address, PORT), timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.1)

    def freeze(self) -> None:
        """Connections stay open, and nobody answers."""
        self.node.stop()

    def thaw(self) -> None:
        self.node.cont()

    def kill(self) -> None:
        """The power goes, and with it all that was stored."""
        self.node.kill()

    def restart(self) -> None:
        """After `kill`: an empty server with an empty bucket, at the same address."""
        self.node.boot()
        self._start()
        self.files.create_dir(BUCKET)
