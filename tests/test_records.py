from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from damage import flipped, mutated
from hypothesis import given, settings
from pydantic import ValidationError

from dynarank import Adapted, FullRank, LowRank
from dynarank.files.reading import DamagedFileError
from dynarank.files.sealed_json import sealed
from dynarank.form_data import form_from_data, form_to_data
from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    LayerSpectrum,
    PhaseRecord,
    Record,
    RecordWriter,
    Run,
    RunRecord,
    SpectrumRecord,
    SummaryRecord,
    find_runs,
    read_run,
)

RUN = RunRecord(
    recipe="digits",
    schedule="dynamic-rank",
    seed=0,
    epochs=2,
    steps_per_epoch=10,
    device="cpu",
    hardware="a µ-processor",
    precision="fp32",
    versions={"torch": "2.0"},
    commit="abc",
    started="2026-01-02T03:04:05+00:00",
)
PHASE = PhaseRecord(
    epoch=0.5,
    step=5,
    forms={"low-rank": 3, "full-rank": 1},
    trainable_parameters=10,
    total_parameters=20,
    predicted_flops=10**15,
    counted_flops=None,
    relative_flops=0.567,
    memory_bytes=2**40,
)
CHANGE = ChangeRecord(
    epoch=0.5,
    step=5,
    path="blocks.é.conv",
    before=form_to_data(LowRank(0.5)),
    after=form_to_data(FullRank()),
    error=1e-7,
)
EPOCH = EpochRecord(
    epoch=1.0,
    step=10,
    learning_rate=0.1,
    train_loss=0.1 + 0.2,
    train_score=1 / 3,
    test_loss=2.5,
    test_score=0.9,
    trainable_parameters=10,
    relative_flops=1.0,
    seconds=0.25,
)
LAYER = LayerSpectrum(effective_rank=3.5, stable_rank=1.5, spectral_ratio=0.75, rank=2, full_rank=4)
SPECTRUM = SpectrumRecord(epoch=1.0, step=10, layers={"a": LAYER, "b.c": LAYER})
SUMMARY = SummaryRecord(
    test_score=0.9,
    best_test_score=0.95,
    trainable_parameters_peak=30,
    trainable_parameters_mean=22.5,
    training_flops=1e18,
    relative_flops=0.8,
    memory_bytes=100,
    train_seconds=3.5,
    wall_seconds=4.0,
)
ALL: list[Record] = [RUN, PHASE, CHANGE, EPOCH, SPECTRUM, SUMMARY]


def write(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(folder)
    for record in records:
        writer.write(record)
    writer.close()
    (folder / "records.jsonl").touch()  # there is none before the first record
    return folder / "records.jsonl"


def test_all_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path, ALL)
    run = read_run(tmp_path)
    assert run.records == ALL
    assert [type(record) for record in run.records] == [type(record) for record in ALL]
    assert (run.folder, run.config) == (tmp_path, {})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [record.kind for record in ALL]


def test_records_are_found_by_kind(tmp_path: Path) -> None:
    write(tmp_path, [RUN, CHANGE, EPOCH, CHANGE, SUMMARY])
    run = read_run(tmp_path)
    assert run.header == RUN
    assert run.all(ChangeRecord) == [CHANGE, CHANGE]
    assert run.all(PhaseRecord) == []
    assert run.summary == SUMMARY


