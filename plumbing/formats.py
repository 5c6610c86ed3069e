"""The kinds of files that fineweb.py reads: a reader for each yields one column of text, in batches.

    read_rows(name, column, skip)  (Arrow binary array, {index: what is wrong with it}) for every batch of rows

    .parquet                       one row per row
    .jsonl, .ndjson                one row per line; a list of objects is read as .json is
    .json                          one row per object of a list, of {"data": [...]}, or per line; or by columns
    .csv, .tsv                     one row per record; the first line has the names of the columns
    .arrow                         one row per row, as datasets' save_to_disk and pyarrow write them
    .txt                           one row per file

All but .parquet and .arrow may be compressed, .gz or .zst. A name may be an hf:// address, which is streamed.
"""
import contextlib
import csv
import glob
import io
import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path

from plumbing.cli import UserError
from plumbing.conversions import way_to_convert
from plumbing.file_kinds import LFS, NOT_FETCHED, kind_by_bytes, kind_of


class Unreadable(UserError):
    """Raised for a file, or the rest of one, that is not what its name says."""


class Spot:
    """Where in a file its reader is: `stream` is read from byte 0 to `size`, or the file has so many `rows`."""

    stream, size, rows = None, 0, 0

    def share(self, row: int) -> float | None:
        """Return which part of the file has been read once `row` rows have; None if that is not known."""
        if self.rows:
            return min(1.0, row / self.rows)
        if not self.size:
            return None
        return 1.0 if self.stream.closed else min(1.0, self.stream.tell() / self.size)


ROWS = 250  # rows per read: the system reuses buffers of a few MB, while larger ones cost page faults
READ = "a .parquet, .jsonl, .json, .csv, .tsv, .arrow or .txt file"
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
OTHERS = {b"PK\x03\x04": "zip", b"%PDF-": "pdf", b"BZh9": "bz2", b"\xfd7zXZ\0": "xz", b"7z\xbc\xaf": "7z",
          b"PAR1": "parquet", b"ARROW1": "arrow", b"\x93NUMPY": "npy"}
STRUCTURED = {".json": "JSON", ".jsonl": "JSON lines", ".csv": "a CSV table", ".tsv": "a table of tab-separated values"}
# files of these names lie beside data, and are about them
ABOUT = re.compile(r"(readme|licen[sc]e|notice|copying|changelog|citation|requirements|robots|merges)\b.*\.txt(\..*)?|"
                   r"(dataset_?(info|infos|dict)|state|config|metadata|package|package-lock|manifest.*|progress.*|"
                   r"vocab|tokenizer.*|special_tokens_map|generation_config|croissant)\.json", re.IGNORECASE)


