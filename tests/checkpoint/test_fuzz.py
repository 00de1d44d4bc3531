"""Files that anyone may have written: one kind of error, nothing outside, bounded memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults import contents, equal, in_child, seal, tree, trials, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynarank.checkpoint import manifest as manifests
from dynarank.checkpoint.folder import read_folder, write_folder
from dynarank.checkpoint.manifest import MANIFEST, NewerFormatError, read_manifest
from dynarank.checkpoint.steps import Checkpoints
from dynarank.files.json_data import dump_json, parse_json
from dynarank.files.reading import DamagedFileError

MANY = settings(
    max_examples=trials(150, 2500),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_opened: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.rename", "os.remove"):
        _opened.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes | Path) else "")


sys.addaudithook(_audit)


@contextmanager
def touches_only(folder: Path) -> Iterator[None]:
    """Nothing outside a folder is opened, listed, renamed or removed."""
    global _opened
    opened = _opened = []
    try:
        yield
    finally:
        _opened = None
    outside = [name for name in opened if name and not Path(name).is_relative_to(folder)]
    assert outside == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fuzz") / "inner" / "checkpoint"
    write_folder(folder, contents(2), step=2)
    yield folder


def read(folder: Path) -> None:
    """It is what was written, or refused with the one error."""
    outside = tree(folder.parent.parent)
    try:
        with touches_only(folder):
            assert equal(read_folder(folder), contents(2))
    except (DamagedFileError, NewerFormatError) as error:
        assert len(str(error)) < 2000 and str(error).isprintable()
    assert tree(folder.parent.parent) == outside


def mutate(folder: Path, name: str, data: bytes) -> None:
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        read(folder)
    finally:
        (folder / name).write_bytes(before)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["..", "../x.json", "/etc/passwd", "model.safetensors", "a" * 64, 2**63]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(["format", "version", "step", "files", "x"])
NAMES = st.sampled_from(
    [
        "../outside.json",
        "/etc/passwd",
        "..",
        "a/b.json",
        "a\\b.json",
        "state.json\0",
        "STATE.json",
        "state.json ",
        "\x1b[31m.json",
        "‮.json",
        "state.pkl",
        "MANIFEST.json",
        "state.json",
        "model.safetensors",
        "a" * 5000 + ".json",
    ]
)


@MANY
@given(st.data())
def test_bytes_of_a_manifest(whole: Path, data: st.DataObject) -> None:
    before = bytearray((whole / MANIFEST).read_bytes())
    at = data.draw(st.integers(0, len(before)))
    length = data.draw(st.integers(0, 20))
    before[at : at + length] = data.draw(st.binary(max_size=20))
    mutate(whole, MANIFEST, bytes(before))


@MANY
@given(st.dictionaries(FIELDS, PLAIN), st.booleans())
def test_fields_of_a_sealed_manifest(whole: Path, fields: dict[str, Any], old: bool) -> None:
    found = json.loads((whole / MANIFEST).read_bytes()) if old else {"format": manifests._FORMAT}
    found.pop("sha256", None)
    try:
        mutate(whole, MANIFEST, manifests._seal({**found, **fields}))
    except ValueError as error:
        assert "digits" in str(error) or "bits" in str(error)


@MANY
@given(st.dictionaries(NAMES, PLAIN | st.fixed_dictionaries({"size": PLAIN, "sha256": PLAIN})))
def test_files_of_a_sealed_manifest(whole: Path, files: dict[str, Any]) -> None:
    found = json.loads((whole / MANIFEST).read_bytes())
    found.pop("sha256")
    mutate(whole, MANIFEST, manifests._seal({**found, "files": {**found["files"], **files}}))


@MANY
@given(st.data())
def test_json_in_place_of_a_file(whole: Path, data: st.DataObject) -> None:
    """The bytes are read as JSON: the manifest is made to fit them."""
    texts = st.text(max_size=60).map(str.encode) | PLAIN.map(_dump)
    text = data.draw(st.binary(max_size=60) | texts)
    before = tree(whole)
    folder = whole.parent / "sealed"
    shutil.copytree(whole, folder)
    try:
        (folder / "state.json").write_bytes(text)
        seal(folder)
        try:
            found = read_folder(folder)
            assert json.loads(text) == found.data["state"] and tree(whole) == before
        except DamagedFileError as error:
            assert "state.json" in str(error)
    finally:
        shutil.rmtree(folder)


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


@MANY
@given(PLAIN)
def test_what_is_dumped_is_parsed_again(value: object) -> None:
    try:
        text = dump_json(value)
    except ValueError:
        return
    assert parse_json(text, "text") == value


def test_a_newer_version_is_no_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, contents(1), wait=True)
    checkpoints.save(2, contents(2), wait=True)
    path = tmp_path / "step-00000002" / MANIFEST
    body = json.loads(path.read_bytes())
    body.pop("sha256")
    path.write_bytes(manifests._seal({**body, "version": 2, "parts": ["unknown"]}))
    before = tree(tmp_path)
    with pytest.raises(NewerFormatError, match=r"newer version.*format 2.*up to 1.*update"):
        checkpoints.newest()
    with pytest.raises(NewerFormatError):
        write_folder(tmp_path / "step-00000002", contents(3))
    assert tree(tmp_path) == before
    for step in (3, 4, 5):
        checkpoints.save(step, contents(step), wait=True)
    assert read_manifest(tmp_path / "step-00000005").step == 5


BOMBS: dict[str, Callable[[], bytes]] = {
    "open lists": lambda: b"[" * (64 << 20),
    "open objects": lambda: b'{"a":' * (10 << 20),
    "closed lists": lambda: b"[" * (1 << 20) + b"]" * (1 << 20),
    "one open string": lambda: b'"' + b'\\"' * (30 << 20),
    "many strings": lambda: b"[" + b'"",' * (20 << 20) + b'""]',
    "many lists": lambda: b"[" + b"[]," * (15 << 20) + b"[]]",
    "a long number": lambda: b"1" * (60 << 20),
    "a long fraction": lambda: b"0." + b"1" * (60 << 20),
    "a large exponent": lambda: b"1e" + b"9" * (1 << 20),
    "too large": lambda: b" " * ((64 << 20) + 1),
    "not UTF-8": lambda: b"\xff" * (60 << 20),
    "one key many times": lambda: b"{" + b'"a":1,' * (5 << 20) + b'"a":1}',
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_and_time_are_bounded(tmp_path: Path, bomb: str) -> None:
    """In 1 GiB beyond what the process had; whatever size the parsed data would have had."""

    def run(say: int) -> None:
        data = BOMBS[bomb]()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
        try:
            parse_json(data, "bomb.json")
            os.write(say, b"parsed")
        except DamagedFileError as error:
            os.write(say, str(error)[:500].encode())

    status, said = wait_for(*in_child(run))
    assert status == 0
    assert b"bomb.json cannot be read" in said or said == b"parsed"


def test_a_recursion_limit_of_the_user_is_no_crash() -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**7)
    try:
        with pytest.raises(DamagedFileError, match="nested 1,000,000 deep, at most 64"):
            parse_json("[" * 10**6, "deep.json")
    finally:
        sys.setrecursionlimit(before)
