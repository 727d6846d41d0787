"""Reading an experiment: a YAML file, overridden by the command line. Every mistake is one line that names file or
flag, and field.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import CliImplicitFlag, CliSettingsSource, PydanticBaseSettingsSource
from pydantic_settings.exceptions import SettingsError

from dmsae_ray.config import Config, Output
from dmsae_ray.config_checks import problem_lines
from dmsae_ray.driver.help import help_text, topic_of
from dmsae_ray.driver.transcript import show_anything
from dmsae_ray.ownership import marked
from dmsae_ray.secret_url import openly, print_scrubbed, scrub
from dmsae_ray.yaml_file import read_yaml


class _YamlFile(PydanticBaseSettingsSource):
    """The file named by `--config`, as the source below the command line."""

    path: Path | None = None

    def get_field_value(self, field, field_name):  # required by the base class, unused: __call__ gives all at once
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return {} if self.path is None else left_to_file(read_experiment(self.path), self.current_state, Config)


def left_to_file(tree: dict[str, Any], given: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """What of a file's section counts beside what the command line gives of it: of a field given there nothing, a
    mapping such as study.arms included, whose entries would else be merged.
    """
    left = {}
    for name, value in tree.items():
        of = section.model_fields[name].annotation if name in section.model_fields else None
        if name not in given:
            left[name] = value
        elif isinstance(of, type) and issubclass(of, BaseModel) and isinstance(value, dict):
            left[name] = left_to_file(value, given[name], of)
    return left


def read_experiment(path: Path) -> dict[str, Any]:
    """A configuration file as a dict; one that lies with the results of a sweep means the output folder in which it
    lies, even if that folder has been moved. Raises ValueError as `read_yaml` does."""
    tree, folders = read_yaml(path), path.absolute().parents
    if path.name == "config.yaml" and len(folders) > 2 and folders[1].name == "sweeps" and marked(folders[2]):
        tree["output"] = str(folders[2])
    return tree


def default_config_path() -> Path:
    """The quickstart that is shipped with the package."""
    return Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Command(Config):
    """An experiment read from a file and the command line."""

    config: Path = Field(default_factory=default_config_path)
    """YAML file with the experiment; without it the quickstart's, shipped with the package, applies. The defaults shown
    here are the file's
    """
    verbose: CliImplicitFlag[bool] = False
    """show everything Ray prints as well"""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
    ):
        return (init_settings, _YamlFile(settings_cls))


class SweepCommand(Command):
    """python -m dmsae_ray.sweep: harvest, distil, compare, and say how far the cores agree."""

    status: CliImplicitFlag[bool] = False
    """say what is done, running and failed, and stop"""
    clean: CliImplicitFlag[bool] = False
    """remove what no finished result needs, and stop (with --dry_run: only say what)"""
    dry_run: CliImplicitFlag[bool] = False
    """with --clean: remove nothing"""


class ReportCommand(Command):
    """python -m dmsae_ray.report: make all results of a sweep again from its chains' files, without training."""

    fresh: CliImplicitFlag[bool] = False
    """compute every pair and describe every feature anew, also where that was done for the same cores"""
    numbers: CliImplicitFlag[bool] = False
    """print every named number as well: what study.expect may refer to"""
    against: Output | None = None
    """results folder of another sweep (in the `sweeps` folder of any output, at a URL too): compare cores and numbers
    with it
    """


class EvaluateCommand(Command):
    """python -m dmsae_ray.evaluate: measure saved SAEs on held-out text, without training.

    evaluate.tokens and evaluate.sequences_per_batch of the command line say what to measure on; chains are those that
    the file describes, with the evaluation that it describes.
    """

    chain: str | None = None
    """label or key of a chain; empty: every finished chain"""
    all: CliImplicitFlag[bool] = False
    """every finished cycle, also of chains that are not finished, not the last one only"""


class HarvestCommand(Command):
    """python -m dmsae_ray.harvest: write the activation shards and stop."""

    verify: CliImplicitFlag[bool] = False
    """read every shard again, say what is bad, and stop"""
    repair: CliImplicitFlag[bool] = False
    """verify, delete what is bad, and make only that again"""


def only_looks(command: Config) -> bool:
    """Whether the command makes nothing: it says what is there, or removes some of it."""
    return isinstance(command, SweepCommand) and (command.status or command.clean)


def load(command: type[Config], argv: list[str]) -> Config:
    """Configuration from `--config` and the command line. Of a flag given twice the last counts, so that a script's can
    be overridden.

    Raises ValueError with one line per mistake: the file or flag, the field, what is wrong.
    """
    show_anything()
    sys.excepthook = print_scrubbed
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=None)
    path = first.parse_known_args(argv)[0].config or default_config_path()
    if (topic := topic_of(argv)) is not None:
        print(help_text(command, _plain(path), path, topic))
        raise SystemExit(0)
    _YamlFile.path = path
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(
            said
        ):  # argparse repeats what it does not know, secrets of URLs included, below all of --help
            loaded = command(_cli_settings_source=_command_line(command)(args=argv))
    except ValidationError as error:
        raise ValueError(explain(error, path)) from None
    except SettingsError as error:
        raise ValueError(f"command line: {scrub(str(error))}") from None
    except SystemExit:
        raise ValueError(
            f"command line: {scrub(said.getvalue().strip().rpartition('error: ')[2])} (see --help for all fields)"
        ) from None
    finally:
        _YamlFile.path = None
    if warning := openly(argv):
        print(warning)
    return loaded


@functools.cache
def _command_line(command: type[Config]) -> CliSettingsSource[Any]:
    """Reads a command line; made once, since a parser of all fields takes thirty milliseconds to make."""
    assert command.__doc__ is not None, "a command's text begins with how it is called"
    return CliSettingsSource(command, cli_prog_name=f"python -m {command.__doc__.split(':')[0].split()[-1]}")


def _plain(path: Path) -> Config:
    """What a run with this file and no other options has. Raises ValueError."""
    try:
        return Config(**read_experiment(path))
    except ValidationError as error:
        raise ValueError(explain(error, path)) from None


def explain(error: ValidationError, path: Path) -> str:
    """A validation error as a message a person can act on."""
    return f"{path} (with the command line's overrides):\n  " + "\n  ".join(problem_lines(error))