def read_rows(name: str, column: str, skip: bool, spot: Spot | None = None):
    """Yield (Arrow binary array, {index in it: what is wrong}) for each batch of up to ROWS rows of a file, in order.

    `spot` then says how far it is.

    A row that cannot be read is null in the array and named in the dict; with `skip`, damage to a part of a parquet
    file is treated so too, and otherwise raised. Raises UserError if the file does not have such a column.
    """
    kind, spot = kind_of(name), spot or Spot()
    if kind in ("parquet", "arrow") and "://" not in name:
        with open(name, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise Unreadable(NOT_FETCHED)
    if kind == "parquet":
        return (read_row_groups if skip or "." in column else read_parquet)(name, column, spot)
    if kind == "arrow":
        return read_arrow(name, column, spot)
    if kind == "txt":
        return read_document(name, column, spot)
    return (read_table if kind in ("csv", "tsv") else read_json)(name, column, spot)


def convert(rows, text_of):
    """Return text_of(row), UTF-8 or None, for a batch of rows as read_rows() yields it; its UserErrors are bad rows."""
    import pyarrow as pa

    texts, bad = [], {}
    for i, row in enumerate(rows):
        try:
            texts.append(text_of(row))
        except UserError as error:
            texts.append(None)
            bad[i] = str(error)
    return pa.array(texts, pa.large_binary()), bad


def as_utf8(text: str) -> bytes:
    """Encode a text as UTF-8. Lone surrogates, which UTF-8 cannot express, become U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ---------------------------------------------------------------------------------------------------------------------
# 1. Text files, compressed or not
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_text(name: str, spot: Spot):
    """Open a file for reading its bytes, decompressed and without the byte-order mark of UTF-8.

    Raises UserError if it is in UTF-16 or UTF-32, binary, or not compressed as its name says.
    """
    import fsspec
    import pyarrow as pa

    with fsspec.open(name, "rb") if "://" in name else open(name, "rb") as stream:
        raw = io.BufferedReader(stream, 1 << 20) if "://" in name else stream
        spot.stream, spot.size = raw, stream.size if "://" in name else os.fstat(stream.fileno()).st_size
        codec = next((codec for magic, codec in MAGIC.items() if raw.peek(4).startswith(magic)), "")
        suffix = Path(name).suffix.lower()
        if suffix in MAGIC.values() and codec != suffix and raw.peek(1):
            right = Path(name[:-len(suffix)] + codec).name
            raise Unreadable(f"it cannot be read, as it is not compressed as its name says: rename it to {right}")
        kind = {".gz": "gzip", ".zst": "zstd"}.get(codec)
        # small reads cost nothing, and of a file that is cut off only the last one is lost
        file = io.BufferedReader(pa.CompressedInputStream(raw, kind), 1 << 14) if kind else raw
        check_encoding(file.peek(4096)[:4096], name)
        if file.peek(3).startswith(b"\xef\xbb\xbf"):
            file.read(3)
        yield file


def check_encoding(head: bytes, name: str) -> None:
    """Raise UserError if a file that begins with these bytes is no text in UTF-8, or in a code like it."""
    if head.startswith(LFS):
        raise Unreadable(NOT_FETCHED)
    zeros, marks = [head[i::4].count(0) for i in range(4)], {
        b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    suffix = next((suffix for mark, suffix in OTHERS.items() if head.startswith(mark)), None)
    if suffix:
        right = Path(name).with_suffix(f".{suffix}").name
        raise Unreadable(f"it is no text but a .{suffix} file: rename it to {right}")
    code = next((code for mark, code in marks.items() if head.startswith(mark)), None)
    if code is None and sum(zeros) * 4 <= len(head):
        return
    if code is None:
        order = "LE" if zeros[3] >= zeros[0] and zeros[1] else "BE"
        code = ("UTF-32" if sum(zeros) * 2 > len(head) else "UTF-16") + order
    raise Unreadable(f"it seems to be in {code}, not UTF-8: {recode(name, code)}")


def recode(name: str, code: str) -> str:
    """Return the command that makes a file in UTF-8 of one in another code."""
    path, last = shlex.quote(name), Path(name).name
    stem = re.sub(r"(?i)\.(gz|zst)$", "", last)
    unpack = "" if stem == last else f"{'zstd' if last.lower().endswith('.zst') else 'gzip'} -dc {path} | "
    return f"{unpack}iconv -f {code} -t UTF-8{'' if unpack else ' ' + path} > {shlex.quote('utf8_' + stem)}"


def decode(data: bytes, name: str) -> str:
    """Decode a text that has to be UTF-8. Raises UserError, with a command, if it is in another code."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 at byte {error.start}; if it is Latin-1: {recode(name, 'WINDOWS-1252')}"
                        ) from error


def in_batches(items):
    """Yield the items of an iterator in lists of ROWS; those before an error come before the error."""
    items, error = iter(items), None
    while error is None:
        batch = []
        try:
            batch.extend(itertools.islice(items, ROWS))  # keeps what came before an error
        except Exception as caught:
            error = caught
        if batch:
            yield batch
        if error is None and len(batch) < ROWS:
            return
    raise error


