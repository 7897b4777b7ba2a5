"""Files of lines: appends of any lengths come back, whole, through blocks of any number."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from locum.common.log.lines import Lines


def empty(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.touch()
    return path


def test_lines_of_any_length_come_back_through_many_blocks(tmp_path: Path) -> None:
    path, draw = empty(tmp_path), random.Random(1)
    written, appends = Lines(path), []
    for most in (0, 10, 3000, 200_000, 2_500_000, 10):
        append = [draw.randbytes(draw.randrange(most + 1)).hex().encode() for _ in range(draw.randrange(1, 5))]
        written.write(append)
        written.take(append)
        appends.append(append)
    again = Lines(path)
    assert list(again.unread()) == appends
    for append in appends:
        again.take(append)
    lines = list(itertools.chain(*appends))
    for found in (written, again):
        assert len(found) == len(lines)
        assert found.end == found.there() == path.stat().st_size
        assert list(found.lines(0, len(lines))) == lines
        assert [found.line(index) for index in range(len(lines))] == lines
        assert list(found.lines(3, 7)) == lines[3:7]
        assert (found.lost(), found.cut(), list(found.unread())) == (None, 0, [])


def test_half_an_append_is_none_until_it_is_cut_off(tmp_path: Path) -> None:
    path = empty(tmp_path)
    path.write_bytes(b"a\nb \nc\nd \ne \nf")
    lines = Lines(path)
    for append in lines.unread():
        lines.take(append)
    assert list(lines.lines(0, len(lines))) == [b"a", b"b", b"c"]
    assert lines.cut() == len(b"d \ne \nf")
    assert path.read_bytes() == b"a\nb \nc\n"


@pytest.mark.parametrize("line", [b"a\nb", b"a\n", b"a "])
def test_what_could_not_be_told_apart_again_is_not_written(tmp_path: Path, line: bytes) -> None:
    path = empty(tmp_path)
    with pytest.raises(ValueError, match="a line has no line feed"):
        Lines(path).write([b"fine", line])
    assert path.read_bytes() == b""


def test_the_first_line_that_a_shorter_file_has_lost_is_told(tmp_path: Path) -> None:
    path = empty(tmp_path)
    lines = Lines(path)
    lines.write([b"aa", b"bb", b"cc"])
    lines.take([b"aa", b"bb", b"cc"])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert lines.lost() == content[:length].count(b"\n")


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (0, 2), (1, 0)])
def test_lines_that_are_not_known_are_an_index_error(tmp_path: Path, start: int, end: int) -> None:
    lines = Lines(empty(tmp_path))
    lines.write([b"a"])
    lines.take([b"a"])
    with pytest.raises(IndexError):
        lines.lines(start, end)
