"""Readers: demonstrations from files and data sets, one row at a time, in the order given.

A source is a file (JSON lines or a JSON array, also compressed with gzip or zstd; Parquet; Arrow)
or a data set of the `datasets` library: a folder, or a name on the Hugging Face hub, written
`NAME[:CONFIG][@SPLIT]` ("HuggingFaceTB/smoltalk:all@train"; the split is "train" where none is
named; a folder takes both too). A path that exists always wins over a name. Only a JSON array is
held in memory as a whole.

A row that cannot be used becomes a Reject and the reading goes on; a source that cannot be read any
further is a UserError.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..pipeline.errors import UserError
from ..pipeline.records import Reject

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Messages = list[dict[str, Any]]
Row = dict[str, Any]
Lines = Iterator[
    tuple[int, Any]
]  # line or row from 1, and what it holds: bytes are JSON to be read

BATCH_ROWS = 256  # of a columnar file, turned into Python objects at a time
CHUNK_BYTES = 1 << 20


class UnusableError(Exception):
    """A demonstration that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation, as its row in the source gave it."""

    id: str
    messages: Messages  # each with "role" and "content", and what else a template may want
    tools: list[Row] | None
    source: str
    line: int  # line (JSON lines) or row (everything else), from 1
    plain: bool  # whether it came as a prompt and a completion that are both plain text


@dataclass(frozen=True)
class Source:
    """Where demonstrations come from. `name` is unique among the sources and no path."""

    name: str
    origin: str  # as the user gave it, for messages
    reader: "_Reader"

    def fingerprint(self) -> str:
        """A sha256 of the content, independent of its path and, for text, of its compression.

        For a data set on the hub: of its name, configuration, split and revision.
        """
        return self._facts[0]

    def count(self) -> int | None:
        """The number of rows; None where nothing but reading them all would tell."""
        return self._facts[1]

    def rows(self, start: int = 0) -> Lines:
        """Rows from `start` on, each with its line. Raises UserError where it is damaged."""
        with _reading(self.origin):
            yield from self.reader.rows(start)

    @cached_property
    def _facts(self) -> tuple[str, int | None]:
        with _reading(self.origin):
            return self.reader.facts()


class _Reader(NamedTuple):
    """How a kind of source is read."""

    rows: Callable[[int], Lines]
    facts: Callable[[], tuple[str, int | None]]  # fingerprint and count


def open_sources(names: Sequence[str]) -> list[Source]:
    """The sources of these names, in their order.

    Raises UserError for one that is missing, of an unknown kind, unreadable or empty.
    """
    sources: list[Source] = []
    for name in names:
        source = _open(name)
        if next(source.rows(), None) is None:
            raise UserError(f"demonstrations {name}: empty, there is no row in it")
        taken = {earlier.name for earlier in sources}
        sources.append(replace(source, name=_unique(source.name, taken)))
    return sources


def read_demonstrations(
    sources: Sequence[Source], format: str = "auto", start: int = 0
) -> Iterator[Demonstration | Reject]:
    """The demonstrations of all sources, from row `start` of them all on.

    `format` is one of FORMATS, or "auto" to recognise that of each row by its fields.
    """
    for source, line, raw in _rows_from(sources, start):
        yield _demonstration(source.name, line, raw, format)


def check_readable(sources: Sequence[Source], format: str = "auto", first: int = 100) -> None:
    """Raises UserError when a source has no usable demonstration among its `first` rows."""
    for source in sources:
        rows = list(islice(read_demonstrations([source], format), first))
        rejects = [row for row in rows if isinstance(row, Reject)]
        if len(rejects) == len(rows):
            raise UserError(
                f"demonstrations {source.origin}: none of its first {len(rows)} rows could be "
                f"used; the first: line {rejects[0].line}: {rejects[0].reason}; formats are "
                f"{', '.join(FORMATS)}, name one with --format"
            )


def _rows_from(sources: Sequence[Source], start: int) -> Iterator[tuple[Source, int, Any]]:
    for source in sources:
        count = source.count() if start else 0
        if count is None:  # only reading tells where such a source ends
            for line, raw in source.rows():
                if start:
                    start -= 1
                else:
                    yield source, line, raw
            continue
        if start == 0 or start < count:
            for line, raw in source.rows(start):
                yield source, line, raw
        start = max(0, start - count)


# --- opening -----------------------------------------------------------------------------------


def _open(name: str) -> Source:
    path = Path(name)
    if path.exists() and not path.is_dir():
        return Source(path.name, name, _file_reader(path))
    data_set, config, split = (name, None, "train") if path.exists() else _parts(name)
    folder = Path(data_set)
    if folder.is_dir():
        options = name[len(data_set) :]
        reader = _folder_reader(folder.resolve(), config, split)
        return Source(folder.resolve().name + options, name, reader)
    if _looks_like_file(name):
        raise UserError(f"demonstrations {name}: no such file")
    return Source(name, name, _hub_reader(data_set, config, split))


def _parts(name: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set."""
    parts = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", name)
    if parts is None:
        raise UserError(
            f"demonstrations {name}: neither a file nor a data set, NAME[:CONFIG][@SPLIT]"
        )
    return parts[1], parts[2], parts[3] or "train"


