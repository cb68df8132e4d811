"""Put texts and pictures into an index, or add pictures to a table of text vectors that exists: LanceDB, PostgreSQL, or parquet.

nev index --model runs/quickstart --images vectors --texts texts.parquet --index index
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nev.common.cli import Revision, TextEncoder, TrustRemoteCode, report_errors
from nev.common.words import counted

if TYPE_CHECKING:
    from nev.search.fill import Filled
    from nev.search.plan import Plan
    from nev.search.store import VectorStore

OfColumn = partial(typer.Option, rich_help_panel="Columns of the table")
OfIndexes = partial(typer.Option, rich_help_panel="Indexes of the table")
EXAMPLE = "--model runs/quickstart --images vectors --texts texts.parquet --index index"


class StoreName(StrEnum):
    """Kinds of stores."""

    lancedb = "lancedb"
    postgres = "postgres"
    exact = "exact"


class AnnName(StrEnum):
    """Kinds of indexes of vectors."""

    auto = "auto"
    none = "none"
    hnsw = "hnsw"
    ivf = "ivf"


def main(
    index: Annotated[
        str,
        typer.Option(
            "--index", help="A folder or s3://BUCKET/PREFIX (LanceDB, or --store exact), or postgresql://HOST/DATABASE."
        ),
    ],
    table: Annotated[str, typer.Option("--table", help="Table, in PostgreSQL also SCHEMA.TABLE.")] = "items",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="As in nev.load: a run, a checkpoint, an export, s3://... or a hub name. Needed for texts, and for a table "
            "whose text encoder is not recorded.",
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Folder of vector files that `nev embed-images --model` wrote.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option("--texts", help="Texts to embed: .parquet or .jsonl with uid and text.")
    ] = None,
    store: Annotated[
        StoreName | None, typer.Option("--store", help="Kind of store, where the location alone does not tell.")
    ] = None,
    uid_column: Annotated[str | None, OfColumn("--uid-column", help="The table's column of identifiers.")] = None,
    vector_column: Annotated[str | None, OfColumn("--vector-column", help="The table's column of vectors.")] = None,
    text_column: Annotated[str | None, OfColumn("--text-column", help="The table's column of texts.")] = None,
    kind_column: Annotated[
        str | None, OfColumn("--kind-column", help="Column that holds `image` for a picture.")
    ] = None,
    source_column: Annotated[str | None, OfColumn("--source-column", help="Column of the pictures' paths.")] = None,
    thumbnail_column: Annotated[
        str | None, OfColumn("--thumbnail-column", help="Column of the pictures' thumbnails.")
    ] = None,
    image_uid_column: Annotated[
        str | None,
        OfColumn("--image-uid-column", help="Column of the pictures' uids, where those of texts are numbers."),
    ] = None,
    ann: Annotated[
        AnnName,
        OfIndexes("--ann", help="Index of the vectors. auto: from 20,000 rows ivf in LanceDB, and hnsw in PostgreSQL."),
    ] = AnnName.auto,
    full_text: Annotated[
        bool | None,
        OfIndexes("--full-text/--no-full-text", help="Index of the texts' words.", show_default="for a new table"),
    ] = None,
    alter_table: Annotated[
        bool, typer.Option("--alter-table", help="Permit columns to be added to a table that exists.")
    ] = False,
    replace_images: Annotated[
        bool, typer.Option("--replace-images", help="Delete all pictures that are there first.")
    ] = False,
    replace_texts: Annotated[
        bool, typer.Option("--replace-texts", help="Write over texts that are there with other words.")
    ] = False,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Vouch that the table's vectors are of the model's text encoder, and compare nothing."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, and write nothing.")
    ] = False,
    text_encoder: TextEncoder = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, mps. Default: a GPU where there is one.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Put texts and pictures into one index, or add pictures to a table of text vectors that exists."""
    console = Console()
    with report_errors("The same command writes what is missing."):
        from nev.common.progress import count_progress
        from nev.inference.load import load
        from nev.search.fill import fill
        from nev.search.open import open_store
        from nev.search.plan import Options, Task, make_plan
        from nev.search.store import Columns

        names = {
            "uid": uid_column,
            "vector": vector_column,
            "text": text_column,
            "kind": kind_column,
            "source": source_column,
            "thumbnail": thumbnail_column,
            "image_uid": image_uid_column,
        }
        named = {name: column for name, column in names.items() if column is not None}
        opened = open_store(index, table, Columns(**named) if named else None, store.value if store else None)
        options = Options(
            images, texts, ann.value, full_text, alter_table or dry_run, replace_images, replace_texts, unverified
        )
        load_model = (
            partial(
                load, model, device=device, text=text_encoder, revision=revision, trust_remote_code=trust_remote_code
            )
            if model
            else None
        )
        task = Task(opened, options, load_model)
        with console.status("checking"):
            plan = make_plan(task)
        show_plan(opened, plan, console)
        if dry_run:
            permission = (
                " Changes to a table that exists need --alter-table." if plan.changes and not plan.is_new else ""
            )
            console.print(f"nothing was written (--dry-run).{permission}", highlight=False, soft_wrap=True)
            return
        with count_progress(console, "items") as advance:
            filled = fill(task, plan, advance)
        show_filled(filled, console)


def print_line(console: Console, what: str, value: str) -> None:
    """Print one line of a plan or a summary."""
    console.print(f"{what:<10} {value}", highlight=False, soft_wrap=True, markup=False)


def show_plan(store: VectorStore, plan: Plan, console: Console) -> None:
    """Print what will be done, and what is left out."""
    show = partial(print_line, console)
    show("index", store.name)
    if not plan.is_new:
        show("columns", ", ".join(f"{name} in {column}" for name, column in store.columns.model_dump().items()))
    for change in plan.changes:
        show("change", change)
    if plan.agreement:
        prompt, median, lowest, texts, _ = plan.agreement
        show(
            "encoder",
            f"{counted(texts, 'text')} embedded again as {prompt}: median cosine {median:.4f}, lowest {lowest:.4f}",
        )
        if prompt == "query":
            show("encoder", "the table was embedded with the prompt of queries; new texts are embedded so, too")
    if plan.deleted_images:
        show("delete", f"{counted(plan.deleted_images, 'picture')} that are there (--replace-images)")
    if plan.is_vouched:
        show("encoder", "not compared (--unverified)")
    bad = f", {plan.bad_images:,} left out whose vector has no direction" if plan.bad_images else ""
    show("pictures", f"{plan.images:,} to write{bad}")
    same = f", {plan.same_texts:,} there already" if plan.same_texts else ""
    empty = f", {plan.empty_texts:,} left out without words" if plan.empty_texts else ""
    show("texts", f"{plan.texts:,} to embed{same}{empty}")


def show_filled(filled: Filled, console: Console) -> None:
    """Print what was written, and what there is now."""
    show = partial(print_line, console)
    if filled.deleted_images:
        show("deleted", f"{counted(filled.deleted_images, 'picture')} (--replace-images)")
    show("pictures", f"{filled.images.inserted:,} new, {filled.images.updated:,} there before")
    show("texts", f"{filled.texts.inserted:,} new, {filled.texts.updated:,} there before")
    for index in filled.indexes:
        show("search", index)
    without = (
        f"; {counted(filled.without_vector, 'row')} without a vector, never found" if filled.without_vector else ""
    )
    show("rows", f"{counted(filled.rows['image'], 'picture')}, {counted(filled.rows['text'], 'text')}{without}")
