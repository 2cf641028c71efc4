"""Group the members of tars into samples: neighbours whose names begin alike, and pictures whose names have dots."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import MAX_BYTES
from microdit.pipeline.sources.members import IMAGES, whole_stem

MAX_MEMBERS, MAX_HELD = 100, 2 * MAX_BYTES
"""Members, and bytes of them, from which on the next name begins other neighbours; twice as many are never held."""


NOT_TAKEN = "not_taken"


@dataclass(frozen=True)
class TarSample:
    """An image with its texts, by extension, and the images of the same sample that are not taken."""

    name: str
    image: Member
    texts: dict[str, Member]
    others: list[Member]

    @property
    def key(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass
class Neighbours:
    """Adjacent members of a tar whose names are equal up to their first dot, by extension."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    held: int = 0
    damaged: Member | None = None
    """A `damaged_archive`, which stands alone."""

    def is_full(self, same_sample: bool) -> bool:
        """Return True if no further member shall be added; one whose name differs in its last extension only may."""
        times = 2 if same_sample else 1
        return len(self.members) >= times * MAX_MEMBERS or self.held >= times * MAX_HELD

    def add(self, extension: str, member: Member) -> None:
        self.members[extension] = member
        self.held += len(member.data or b"")

    def samples(self, named: Sequence[str], texts: Collection[str]) -> list[TarSample]:
        """Make the samples.

        The image with the lowest rank is the sample's, with the texts of exactly the extensions in `texts`. Images with
        a longer name (`22.05.png`) are samples of their own, with the texts of their whole name (`22.05.txt`), if there
        is such a text, or if there are several and no image with the short name.
        """
        ranks = {extension: order for extension in self.members if (order := rank(extension, named)) is not None}
        inner: dict[str, list[str]] = {}
        for extension, order in ranks.items():
            if order >= len(named or IMAGES):
                inner.setdefault(extension.rpartition(".")[0], []).append(extension)
        is_short = len(ranks) > sum(map(len, inner.values()))
        alone = len(inner) == 1 and not is_short
        made: list[TarSample] = []
        own: set[str] = set()
        for name, extensions in inner.items():
            its_texts = self._texts_of(f"{name}.", texts)
            if its_texts or not (is_short or alone):
                own.update(extensions)
                made.append(self._sample(f"{self.name}.{name}", extensions, ranks, its_texts))
        if main := [extension for extension in ranks if extension not in own]:
            made.insert(0, self._sample(self.name, main, ranks, self._texts_of("", texts)))
        return made

    def _texts_of(self, before: str, texts: Collection[str]) -> dict[str, Member]:
        return {text: self.members[before + text] for text in sorted(texts) if before + text in self.members}

    def _sample(
        self, name: str, extensions: Sequence[str], ranks: dict[str, int], texts: dict[str, Member]
    ) -> TarSample:
        taken = min(extensions, key=ranks.__getitem__)
        others = [self.members[extension] for extension in extensions if extension != taken]
        return TarSample(name, self.members[taken], texts, others)


def neighbours(members: Iterable[Member]) -> Iterator[Neighbours]:
    """Group adjacent members; a name that comes again begins other neighbours."""
    group, last = Neighbours(""), ""
    for member in members:
        if member.reason == "damaged_archive":
            if group.members:
                yield group
            yield Neighbours("", damaged=member)
            group = Neighbours("")
            continue
        name, extension = whole_stem(member.name), stem(member.name)[1]
        inner = extension.rpartition(".")[0]
        if name != group.name or extension in group.members or group.is_full(inner == last):
            if group.members:
                yield group
            group = Neighbours(name)
        group.add(extension, member)
        last = inner
    if group.members:
        yield group


def samples_with_text(members: Iterable[Member]) -> Iterator[tuple[str, Member, Member | None]]:
    """Group images with their `txt`, as in the tars of known datasets.

    Yields the sample's name, the image, and its text. A damaged archive, and an image of which another one is taken
    (`not_taken`), are images without bytes. Texts without an image are skipped.
    """
    for group in neighbours(members):
        if group.damaged is not None:
            yield "", group.damaged, None
        for sample in group.samples((), ("txt",)):
            yield sample.key, sample.image, sample.texts.get("txt")
            for other in sample.others:
                detail = f"of this sample {sample.image.name} is taken"
                yield sample.key, Member(other.name, None, NOT_TAKEN, detail), None


def rank(extension: str, named: Sequence[str]) -> int | None:
    """Rank the images of a sample, of which the lowest is taken; None for other members.

    Args:
        named: the extensions to take, all that are known if it is empty. `small.jpg` ranks behind all of them, as jpg.
    """
    known = named or IMAGES
    if extension in known:
        return known.index(extension)
    last = extension.rpartition(".")[2]
    return len(known) + known.index(last) if last in known else None
