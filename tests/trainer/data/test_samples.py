import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.run_samples import split
from microdit.pipeline.selection.sample_index import index_samples
from microdit.trainer.data.samples import open_samples
from tests.trainer.conftest import build_recipe

COLUMNS = ["latents/demo-32", "text/tiny@source", "text/tiny@long"]


def test_hold_out_is_disjoint_stable_and_the_same_for_all_stages(corpus: Corpus) -> None:
    full, _ = index_samples(corpus, newest_commits(corpus, COLUMNS[:2]))
    fewer, _ = index_samples(corpus, newest_commits(corpus, COLUMNS))
    (a, b), (of_full, held) = split([full, fewer], 10, seed=5)
    assert len(of_full) == len(held)
    names = {held.name(i) for i in range(len(held))}
    assert len(names) == 10
    assert len(b) == len(fewer) - 10
    for index in (a, b):
        assert not names & {index.name(i) for i in range(len(index))}
    (again,) = split([fewer], 10, seed=5)[1]
    assert {again.name(i) for i in range(10)} == names
    (other,) = split([fewer], 10, seed=6)[1]
    assert {other.name(i) for i in range(10)} != names


def test_holding_out_everything_is_refused(corpus: Corpus) -> None:
    index, _ = index_samples(corpus, newest_commits(corpus, COLUMNS))
    with pytest.raises(RequestError, match="hold_out: 84 leaves nothing"):
        split([index], 84, seed=0)


def test_open_samples_of_a_recipe_with_two_resolutions(corpus: Corpus, tmp_path) -> None:
    stage = {"batch": 8, "learning_rate": 1e-3, "steps": 2}
    stages = [stage | {"latents": "latents/demo-32"}, stage | {"latents": "latents/demo-64"}]
    samples = open_samples(build_recipe(corpus, tmp_path / "run", stages=stages, hold_out=4))
    assert [len(index) for index in samples.legs] == [80, 80]
    assert len(samples.held) == 4
