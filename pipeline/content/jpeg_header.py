"""Read how the scan of a baseline JPEG is coded: size, sampling, quantisation and Huffman tables."""

from dataclasses import dataclass, field

START_OF_SCAN = 0xDA
FRAMES = range(0xC0, 0xD0)  # markers of a frame, but for three
MAX_BLOCKS = 10  # of a MCU
NO_FRAMES = (0xC4, 0xC8, 0xCC)


@dataclass(frozen=True)
class Component:
    """One colour of a JPEG: how many blocks of it a MCU has, and by which tables it is coded."""

    name: int
    across: int
    down: int
    quantiser: int


@dataclass
class Header:
    """Contents of a JPEG's segments in front of the first scan."""

    width: int = 0
    height: int = 0
    components: list[Component] = field(default_factory=list)
    quantisers: dict[int, bytes] = field(default_factory=dict)
    huffman: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """By kind and number (0x10: the first of the others than the mean): codes of each length, and their symbols."""
    restart: int = 0
    scan: dict[int, int] = field(default_factory=dict)
    """The tables' numbers of each component of the first scan, as the file has them in one byte."""
    begin: int = 0
    """Offset in bytes of the first scan's data."""

    @property
    def unit(self) -> tuple[int, int]:
        """Height and width of a MCU in pixels."""
        if len(self.components) == 1:
            return 8, 8
        return 8 * max(part.down for part in self.components), 8 * max(part.across for part in self.components)


def baseline_header(data: bytes) -> Header | None:
    """Read the header of a JPEG that has one scan of all colours, coded by Huffman tables; None for any other."""
    header, at = Header(), 2
    try:
        while data[at] == 0xFF:
            name = data[at + 1]
            if name == 0xFF:  # filling
                at += 1
                continue
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if name in FRAMES and name not in NO_FRAMES:
                if name > 0xC1 or data[at + 4] != 8 or header.components:
                    return None
                _read_frame(header, data[at + 5 : end])
            else:
                _read_table(header, name, data[at + 4 : end])
            if name == START_OF_SCAN:
                header.begin = end
                return header if _is_complete(header) else None
            at = end
    except IndexError:
        pass
    return None


def _read_frame(header: Header, body: bytes) -> None:
    header.height, header.width = int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")
    for at in range(5, 5 + 3 * body[4], 3):
        header.components.append(Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2]))


def _read_table(header: Header, name: int, body: bytes) -> None:
    at = 0
    if name == 0xDB:
        while at < len(body):
            size = 128 if body[at] >> 4 else 64
            header.quantisers[body[at] & 15] = body[at + 1 : at + 1 + size]
            at += 1 + size
    elif name == 0xC4:
        while at < len(body):
            counts = body[at + 1 : at + 17]
            symbols = body[at + 17 : at + 17 + sum(counts)]
            if len(symbols) == sum(counts):
                header.huffman[body[at]] = counts, symbols
            at += 17 + sum(counts)
    elif name == 0xDD:
        header.restart = int.from_bytes(body[:2], "big")
    elif name == START_OF_SCAN:
        header.scan = {body[at]: body[at + 1] for at in range(1, 1 + 2 * body[0], 2)}


def _is_complete(header: Header) -> bool:
    tables = [kind + number for used in header.scan.values() for kind, number in ((0, used >> 4), (0x10, used & 15))]
    return (
        bool(header.components)
        and list(header.scan) == [part.name for part in header.components]
        and all(1 <= part.across <= 4 and 1 <= part.down <= 4 for part in header.components)
        and (len(header.components) == 1 or sum(part.across * part.down for part in header.components) <= MAX_BLOCKS)
        and all(len(header.quantisers.get(part.quantiser, b"")) in (64, 128) for part in header.components)
        and all(table in header.huffman for table in tables)
    )