def read_document(name: str, column: str, spot: Spot):
    """Yield the text of a .txt file as one row, with the ends of lines as Python reads them; none if it is empty.

    A file that is binary, markup, JSON or a table is a bad row.
    """
    def text_of(data: bytes) -> bytes | None:
        if b"\0" in data:
            raise UserError(f"it holds NUL bytes, so it is no text: tr -d '\\000' < {shlex.quote(name)} removes them")
        markup = re.match(rb"\s*(?i:<(!doctype )?(html)|<\?(xml)|\{\\(rtf))", data[:200])
        found = kind_by_bytes(data[:1 << 20])
        if markup or found == ".xml":
            kind = next(filter(None, markup.groups()[1:])).decode().lower() if markup else "xml"
            way = way_to_convert(str(Path(name).with_suffix(f".{kind}")))
            raise UserError(f"it seems to be {kind.upper()}, not plain text: rename it to .{kind}, then {way}")
        if found in STRUCTURED:
            raise UserError(f"it seems to be {STRUCTURED[found]}, not plain text: rename it to {found}")
        return decode(data, name).replace("\r\n", "\n").replace("\r", "\n").encode() or None

    with open_text(name, spot) as file:
        yield convert([file.read()], text_of)


def read_table(name: str, column: str, spot: Spot):
    """Yield one column of a .csv or .tsv file. Texts are kept as they are written; an empty field is null.

    The names of the columns are in the first line. Raises UserError if `column` is not among them.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(name, spot) as raw, io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="") as file:
        delimiter, head, blanks, begin = read_head(file, column, kind_of(name))
        if head and head.count(column) != 1:
            wrong = f"{column!r} twice: rename one" if column in head else missing_column(column, head)
            raise UserError(f"its line {begin - 1}, which has to name the columns, has {wrong}")
        records = csv.reader(file, delimiter=delimiter, skipinitialspace=blanks, strict=True)

        def text_of(record) -> bytes | None:
            line, values = record
            if isinstance(values, csv.Error):
                raise UserError(f"{line} is not CSV: {values}: {plain_quotes(name, delimiter)}")
            if values and len(values) != len(head):
                raise UserError(f"{line} has {len(values)} fields and the first line {len(head)}: put a text that "
                                f"holds {delimiter!r} or ends of lines in quotes")
            text = values[head.index(column)].encode("utf-8", "surrogateescape") if values else b""
            try:
                return decode(text, name).encode() or None
            except UserError as error:
                raise UserError(f"{line}: {error}") from error

        def numbered():
            while True:
                first = begin + records.line_num
                try:
                    values = next(records)
                except StopIteration:
                    return
                except csv.Error as error:
                    values = error
                last = begin + records.line_num - 1
                yield f"line {first}" + (f" to {last}" if last > first else ""), values

        for batch in in_batches(numbered()):
            yield convert(batch, text_of)


def plain_quotes(name: str, delimiter: str) -> str:
    """Return what to type for a table whose quotes are not CSV's, but part of the texts or escaped with a backslash."""
    how = "quoting=3" if delimiter == "\t" else "escapechar=chr(92)"
    meaning = "are part of the texts" if delimiter == "\t" else "follow a backslash"
    return (f"if its quotes {meaning}: python -c \"import pandas; pandas.read_csv({name!r}, sep={delimiter!r}, {how})"
            ".to_parquet('texts.parquet')\"")


def read_head(file, column: str, kind: str) -> tuple[str, list[str], bool, int]:
    """Read the line that names the columns of a table -> (delimiter, names, are blanks around it?, next line).

    Blank lines and Excel's sep=; before it are passed over. The names are [] if there is none.
    """
    delimiters, number, first = "\t" if kind == "tsv" else ",;\t|", 0, ""
    while not first.strip():
        first, number = file.readline(), number + 1
        if not first:
            return delimiters[0], [], False, number
        if found := re.fullmatch(r"(?i)sep=(.)\s*", first):
            delimiters, first = found[1], ""
    while first.count('"') % 2 and (more := file.readline()):  # a name in quotes may hold ends of lines
        first, number = first + more, number + 1
    for blanks in (False, True):
        for delimiter in delimiters:
            names = next(csv.reader(io.StringIO(first, newline=""), delimiter=delimiter, skipinitialspace=blanks))
            if column in names:
                return delimiter, names, blanks, number + 1
    return delimiters[0], next(csv.reader(io.StringIO(first, newline=""), delimiter=delimiters[0])), False, number + 1


