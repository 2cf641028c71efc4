"""The threads around a device: order, bounds, and errors in every step."""

import threading
import time

import pytest

from microdit.pipeline.base.threads import chunks
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.batch_line import WRITING, BatchLine, prepared_images
from microdit.pipeline.stages.rows import RowFailure


def rows(count: int) -> list[Row]:
    return [Row(i, f"k{i}", True, {}, {}) for i in range(count)]


def test_everything_is_written_in_order_by_one_thread() -> None:
    failed, written, threads = [], [], set()

    def prepare(row: Row) -> int:
        time.sleep(0.001 * (row.row % 3))
        if row.row % 5 == 4:
            raise ValueError("no image")
        return row.row

    def write(batch: list, encoded: list[int]) -> None:
        threads.add(threading.get_ident())
        written.extend(encoded)

    def fail(row: Row, failure: RowFailure) -> None:
        failed.append((row.row, failure.reason, str(failure)))

    before = threading.active_count()
    with BatchLine(4) as line:
        images = prepared_images(line, rows(30), prepare, fail, 8)
        line.run(chunks(images, 7), lambda batch: [10 * image.image for image in batch], write)
    assert written == [10 * i for i in range(30) if i % 5 != 4]
    assert sorted(failed) == [(i, "damaged", "ValueError: no image") for i in range(4, 30, 5)]
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert threading.active_count() == before


def test_encoding_waits_for_a_slow_writer() -> None:
    encoded, gate = [], threading.Event()

    def encode(batch: int) -> int:
        encoded.append(batch)
        return batch

    def run() -> None:
        with BatchLine(1) as line:
            line.run(range(20), encode, lambda batch, result: gate.wait() and None)

    worker = threading.Thread(target=run)
    worker.start()
    while len(encoded) <= WRITING:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(encoded) == WRITING + 1
    gate.set()
    worker.join()
    assert encoded == list(range(20))


@pytest.mark.parametrize("where", ["read", "encode", "write"])
def test_an_error_in_any_step_ends_the_line(where: str) -> None:
    def broken(step: str, number: int) -> None:
        if step == where and number == 5:
            raise OSError(step)

    def items():
        for row in rows(12):
            broken("read", row.row)
            yield row

    before = threading.active_count()
    with pytest.raises(OSError, match=where), BatchLine(2) as line:
        images = prepared_images(line, items(), lambda row: row.row, lambda row, failure: None, 2)
        line.run(images, lambda image: broken("encode", image.image), lambda image, _: broken("write", image.image))
    assert threading.active_count() == before
