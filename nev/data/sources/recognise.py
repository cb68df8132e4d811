"""Which source reads an input, by the suffixes of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nev.config.base import ConfigError
from nev.data.sources import webdataset
from nev.data.sources.folder import IMAGES
from nev.data.sources.input_files import find_files, name_suffix

CHOOSE = "Choose with --source."


def recognise_source(inputs: Iterable[str | Path], metadata: bool) -> tuple[str, Counter[str]]:
    """The name of the source, and how many files of other suffixes that source does not read, by suffix.

    metadata: there are metadata of DataComp, to which its tars are joined.
    Beside tars lie tables and statistics of the tool that wrote them; pictures beside parquet may be either.
    Raises ConfigError where nothing can be read, or the choice is the user's, and as `find_files` does.
    """
    patterns = list(inputs)
    suffixes = Counter(name_suffix(file.location) for file in find_files(patterns, ("",)))
    tars, parquet = webdataset.SUFFIXES, (".parquet",)
    kinds = {"datacomp" if metadata else "webdataset": tars, "hf-parquet": parquet, "folder": IMAGES}
    present = [kind for kind, read in kinds.items() if any(suffix in suffixes for suffix in read)]
    if not present:
        counts = ", ".join(f"{suffix} ({count:,})" for suffix, count in suffixes.most_common(5)) or "nothing"
        raise ConfigError(f"{', '.join(map(str, patterns))}: no tars, no parquet, no pictures. It holds {counts}")
    if present == ["hf-parquet", "folder"]:
        raise ConfigError(f"{', '.join(map(str, patterns))}: has parquet files and pictures. {CHOOSE}")
    return present[0], Counter({name: n for name, n in suffixes.items() if name not in kinds[present[0]]})