def missing_column(column: str, there) -> str:
    """Return what is said of a column that does not exist, with the names of those that do."""
    names = ", ".join(str(name)[:60] for name in list(there)[:20])
    return f"no column {column!r}: choose a --text_column of {names}"


# ---------------------------------------------------------------------------------------------------------------------
# 2. JSON
# ---------------------------------------------------------------------------------------------------------------------

def read_json(name: str, column: str, spot: Spot):
    """Yield one key of the JSON objects in a file: one per line, or a list of them, also as {"data": [...]}.

    Python's parser is used, because the one in `datasets` refuses lone surrogates and turns texts that look like dates
    into dates.
    """
    with open_text(name, spot) as file:
        kind, head = kind_of(name), file.peek(4096)[:4096].lstrip()
        if head.startswith(b"["):
            yield from batches(items_of_list(file), column)
            return
        lines = enumerate(file, start=1)
        if kind == "json" and head.startswith(b"{"):
            number, first = next((number, line) for number, line in lines if line.strip())
            following = next(((number, line) for number, line in lines if line.strip()), None)
            if not (following and is_object(first)):  # one object, in one line or in several
                whole = first + following[1] + file.read() if following else first
                yield from batches(enumerate(list_in(whole, column), start=1), column)
                return
            lines = itertools.chain([(number, first)], [following], lines)
        for batch in in_batches(lines):
            yield convert(batch, lambda line: text_of_line(line, column))


def is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object, or looks like a damaged one rather than like a part of one."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not line.rstrip().endswith((b"[", b",", b"{", b":"))


def list_in(data: bytes, column: str) -> list:
    """Return the rows in a JSON file that is one object: those in it, or the object itself."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is not JSON: {error}; if it has several values one after another: "
                         "jq -c . FILE > lines.jsonl") from error
    rows = rows_in(value, column)
    return [value] if rows is None else rows


def rows_in(value: dict, column: str) -> list | None:
    """Return the rows that a JSON object holds, or None if it is a row itself.

    They are in a list of objects, in "data", under a key each, or by columns, in all forms of pandas' to_json().
    """
    texts, data, columns = value.get(column), value.get("data"), value.get("columns")
    if isinstance(texts, dict) and texts and all(key.isdecimal() for key in texts):
        return [{column: text} for text in texts.values()]  # {"text": {"0": "...", "1": ...}, "id": {"0": ...}}
    lengths = {len(each) if isinstance(each, list) else None for each in value.values()}
    if isinstance(texts, list) and len(lengths) == 1:
        return [{column: text} for text in texts]  # {"text": ["...", ...], "id": [...]}
    if column in value:
        return None
    if isinstance(columns, list) and isinstance(data, list) and column in columns:
        return [dict(zip(columns, row)) for row in data]  # {"columns": ["id", "text"], "data": [[1, "..."], ...]}
    if is_list(data) or (isinstance(data, list) and data and all(isinstance(each, str) for each in data)):
        return data
    if value and all(isinstance(each, dict) and column in each for each in value.values()):
        return list(value.values())  # {"0": {"text": ...}, "1": ...}
    lists = [each for each in value.values() if is_list(each)]
    named = [each for each in lists if column.partition(".")[0] in each[0]]
    return named[0] if len(named) == 1 else lists[0] if len(lists) == 1 else None


def is_list(value) -> bool:
    """Return whether a JSON value is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def items_of_list(file):
    """Yield (number, value) for each item of a JSON list, without holding the whole file."""
    decoder, reader, between = json.JSONDecoder(), io.TextIOWrapper(file, "utf-8", "replace"), re.compile(r"[\s,]*")
    place, number, size = 0, 0, 1 << 16
    text = reader.read(size).lstrip()[1:]
    while True:
        place = between.match(text, place).end()
        try:
            if place < len(text) and text[place] == "]":
                return
            value, end = decoder.raw_decode(text, place)
            if end == len(text):  # a number may go on
                raise ValueError("cut off")
        except (ValueError, RecursionError) as error:
            more = reader.read(size)
            if not more:
                raise Unreadable(f"item {number + 1} of its list is not JSON: {error}") from error
            text, place, size = text[place:] + more, 0, 2 * size
            continue
        number, place, size = number + 1, end, 1 << 16
        yield number, value


def batches(items, column: str):
    """Yield the texts of numbered JSON values, in batches. A value that is a string is a text itself."""
    def text_of(item) -> bytes | None:
        if isinstance(item[1], str):
            return as_utf8(item[1])
        return text_in(item[1], column, f"item {item[0]}")

    for batch in in_batches(items):
        yield convert(batch, text_of)


def text_of_line(numbered: tuple[int, bytes], column: str) -> bytes | None:
    """Return the text in a numbered JSON line as UTF-8, or None if it is null or the line is blank.

    Raises UserError, with the number of the line, for anything else.
    """
    number, line = numbered
    try:
        line = line.decode("utf-8", "replace")
        value = json.loads(line) if line.strip() else {column: None}
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number} is not a JSON object with a string under {column!r}: {error}; if objects take "
                        "several lines, or share one: jq -c . FILE > lines.jsonl") from error
    if isinstance(value, str):
        return as_utf8(value)
    return text_in(value, column, f"line {number}")


