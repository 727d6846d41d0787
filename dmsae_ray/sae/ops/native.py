"""The compiled kernels of `kernels.c`: built once per machine with the system's C compiler, called through ctypes.

Nothing but a C compiler with OpenMP is needed; without one, `pairs.py` does the same in plain torch. The library lies
in a cache folder under a name made of source, compiler and processor, so a shared home folder serves unlike machines.

An image has no compiler, and is built on another machine than it runs on:

    python -m dmsae_ray.sae.ops.native FOLDER

builds the kernels ahead for each of LEVELS, and they are taken from there where $DMSAE_RAY_KERNELS names the folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from dmsae_ray.files import replacing

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
LEVELS = {
    "x86-64-v4": ("x86_64", "avx2 bmi1 bmi2 f16c fma abm movbe avx512f avx512bw avx512cd avx512dq avx512vl"),
    "x86-64-v3": ("x86_64", "avx2 bmi1 bmi2 f16c fma abm movbe"),
    "armv8-a": ("aarch64", "asimd"),
}
"""What kernels are built for ahead, the best first: machine, and what /proc/cpuinfo says of a processor that has it."""
ROWS = 32
"""Rows of a matrix that share partial sums (the same number in kernels.c)."""
SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}


class NotBuilt(RuntimeError):
    """The kernels cannot be had on this machine; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/dmsae_ray, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmsae_ray"


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels: those built ahead, else built now if they are not there. Raises NotBuilt if neither can be
    had.
    """
    try:
        return ctypes.CDLL(str(_built_ahead() or _built_here()))
    except OSError as error:
        raise NotBuilt(f"{cache_folder()}: {error}") from error


def build_ahead(folder: Path) -> list[Path]:
    """Builds the kernels for every level of this kind of machine. Raises NotBuilt."""
    levels = [level for level, (machine, _) in LEVELS.items() if machine == platform.machine()]
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        _build(compiler, level, folder / _name_ahead(level))
    return [folder / _name_ahead(level) for level in levels]


def _built_ahead() -> Path | None:
    """For the best level that this processor has; of another source than ours there are none."""
    has = set(_processor().split())
    for level, (machine, needed) in LEVELS.items():
        path = Path(os.environ.get("DMSAE_RAY_KERNELS", ""), _name_ahead(level))
        if machine == platform.machine() and has.issuperset(needed.split()) and path.is_absolute() and path.exists():
            return path
    return None


def _name_ahead(level: str) -> str:
    return f"kernels-{_digest(level)}-{level}.so"


def _built_here() -> Path:
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    path = cache_folder() / f"kernels-{_digest(version, _processor())}.so"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _build(compiler, "native", path)
    _check_ours(path.parent)
    _check_ours(path)
    return path


def _digest(*of: str) -> str:
    return hashlib.sha256("\n".join([SOURCE.read_text(), " ".join(FLAGS), *of]).encode()).hexdigest()[:16]


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NotBuilt("no C compiler found (cc, gcc or clang)")
    return compiler


def _check_ours(path: Path) -> None:
    """What is loaded is run: nobody but this user and root may have written it. Raises NotBuilt."""
    about = path.stat()
    if about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
        raise NotBuilt(
            f"{path} is another user's, or everybody may write to it, so it is not loaded; set XDG_CACHE_HOME to a "
            "folder of your own"
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _build(compiler: str, march: str, path: Path) -> None:
    """Compile to a temporary name and rename: several processes may do this at once."""
    with replacing(path) as temporary:
        done = subprocess.run(
            [compiler, *FLAGS, f"-march={march}", "-o", str(temporary), str(SOURCE), "-lm"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            errors = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or [f"exit {done.returncode}"]
            )
            raise NotBuilt(f"{compiler} failed: {errors[0]}")


def call(name: str, dtype: torch.dtype | None, *arguments, returns=None):
    """Call a kernel, by its name and the precision it is for. Tensors go as pointers (None: a null pointer), ints as
    int64, floats as double, bools and `Int` as int.
    """
    function = _function(name + (SUFFIX[dtype] if dtype is not None else ""), returns)
    return function(*(_argument(argument) for argument in arguments))


@functools.cache
def _function(name: str, returns):
    function = getattr(library(), name)
    function.restype = returns
    return function


class Int(int):
    """A C int; plain Python ints go as int64."""


def _argument(value):
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device.type == "cpu", "kernels take contiguous CPU tensors"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, Int | bool):
        return ctypes.c_int(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value)


def threads() -> Int:
    """As many as torch uses."""
    return Int(torch.get_num_threads())


if __name__ == "__main__":
    print(*build_ahead(Path(sys.argv[1])), sep="\n")
