"""`microdit convert`: it finds out which way it goes, and says what is wrong with a request."""

import json
import tarfile
from pathlib import Path

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from tests.data.mds import make
from tests.pipeline.helpers.mds_folders import OFFICIAL, WORKERS, all_samples, microdit, read_mds, small

__all__ = ["small"]


def test_the_command_finds_out_which_way_it_goes(tmp_path: Path) -> None:
    made = microdit(OFFICIAL, tmp_path / "corpus", "--source", "cc12m", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["columns"]["latents/sdxl-512"]["out"] == 3
    again = microdit(OFFICIAL, tmp_path / "corpus", "--source", "cc12m")
    assert again.stdout.startswith("nothing to do: all of it is there\n")
    back = microdit(tmp_path / "corpus", tmp_path / "mds")
    assert back.exit_code == 0, back.output
    assert "3 samples in = 3 out + 0 left out" in back.stdout
    assert read_mds(tmp_path / "mds") == [make.encoded(sample) for sample in all_samples("official")]
    with tarfile.open(next((tmp_path / "corpus/images").rglob("*.tar"))) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["jpg", "json"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{mds}", "{new}"], "--source: name the samples"),
        (["{mds}", "{new}", "--source", "a", "--selection", "b"], "--selection: it is for the other way"),
        (["{corpus}", "{new}", "--source", "a"], "--source: it is for the other way; FROM is a corpus"),
        (["{corpus}", "{new}", "--text-shape", "77"], "--text-shape '77': expected tokens and width"),
        (["{corpus}", "s3://bucket/x"], "MDS is written to a folder of this machine"),
        (["{corpus}", "{new}", "--compression", "br"], "--compression 'br': expected zstd"),
        (["{new}", "{new}"], "there is no such folder; expected MDS shards, or a corpus"),
        (["{empty}", "{new}"], "it is no corpus"),
    ],
)
def test_a_wrong_request_is_told(tmp_path: Path, small: Corpus, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"mds": WORKERS, "corpus": small.url, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    result = microdit(*(argument.format_map(folders) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "new").exists()