def text_in(value, column: str, place: str) -> bytes | None:
    """Return the text under a key of a JSON object as UTF-8; "a.b" is the key b of the object under a."""
    for key in [column] if not isinstance(value, dict) or column in value else column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UserError(f"{place} is not a JSON object with a string under {column!r}")
        if key not in value:
            raise UserError(f"{place} has no key {column!r}: choose a --text_column of {', '.join(value)[:200]}")
        value = value[key]
    if value is None or isinstance(value, str):
        return None if value is None else as_utf8(value)
    if isinstance(value, (list, dict)):
        raise UserError(f"{place} has a {type(value).__name__} under {column!r}: {way_out(value, column, 'json')}")
    raise UserError(f"{place} is not a JSON object with a string under {column!r}, but with {str(value)[:40]!r}")


def way_out(value, column: str, kind: str, name: str = "FILE") -> str:
    """Return what to type where a column holds `value`, a list or an object, instead of a text."""
    if isinstance(value, dict):
        keys = [f"{column}.{key}" for key, each in value.items() if isinstance(each, str)]
        return f"choose a --text_column of {', '.join(keys)}" if keys else "choose another --text_column"
    item = value[0] if value else ""
    keys = [key for key, each in item.items() if isinstance(each, str)] if isinstance(item, dict) else []
    key = next((key for key in ("content", "value", "text", *reversed(keys)) if key in keys), None)
    part = f"part[{key!r}]" if key else "str(part)"
    joined = f"'\\n'.join({part} for part in row[{column!r}])"
    return ('join it to one text first: python -c "import datasets; '
            f"datasets.load_dataset({kind!r}, data_files={name!r}, split='train')"
            f".map(lambda row: {{'text': {joined}}}).select_columns('text').to_json('texts.jsonl')\"")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Arrow
# ---------------------------------------------------------------------------------------------------------------------

def read_parquet(name: str, column: str, spot: Spot):
    """Yield one column of a parquet file. Other columns are not read."""
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet

    options = {}
    if "://" in name:  # over a network: few and large requests, with the next one sent early
        cache = pa.CacheOptions(prefetch_limit=1, range_size_limit=128 << 20)
        options["fragment_scan_options"] = pa.dataset.ParquetFragmentScanOptions(cache_options=cache)
    else:
        with contextlib.suppress(pa.ArrowException):  # which is said when it is read
            spot.rows = pa.parquet.read_metadata(name).num_rows
    path = glob.escape(name if "://" in name else os.path.abspath(name))
    table = import_datasets().load_dataset("parquet", data_files=[path], columns=[column], batch_size=ROWS,
                                           split="train", streaming=True, **options)
    try:
        for batch in table.with_format("arrow").iter(batch_size=ROWS):
            yield from binary_of(batch.column(0), column, name)
    except pa.ArrowInvalid as error:
        if "No match for FieldRef" not in str(error):
            raise
        columns = str(error).partition(" in ")[2].partition("__fragment_index")[0].split("\n")
        raise UserError(missing_column(column, [each for each in columns if each and each[0] != " "])) from error


