"""Choose rows of an embedded corpus: a list of uids for `nev prepare --uids`.

The pairs of a pool that a trained model likes best, as a data filtering network does, without near-duplicates:

nev filter --vectors vectors --top-share 0.3 --dedupe-vectors 0.95 --output keep.parquet
nev prepare --source webdataset --input pool --uids keep.parquet --output data/filtered/train
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nev.common.cli import report_errors
from nev.config.base import ConfigError

if TYPE_CHECKING:
    from nev.embed.selection import Selected

EXAMPLE = "--vectors vectors --top-share 0.3 --dedupe-vectors 0.95 --output keep.parquet"
Condition = partial(typer.Option, rich_help_panel="Conditions")


def main(
    vectors: Annotated[
        str, typer.Option("--vectors", help="Folder of the files that `nev embed-images --model` has written.")
    ],
    output: Annotated[str, typer.Option("--output", help="The list of uids: a .parquet file, here or on s3://.")],
    min_cosine: Annotated[
        float | None,
        Condition("--min-cosine", min=-1, max=1, help="Least cosine of a picture with its best caption."),
    ] = None,
    top_share: Annotated[
        float | None,
        Condition(
            "--top-share", min=0, max=1, help="Share of the pictures with captions, those of the largest cosine."
        ),
    ] = None,
    dedupe_vectors: Annotated[
        float | None,
        Condition(
            "--dedupe-vectors", min=0, max=1, help="Keep one of the pictures with this cosine or more (SemDeDup)."
        ),
    ] = None,
) -> None:
    """Choose rows of an embedded corpus by cosine, and one of near-duplicates: a list of uids. Left-out rows are counted."""
    with report_errors():
        if min_cosine is None and top_share is None and dedupe_vectors is None:
            raise ConfigError("nothing to choose by: give --min-cosine, --top-share or --dedupe-vectors")
        if not output.endswith(".parquet"):
            raise ConfigError(f"--output {output}: give the name of a .parquet file")
        if output.rpartition("/")[0] == vectors.rstrip("/"):
            raise ConfigError(
                f"--output {output}: a list among the vector files would be read as one. Give another folder"
            )
        from nev.embed.selection import select_uids

        selected = select_uids(vectors, output, min_cosine, top_share, dedupe_vectors)
    show(selected, output)


def show(selected: Selected, output: str) -> None:
    """Print what was chosen, and what was left out."""
    from nev.embed.selection import SHARES

    def line(count: int, what: str) -> None:
        Console().print(f"{count:>12,}  {what}", highlight=False, markup=False, soft_wrap=True)

    if selected.percentiles:
        shares = "  ".join(f"{share} %: {value:.3f}" for share, value in zip(SHARES, selected.percentiles, strict=True))
        Console().print(f"cosines of pictures and captions, percentiles  {shares}", highlight=False, soft_wrap=True)
    line(selected.rows, "vectors")
    if selected.least is not None:
        line(selected.unscored, "left out: no caption")
        line(selected.below, f"left out: cosine below {selected.least:.4f}")
    if selected.duplicates:
        line(selected.near, f"left out: near-duplicates, listed in {selected.duplicates}")
    line(selected.chosen, f"chosen, listed in {output}")
