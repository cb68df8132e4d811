"""An index of a folder's pictures and captions, made by a model in one go: what the page of `nev demo` searches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from nev.common.errors import first_few
from nev.config.base import ConfigError
from nev.data.sources import SOURCES, Source, SourceOptions
from nev.data.sources.caption_tables import TABLES
from nev.data.sources.recognise import recognise_source
from nev.data.vectors import iterate_vectors, list_vector_files
from nev.storage.files import write_atomic

if TYPE_CHECKING:
    from nev.inference.model import Model

THUMBNAIL = 256  # pixels
TABLE = "items"
RECORD, INDEXED = "demo.txt", "indexed.json"  # the pictures of a demo; what its index was made of


class Searchable(NamedTuple):
    """A model, and an index made with it. model: its location. location: of the index. images, texts: rows of the index."""

    model: str
    location: str
    images: int
    texts: int


def open_pictures(folder: str, kind: str | None, console: Console) -> tuple[str, Source]:
    """The pictures of a folder, with captions where the folder has some. Returns the kind of source, and the source.

    kind: of SOURCES. None: by the folder's files; pictures beside a table (csv, tsv, jsonl) have their captions there.
    """
    inputs = [folder]
    if kind is None:
        kind, unread = recognise_source(inputs, metadata=False)
        if kind == "folder" and unread.keys() & set(TABLES):
            kind = "folder-captions"
        others = first_few([f"{count:,} {suffix}" for suffix, count in unread.items() if suffix not in TABLES])
        console.print(f"--source {kind}{f'; not read: {others}' if others else ''}", highlight=False, soft_wrap=True)
    if kind not in SOURCES:
        raise ConfigError(f"--source {kind!r}: it is one of {', '.join(SOURCES)}")
    return kind, SOURCES[kind](inputs, SourceOptions(captioned=False))


def make_searchable(location: str, source: Source, inputs: list[str], folder: Path, console: Console) -> Searchable:
    """Embed the pictures of a source, and index them with their captions, unless that is done.

    location: of the model. inputs: what the source reads, for the record. folder: for vector files and index.
    An index is made whole or not at all. Pictures that changed make a new index.
    """
    from nev.embed.corpus import CorpusOptions, choose_run, embed_corpus, weight_bytes
    from nev.embed.same_model import open_model

    vectors, index = folder / "vectors", folder / "index"
    model, place = open_model(location, None, None, False, with_text=True)
    options = CorpusOptions(str(vectors), inputs, thumbnail=THUMBNAIL, prune=True)
    run = choose_run(source, None, weight_bytes(model, with_text=True), console)
    report = embed_corpus(model, place, source, options, console, run)
    if report.bad:
        console.print(f"{report.bad.total():,} pictures cannot be used: {vectors / '_bad'} lists them", soft_wrap=True)
    if report.unreadable:
        raise ConfigError(f"{len(report.unreadable)} parts cannot be read. The first: {report.unreadable[0]}")
    files = {
        "files": sorted(PurePath(file).name for file in list_vector_files(str(vectors))),
        "model": model.fingerprint,
    }
    if not index.exists() or read_record(folder) != files:
        write_index(model, vectors, index, console)
        write_atomic(str(folder / INDEXED), json.dumps(files).encode())
    return count_items(location, index)


def open_folder(folder: Path, pictures: str) -> None:
    """Make the folder of a demo, or take that of an earlier call. Raises ConfigError for a folder of other pictures or files.

    pictures: folder of the pictures, absolute.
    """
    record = folder / RECORD
    there = record.read_text(encoding="utf-8") if record.exists() else None
    if there is None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} was not made by nev demo, which would write there: give another --output")
    if there not in (None, pictures):
        raise ConfigError(f"{folder} is the demo of {there}: give another --output, or delete that folder")
    write_atomic(str(record), pictures.encode())


def read_record(folder: Path) -> Any:
    """What the index of a demo was made of. None: there is no whole index."""
    record = folder / INDEXED
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else None


def write_index(model: Model, vectors: Path, index: Path, console: Console) -> None:
    """Write an index of the pictures in vector files, and of their captions as texts, in the place of an older one."""
    from nev.common.progress import progress
    from nev.search.fill import fill
    from nev.search.open import open_store
    from nev.search.plan import Options, Task, make_plan

    writing, record = index.with_name("_index"), index.with_name(INDEXED)
    record.unlink(missing_ok=True)
    shutil.rmtree(writing, ignore_errors=True)
    texts = write_captions(vectors, writing.with_name("_captions.parquet"))
    options = Options(images=str(vectors), texts=str(texts) if texts else None)
    with progress(console) as update:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            update("indexed", done, done, "pictures and captions")

        task = Task(open_store(str(writing), TABLE), options, lambda: model)
        fill(task, make_plan(task), advance)
    shutil.rmtree(index, ignore_errors=True)
    writing.rename(index)


def write_captions(vectors: Path, file: Path) -> Path | None:
    """Write the captions in vector files as texts to index, each sentence once. Returns the file, or None without a caption."""
    texts: dict[str, str] = {}
    for table in iterate_vectors(str(vectors)):
        if "caption" not in table.column_names:
            continue
        for uid, captions in zip(table["uid"].to_pylist(), table["caption"].to_pylist(), strict=True):
            for number, caption in enumerate(captions or ()):
                texts.setdefault(caption, f"{uid}#{number}")
    if not texts:
        return None
    pq.write_table(pa.table({"uid": list(texts.values()), "text": list(texts)}), file)
    return file


def count_items(model: str, index: Path) -> Searchable:
    """What an index holds."""
    from nev.search.index import open_index

    opened = open_index(str(index), TABLE)
    return Searchable(model, str(index), opened.count("image"), opened.count("text"))
