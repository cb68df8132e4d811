"""Parts of an input that are embedded in this process, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.pictures import encoded, photo
from helpers.tars import tar_of
from nev.data.sources import SOURCES, Source, SourceOptions
from nev.embed.corpus import CorpusOptions, make_job
from nev.embed.output import PartSpec
from nev.embed.part import PartJob, embed_part
from nev.embed.same_model import ModelPlace
from nev.inference.model import Model

Opened = tuple[Model, ModelPlace]


def write_tar(folder: Path, **more: Any) -> Source:
    folder.mkdir(exist_ok=True)
    members = {f"k{k}.jpg": encoded(photo(k, 60, 40)) for k in range(6)}
    tar_of(folder / "0.tar", members | more)
    return SOURCES["webdataset"]([folder], SourceOptions(captioned=False))


def job_for(opened: Opened, source: Source, output: Path, **options: Any) -> PartJob:
    return make_job(*opened, source, CorpusOptions(str(output), ["in"], captions=False, **options))


def run(source: Source, job: PartJob) -> PartSpec:
    *_, record = embed_part(source.parts[0], job, "cpu", 1)
    assert isinstance(record, PartSpec)
    return record
