"""Find the hosts that cost a build the most URLs."""

from collections import Counter, defaultdict
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

import pyarrow as pa

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId
from microdit.pipeline.corpus.reasons import OF_SERVERS, in_words

MOST_SHARDS = 200  # whose rows are read
MOST_HOSTS = 5
FEW = 10  # URLs that are not worth a line


def committed_shards(corpus: Corpus, source: str) -> dict[ShardId, int]:
    """List a source's committed shards of images, with their newest generations."""
    return corpus.committed(IMAGES, source)


def failing_hosts(corpus: Corpus, source: str, before: Collection[tuple[ShardId, int]]) -> str:
    """Say which hosts failed the most URLs of the shards that were committed since; empty if hardly any did."""
    new = sorted(set(committed_shards(corpus, source).items()) - set(before))
    read = new[:: -(-len(new) // MOST_SHARDS)] if new else []
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (_, shard), generation in read:
        with suppress(DamagedError, FileNotFoundError, pa.ArrowException):
            commit = corpus.commit(IMAGES, source, shard, generation)
            if commit.counts["failed"]:
                for row in corpus.sidecar(commit, ["origin", "reason"]).to_pylist():
                    if row["reason"] and OF_SERVERS.fullmatch(row["reason"]):
                        reasons[_host(row["origin"] or "")][row["reason"]] += 1
    total = sum(counts.total() for counts in reasons.values())
    if total < FEW:
        return ""
    worst = sorted(reasons, key=lambda host: (-reasons[host].total(), host))[:MOST_HOSTS]
    named = "; ".join(f"{host} {reasons[host].total():,} ({in_words(reasons[host])})" for host in worst)
    of = "" if len(read) == len(new) else f" in {len(read)} of its {len(new):,} new shards"
    return f"source {source}: servers failed {total:,} URLs of {len(reasons):,} hosts{of}, most of them {named}"


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "?"
    except ValueError:
        return "?"
