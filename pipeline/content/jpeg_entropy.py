"""Read the scan of a baseline JPEG symbol by symbol, for what no encoder writes and decoders pass over in silence.

Decoders ignore a block of more than 64 coefficients, clip a mean that is brighter than white or darker than black, and
complete a picture whatever bytes are left behind it. Two of three scans that lost synchronisation and resynchronised
have such blocks: the means are stored as differences, and are off from there on.
"""

import re
from dataclasses import dataclass

import numpy as np

from microdit.pipeline.content.decoded import BadImage
from microdit.pipeline.content.jpeg_header import Header, baseline_header
from microdit.pipeline.content.jpeg_scan import FEW, end_of_scans
from microdit.pipeline.content.jpeg_seams import has_seam

MAX_SCAN = 4_000_000  # bytes; a second for 3 MB
CHUNK = 1 << 16  # bytes of which the symbols at every bit are looked up at a time
SPARE = 1 << 13  # bytes, more than the symbols of a MCU have
RESTARTS = re.compile(rb"\xff[\xd0-\xd7]")
LARGEST = 1024  # of a coefficient, times its quantiser, as the transform of 8 bits gives them
OVERSHOOT = 256  # that encoders may add against ringing, and more than any is known to
BLOCK_ENDS, NO_CODE = 100, 200  # in place of a step, behind the 64 coefficients of a block


@dataclass(frozen=True)
class Coder:
    """Look-up tables of a component's Huffman codes, indexed by the next 16 bits of the scan."""

    blocks: int
    quantiser: int
    mean_length: bytes
    mean_size: bytes
    step: np.ndarray
    """By how many coefficients a symbol goes on."""
    advance: np.ndarray
    """By how many bits."""


def check_place(data: bytes, pixels: np.ndarray, scale: float) -> None:
    """Refuse a baseline JPEG whose scan lost synchronisation for a while, at which decoders do not complain.

    Pixels whose colours jump at the corner of a MCU are the sign, what the scan's symbols say is the proof. Without a
    sign symbols are not read: that takes seven times as long as all else that is done with a JPEG.

    Args:
        pixels: as decoded, not turned, `scale` times as large as the picture.

    Raises:
        BadImage: `damaged`.
    """
    if (header := baseline_header(data)) is None:
        return
    down, across = header.unit
    colours = pixels if len(header.components) > 1 else pixels[..., :1]
    seen = len(header.components) == 4 or has_seam(colours, round(down * scale), round(across * scale))  # inks hide it
    end = end_of_scans(data)[0] if seen else None
    if end is not None and (fault := scan_fault(data, header, end)):
        raise BadImage("damaged", f"the scan lost synchronisation: {fault}")


def scan_fault(data: bytes, header: Header, end: int) -> str | None:
    """Look for what no encoder writes in the scan up to `end`: what it is, or None.

    None too for a scan that is too long to be read.
    """
    if end - header.begin > MAX_SCAN:
        return None
    coders = _coders(header)
    down, across = header.unit
    units = -(-header.width // across) * -(-header.height // down)
    parts = RESTARTS.split(data[header.begin : end]) if header.restart else [data[header.begin : end]]
    for number, part in enumerate(parts):
        count = min(header.restart or units, units - number * header.restart)
        fault = _part_fault(part.replace(b"\xff\0", b"\xff"), coders, count) if count > 0 else None
        if fault:
            return fault
    return None


def _coders(header: Header) -> list[Coder]:
    alone = len(header.components) == 1
    coders = []
    for part in header.components:
        used, packed = header.scan[part.name], header.quantisers[part.quantiser]
        quantisers = np.frombuffer(packed, np.uint8 if len(packed) == 64 else ">u2").tolist()
        lengths, sizes = _codes(*header.huffman[used >> 4])
        length, symbol = _codes(*header.huffman[0x10 + (used & 15)])
        size, run = symbol & 15, symbol >> 4
        step = np.where(size > 0, run + 1, np.where(symbol == 0xF0, 16, BLOCK_ENDS))
        most = (LARGEST + OVERSHOOT) // max(1, min(quantisers[1:]))
        step[(length == 0) | (size > most.bit_length())] = NO_CODE
        advance = np.maximum(length, 1) + size
        blocks = 1 if alone else part.across * part.down
        narrow = [table.astype(np.uint8) for table in (lengths, sizes, step, advance)]
        coders.append(Coder(blocks, quantisers[0], narrow[0].tobytes(), narrow[1].tobytes(), narrow[2], narrow[3]))
    return coders


def _codes(counts: bytes, symbols: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the length and the symbol of the code that any 16 bits begin with; the length 0 where there is none."""
    lengths, found, at, number = np.zeros(1 << 16, int), np.zeros(1 << 16, int), 0, 0
    for length, count in enumerate(counts, 1):
        span = 1 << (16 - length)
        for _ in range(count):
            lengths[at : at + span], found[at : at + span] = length, symbols[number]
            at, number = at + span, number + 1
    return lengths, found


def _part_fault(part: bytes, coders: list[Coder], units: int) -> str | None:
    """Look for a fault in the bytes between two restart markers, which hold so many MCUs."""
    at = base = done = 0  # at: a bit, of the chunk that begins at the byte `base`
    means = [0] * len(coders)
    while done < units:
        base, at = base + at // 8, at % 8
        if base >= len(part):  # too short: decoders say so
            return None
        words, tables = _looked_up(part[base : base + CHUNK + SPARE], coders)
        while done < units and at < 8 * CHUNK:
            for number, coder in enumerate(coders):
                step, advance = tables[number]
                for _ in range(coder.blocks):
                    word = words[at]
                    size = coder.mean_size[word]
                    at += coder.mean_length[word]
                    if size:
                        value = words[at] >> (16 - size) if size <= 16 else 0
                        means[number] += value if value >> (size - 1) else value - (1 << size) + 1
                        at += size
                        if abs(means[number]) * coder.quantiser > LARGEST + 2 * coder.quantiser + 16:
                            return f"block means out of range in MCU {done} of {units}"
                    read = 1
                    while read < 64:
                        read += step[at]
                        at += advance[at]
                    if 64 < read < BLOCK_ENDS or read >= NO_CODE:
                        return f"coefficients that no encoder writes in MCU {done} of {units}"
            done += 1
    left = part[base + -(-at // 8) :]
    if len(left) > FEW and left.count(left[:1]) != len(left):
        return f"{len(left)} bytes behind the last MCU"
    return None


def _looked_up(chunk: bytes, coders: list[Coder]) -> tuple[memoryview, list[tuple[bytes, bytes]]]:
    """Return the 16 bits from every bit on, and the steps and advances of each component there."""
    padded = np.frombuffer(chunk + bytes(SPARE), np.uint8).astype(np.uint32)
    three = (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]
    words = ((three[:, None] >> np.arange(8, 0, -1, dtype=np.uint32)) & 0xFFFF).astype(np.uint16).reshape(-1)
    known: dict[int, tuple[bytes, bytes]] = {}
    tables = []
    for coder in coders:
        same = next((other for other in coders if np.array_equal(other.step, coder.step)), coder)
        if id(same) not in known:
            known[id(same)] = same.step[words].tobytes(), same.advance[words].tobytes()
        tables.append(known[id(same)])
    return words.data, tables
