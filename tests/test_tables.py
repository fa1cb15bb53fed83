"""Parquet and JSON-lines files as examples: the rows in order, a piece at a time, and clear refusals."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gradscale.errors import GradscaleError
from gradscale.task import Examples, fingerprint
from gradscale.tasks import table_files
from gradscale.tasks.columns import BadRow
from gradscale.tasks.tables import CACHED_ROW_GROUPS, JsonlExamples, ParquetExamples, column_names

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 23


def table(rows: int = ROWS, start: int = 0) -> pa.Table:
    ids = np.arange(start, start + rows)
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(np.stack([ids, -ids], 1).reshape(-1).astype(np.float32)), 2)
    return pa.table(
        {
            "id": ids,
            "pair": pairs,
            "square": pa.array([[i, i**2] for i in ids.tolist()], pa.list_(pa.int64())),
            "even": ids % 2 == 0,
        }
    )


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files, row groups of 4, 23 rows with ids 0 to 22, and an empty file between them."""
    for name, start, rows in (("a", 0, 10), ("b", 10, 0), ("c", 10, 9), ("d", 19, 4)):
        pq.write_table(table(rows, start), tmp_path / f"{name}.parquet", row_group_size=4)
    (tmp_path / "_metadata.parquet").write_bytes(b"not data")
    (tmp_path / "README.md").write_text("not data")
    return tmp_path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    rows = [{"id": i, "pair": [i + 0.5, -i], "name": f"näme {i}"} for i in range(ROWS)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(lines[:9]) + "\n")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text("\n".join(lines[9:]))
    return tmp_path


def split_names(rows: pa.Table) -> dict[str, torch.Tensor]:
    return {"length": torch.tensor([len(name) for name in rows["name"].to_pylist()])}


def refuse_multiples_of_7(rows: pa.Table) -> dict[str, torch.Tensor]:
    ids = rows["id"].to_pylist()
    for row, i in enumerate(ids):
        if i % 7 == 0:
            raise BadRow(row, f"must be no multiple of 7, got {i}; drop it")
    return {"id": torch.tensor(ids)}


def test_every_range_of_parquet_rows(parquet: Path) -> None:
    examples = ParquetExamples(str(parquet))
    assert isinstance(examples, Examples)
    assert len(examples) == ROWS
    for start in range(ROWS + 1):
        for stop in range(start, ROWS + 1):
            batch = examples.batch(range(start, stop))
            ids = torch.arange(start, stop)
            assert torch.equal(batch["id"], ids)
            assert torch.equal(batch["pair"], torch.stack([ids, -ids], 1).float())
            assert torch.equal(batch["square"], torch.stack([ids, ids**2], 1)) or not len(ids)
            assert torch.equal(batch["even"], ids % 2 == 0)


def test_every_range_of_json_lines(jsonl: Path) -> None:
    examples = JsonlExamples(str(jsonl), columns=["id", "pair"])
    assert isinstance(examples, Examples)
    assert len(examples) == ROWS
    for start in range(ROWS):
        for stop in range(start + 1, ROWS + 1):
            batch = examples.batch(range(start, stop))
            ids = torch.arange(start, stop)
            assert torch.equal(batch["id"], ids)
            assert torch.equal(batch["pair"], torch.stack([ids + 0.5, -ids], 1).double())


def test_parquet_reads_only_the_row_groups_and_columns_asked_for(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, list[str]]] = []
    original = table_files.read_row_group

    def recording(file: Path, footer: Any, group: int, schema: Any) -> Any:
        read.append((file.name, group, schema.names))
        return original(file, footer, group, schema)

    monkeypatch.setattr(table_files, "read_row_group", recording)
    examples = ParquetExamples(str(parquet), columns=["id"])
    examples.batch(range(5, 11))
    assert read == [("a.parquet", 1, ["id"]), ("a.parquet", 2, ["id"]), ("c.parquet", 0, ["id"])]
    examples.batch(range(8, 12))
    assert len(read) == 3  # both groups were still there
    assert len(examples._decoded) == CACHED_ROW_GROUPS


@pytest.mark.parametrize("pattern", ["*.parquet", "[ac-d].parquet", "**/?.parquet"])
def test_globs(parquet: Path, pattern: str) -> None:
    (parquet / "_metadata.parquet").unlink()
    assert len(ParquetExamples(f"{parquet}/{pattern}")) == ROWS


