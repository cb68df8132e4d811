"""Suites: tasks as data, read from every layout, embedded once, each scored or listed as not run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.pictures import encoded, photo
from helpers.tars import tar_of
from rich.console import Console

from nev.config.base import ConfigError
from nev.embed.images import EmbedJob
from nev.eval.evaluate_suite import evaluate_suite
from nev.eval.suite import collection
from nev.eval.suite.results import SuiteResult
from nev.eval.suite.schema import Suite, load_suite, shipped
from nev.storage.files import filesystem

if TYPE_CHECKING:
    from helpers.s3_server import Proxy


def test_every_shipped_suite_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_DATA", "/data")
    monkeypatch.setenv("NEV_EVAL_DATA", "/eval")
    assert shipped() == ["coco", "datacomp", "flickr30k", "imagenet", "ood", "quick"]
    for name in shipped():
        assert load_suite(name).tasks
    assert load_suite("quick").root == "/data"
    assert load_suite("imagenet", "s3://bucket/eval").root == "s3://bucket/eval"


def test_datacomp_has_its_38_tasks_and_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEV_EVAL_DATA", "/eval")
    suite = load_suite("datacomp")
    assert len(suite.tasks) == 38
    judged = {one.name: one.judged_by for one in suite.tasks if one.judged_by != "top1"}
    assert judged == {
        **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean_per_class"),
        **dict.fromkeys(("flickr30k", "mscoco"), "mean_recall_1"),
        **{"winogavil": "jaccard", "iwildcam": "macro_f1", "fmow": "worst_group_top1"},
        **{"dollar_street": "worst_group_top5", "geode": "worst_group_top1"},
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kindd": 1}, "kindd"),
        ({"kind": "guess"}, "kind"),
        ({"metric": "jaccard"}, "zero_shot is judged by"),
        ({"metric": "worst_group_top1"}, "needs `group`"),
        ({"kind": "retrieval", "classes": ["a"]}, "leave classes and templates out"),
        ({"kind": "association"}, "winogavil"),
        ({"source": {"format": "folder-classes", "input": "x", "share": 0}}, "share"),
    ],
)
def test_a_task_that_cannot_be_is_an_error(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    one = {"name": "one", "kind": "zero_shot", "source": {"format": "webdataset", "input": "x"}, **settings}
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"about": "own", "root": str(tmp_path), "tasks": [one]}))
    with pytest.raises(ConfigError, match=said):
        load_suite(str(file))


def test_an_unknown_suite_a_variable_that_is_not_set_and_names_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no suite is called 'imagenett': give one of coco"):
        load_suite("imagenett")
    with pytest.raises(ConfigError, match=r"validation\.yaml: a run's own page has the name 'validation'"):
        load_suite(str(tmp_path / "validation.yaml"))
    monkeypatch.delenv("NEV_EVAL_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"NEV_EVAL_DATA' is not set.*--data"):
        load_suite("imagenet")
    one = {"name": "one", "kind": "retrieval", "source": {"format": "webdataset", "input": "x"}}
    with pytest.raises(ValueError, match="two tasks are called 'one'"):
        Suite.model_validate({"about": "", "root": "/", "tasks": [one, one]})


OWN = """
about: Own
root: {root}
average: true
tasks:
  - &drawn
    name: drawn
    kind: zero_shot
    source: &shards {{format: hf-parquet, input: val}}
    classes: classes.txt
    templates: ["a {{}}"]
    published: {{other: 0.5}}
  - {{name: search, kind: retrieval, source: *shards}}
  - {{name: space, kind: alignment, source: *shards}}
  - {{name: small, kind: compression, source: *shards}}
  - {{<<: *drawn, name: small-classes, kind: compression, published: {{}}}}
  - {{<<: *drawn, name: corrupted, kind: robustness, source: {{<<: *shards, share: 0.3}}}}
  - {{name: absent, kind: zero_shot, source: {{format: clip-benchmark, input: nowhere}}}}
  - {{name: unnamed, kind: zero_shot, source: *shards, classes: [only, two]}}
  - {{name: damaged, kind: zero_shot, source: {{format: webdataset, input: "{own}/cut.tar"}}}}
  - {{name: few, kind: zero_shot, metric: top5, source: {{format: folder-classes, input: "{own}/few"}}}}