def test_an_unfinished_run_has_no_summary_and_is_readable_while_it_goes_on(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    for count, record in enumerate([RUN, PHASE, EPOCH], start=1):
        writer.write(record)
        assert len(read_run(tmp_path).records) == count  # flushed line by line
    assert read_run(tmp_path).summary is None
    writer.close()


def test_a_writer_starts_its_file_afresh(tmp_path: Path) -> None:
    write(tmp_path, [RUN, PHASE, EPOCH])
    write(tmp_path, [RUN])
    assert read_run(tmp_path).records == [RUN]


def test_the_configuration_is_read_beside_the_records(tmp_path: Path) -> None:
    write(tmp_path, [RUN])
    (tmp_path / "config.json").write_text('{"model": {"name": "resnet20"}}')
    assert read_run(tmp_path).config == {"model": {"name": "resnet20"}}


@pytest.mark.parametrize("form", [FullRank(), LowRank(3), LowRank(0.5), Adapted(2, alpha=3.0)])
def test_forms_of_a_change_come_back(tmp_path: Path, form: FullRank | LowRank | Adapted) -> None:
    write(tmp_path, [RUN, CHANGE.model_copy(update={"after": form_to_data(form)})])
    (change,) = read_run(tmp_path).all(ChangeRecord)
    assert form_from_data(change.after) == form


def test_floats_that_are_not_finite_survive(tmp_path: Path) -> None:
    losses = {"train_loss": math.nan, "test_loss": math.inf, "learning_rate": -math.inf}
    write(tmp_path, [RUN, EPOCH.model_copy(update=losses)])
    (epoch,) = read_run(tmp_path).all(EpochRecord)
    assert math.isnan(epoch.train_loss)
    assert (epoch.test_loss, epoch.learning_rate) == (math.inf, -math.inf)


@settings(deadline=None, max_examples=50)
@given(st.floats(allow_nan=False), st.integers(0, 2**62))
def test_numbers_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, x: float, n: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    record = PHASE.model_copy(update={"relative_flops": x, "predicted_flops": n})
    write(folder, [RUN, record])
    assert read_run(folder).records[1] == record


@pytest.mark.parametrize("text", ["", 'a "b" \\', "two\nlines\r\n", "日本 🙂", "\0\x1f\x7f"])
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    record = RUN.model_copy(update={"recipe": text})
    write(tmp_path, [record, PHASE])
    assert read_run(tmp_path).records == [record, PHASE]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_unicode_line_separators_survive(tmp_path: Path, separator: str) -> None:
    record = RUN.model_copy(update={"recipe": f"one{separator}two"})
    write(tmp_path, [record, PHASE])
    assert read_run(tmp_path).records == [record, PHASE]


# Interrupted and damaged files.


def cuts(last: Record) -> list[bytes]:
    """The last line cut short after each of its bytes but the last."""
    line = last.model_dump_json().encode()
    return [line[:end] for end in range(1, len(line))]


def assert_dropped(folder: Path, part: bytes) -> None:
    path = write(folder, [RUN, EPOCH])
    with path.open("ab") as file:
        file.write(part)
    assert read_run(folder).records == [RUN, EPOCH], part


def test_a_last_line_cut_short_is_dropped(tmp_path: Path) -> None:
    for part in [*cuts(EPOCH), *cuts(SUMMARY)]:
        assert_dropped(tmp_path, part)


def test_a_last_line_cut_after_an_inner_brace_is_dropped(tmp_path: Path) -> None:
    assert sum(part.endswith(b"}") for part in cuts(CHANGE)) == 2
    for part in [*cuts(PHASE), *cuts(SPECTRUM), *cuts(CHANGE)]:
        if part.endswith(b"}"):
            assert_dropped(tmp_path, part)


def test_a_last_line_cut_inside_a_character_is_dropped(tmp_path: Path) -> None:
    line = CHANGE.model_dump_json().encode()
    assert_dropped(tmp_path, line[: line.index("é".encode()) + 1])


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, ALL)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert read_run(tmp_path).records == ALL


def broken(folder: Path, number: int, line: bytes) -> Run:
    """The run ALL with another line in the place of one of its lines."""
    path = write(folder, ALL)
    lines = path.read_bytes().splitlines()
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    return read_run(folder)


BAD = [
    *(b"{}", b'{"kind": "epoch"', b"", b"null", b'{"kind": "epoch"}', b"12", b"\0" * 300),
    *(b"[" * 100_000, b'{"kind":"epoch","epoch":"\xff\xfe"}', b'{"kind":"change","before":'),
    b'{"kind":"epoch","step":1e999}',
]


@pytest.mark.parametrize("number", [2, 3, len(ALL)])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: ascii(bad[:20]))
def test_a_damaged_line_is_left_out_and_named_and_the_others_are_read(
    tmp_path: Path, bad: bytes, number: int
) -> None:
    run = broken(tmp_path, number, bad)
    assert run.records == [record for i, record in enumerate(ALL, 1) if i != number]
    (told,) = run.damage
    assert f"records.jsonl, line {number}: " in told
    assert len(told) < 500
    assert told.isprintable()


def test_a_line_of_a_hundred_megabytes_makes_a_short_message(tmp_path: Path) -> None:
    long = b'{"kind":"epoch","epoch":"' + b"a" * (100 << 20) + b'"}'
    run = broken(tmp_path, 2, long)
    assert run.records == [RUN, *ALL[2:]]
    assert run.damage == ("records.jsonl, line 2: it is longer than 67,108,864 bytes (left out)",)


def test_of_many_damaged_lines_three_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [RUN])
    with path.open("ab") as file:
        file.write(b"\n" * 5_000)
    (told,) = read_run(tmp_path).damage
    assert "line 2: " in told and "line 5" not in told and "and 4,997 more lines" in told


def test_a_torn_last_line_is_a_note_and_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path, [RUN, EPOCH])
    path.write_bytes(path.read_bytes()[:-9])
    run = read_run(tmp_path)
    assert run.damage == ()
    assert run.notes == ("the last line of records.jsonl is not complete (left out)",)


def test_kinds_and_fields_of_a_newer_version_are_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, [RUN])
    deep = SPECTRUM.model_dump()
    deep["layers"]["a"]["sharpness"] = 1.0
    lines = [{"kind": "speech", "words": []}, EPOCH.model_dump() | {"mood": {"x": 1}}, deep]
    with path.open("a") as file:
        file.writelines(sealed(json.dumps(line)) + "\n" for line in lines)
    run = read_run(tmp_path)
    assert run.records == [RUN, EPOCH, SPECTRUM]
    assert run.damage == ()
    (told,) = run.notes
    for words in ("line 2: kind 'speech'", "line 3: unknown field mood", "field sharpness"):
        assert words in told


