"""Files and data sets of the Hub -> rows, each with its place.

    .jsonl .ndjson                        a row a line
    .json                                 an array of rows, one row, or a row a line; read whole, all others row by row
    .csv                                  a header with the names of fields, then a row a record; an empty cell is none
    .parquet                              a row a row
    .txt                                  a document a paragraph, or a prompt a line
    owner/name, owner/name:split          a data set of the Hub; without a split, "train"

All but .parquet may be packed by gzip: .jsonl.gz and so on. What the rows hold, `conversations.py` says.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import string
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

from medusa.errors import MedusaError, UsageError

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")
_PACKED = tuple(f"{kind}.gz" for kind in FILES if kind != ".parquet")
_LONGEST_CELL = 2**24  # characters; a quote that is never closed must not fill the memory
_BATCH = 256  # rows of a parquet file that are objects at once

Place = str  # "file.jsonl, line 12"


class MalformedRow(MedusaError):  # noqa: N818 - it is the row that is in error
    """A row that cannot be used; the message says why, the reader adds where."""


def file_of(source: str) -> Path | None:
    """The file that a source is, or None where it is on the Hub. Raises UsageError."""
    path = Path(source).expanduser()
    kinds = f"a file ({', '.join(FILES)}; or packed, .gz) or a data set of the Hub (owner/name or owner/name:split)"
    if path.is_dir():
        raise UsageError(f"{source} is a directory: name {kinds}")
    if _kind(path) in (*FILES, *_PACKED):
        if not path.exists():
            raise UsageError(f"there is no file {source}")
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?", source, re.ASCII):
        raise UsageError(f"{source!r} cannot be read: name {kinds}")
    return None


def rows_of(source: str, path: Path | None, prompts: bool) -> Iterator[tuple[Place, object]]:
    """(where it is, the row) for each row; for one that is no row at all, the MalformedRow that says so. Raises
    MedusaError: the source cannot be read, or is damaged."""
    if path is None:
        yield from _hub_rows(source)
        return
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows}
    readers[".txt"] = partial(_text_rows, prompts=prompts)
    try:
        yield from readers.get(_kind(path).removesuffix(".gz"), _json_lines)(source, path)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for a file that is cut short or damaged
        raise MedusaError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None


def parse_json(text: str) -> object:
    """What a JSON text says. Raises ValueError or RecursionError, for a name that comes twice in an object too: Python
    would take the last of them."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f'"{_twice([name for name, _ in pairs])}" comes twice')
    return fields


def _twice(names: list[str]) -> str:
    """The first name that comes twice; "" where none does."""
    return next((name for name in names if name and names.count(name) > 1), "")


def _kind(path: Path) -> str:
    """How its name ends: ".jsonl", or ".jsonl.gz"."""
    kind = path.suffix.lower()
    return path.with_suffix("").suffix.lower() + kind if kind == ".gz" else kind


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_lines(source: str, path: Path) -> Iterator[tuple[Place, object]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{source}, line {number}", _parsed(line)


def _parsed(line: bytes) -> object:
    try:
        return parse_json(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError:
        return MalformedRow("not UTF-8 text")
    except json.JSONDecodeError as error:
        return MalformedRow(f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return MalformedRow(f"not valid JSON ({error})")


def _json_rows(source: str, path: Path) -> Iterator[tuple[Place, object]]:
    with _open(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        whole = parse_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"["):
            raise MedusaError(f"{source} is not valid JSON: {error}") from None
        yield from _json_lines(source, path)
        return
    # An array is a list of rows, or itself a row, which then is a list of messages.
    rows = whole if isinstance(whole, list) and not (whole and all(map(is_message, whole))) else [whole]
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def is_message(item: object) -> bool:
    """Whether an object is one message, in any of the forms of `messages.py`, and not a row."""
    needed = ({"role", "content"}, {"role", "tool_calls"}, {"role", "function_call"}, {"from", "value"})
    return isinstance(item, dict) and any(names <= item.keys() for names in needed)


def _csv_rows(source: str, path: Path) -> Iterator[tuple[Place, object]]:
    csv.field_size_limit(_LONGEST_CELL)  # of the whole process; Python's own limit is shorter than long texts
    table = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    done = 0
    try:
        for cells in table:
            begun, done = done + 1, table.line_num
            if not cells:  # an empty line
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if twice := _twice(header):
                    raise MedusaError(f'the header of {source} has "{twice}" twice')
            else:
                yield f"{source}, line {begun}", _csv_row(header, cells)
    except csv.Error as error:  # where the next row begins, nobody knows now
        raise MedusaError(f"{source} is not valid CSV: {error} (line {max(table.line_num, 1)})") from None


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return MalformedRow(f"has {len(cells)} cells, but the header names {len(header)}")
    if any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isprintable() for letter in cell):
        return MalformedRow("not UTF-8 text")
    return {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}


def _text_rows(source: str, path: Path, *, prompts: bool) -> Iterator[tuple[Place, object]]:
    """A prompt a line, or a document a paragraph, which ends at a blank line."""

    def border(numbered: tuple[int, bytes]) -> tuple[bool, int]:
        number, line = numbered
        return not line.strip(), number if prompts else 0

    for (blank, _), lines in groupby(_lines(path), border):
        if blank:
            continue
        (number, *_), parts = zip(*lines, strict=True)
        try:
            text = b"".join(parts).decode("utf-8").replace("\r\n", "\n").strip("\n")
        except UnicodeDecodeError:
            yield f"{source}, line {number}", MalformedRow("not UTF-8 text")
        else:
            yield f"{source}, line {number}", {"prompt": text.strip(string.whitespace)} if prompts else {"text": text}


def _parquet_rows(source: str, path: Path) -> Iterator[tuple[Place, object]]:
    # pyarrow is what `datasets` reads parquet with; asked directly, it makes no copy in a cache.
    parquet = _library("pyarrow.parquet", source)
    count = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    count += 1
                    yield f"{source}, row {count}", _without_nulls(row)
    except Exception as error:
        raise MedusaError(f"{source} is not a valid parquet file: {_first_line(error)}") from error


def _hub_rows(source: str) -> Iterator[tuple[Place, object]]:
    datasets = _library("datasets", source)
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise MedusaError(f"cannot load the data set {source}: {_first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", _without_nulls(row)


def _without_nulls(value: object) -> object:
    """Arrow gives all objects of a column the same fields, at any depth, and fills in nulls: a tool call would have the
    arguments of all other tools."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        # Most by far are token ids, which may be left as they are.
        return [_without_nulls(inner) for inner in value] if value and isinstance(value[0], dict | list) else value
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _library(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MedusaError(f"reading {source} needs more libraries: pip install 'medusa-decode[train]'") from None