"""


def nothing_of(own: Path) -> Path:
    """The same suite with its first task alone, by the same name in another folder."""
    (own.parent / "first").mkdir()
    first = own.parent / "first" / own.name
    first.write_text(own.read_text().split("  - {name: search")[0])
    return first


@pytest.mark.ray
@pytest.mark.slow
def test_a_suite_from_its_file_to_its_page(
    trained: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(OWN.format(root=pictures, own=tmp_path))
    tar_of(tmp_path / "whole.tar", {"a.jpg": encoded(photo(0)), "a.cls": "0"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:700])
    for name in ("cat", "dog"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / f"few/{name}/1.jpg").write_bytes(encoded(photo(len(name))))
    embedded: list[int] = []
    embed_all = collection.embed_all

    def counting(works: list[EmbedJob], *rest: Any) -> Iterator[Any]:
        embedded.append(len(works))
        yield from embed_all(works, *rest)

    monkeypatch.setattr(collection, "embed_all", counting)
    result, files = evaluate_suite(trained, str(own), Console(quiet=True), output=str(tmp_path / "out"))
    assert embedded == [4]  # five tasks share one set; corrupted pictures, a damaged file and a small set are others
    by_name = {one.name: one for one in result.tasks}
    assert result.not_run == ["absent", "unnamed", "damaged", "few"]
    assert "not a whole tar file" in str(by_name["damaged"].reason)
    assert "top5 is not known of this set" in str(by_name["few"].reason)
    assert result.average is None
    assert "no such file or folder" in str(by_name["absent"].reason)
    assert "there are 2 classes" in str(by_name["unnamed"].reason)

    drawn = by_name["drawn"]
    assert drawn.images == 128
    assert drawn.low is not None
    assert drawn.low <= drawn.value <= drawn.high
    assert {"top1", "top5", "mean_per_class", "macro_f1", "calibration_error", "scale_fitted"} <= drawn.metrics.keys()
    assert by_name["corrupted"].metrics["clean"] > 0
    assert len(by_name["corrupted"].table) == 40
    assert by_name["small"].metrics["float32_384"] == pytest.approx(by_name["search"].value, abs=1e-9)
    assert by_name["small-classes"].metrics["float32_384"] == pytest.approx(drawn.value, abs=1e-9)

    page, numbers = (Path(file) for file in files)
    assert SuiteResult.model_validate_json(numbers.read_text()) == result
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 12  # the loss, and the pictures of six tasks
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)  # four letters that a picture may have by chance
    assert "not run: " in html

    with pytest.raises(ConfigError, match=r"no task could be run, so nothing is written:\n  .*no such file or folder"):
        evaluate_suite(
            trained,
            str(nothing_of(own)),
            Console(quiet=True),
            data=str(tmp_path / "nowhere"),
            output=str(tmp_path / "out"),
        )
    assert page.read_text() == html

    again, _ = evaluate_suite(trained, str(own), Console(quiet=True), output=str(tmp_path / "out"))
    assert embedded == [4, 1]  # nothing is embedded anew but what cannot be
    assert [one.model_dump() for one in again.tasks] == [one.model_dump() for one in result.tasks]


@pytest.mark.ray
def test_data_and_results_on_s3(s3: Proxy, trained: str, pictures: Path, tmp_path: Path) -> None:
    fs = filesystem("s3://bucket")[0]
    for file in sorted((pictures / "val").glob("*.parquet")):
        fs.put_file(str(file), f"bucket/data/val/{file.name}")
    fs.put_file(str(pictures / "classes.txt"), "bucket/data/classes.txt")
    own = tmp_path / "own.yaml"
    own.write_text(OWN.format(root="/nowhere", own="/nowhere").split("  - {<<: *drawn, name: corrupted")[0])
    result, files = evaluate_suite(
        trained, str(own), Console(quiet=True), data="s3://bucket/data", output="s3://bucket/out"
    )
    assert result.not_run == []
    assert result.average is not None
    assert all(file.startswith("s3://bucket/out/own-") and fs.exists(file) for file in files)
    assert len(fs.glob("bucket/out/embeddings/*.safetensors")) == 3  # pictures, class prompts, captions
    here, _ = evaluate_suite(trained, str(own), Console(quiet=True), data=str(pictures), output=str(tmp_path / "out"))
    assert [one.value for one in here.tasks] == pytest.approx([one.value for one in result.tasks], abs=1e-6)