def test_one_file(parquet: Path) -> None:
    assert ParquetExamples(str(parquet / "c.parquet")).batch(range(9))["id"].tolist() == list(range(10, 19))


def test_column_names(parquet: Path, jsonl: Path) -> None:
    assert column_names(f"{jsonl}/*.jsonl") == ("id", "pair", "name")
    assert column_names(f"{parquet}/?.parquet") == ("id", "pair", "square", "even")


def test_decode_chooses_the_tensors(jsonl: Path) -> None:
    examples = JsonlExamples(str(jsonl), ["name"], split_names)
    assert examples.batch(range(8, 12))["length"].tolist() == [6, 6, 7, 7]


@pytest.mark.parametrize("kind", [ParquetExamples, JsonlExamples])
def test_pickles_its_settings_only(kind: type, parquet: Path, jsonl: Path) -> None:
    examples = kind(str(parquet), ["id"])
    expected = examples.batch(range(3, 7))
    data = pickle.dumps(examples)
    assert len(data) < 400
    assert torch.equal(pickle.loads(data).batch(range(3, 7))["id"], expected["id"])


def test_types_of_numbers(tmp_path: Path) -> None:
    columns = {
        "u8": pa.array([1, 255], pa.uint8()),
        "u32": pa.array([1, 2**32 - 1], pa.uint32()),
        "f16": pa.array(np.array([1, 2], np.float16)),
        "f64": pa.array([1.5, 2.5], pa.float64()),
        "image": pa.array([[[1, 2], [3, 4], [5, 6]]] * 2, pa.list_(pa.list_(pa.int16(), 2), 3)),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 2, 3)),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    batch = ParquetExamples(str(tmp_path)).batch(range(1, 2))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "u8": (torch.uint8, (1,)),
        "u32": (torch.int64, (1,)),
        "f16": (torch.float16, (1,)),
        "f64": (torch.float64, (1,)),
        "image": (torch.int16, (1, 3, 2)),
        "tensor": (torch.float32, (1, 2, 3)),
    }
    assert batch["u32"].item() == 2**32 - 1
    assert batch["tensor"].flatten().tolist() == list(range(6, 12))