def read_row_groups(name: str, column: str, spot: Spot):
    """Yield one column of a parquet file, "a.b" being the field b of a column a.

    The rows of a group that is damaged, from the damage on, are bad ones.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet

    with fsspec.open(name, "rb") if "://" in name else open(name, "rb") as raw, pa.parquet.ParquetFile(raw) as file:
        schema, top = file.schema_arrow, column if column in file.schema_arrow.names else column.partition(".")[0]
        if top not in schema.names:
            raise UserError(missing_column(column, [f"{field.name}: {field.type}" for field in schema]))
        begin, spot.rows = 0, file.metadata.num_rows
        for group in range(file.num_row_groups):
            row, end = begin, begin + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS, [group], [top]):
                    values = batch.column(0)
                    yield from binary_of(values if top == column else inner(values, column), column, name)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                if "://" in name and not isinstance(error, pa.ArrowException):
                    raise  # the network's, and tried again
                reason = f"rows {row + 1} to {end} cannot be read: {' '.join(str(error).split())[:200]}"
                yield pa.nulls(end - row, pa.large_binary()), dict.fromkeys(range(end - row), reason)
            begin = end


def read_arrow(name: str, column: str, spot: Spot):
    """Yield one column of an .arrow file: a stream, as `datasets` writes it, or a file with an index at its end."""
    import fsspec
    import pyarrow as pa

    with fsspec.open(name, "rb") if "://" in name else pa.memory_map(name) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
        schema, top = reader.schema, column if column in reader.schema.names else column.partition(".")[0]
        if top not in schema.names:
            raise UserError(missing_column(column, [f"{field.name}: {field.type}" for field in schema]))
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            for i in range(0, len(batch), ROWS):
                values = batch.column(top).slice(i, ROWS)
                yield from binary_of(values if top == column else inner(values, column), column, name)


def inner(values, column: str):
    """Return the field of an Arrow struct that "a.b.c" names, values being the column a; null in a null struct."""
    import pyarrow as pa
    import pyarrow.compute

    for key in column.split(".")[1:] if pa.types.is_struct(values.type) else []:
        names = [field.name for field in values.type] if pa.types.is_struct(values.type) else []
        if key not in names:
            raise UserError(missing_column(column, [f"{column.partition('.')[0]}.{each}" for each in names]))
        values = pa.compute.struct_field(values, key)
    return values


def binary_of(values, column: str, name: str):
    """Yield (Arrow binary array, {}) for a column of text, of any type that Arrow has for it."""
    import pyarrow as pa

    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
                    pa.null()):
        remedy = "choose another --text_column"
        if pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
            remedy = way_out(example(kind), column, kind_of(name), name)
        raise UserError(f"column {column!r} holds {str(kind)[:200]}, not text: {remedy}")
    if pa.types.is_dictionary(values.type):
        values = values.cast(kind)
    values = values.cast(pa.large_binary())
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        yield chunk, {}


def example(kind):
    """Return a JSON value of an Arrow type, with "" for text and None for all else that is neither list nor struct."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name: example(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [example(kind.value_type)]
    return "" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def import_datasets():
    """Import the package `datasets`, set up to start fast, print nothing and leave the retries to read_texts."""
    import datasets
    import huggingface_hub

    datasets.config.TORCH_AVAILABLE = False  # otherwise it imports torch, which takes a second
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for reason in ("OPEN", "READ", "READ_RATE_LIMIT", "READ_SERVER_UNAVAILABLE"):
        setattr(datasets.config, f"STREAMING_{reason}_RETRY_INTERVAL", 0)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # these two print what they also raise
    huggingface_hub.logging.set_verbosity_error()
    return datasets
