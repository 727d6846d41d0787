"""Which Ray cluster a command joins, and whether it answers: Ray itself would try for a quarter of an hour, in
silence.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from dmsae_ray.config import Config

TRIES, PAUSE_S, ANSWER_S = 3, 1.0, 4.0
"""A cluster that is just being started gets another chance; an address where nobody listens costs some seconds."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""HTTP/2's preface and an empty SETTINGS frame. A gRPC server, as Ray's is, answers with such a frame of its own."""
SETTINGS = 4
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What only the head of a Ray cluster can be asked."""
REMEDY = (
    "Start the cluster, correct the address, or use --cluster.address local to start one here (`ray stop` clears what "
    "a cluster that died left behind)"
)


def cluster_address(config: Config) -> str | None:
    """The cluster to join, as Ray takes it; None: a cluster of our own is to be started.

    "auto", not the address itself, for one that `ray start` made on this machine: only then does Ray take up a token
    that lies ready. Another driver's private cluster does not count: it ends with its driver.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or ("auto" if _started_here() else None)
    return None if address == "local" else address


def check_answers(config: Config, address: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Somebody who talks as Ray does listens at this address. Raises ValueError, after some seconds at most."""
    named = f"cluster.address {address}" if config.cluster.address else f"RAY_ADDRESS {address}"
    if address == "auto":
        found = _started_here()
        if found is None:
            return  # Ray looks for running processes, and says at once if there are none
        named = f"cluster.address auto: {found}, which `ray start` noted on this machine"
        address = found
    if "://" in address:
        raise ValueError(
            f"{named}: Ray Client and other URLs are not supported: the command reads its output folder and Ray's "
            "shared memory itself. Run it on a node of the cluster with <host>:<port of the head>, 6379 by default "
            "(`ray start --address=<host>:<port>` makes this machine one), or send it as a job (`ray job submit`)"
        )
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{named}: is not <host>:<port> (the port of the head is 6379 by default). {REMEDY}")
    for left in reversed(range(TRIES)):
        try:
            _greet(host, int(port))
            return
        except socket.gaierror as error:
            raise ValueError(f"{named}: no machine of the name {host} is known ({error.strerror}). {REMEDY}") from error
        except NotRay as error:
            raise ValueError(f"{named}: {error}. {REMEDY}") from error
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            if not left:
                raise ValueError(
                    f"{named}: nothing that could be joined answers there ({why}; tried {TRIES} times). {REMEDY}"
                ) from error
            say(f"ray: no answer from {host}:{port} ({why}); trying again")
            time.sleep(PAUSE_S)


class NotRay(Exception):
    """Somebody else listens there."""


def _greet(host: str, port: int) -> None:
    """Raises OSError if nobody listens, NotRay if it is no gRPC server. Where TLS is on, a listener has to do."""
    with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.settimeout(ANSWER_S)
        connection.sendall(HELLO)
        answer = b""
        try:
            while len(answer) < 9 and (more := connection.recv(9 - len(answer))):
                answer += more
        except OSError as error:
            raise NotRay(f"what listens there does not answer as Ray does ({error.strerror or error})") from error
    if len(answer) < 9 or answer[3] != SETTINGS:
        raise NotRay(f"what listens there is not Ray (it answers {answer!r})")
    _ask(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _ask(target: str) -> None:
    """Raises NotRay if this gRPC server has no list of a cluster's nodes: another program's, or another port of Ray."""
    import grpc  # Ray needs it, too

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            # Whatever else it says, such as that it wants a token, it knows the question.
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NotRay(
                    "what listens there is not the head of a Ray cluster, or not its port (6379 by default)"
                ) from error


def _started_here() -> str | None:
    """The address of the cluster that `ray start` noted on this machine."""
    from ray._private.utils import read_ray_address

    return read_ray_address()