def test_no_rows(tmp_path: Path) -> None:
    pq.write_table(table(0), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert len(ParquetExamples(str(tmp_path))) == 0
    assert len(JsonlExamples(str(tmp_path), ["x"])) == 0
    assert column_names(str(tmp_path / "a.jsonl")) == ()


class TestFingerprint:
    def test_parquet_changes_with_one_value(self, tmp_path: Path) -> None:
        for folder, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
            (tmp_path / folder).mkdir()
            pq.write_table(pa.table({"x": [0.0, value]}), tmp_path / folder / "x.parquet")
        prints = [fingerprint(ParquetExamples(str(tmp_path / folder))) for folder in "abc"]
        assert prints[0] == prints[1] != prints[2]

    def test_json_lines_change_with_one_byte_and_the_name(self, tmp_path: Path) -> None:
        text = '{"x": 1}\n' * 20_000
        files = {"a/x": text, "b/x": text, "c/x": text[:-3] + "2}\n", "d/y": text}
        for name, content in files.items():
            file = tmp_path / f"{name}.jsonl"
            file.parent.mkdir()
            file.write_text(content)
        prints = [fingerprint(JsonlExamples(str(tmp_path / folder))) for folder in "abcd"]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3


class TestRefusals:
    def test_no_file(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "*.parquet", tmp_path / "none.parquet"):
            with pytest.raises(GradscaleError, match=f"data must be .* got {re.escape(str(path))} which matches no"):
                len(ParquetExamples(str(path)))

    def test_uri(self) -> None:
        with pytest.raises(GradscaleError, match="data must be a local file, folder or glob, got s3://b/x; mount or"):
            len(ParquetExamples("s3://b/x"))

    @pytest.mark.parametrize("keep", [0, 3, 11, 200, -1])
    def test_truncated(self, parquet: Path, keep: int) -> None:
        file = parquet / "c.parquet"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(GradscaleError, match=r"data file .*c\.parquet must be a whole Parquet file, got .* trunc"):
            len(ParquetExamples(str(parquet)))

    def test_damaged_footer(self, parquet: Path) -> None:
        file = parquet / "c.parquet"
        content = bytearray(file.read_bytes())
        content[-200:-100] = b"\xff" * 100
        file.write_bytes(content)
        with pytest.raises(GradscaleError, match=r"c\.parquet must be a whole Parquet file, got .*; it is truncated"):
            len(ParquetExamples(str(parquet)))

    def test_damaged_rows_are_tried_again_and_name_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a.parquet"
        pq.write_table(table(), file, write_page_checksum=True, compression="none")
        content = bytearray(file.read_bytes())
        content[60] ^= 255
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"row group 0 of .*a\.parquet could not be read: .*CRC"):
            ParquetExamples(str(file)).batch(range(2))

    def test_missing_column(self, parquet: Path, jsonl: Path) -> None:
        for kind, names in ((ParquetExamples, "id, pair, square, even"), (JsonlExamples, "id, pair, name")):
            with pytest.raises(GradscaleError, match=rf"column must be one of those in .* \({names}\), got y; name"):
                len(kind(str(parquet), ["id", "y"]))

    def test_different_schemas(self, parquet: Path) -> None:
        changed = table(2).set_column(0, "id", pa.array([1, 2], pa.int32()))
        pq.write_table(changed, parquet / "e.parquet")
        message = r"one schema, got id: int64 in .*a\.parquet but id: int32 in .*e\.parquet; write them"
        with pytest.raises(GradscaleError, match=message):
            len(ParquetExamples(str(parquet)))
        assert len(ParquetExamples(str(parquet), ["even"])) == ROWS + 2
        pq.write_table(table(2).drop_columns("id"), parquet / "e.parquet")
        with pytest.raises(GradscaleError, match=r"id: int64 in .*a\.parquet but id: absent in .*e\.parquet"):
            len(ParquetExamples(str(parquet), ["id"]))

    @pytest.mark.parametrize(
        ("line", "actual"),
        [('{"id": 1', "Expecting"), ("[1]", "list"), ("nonsense", "Expecting value"), ('{"id": "\xff"}', "'utf-8'")],
    )
    def test_not_json(self, tmp_path: Path, line: str, actual: str) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n\n' + line.encode("latin-1") + b'\n{"id": 2}\n')
        with pytest.raises(GradscaleError, match=rf"line 3 of .*a\.jsonl must be a JSON object, got {actual}.*; write"):
            JsonlExamples(str(tmp_path)).batch(range(3))

    def test_mixed_types_in_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": "one"}\n')
        with pytest.raises(
            GradscaleError, match=r"must hold one type in every column, got .* in examples 0 to 1; make"
        ):
            JsonlExamples(str(tmp_path)).batch(range(2))

    def test_text_without_decode(self, jsonl: Path) -> None:
        with pytest.raises(GradscaleError, match="column name must hold numbers or lists of numbers, got string; name"):
            JsonlExamples(str(jsonl)).batch(range(2))

    def test_ragged_lists_without_decode(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"x": [[1], [1, 2, 3]]}), tmp_path / "a.parquet")
        with pytest.raises(GradscaleError, match="column x must hold lists of one length, got 1 to 3 entries; pass"):
            ParquetExamples(str(tmp_path)).batch(range(2))

    @pytest.mark.parametrize("bad", [None, [None, 1], [1, None]])
    def test_null(self, tmp_path: Path, bad: object) -> None:
        pq.write_table(pa.table({"x": [[0, 0], [0, 0], bad]}), tmp_path / "a.parquet")
        with pytest.raises(
            GradscaleError, match=r"example 2 of .* must have a value in column x, got null; fill it in"
        ):
            ParquetExamples(str(tmp_path)).batch(range(1, 3))

    def test_the_example_that_decode_refuses_is_named(self, parquet: Path, jsonl: Path) -> None:
        for kind in (ParquetExamples, JsonlExamples):
            with pytest.raises(GradscaleError, match=r"^example 14 of .* must be no multiple of 7, got 14; drop it$"):
                kind(str(parquet), ["id"], refuse_multiples_of_7).batch(range(11, 20))

    @pytest.mark.parametrize("ids", [range(20, 24), range(-1, 3), range(0, 6, 2)])
    def test_ids(self, parquet: Path, ids: range) -> None:
        with pytest.raises(GradscaleError, match=r"ids must be consecutive and within 0 to 23 of .*, got range"):
            ParquetExamples(str(parquet)).batch(ids)

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("x\n1\n")
        with pytest.raises(GradscaleError, match=r"data must be .* files, got .*a\.csv; convert"):
            column_names(str(tmp_path / "a.csv"))


def test_pyarrow_is_not_imported_with_the_module() -> None:
    code = "import sys, gradscale.tasks.tables, gradscale.checkpoints; print('pyarrow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
