"""What is found behind errors that libraries and Ray wrapped."""

import errno

import pytest
import torch
from tmpfs import mounted

from dmsae_ray.causes import disk_full, disk_trouble
from dmsae_ray.distill.failure import DiskFull, final
from dmsae_ray.files import replacing


def behind(cause: BaseException) -> BaseException:
    """An error that was raised from this one."""
    try:
        raise RuntimeError("a library's words") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_final_and_named(code):
    said = final(behind(OSError(code, "words of the system", "/a/b")))
    assert isinstance(said, DiskFull) and str(said).startswith("/a/b: words of the system; free space there")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_stutters_is_worth_another_try(code):
    error = behind(OSError(code, "words", "/a/b"))
    assert disk_trouble(error) and disk_full(error) is None and final(error) is None


def test_a_full_disk_is_known_by_its_words_too():
    """As an actor's error arrives: text in text."""
    error = RuntimeError("ray::Aggregator.give() OSError: [Errno 28] No space left on device: '/x/y.json'")
    assert disk_full(error).startswith("/x/y.json: No space left on device; ")
    stale = RuntimeError("OSError: [Errno 116] Stale file handle: '/x'")
    assert disk_full(stale) is None and disk_trouble(stale).startswith("/x: Stale file handle; ")


def test_a_checkpoint_that_finds_no_room_names_itself(tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        path = disk / "checkpoint.pt"
        with (
            pytest.raises((OSError, RuntimeError)) as caught,
            replacing(path) as temporary,
            open(temporary, "wb") as file,
        ):
            torch.save({"a": torch.ones(100_000)}, file)
        assert str(final(caught.value)).startswith(f"{path}: No space left on device; ")
        assert list(disk.iterdir()) == []
