"""`verify` of a part of a corpus: some columns, one source, a share of the shards; on a cluster the same."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.app import app
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.spread import spread
from microdit.pipeline.upkeep.verify import VerifiedPart, verify
from tests.pipeline.helpers.small_corpus import LATENTS, NEXT, REF, SOURCE, fill, keys_of, make_corpus, write_images


@pytest.fixture
def damaged(tmp_path: Path) -> Corpus:
    """8 shards; of each the latents' object, and of the first the images' too, is damaged."""
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, units=4)
    for commit in [*corpus.commits(LATENTS), corpus.commits("images")[0]]:
        path = tmp_path / "corpus" / commit.object.name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    return corpus


def test_the_objects_of_other_columns_are_not_read(damaged: Corpus) -> None:
    whole = verify(damaged)
    assert len(whole.problems) == 9
    part = verify(damaged, part=VerifiedPart([LATENTS]))
    assert len(part.problems) == 8 and part.totals.samples.keys() == {LATENTS}
    assert part.totals.bytes == sum(commit.size for commit in damaged.commits(LATENTS)) < whole.totals.bytes
    assert verify(damaged, part=VerifiedPart(["captions/source"])).problems == []
    assert len(verify(damaged, part=VerifiedPart(source=SOURCE)).problems) == 9


def test_samples_of_several_seeds_come_to_see_every_shard(damaged: Corpus) -> None:
    def seen(seed: int) -> set[str]:
        result = verify(damaged, part=VerifiedPart([LATENTS], sample=0.4, seed=seed))
        assert len(result.problems) == result.totals.commits
        return {problem.what for problem in result.problems}

    drawn = [seen(seed) for seed in range(12)]
    assert drawn == [seen(seed) for seed in range(12)]
    assert len(set.union(*drawn)) == 8 and all(len(of) < 8 for of in drawn)


def test_what_is_not_there_is_refused(damaged: Corpus) -> None:
    with pytest.raises(RequestError, match=r"columns: latents/none is not declared; there are .*latents"):
        verify(damaged, part=VerifiedPart([LATENTS, "latents/none"]))
    with pytest.raises(RequestError, match="source: none is not declared; there are demo"):
        verify(damaged, part=VerifiedPart(source="none"))
    with pytest.raises(RequestError, match="sample: 0 is no share"):
        verify(damaged, part=VerifiedPart(sample=0.0))


def test_the_command_says_what_was_checked(damaged: Corpus) -> None:
    result = CliRunner().invoke(app, ["verify", damaged.url, "--columns", LATENTS, "--sample", "0.9", "--seed", "5"])
    assert result.exit_code == 1
    assert (
        f"checked: columns {LATENTS}, a share of 0.9 of the shards by seed 5 (another --seed draws others); "
        "tables and selections were not"
    ) in result.stdout
    assert CliRunner().invoke(app, ["verify", damaged.url, "--columns", "captions/source"]).exit_code == 0


def test_keys_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("verify", "verify_shard"):
        monkeypatch.setattr(
            f"microdit.pipeline.upkeep.{module}.key_hashes", lambda keys: np.zeros(len(keys), np.uint64)
        )
    corpus = make_corpus(tmp_path)
    fill(corpus)
    assert verify(corpus).problems == []
    write_images(corpus, NEXT, keys=[*keys_of(NEXT)[:-1], keys_of(REF)[0]], generation=1, failed=())
    found = [problem.detail for problem in verify(corpus).problems if problem.what == f"images/{SOURCE}"]
    assert found == [f"key {keys_of(REF)[0]!r} is in the shards {[REF.shard, NEXT.shard]}"]


def test_a_cluster_finds_the_same(damaged: Corpus) -> None:
    one, many = verify(damaged), verify(damaged, spread=spread)
    assert many == one and len(one.problems) == 9
