"""Nodes with GPUs that torch cannot use are left out, and the build goes on where others can."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.engine.build import carry_out
from tests.pipeline.helpers.build_checks import check_whole
from tests.pipeline.helpers.fake_stages import Pictures, ingest, open_corpus, source_words, upper_words
from tests.pipeline.helpers.stub_torch import write_torch


@pytest.fixture
def bad_gpu() -> Iterator[Cluster]:
    """A cluster whose one node has a GPU, if Ray is believed."""
    options = {"num_gpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **options})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_build_goes_on_with_the_gpus_that_work_and_ends_without_any(bad_gpu: Cluster, tmp_path: Path) -> None:
    sources, stages = [Pictures(count=2)], [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    fault = r"node .* has GPU 0 as Ray says, and torch .* cannot use it: "
    with pytest.raises(RequestError, match=f"^no GPU of the cluster can be used: {fault}.*--num-gpus=0"):
        carry_out(corpus, sources, stages, ingest)

    works = write_torch(tmp_path)  # that of the other node
    bad_gpu.add_node(num_cpus=2, num_gpus=1, object_store_memory=100 << 20, env_vars=works)
    seen: list[Snapshot] = []
    summary = carry_out(corpus, sources, stages, ingest, progress=seen.append)
    check_whole(corpus, shards=4)
    assert summary.exit_status == 0 and summary.gpus == 1
    assert {commit.device for commit in corpus.commits("captions/upper")} == {"NVIDIA Tested"}
    notes = [note for shot in seen for note in shot.notes if "left out" in note]
    assert len(notes) == len(summary.gpus_left_out) <= 1  # if Ray had the idea to begin there
    assert "GPUs at work: 1" in summary.text()
