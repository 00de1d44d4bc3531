"""Data sets that are damaged or made to harm: DataError, in bounded memory and time."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damage import mutated
from hypothesis import given, settings

from dynarank.schedules.serialization import schedule_from_data
from dynarank.train.cifar_files import CIFAR10
from dynarank.train.glue_files import GLUE, read_glue
from dynarank.train.idx_files import read_idx
from dynarank.train.image_files import read_files
from dynarank.train.imdb_files import read_imdb
from dynarank.train.sources import DataError
from dynarank.train.wordpiece import WordPiece

MIB = 1 << 20


def member(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def arrays(count: int = 2) -> dict[str, bytes]:
    images = member((count, 32, 32, 3)) + b"\7" * count * 3072
    labels = member((count,)) + b"\1" * count
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


def archived(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npz(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(archived(members))
    return path


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays().items():
            with archive.open(f"{name}.npy", "w") as file:
                file.write(content)
                for _ in range(270 if name.startswith("x") and name.endswith("train") else 0):
                    file.write(b"\0" * 4 * MIB)
    assert path.stat().st_size < 3 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"unpacks to 1,132,\d+,\d+ bytes, at most 1,073,741,8"):
            read_files(CIFAR10, path)
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def test_members_that_no_one_asked_for_are_not_unpacked(tmp_path: Path) -> None:
    path = npz(tmp_path / "cifar10.npz", arrays() | {"z": b"junk"})
    assert len(read_files(CIFAR10, path).train_images) == 2


HEADERS = {
    "objects": member((2,), "|O") + b"\x80\x04cos\nsystem\n.",
    "a huge shape": member((1 << 40, 32, 32, 3)) + b"\0" * 64,
    "a negative shape": member((2, 32, 32, 3)).replace(b"(2, ", b"(-2,") + b"\0" * 6144,
    "fields": member((2,), "|O").replace(b"'|O'", b"[('a','|O')]"),
    "nonsense": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_arrays_with_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    path = npz(tmp_path / "cifar10.npz", arrays() | {"x_train": HEADERS[name]})
    with pytest.raises(DataError, match=r"cifar10\.npz"):
        read_files(CIFAR10, path)


def test_an_array_twice_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "cifar10.npz", arrays())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", arrays()["x_train"])
    with pytest.raises(DataError, match="twice"):
        read_files(CIFAR10, path)


@settings(deadline=None, max_examples=200)
@given(data=mutated(archived(arrays())))
def test_damaged_archives_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("npz") / "cifar10.npz"
    path.write_bytes(data)
    try:
        read_files(CIFAR10, path)
    except DataError as error:
        assert len(str(error)) < 1_000


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape) + data


def test_a_gzip_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(idx((60_000, 28, 28), b""))
        for _ in range(80):
            file.write(b"\0" * 4 * MIB)
    with pytest.raises(DataError, match=r"more than 268,435,456 bytes"):
        read_idx(path)


@settings(deadline=None, max_examples=200)
@given(plain=mutated(idx((3, 4, 5), bytes(60))))
def test_damaged_idx_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, plain: bytes
) -> None:
    folder = tmp_path_factory.mktemp("idx")
    (folder / "a.idx").write_bytes(plain)
    (folder / "b.gz").write_bytes(gzip.compress(plain)[: len(plain)] + plain[:7])
    for path in folder.iterdir():
        try:
            read_idx(path)
        except DataError as error:
            assert len(str(error)) < 500


EXAMPLES = {  # a line of each task
    "sst2": "a joy \t1\n",
    "mrpc": "1\t5\t6\tA b.\tC d.\n",
    "cola": "gj04\t1\t\tA b.\n",
    "rte": "0\tA b.\tC d.\tentailment\n",
    "stsb": "0\tmain\tMS\t2012\t1\tn\tn\tA b.\tC d.\t3.8\n",
}
LABELS = {"sst2": "label", "mrpc": "Quality", "cola": "label", "rte": "label", "stsb": "score"}


def glue(folder: Path, name: str, train: bytes, dev: bytes | None = None) -> None:
    place = folder / GLUE[name].folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "train.tsv").write_bytes(train)
    (place / "dev.tsv").write_bytes(train if dev is None else dev)


def title(name: str) -> str:
    task = GLUE[name]
    return "\t".join(LABELS[name] if i == task.label else "x" for i in range(task.fields)) + "\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_without_a_title_keeps_its_first_example(tmp_path: Path, name: str) -> None:
    lines = EXAMPLES[name] * 3
    for mark in ("", "\ufeff"):
        glue(tmp_path, name, (mark + lines).encode(), (mark + title(name) + lines).encode())
        data = read_glue(name, tmp_path)
        assert (len(data.train), len(data.test)) == (3, 3)
        assert data.train.first == data.test.first


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_damaged_first_example_is_no_title(tmp_path: Path, name: str) -> None:
    damaged = title(name).replace(LABELS[name], "7", 1)
    glue(tmp_path, name, (damaged + EXAMPLES[name]).encode())
    with pytest.raises(DataError, match="line 1: "):
        read_glue(name, tmp_path)


@settings(deadline=None, max_examples=150)
@given(data=mutated((title("sst2") + EXAMPLES["sst2"] * 3).encode()))
def test_damaged_sentences_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("glue")
    glue(folder, "sst2", data)
    try:
        read_glue("sst2", folder)
    except DataError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 700


def imdb(folder: Path) -> Path:
    for part in ("train/pos/1_8", "train/neg/1_2", "test/pos/1_8", "test/neg/1_2"):
        path = folder / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a review")
    return folder


def test_links_among_reviews_are_read_and_pipes_and_folders_refused(tmp_path: Path) -> None:
    place = imdb(tmp_path / "aclImdb") / "train" / "pos"
    (tmp_path / "blob").write_text("from elsewhere")
    (place / "2_9.txt").symlink_to(tmp_path / "blob")
    assert "from elsewhere" in read_imdb(tmp_path).train.first
    wrong = place / "3_9.txt"
    links = (lambda path, to=to: path.symlink_to(to) for to in (wrong, "/dev/zero", "nowhere"))
    for make in (os.mkfifo, os.mkdir, *links):
        make(wrong)
        with pytest.raises(DataError, match=r"3_9\.txt could not be read"):
            read_imdb(tmp_path)
        wrong.rmdir() if wrong.is_dir() else wrong.unlink()


def test_two_reviews_of_one_number_are_refused(tmp_path: Path) -> None:
    (imdb(tmp_path) / "train" / "pos" / "01_9.txt").write_text("another")
    with pytest.raises(DataError, match="have the same number"):
        read_imdb(tmp_path)


def test_names_of_files_reach_no_message_raw(tmp_path: Path) -> None:
    (imdb(tmp_path) / "train" / "pos" / "\x1b[31m\n.txt").write_text("a")
    with pytest.raises(DataError, match="NUMBER_RATING") as error:
        read_imdb(tmp_path)
    assert str(error.value).isprintable()


def test_a_vocabulary_of_hostile_pieces_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    for first in ("\x1b[31m" * 100_000, "[PAD]\n" + "\x1b[2J" * 2 + "\n" + "\x1b[2J" * 2):
        path.write_text("\n".join([first, *pieces[:1], *pieces[2:], "[PAD]"]))
        with pytest.raises(DataError) as error:
            WordPiece.from_file(path, 8, size=100)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("key", ["map", "class", "schedule"])
def test_a_schedule_nested_too_deeply_is_a_value_error(key: str) -> None:
    data: dict[str, object] = {"class": "LowRankThroughout", "rank": 8}
    for _ in range(100_000):
        data = {"class": "Mapped", key: data}
    with pytest.raises(ValueError, match="nested too deeply"):
        schedule_from_data(data)
    for _ in range(100_000):  # freed level by level: the interpreter would recurse
        data = data.pop(key)  # type: ignore[assignment]