@pytest.mark.parametrize("change", [{"step": "many"}, {"step": None}, {"extra": 1, "step": "x"}])
def test_wrong_values_are_damage(tmp_path: Path, change: dict[str, object]) -> None:
    run = broken(tmp_path, 4, json.dumps(EPOCH.model_dump() | change).encode())
    assert len(run.records) == len(ALL) - 1
    assert "line 4: not a record: epoch.step: " in run.damage[0]


def test_names_reach_no_message_raw(tmp_path: Path) -> None:
    path = write(tmp_path, [RUN])
    lines = [{"kind": "a\x1b[31m\n" * 100}, EPOCH.model_dump() | {"\x1b[2J\u202e" * 100: 1}]
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (told,) = read_run(tmp_path).notes
    assert told.isprintable()
    assert len(told) < 400


# Checksums: every flipped bit is noticed.


def noticed(folder: Path) -> bool:
    try:
        run = read_run(folder)
    except DamagedFileError:
        return True
    return bool(run.damage or run.notes)


def test_a_flip_of_any_bit_of_the_records_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, [RUN, EPOCH, SUMMARY])
    whole = path.read_bytes()
    assert not noticed(tmp_path)
    ends = [i * 8 + bit for i, byte in enumerate(whole) if byte == 10 for bit in range(-160, 8)]
    for bit in {*range(0, len(whole) * 8, 7), *ends}:
        path.write_bytes(flipped(whole, bit))
        assert noticed(tmp_path), (bit, chr(whole[bit // 8]), bit % 8)


def test_a_flip_of_any_bit_of_the_configuration_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, [RUN])
    path = tmp_path / "config.json"
    config = {"recipe": {"name": "digits", "rank": 0.5}, "seed": 0, "data": {}}
    whole = (sealed(json.dumps(config, indent=2)) + "\n").encode()
    path.write_bytes(whole)
    assert read_run(tmp_path).config == config
    assert not noticed(tmp_path)
    for bit in range(len(whole) * 8):
        path.write_bytes(flipped(whole, bit))
        assert noticed(tmp_path), (bit, chr(whole[bit // 8]))


def test_lines_without_a_checksum_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(record.model_dump_json() + "\n" for record in ALL), encoding="utf-8")
    run = read_run(tmp_path)
    assert (run.records, run.damage, run.notes) == (ALL, (), ())


CONFIGS = [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b"\0" * 10, b"12"]


@pytest.mark.parametrize("bad", CONFIGS, ids=lambda bad: ascii(bad[:9]))
def test_a_damaged_configuration_is_said_and_the_records_are_read(
    tmp_path: Path, bad: bytes
) -> None:
    write(tmp_path, ALL)
    (tmp_path / "config.json").write_bytes(bad)
    run = read_run(tmp_path)
    assert (run.records, run.config) == (ALL, {})
    (told,) = run.damage
    assert told.startswith("config.json cannot be read: ")


@settings(deadline=None, max_examples=200)
@given(mutated(b"".join(sealed(r.model_dump_json()).encode() + b"\n" for r in ALL)))
def test_damaged_files_are_read_in_part_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "records.jsonl").write_bytes(data)
    (folder / "config.json").write_bytes(data)
    try:
        run = read_run(folder)
    except DamagedFileError:
        return
    assert run.header.seed >= 0
    assert sum(map(len, (*run.damage, *run.notes))) < 2_000


def test_records_refuse_unknown_fields_and_changes() -> None:
    with pytest.raises(ValidationError, match="extra"):
        LayerSpectrum(**LAYER.model_dump(), extra=1)
    with pytest.raises(ValidationError, match="frozen"):
        EPOCH.step = 3  # type: ignore[misc]


@pytest.mark.parametrize("records", [[], [EPOCH], [EPOCH, RUN]], ids=len)
def test_the_first_record_must_be_a_run(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path, records)
    with pytest.raises(ValueError, match=r"cannot be read: it does not begin with a run record"):
        read_run(tmp_path)


def test_a_folder_without_records_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path)


# Finding runs.


def test_a_run_folder_holds_itself(tmp_path: Path) -> None:
    write(tmp_path, [RUN])
    assert find_runs(tmp_path) == [tmp_path]


def test_runs_below_a_folder_come_oldest_first(tmp_path: Path) -> None:
    started = {"c": "2026-01-01", "a/deep/er": "2026-01-02", "b": "2026-01-03", "a": "2026-01-04"}
    for name, start in started.items():
        write(tmp_path / name, [RUN.model_copy(update={"started": start}), PHASE])
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [tmp_path / name for name in started]


def test_a_missing_folder_and_one_without_runs_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder at .*nowhere"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no run.*dynarank train"):
        find_runs(tmp_path / "empty")
