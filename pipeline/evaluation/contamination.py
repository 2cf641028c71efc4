"""Count what an evaluation shares with the training: captions that are prompts, and images that are of the reference.

A model that has seen GenEval's prompts with fitting pictures scores high without having learned more: its figure says
so then. Captions and prompts are compared by their words, without case, punctuation, order and filler words.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import decontaminate

WORD = re.compile(r"\w+")
FILLERS = {"a", "an", "the", "of", "in", "on", "at", "is", "are", "and", "one", "there", "this", "that", "with"} | {
    "photo", "photos", "photograph", "picture", "image", "images",
}  # fmt: skip
NEAR = 0.8  # of the words of both together that both must have
EXAMPLES = 20


def words_of(text: str) -> frozenset[str]:
    """Take the words of a caption that count; all of them if those are none."""
    words = frozenset(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
    return words - FILLERS or words


class PromptIndex:
    """Finds the prompts that a caption is, or nearly is."""

    def __init__(self, prompts: Sequence[str]):
        self._prompts: dict[frozenset[str], str] = {}
        for prompt in prompts:
            self._prompts.setdefault(words_of(prompt), prompt)
        self._longest = max(map(len, self._prompts), default=0)
        self._by_word: dict[str, list[frozenset[str]]] = defaultdict(list)
        for words in self._prompts:
            for word in words:
                self._by_word[word].append(words)

    def find(self, caption: str) -> tuple[str, bool] | None:
        """Return the nearest prompt, and whether all words are the same; None if none is near."""
        words = words_of(caption)
        if words in self._prompts:
            return self._prompts[words], True
        if len(words) * NEAR > self._longest:
            return None
        candidates = {other for word in words for other in self._by_word.get(word, ())}
        shares = [(len(words & other) / len(words | other), self._prompts[other]) for other in candidates]
        share, prompt = max(shares, default=(0.0, ""))
        return (prompt, False) if share >= NEAR else None


def contaminated_captions(corpus: Corpus, prompts: Sequence[str]) -> dict[str, Any]:
    """Count the captions of a corpus, of all its captions columns, that are prompts or nearly.

    Returns `captions` (how many were read), `equal`, `near`, `prompts` (how many have such a caption) and `examples`.
    """
    index, count, kinds = PromptIndex(prompts), 0, {True: 0, False: 0}
    met: set[str] = set()
    examples: list[dict[str, str]] = []
    for name, caption in _captions(corpus):
        count += 1
        if (found := index.find(caption)) is None:
            continue
        prompt, equal = found
        kinds[equal] += 1
        if prompt not in met and len(examples) < EXAMPLES:
            examples.append({"sample": name, "caption": caption[:300], "prompt": prompt})
        met.add(prompt)
    return {"captions": count, "equal": kinds[True], "near": kinds[False], "prompts": len(met), "examples": examples}


def contaminated_images(corpus: Corpus, reference: str) -> dict[str, Any]:
    """Count the images of a corpus near those of another, as `microdit decontaminate`, which leaves its table there.

    Raises:
        RequestError: one of both has no hashes (`scores/basic`).
    """
    found = decontaminate(corpus, [reference])
    return {"images": found.samples, "near": found.contaminated, "equal": found.exact, "distance": found.distance}


def _captions(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Read the captions of a corpus, each with the name of its sample."""
    for column in sorted(name for name in corpus.columns() if name.startswith("captions/")):
        for commit in {(each.source, each.shard): each for each in corpus.commits(column)}.values():
            for row, caption in enumerate(corpus.sidecar(commit, ["caption"])["caption"].to_pylist()):
                if caption:
                    yield f"{commit.source}/{commit.shard}/{row}", caption
