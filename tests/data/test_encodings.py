"""Files that are not UTF-8, documents by other names, and Excel files."""

import datetime
import gzip
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data.rows_of import comma_separated, json_lines, put
from tunesmith.data.check import check
from tunesmith.data.read import expand_folders, read
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import load
from tunesmith.recipe.schema import Data, DataFile, Limits, Reading
from tunesmith.types import Problem

SAID = "Schönes Café “ok” – naïve €"
ROWS = [{"prompt": f"{SAID} {i}", "completion": "b"} for i in range(40)]
KINDS = {
    "t.csv": comma_separated(ROWS).decode(),
    "t.tsv": comma_separated(ROWS).decode().replace(",", "\t"),
    "t.jsonl": json_lines(ROWS).decode(),
    "t.json": f"[{','.join(json_lines(ROWS).decode().splitlines())}]",
}


def rows_of(path: Path, **how: Any) -> tuple[list[dict[str, Any]], list[Problem]]:
    problems: list[Problem] = []
    found = read([DataFile(path=str(path))], limits=Limits(), on_problem=problems.append, how=Reading(**how))
    return [row for _, row, _ in found], problems


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "cp1250", "utf-8"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_reader_takes_an_encoding(name: str, encoding: str, packed: bool, tmp_path: Path) -> None:
    raw = KINDS[name].replace("ï", "i").encode(encoding)
    expected = [{**row, "prompt": row["prompt"].replace("ï", "i")} for row in ROWS]
    path = put(tmp_path, f"{name}.gz" if packed else name, gzip.compress(raw) if packed else raw)
    assert rows_of(path, encoding=encoding) == (expected, [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", KINDS)
def test_a_byte_order_mark_says_it(name: str, encoding: str, tmp_path: Path) -> None:
    path = put(tmp_path, name, KINDS[name].encode(encoding))
    for how in ({}, {"encoding": "cp1252"}):
        assert rows_of(path, **how) == (ROWS, [])


def test_documents_and_sentences_too(tmp_path: Path) -> None:
    assert rows_of(put(tmp_path, "a.txt", SAID.encode("cp1252")), encoding="cp1252") == ([{"text": SAID}], [])
    assert rows_of(put(tmp_path, "b.txt", SAID.encode("utf-16"))) == ([{"text": SAID}], [])
    tagged = "André B-PER\nsingt O\n\n" * 3
    rows, _ = rows_of(put(tmp_path, "a.conll", tagged.encode("cp1252")), encoding="cp1252")
    assert rows[0] == {"tokens": ["André", "singt"], "tags": ["B-PER", "O"]}


@pytest.mark.parametrize("ahead", [0, 65_530, 65_535, 65_536, 200_000])
@pytest.mark.parametrize(("written", "given"), [("utf-8", "cp1252"), ("cp1252", "cp1252"), ("shift_jis", "shift_jis")])
def test_a_file_that_is_utf_8_stays_as_it_is(written: str, given: str, ahead: int, tmp_path: Path) -> None:
    said = "あいう" if written == "shift_jis" else "ä"
    text = "a" * ahead + said * 3 + "b" * 70_000 + said
    assert rows_of(put(tmp_path, "a.txt", text.encode(written)), encoding=given)[0] == [{"text": text}]


def test_what_the_encoding_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte 0x81 is not cp1252") as refused:
        rows_of(put(tmp_path, "t.csv", b"prompt,completion\na,b\nc\xe9,\x81\n"), encoding="cp1252")
    assert refused.value.problems[0].code == "wrong_encoding"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_that_lacks_the_mark_of_its_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    content = "prompt,completion\nä,b\n".encode(f"{encoding}-le")
    with pytest.raises(DataError, match=f"this is not {encoding}"):
        rows_of(put(tmp_path, "t.csv", content), encoding=encoding)


@pytest.mark.parametrize("name", ["rot13", "zlib", "base64", "cp99999", "", "a\0b"])
def test_only_encodings_of_text_are_taken(name: str) -> None:
    with pytest.raises(RecipeError, match="no encoding of text has this name"):
        load.validate({"data": {"encoding": name}})


def test_windows_1252_is_spelt_rightly_and_has_an_option(tmp_path: Path) -> None:
    path = put(tmp_path, "t.csv", KINDS["t.csv"].encode("cp1252"))
    (first, *_) = check(Data(train=(DataFile(path=str(path)),))).problems
    assert "Café “o" in first.fix
    assert first.fix.endswith("add --set data.encoding=cp1252.")
    assert check(Data(train=(DataFile(path=str(path)),), encoding="cp1252")).ok


def test_documents_by_other_names(tmp_path: Path) -> None:
    for name in ("ls.1.gz", "cat.1.gz"):
        put(tmp_path, name, gzip.compress(b"it lists files.\n"))
    folder = DataFile(path=str(tmp_path))
    with pytest.raises(DataError, match=r"add --set 'data.suffixes=\[\"\.1\"\]'"):
        expand_folders([folder], pytest.fail)
    rows, problems = rows_of(tmp_path, suffixes=(".1",))
    assert (rows, problems) == ([{"text": "it lists files.\n"}] * 2, [])
    put(tmp_path, "LICENSE", b"You may, or may not.\nNobody knows.\n")
    assert rows_of(tmp_path)[0] == [{"text": "You may, or may not.\nNobody knows.\n"}]
    assert rows_of(tmp_path / "LICENSE")[0] == [{"text": "You may, or may not.\nNobody knows.\n"}]
    put(tmp_path, "table", b"prompt,completion\na,b\n")
    assert rows_of(tmp_path / "table")[0] == [{"prompt": "a", "completion": "b"}]


def workbook(path: Path, *sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for i, rows in enumerate(sheets):
        sheet = book.create_sheet(f"S{i}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_first_sheet_of_an_excel_file_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 3, 1)
    rows = [
        ["text", "label", "when"],
        ["good", 5, day],
        [None, None, None],
        ["bad", 1.5, day],
        [12, True, None],
        ["é\nü", "5", "x"],
    ]
    path = workbook(tmp_path / "a.xlsx", rows, [["x"]], [["y"]])
    found, (warning,) = rows_of(path)
    assert found == [
        {"text": "good", "label": "5", "when": "2024-03-01"},
        {"text": "bad", "label": "1.5", "when": "2024-03-01"},
        {"text": "12", "label": "TRUE", "when": ""},
        {"text": "é\nü", "label": "5", "when": "x"},
    ]
    assert "first sheet was read, 'S0'; left out: 'S1', 'S2'" in warning.message
    assert check(Data(train=(DataFile(path=str(path)),))).files[0].format == "Excel, sheet 'S0'"


def test_rows_of_an_excel_file_keep_their_numbers_and_its_faults_are_named(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["text"], [None], ["a"], ["b", "beyond"]])
    problems: list[Problem] = []
    found = read([DataFile(path=str(path))], limits=Limits(), on_problem=problems.append)
    assert [source.line for *_, source in found] == [3]
    assert [(one.code, one.source.line) for one in problems] == [("ragged_row", 4)]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError):
        rows_of(path)


def with_sheet(path: Path, xml: str) -> Path:
    """The file with another sheet."""
    source = io.BytesIO(workbook(path, [["text"], ["a"]]).read_bytes())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, xml if name == "xl/worksheets/sheet1.xml" else old.read(name))
    return path


SHEET = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">{}<sheetData>{}</sheetData></worksheet>'
HEAD = '<row r="1"><c r="A1" t="inlineStr"><is><t>text</t></is></c></row>'


def test_a_sheet_is_not_believed_what_it_says_of_its_size(tmp_path: Path) -> None:
    one = '<row r="2"><c r="A2" t="inlineStr"><is><t>a</t></is></c></row>'
    path = with_sheet(tmp_path / "a.xlsx", SHEET.format('<dimension ref="A1:XFD1048576"/>', HEAD + one))
    assert rows_of(path)[0] == [{"text": "a"}]
    far = '<row r="1048576"><c r="A1048576" t="inlineStr"><is><t>z</t></is></c></row>'
    assert rows_of(with_sheet(path, SHEET.format("", HEAD + far)))[0] == [{"text": "z"}]


@pytest.mark.parametrize(
    "row", ['<row r="99999999999"><c r="A99999999999"><v>1</v></c></row>', '<row r="2"><c r="ZZZ2"><v>1</v></c></row>']
)
def test_a_sheet_without_end_is_refused(row: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        rows_of(with_sheet(tmp_path / "a.xlsx", SHEET.format("", HEAD + row)))
    assert refused.value.problems[0].code == "sheet_too_large"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["text"], ["a"]])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("xl/more.xml", bytes(2**27 + 1))
    with pytest.raises(DataError, match="it unpacks to more than is read") as refused:
        rows_of(path)
    assert refused.value.problems[0].code == "sheet_too_large"


def test_without_the_library_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "a.xlsx", [["text"], ["a"]])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match="pip install"):
        rows_of(path)


def test_old_excel_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"an old Excel file"):
        rows_of(put(tmp_path, "a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)))
