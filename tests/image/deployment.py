"""What docker/compose.yaml names, started in a box: each container is a node with a network of its own.

Services, commands, environment, secrets, volumes and order come from the file. Services of our image run from the built
image. The two others are stood in for, since their images are in no reach: PostgreSQL by Debian's, the object store by
s3_stand_in.py, with the same names, ports, users and passwords. Not there: restarts, publishing of ports.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import compose_file
from cluster.box import BIN, Box, Node
from compose_file import Service

from image.built import Image
from image.container import Container

STAND_IN = Path(__file__).with_name("s3_stand_in.py")
PROGRAMS = "usr/lib/postgresql/*/bin/initdb"
"""Where Debian has what its PATH does not."""
HANGS_S = 900.0


def missing() -> str:
    """What this machine lacks for it, beside what the image and a box need; empty if nothing."""
    if not list(Path("/").glob(PROGRAMS)):
        return "apt-get install postgresql"
    try:
        import moto.server  # noqa: F401
    except ImportError as error:
        return f"make setup ({error})"
    return ""


class StandIn:
    """A service whose image is not ours, by programs of this machine on a node."""

    def __init__(self, box: Box, service: Service):
        self.service = service
        self.node: Node = box.node(service.name)
        self.log = self.node.disk / "container.log"
        self.path = BIN.as_posix()
        folder = self.node.disk / "srv/files"
        folder.mkdir()
        self.files: dict[str, str] = {}
        """Where the node sees each file, by where the service would."""
        for number, (target, source) in enumerate(service.files.items()):
            (folder / str(number)).write_bytes(source.read_bytes())
            self.files[target] = f"/srv/files/{number}"

    def popen(self, argv: list[object]) -> subprocess.Popen[bytes]:
        return self.node.popen(argv, log=self.log)

    def run(self, argv: list[object], **env: str) -> subprocess.CompletedProcess[str]:
        return self.node.run(argv, env={"PATH": f"{self.path}:/usr/bin:/bin", **env})


class Postgres(StandIn):
    """Debian's, with user, database and password as the official image takes them from its environment."""

    def start(self) -> subprocess.Popen[bytes]:
        self.path = str(sorted(Path("/").glob(PROGRAMS))[-1].parent)
        env, (volume,) = self.service.environment, self.service.volumes
        password = self.files[env["POSTGRES_PASSWORD_FILE"]]
        as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--", "env", "LC_ALL=C"]
        data = f"/srv/volumes/{volume}"
        user = env["POSTGRES_USER"]
        self.do(["sh", "-ec", f"mkdir -p -m 700 {data}; chown postgres: {data} {password}"])
        how = [f"--username={user}", f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        self.do([*as_postgres, f"{self.path}/initdb", f"--pgdata={data}", *how])
        (self.node.disk / data.lstrip("/") / "pg_hba.conf").write_text("host all all all scram-sha-256\n")
        serve = [f"{self.path}/postgres", "-D", data, "-c", "listen_addresses=*", "-c", "unix_socket_directories="]
        process = self.popen([*as_postgres, *serve])
        secret = self.service.files[env["POSTGRES_PASSWORD_FILE"]].read_text()
        wait_until(lambda: self.run(["pg_isready", "--host=127.0.0.1"]).returncode == 0, process, self.log)
        self.do(["createdb", "--host=127.0.0.1", f"--username={user}", env["POSTGRES_DB"]], PGPASSWORD=secret)
        return process

    def do(self, argv: list[object], **env: str) -> None:
        done = self.run(argv, **env)
        assert done.returncode == 0, done.stdout + done.stderr


class ObjectStore(StandIn):
    """Moto's S3 server, which asks for the keys in the file that SeaweedFS is given, at the port that it is given."""

    def start(self) -> subprocess.Popen[bytes]:
        options = dict(word.lstrip("-").split("=", 1) for word in self.service.command or [] if "=" in word)
        keys, port = self.files[options["s3.config"]], options["s3.port"]
        return self.popen([BIN / "python", STAND_IN, keys, port])


STAND_INS: dict[str, type[Postgres | ObjectStore]] = {"postgres": Postgres, "chrislusf/seaweedfs": ObjectStore}
"""By the image that they stand for."""


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + HANGS_S
    while not condition():
        assert process.poll() is None, f"ended with {process.poll()}:\n{log.read_text()}"
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.5)


class Deployment:
    """All of it, up: `docker compose up --wait`. folder: what holds the compose file's secrets and configurations."""

    def __init__(self, box: Box, image: Image, folder: Path):
        self.box, self.image = box, image
        self.services = compose_file.services(compose_file.load(), folder)
        self.ours: dict[str, Container] = {}
        """By name; of several replicas, `<name>-1` and so on."""
        self.running: dict[str, tuple[Container | StandIn, subprocess.Popen[bytes]]] = {}
        self.seconds: dict[str, float] = {}
        """Until each was as its file asks before the next may start."""
        for service in compose_file.in_order(self.services):
            begin = time.monotonic()
            self._up(service)
            self.seconds[service.name] = time.monotonic() - begin

    def _up(self, service: Service) -> None:
        own = self.services["head"].image == service.image
        names = (
            [service.name] if service.replicas == 1 else [f"{service.name}-{n + 1}" for n in range(service.replicas)]
        )
        for name in names:
            made = self._container(service, name) if own else STAND_INS[service.image.split(":")[0]](self.box, service)
            process = made.start(service.command or self.image.command) if own else made.start()  # type: ignore[call-arg]
            self.running[name] = made, process
        for name in names:
            made, process = self.running[name]
            if self._waited_for(service) == "service_completed_successfully":
                assert process.wait(HANGS_S) == 0, made.log.read_text()
            elif (health := service.healthcheck) is not None:
                test = health.test
                wait_until(lambda: made.run(test).returncode == 0, process, made.log)
            else:
                raise ValueError(f"{service.name}: nothing says when it is up")

    def _container(self, service: Service, name: str) -> Container:
        how = (service.environment, service.files, service.volumes, service.shm_bytes)
        self.ours[name] = made = Container(self.box, name, self.image, *how)
        return made

    def _waited_for(self, service: Service) -> str | None:
        """The condition on which others start after it."""
        asked = {other.needs[service.name] for other in self.services.values() if service.name in other.needs}
        assert len(asked) <= 1, asked
        return next(iter(asked), None)

    def log(self, name: str) -> str:
        return self.running[name][0].log.read_text()
