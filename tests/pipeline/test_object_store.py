"""Activations in an object store: the same files, the same weights, and no secret anywhere."""

import pytest
from conftest import command, run_command, same_results
from s3_server import KEYS

from dmsae_ray import harvest, sweep

PASSWORD = "secretwordofaurl"


def files_below(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def holding(folder, word: str) -> list[str]:
    """Files, logs among them, in which a word stands."""
    return [name for name, content in files_below(folder).items() if word.encode() in content]


@pytest.mark.slow
def test_harvesting_to_a_url_and_training_from_it_gives_the_files_and_weights_of_a_folder(small_sweep, s3, tmp_path):
    s3.proxy.reset()
    # The keys of the environment, again in the URL, where they would be shown if anything showed the URL.
    url = s3.url("made", proxy=True).replace("s3://", f"s3://{KEYS['AWS_ACCESS_KEY_ID']}:{PASSWORD}@")
    (folder,) = (small_sweep.output / "data").glob("*")
    run = run_command(tmp_path / "out", "--harvest.store", url, module="harvest")
    assert run.code == 0 and f"s3://activations/made/{folder.name}" in run.out, run.out
    references = {name for name in files_below(folder) if name.startswith("references")}
    assert s3.content(f"made/{folder.name}") == {n: c for n, c in files_below(folder).items() if n not in references}
    assert not (tmp_path / "out" / "data").exists()

    place, options = url.split("?")
    trained = run_command(
        tmp_path / "out", "--sweep.seeds", "0", "--harvest.dataset", f"{place}/{folder.name}?{options}"
    )
    assert trained.code == 0 and "complete and checked" in trained.out, trained.out
    same_results(tmp_path / "out", small_sweep.output, cycles=2)
    assert set(files_below(tmp_path / "out" / "data" / folder.name)) == references
    for secret in (PASSWORD, KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in run.out + trained.out and not holding(tmp_path / "out", secret)


@pytest.mark.slow
def test_bad_shards_of_a_url_are_made_again_there_and_they_alone(small_sweep, s3, tmp_path, capfd):
    (folder,) = (small_sweep.output / "data").glob("*")
    names = [f"shards/{name}.parquet" for name in ("calibration", "train-00000", "train-00001")]
    s3.upload(folder, f"bad/{folder.name}")
    with s3.files.open_output_stream(f"activations/bad/{folder.name}/{names[1]}") as stream:
        stream.write((folder / names[1]).read_bytes()[:-1])
    s3.files.delete_file(f"activations/bad/{folder.name}/{names[2]}")
    arguments = ("--harvest.store", s3.url("bad", proxy=True))
    s3.proxy.reset()
    assert harvest.main(command(tmp_path / "out", *arguments, "--verify")[3:]) == 1
    assert "2 bad" in capfd.readouterr().out
    run = run_command(tmp_path / "out", *arguments, "--repair", module="harvest")
    assert run.code == 0, run.out
    assert {name: s3.content(f"bad/{folder.name}")[name] for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    written = {name for request in s3.proxy.served if request.method == "PUT" for name in names if name in request.path}
    assert written == set(names[1:])
    assert harvest.main(command(tmp_path / "out", *arguments, "--verify")[3:]) == 0


@pytest.mark.parametrize(
    "url",
    [
        f"s3://name:{PASSWORD}@activations/x?nonsense=1",  # refused before anything is sent
        # nothing there
        f"s3://name:{PASSWORD}@activations/x?endpoint_override=127.0.0.1:PORT&scheme=http&region=us-east-1",
        f"strange://name:{PASSWORD}@activations/x",
    ],
)
@pytest.mark.parametrize("main, option", [(sweep.main, "--harvest.dataset"), (harvest.main, "--harvest.store")])
def test_no_secret_of_a_url_is_said_or_kept(s3, tmp_path, capfd, url, main, option):
    output = tmp_path / "out"
    url = url.replace("PORT", str(s3.port))
    verify = ["--verify"] if main is harvest.main else []
    assert main(command(output, option, url, *verify)[3:]) == 2
    said = capfd.readouterr()
    assert "activations/x" in said.err and PASSWORD not in said.out + said.err
    assert not holding(output, PASSWORD)