def _looks_like_file(name: str) -> bool:
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return is_path or _suffix(path)[0] in (*FILE_KINDS, *OTHER_FILES)


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}#{number}" for number in range(2, len(taken) + 2))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def _file_reader(path: Path) -> _Reader:
    suffix, compression = _suffix(path)
    kind = FILE_KINDS.get(suffix)
    if kind is None or (compression and kind is not _json_reader):
        raise UserError(
            f"demonstrations {path}: unknown kind of file {path.suffix!r}; known are "
            f"{', '.join(FILE_KINDS)}, those of JSON also with {' or '.join(COMPRESSIONS)} after it"
        )
    return kind(path)


def _suffix(path: Path) -> tuple[str, str]:
    """The suffix that tells the kind of a file, and that of its compression or ""."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


@contextmanager
def _reading(origin: str) -> Iterator[None]:
    """Turns what the libraries raise about a damaged or unreachable source into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zlib, zstd, Arrow and the hub each have their own
        raise UserError(f"demonstrations {origin}: cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- text --------------------------------------------------------------------------------------


def _json_reader(path: Path) -> _Reader:
    if _suffix(path)[0] == ".json" and _starts_array(path):
        return _Reader(lambda start: _array_rows(path, start), lambda: _array_facts(path))
    return _Reader(lambda start: _text_rows(path, start), lambda: _text_facts(path))


def _open_text(path: Path) -> BinaryIO:
    """The bytes of a text file, decompressed."""
    if not _suffix(path)[1]:
        return path.open("rb")
    import io

    import pyarrow as pa  # it tells of a file cut short, where zstandard ends without a word

    return io.BufferedReader(pa.input_stream(str(path)))  # pyright: ignore[reportReturnType, reportArgumentType]


def _text_lines(path: Path) -> Iterator[bytes]:
    """All lines, the mark of UTF-8 that some editors put before the first one left out."""
    with _open_text(path) as file:
        for i, line in enumerate(file):
            yield line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line


def _text_rows(path: Path, start: int) -> Lines:
    lines = enumerate(_text_lines(path), 1)
    yield from islice(((number, line) for number, line in lines if line.strip()), start, None)


def _text_facts(path: Path) -> tuple[str, int]:
    digest = sha256()
    count = 0
    for line in _text_lines(path):
        digest.update(line)
        count += bool(line.strip())
    return digest.hexdigest(), count


def _starts_array(path: Path) -> bool:
    with _reading(str(path)):
        return next(
            (line.lstrip()[:1] == b"[" for line in _text_lines(path) if line.strip()), False
        )


def _load_array(path: Path) -> list[Any]:
    return json.loads(b"".join(_text_lines(path)).decode("utf-8"))


def _array_rows(path: Path, start: int) -> Lines:
    yield from islice(enumerate(_load_array(path), 1), start, None)


def _array_facts(path: Path) -> tuple[str, int]:
    return _text_facts(path)[0], len(_load_array(path))


# --- columns -----------------------------------------------------------------------------------


def _parquet_reader(path: Path) -> _Reader:
    return _Reader(lambda start: _parquet_rows(path, start), lambda: _parquet_facts(path))


def _parquet_rows(path: Path, start: int) -> Lines:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row + size > start:
                batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
                yield from _batch_rows(batches, row, start)
            row += size


def _parquet_facts(path: Path) -> tuple[str, int]:
    from pyarrow.parquet import read_metadata

    return _file_digest(path), read_metadata(path).num_rows


def _arrow_reader(path: Path) -> _Reader:
    return _Reader(lambda start: _arrow_rows(path, start), lambda: _arrow_facts(path))


def _arrow_rows(path: Path, start: int) -> Lines:
    yield from _batch_rows(_arrow_batches(path), 0, start)


def _arrow_batches(path: Path) -> "Iterator[pa.RecordBatch]":
    """The batches of an Arrow file, in either of the two IPC formats; mapped, not read."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _arrow_facts(path: Path) -> tuple[str, int]:
    return _file_digest(path), sum(batch.num_rows for batch in _arrow_batches(path))


def _batch_rows(batches: "Iterator[pa.RecordBatch]", row: int, start: int) -> Lines:
    """Rows from `start` on of batches of which the first one begins at `row`."""
    for batch in batches:
        for offset in range(max(0, start - row), batch.num_rows, BATCH_ROWS):
            rows = batch.slice(offset, BATCH_ROWS).to_pylist()
            yield from enumerate(map(_without_nones, rows), row + offset + 1)
        row += batch.num_rows


def _without_nones(value: Any) -> Any:
    """A value without its absent fields: a column of structs has those of all rows in each row."""
    if isinstance(value, dict):
        return {key: _without_nones(field) for key, field in value.items() if field is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


# --- data sets ---------------------------------------------------------------------------------


def _folder_reader(path: Path, config: str | None, split: str) -> _Reader:
    return _data_set_reader(
        lambda: _load_folder(path, config, split),
        lambda: _digest(config, split, *_file_digests(path)),
    )


def _hub_reader(name: str, config: str | None, split: str) -> _Reader:
    @cache
    def load() -> "tuple[datasets.IterableDataset, str | None]":
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(name, config)
            return builder.as_streaming_dataset(split), builder.hash  # pyright: ignore[reportReturnType]
        except Exception as error:  # the hub, the network and the data set each have their own
            raise UserError(
                f"demonstrations {name}: no such file, and no data set that can be loaded "
                f"(NAME[:CONFIG][@SPLIT]): {_one_line(error)}"
            ) from error

    return _data_set_reader(lambda: load()[0], lambda: _digest(name, config, split, load()[1]))


def _data_set_reader(
    load: "Callable[[], datasets.Dataset | datasets.IterableDataset]",
    fingerprint: Callable[[], str],
) -> _Reader:
    def rows(start: int) -> Lines:
        yield from enumerate(map(_without_nones, load().skip(start)), start + 1)

    return _Reader(rows, lambda: (fingerprint(), _data_set_size(load())))


def _load_folder(
    path: Path, config: str | None, split: str
) -> "datasets.Dataset | datasets.IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return load_dataset(str(path), config, split=split, streaming=True)
    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(
            f"demonstrations {path}: no split {split!r}, there are {', '.join(map(str, saved))}: "
            f"name one as {path}@SPLIT"
        )
    return saved[split]


def _data_set_size(data_set: "datasets.Dataset | datasets.IterableDataset") -> int | None:
    from datasets import Dataset

    return len(data_set) if isinstance(data_set, Dataset) else None


def _file_digests(folder: Path) -> Iterator[str]:
    """Name and content of each file in a folder, hidden ones left out."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in names:
        if not any(part.startswith(".") for part in name.parts):
            yield from (name.as_posix(), _file_digest(folder / name))


def _file_digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(*parts: str | None) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()


FILE_KINDS: Mapping[str, Callable[[Path], _Reader]] = {
    ".jsonl": _json_reader,
    ".ndjson": _json_reader,
    ".json": _json_reader,
    ".parquet": _parquet_reader,
    ".arrow": _arrow_reader,
    ".feather": _arrow_reader,
    ".ipc": _arrow_reader,
}
COMPRESSIONS = (".gz", ".zst")
OTHER_FILES = (".csv", ".tsv", ".txt", ".xml", ".yaml", ".zip", ".bz2", ".xz")  # no data set's name


# --- rows --------------------------------------------------------------------------------------


def _demonstration(source: str, line: int, raw: Any, format: str) -> Demonstration | Reject:
    try:
        row = _parse(raw) if isinstance(raw, bytes) else raw
        if not isinstance(row, dict):
            raise UnusableError("not an object with fields")
        if format == "auto":
            format = _recognise(row)
        demonstration = Demonstration(
            id=_row_id(row) or f"{source}:{line}",
            messages=_checked(FORMATS[format].convert(row)),
            tools=_tools(row),
            source=source,
            line=line,
            plain=format == "prompt-completion" and _is_plain(row),
        )
        _check_characters(demonstration)
    except UnusableError as error:
        return Reject(source, line, str(error))
    return demonstration


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableError(
            f"not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON: {error}") from error


def _recognise(row: Row) -> str:
    for name, form in FORMATS.items():
        if form.fits(row):
            return name
    raise UnusableError(f"no known format, the fields are {', '.join(map(str, row)) or 'none'}")


def _row_id(row: Row) -> str | None:
    value = row.get("id")
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_id else None


def _tools(row: Row) -> list[Row] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # columns hold schemas of many shapes as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UnusableError(f"tools is not JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise UnusableError("tools is not a list of objects")
    return tools or None


def _checked(messages: Messages) -> Messages:
    if not messages:
        raise UnusableError("messages is empty")
    checked = [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise UnusableError("no assistant message")
    return checked


def _checked_message(name: str, message: Any) -> Row:
    if not isinstance(message, dict):
        raise UnusableError(f"{name} is not an object")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UnusableError(
            f"{name}.role is missing" if role is None else f"{name}.role is not a name"
        )
    calls = role == "assistant" and message.get("tool_calls")
    content = message.setdefault("content", "" if calls else None)
    if not isinstance(content, str):
        raise UnusableError(f"{name}.content is {'missing' if content is None else 'not a string'}")
    if role == "assistant" and not calls and not content.strip():
        raise UnusableError(f"{name}.content, the assistant's answer, is empty")
    return message


def _check_characters(demonstration: Demonstration) -> None:
    """Half a surrogate pair, which JSON can spell, is no character: tokenizers fail on it."""
    parts = [demonstration.id, demonstration.messages, demonstration.tools]
    try:
        json.dumps(parts, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise UnusableError(f"the text holds half a surrogate pair, \\u{half:04x}") from error


# --- formats -----------------------------------------------------------------------------------

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _from_messages(row: Row) -> Messages:
    return _list(row, "messages")


def _from_sharegpt(row: Row) -> Messages:
    turns = enumerate(_list(row, "conversations"))
    return _system(row) + [_from_turn(f"conversations[{i}]", turn) for i, turn in turns]


def _from_turn(name: str, turn: Any) -> Row:
    if not isinstance(turn, dict):
        raise UnusableError(f"{name} is not an object")
    speaker = turn.get("from")
    if not isinstance(speaker, str):
        raise UnusableError(f"{name}.from is {'missing' if speaker is None else 'not a name'}")
    if speaker.lower() not in SPEAKERS:
        raise UnusableError(f"{name}.from is {speaker!r}, known are {', '.join(SPEAKERS)}")
    if not isinstance(turn.get("value"), str):
        raise UnusableError(f"{name}.value is {'not a string' if turn.get('value') else 'missing'}")
    return _message(SPEAKERS[speaker.lower()], turn["value"])


def _from_alpaca(row: Row) -> Messages:
    question = _string(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _string(row, "input")
    answer = _message("assistant", _string(row, "output"))
    return [*_system(row), _message("user", question), answer]


def _from_prompt_completion(row: Row) -> Messages:
    return [*_turns(row, "prompt", "user"), *_turns(row, _completion_key(row), "assistant")]


def _turns(row: Row, key: str, role: str) -> Messages:
    is_list = isinstance(row.get(key), list)
    return _list(row, key) if is_list else [_message(role, _string(row, key))]


def _completion_key(row: Row) -> str:
    return "completion" if row.get("completion") is not None else "response"


def _is_plain(row: Row) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row[_completion_key(row)], str)


def _system(row: Row) -> Messages:
    return [_message("system", _string(row, "system"))] if row.get("system") else []


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise UnusableError(f"{key} is {'missing' if value is None else 'not a list'}")
    return value


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UnusableError(f"{key} is {'missing' if value is None else 'not a string'}")
    return value


class Format(NamedTuple):
    """A way to write down a conversation: how it is recognised, and how it is read."""

    fits: Callable[[Row], bool]
    convert: Callable[[Row], Messages]


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(field) is not None for field in fields)


FORMATS: Mapping[str, Format] = {  # a row of several formats is read as the first of them
    "messages": Format(_has("messages"), _from_messages),
    "sharegpt": Format(_has("conversations"), _from_sharegpt),
    "alpaca": Format(_has("instruction", "output"), _from_alpaca),
    "prompt-completion": Format(
        lambda row: _has("prompt", _completion_key(row))(row), _from_prompt_completion
    ),
}
