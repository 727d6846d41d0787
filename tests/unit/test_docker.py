"""docker/ as it lies there: what must hold of it wherever it is built and started. tests/image does both."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import compose_file
import pytest
from compose_file import COMPOSE, DOCKER

ROOT = DOCKER.parent
TREE = compose_file.load(env={})
SERVICES = compose_file.services(TREE)
DOCKERFILE = (DOCKER / "Dockerfile").read_text().replace("\\\n", "")
PASSWORD = re.compile(r"(?i)(password|passwd|secret|token)\w*\s*[=:]\s*(?!/run/secrets/|token\b)\S")


def test_nothing_is_published_but_on_this_machine():
    ports = [port for service in SERVICES.values() for port in service.ports]
    assert len(ports) == 2 and all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports), ports
    assert not any(
        key in service.told for service in SERVICES.values() for key in ("network_mode", "networks", "privileged")
    )


def test_every_secret_is_a_file_that_git_ignores_and_the_script_makes():
    made = (DOCKER / "secrets.sh").read_text()
    for name, told in TREE["secrets"].items():
        assert told == {"file": f"secrets/{name}"} and re.search(rf"> {name}( <<END)?$", made, re.MULTILINE), name
    assert {"docker/secrets/", "docker/.env"} <= set((ROOT / ".gitignore").read_text().splitlines())
    used = {
        Path(place).name for s in SERVICES.values() for place, source in s.files.items() if "secrets" in str(source)
    }
    assert {"ray_token", "credentials"} <= used


@pytest.mark.parametrize("name", SERVICES)
def test_no_password_stands_in_a_service(name):
    told = SERVICES[name]
    assert not [f"{key}={value}" for key, value in told.environment.items() if PASSWORD.search(f"{key}={value}")]
    assert not PASSWORD.search(" ".join(told.command or []))


def test_versions_are_pinned():
    images = {service.image for service in SERVICES.values()} | set(
        re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)
    )
    assert len(images) == 4 and all(
        re.search(r":[\w.-]*\d+\.\d+", image) and ":latest" not in image for image in images
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'image.version="{version}"' in DOCKERFILE and SERVICES["head"].image == f"dmsae_ray:{version}"
    installs = re.findall(r"pip install [^&;\n]*", DOCKERFILE)
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line or "--no-deps --prefix /opt/code ." in line for line in installs)


def test_what_links_in_the_package_point_to_is_sent_to_the_builder_too():
    sent = set(re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    links = [path.resolve() for path in (ROOT / "dmsae_ray").rglob("*") if path.is_symlink()]
    assert links and {path.relative_to(ROOT).parts[0] for path in links} <= sent
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    }
    assert copied == sent


def test_the_image_has_a_user_of_its_own_and_no_compiler_on_cpus():
    *_, final = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    assert re.findall(r"^USER (\S+)", final, re.MULTILINE) == ["1000:1000"] and "--uid 1000" in final
    assert final.index("ENV ") < final.index("COPY ") < final.index("USER ") < final.index("HEALTHCHECK ")
    assert re.search(r"test \"\$DEVICE\" = cpu \|\| echo gcc", final)


def test_who_waits_for_whom_says_when_it_is_up():
    order = [service.name for service in compose_file.in_order(SERVICES)]
    assert order.index("worker") > order.index("head") > order.index("bucket") > order.index("objects")
    for service in SERVICES.values():
        for other, condition in service.needs.items():
            assert condition == "service_completed_successfully" or SERVICES[other].healthcheck, (service.name, other)


def test_our_services_have_no_rights_and_an_init():
    for name in ("head", "worker", "mlflow", "bucket"):
        told = SERVICES[name].told
        assert told["init"] and told["cap_drop"] == ["ALL"] and told["security_opt"] == ["no-new-privileges:true"]


def test_the_head_does_no_work_and_both_ask_for_the_token():
    assert "--num-cpus=0" in SERVICES["head"].command and SERVICES["worker"].replicas == 2
    for name in ("head", "worker"):
        env = SERVICES[name].environment
        assert env["RAY_AUTH_MODE"] == "token" and env["RAY_AUTH_TOKEN_PATH"] in SERVICES[name].files
        store = next(word for word in SERVICES[name].command if word.startswith("--object-store-memory="))
        assert int(store.partition("=")[2]) < SERVICES[name].shm_bytes


def test_what_may_be_set_is_in_the_example_with_its_default():
    asked = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text()))
    example = dict(re.findall(r"^#(\w+)=(.*)$", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert asked.keys() == example.keys()
    assert {name: value for name, value in asked.items() if value} == {
        name: example[name] for name in asked if asked[name]
    }
    assert example["TORCH_INDEX"] in DOCKERFILE


def test_the_gpu_file_adds_to_services_that_there_are():
    added = compose_file.load(DOCKER / "compose.gpu.yaml", env={})
    assert added["services"].keys() <= SERVICES.keys()


def test_a_key_that_is_not_known_is_refused():
    tree = compose_file.load(env={})
    tree["services"]["head"]["privileged"] = True
    with pytest.raises(ValueError, match="head.*privileged"):
        compose_file.services(tree)
