"""`nev embed-images --model`: vectors equal to those of single pictures, from every source; restart, faults, forms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.parts import Opened, job_for, run, write_tar
from helpers.pictures import encoded, photo, write_shard
from helpers.s3_server import Proxy
from helpers.tars import tar_of
from PIL import Image
from typer.testing import CliRunner

from nev.cluster.tasks import ray_run_streaming
from nev.commands.main import app
from nev.config.base import ConfigError
from nev.config.model_spec import ModelError
from nev.data.vectors import as_array, iterate_vectors, list_vector_files, read_spec, read_vectors
from nev.embed.corpus import threads_beside_gpu
from nev.embed.output import count_reasons
from nev.embed.part import choose_batch
from nev.embed.same_model import load_same_model
from nev.inference.model import Model
from nev.storage.files import filesystem, list_files
from nev.storage.reading import DataError


def embed(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["embed-images", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def rows_in(output: str | Path) -> dict[str, dict[str, Any]]:
    """All rows of a folder of vector files, by uid; `vector` is an array."""
    rows = {}
    for table in iterate_vectors(str(output)):
        vectors = as_array(table["vector"])
        for row, vector in zip(table.drop(["vector"]).to_pylist(), vectors, strict=True):
            assert row["uid"] not in rows
            rows[row["uid"]] = {**row, "vector": vector}
    return rows


def check_vectors(rows: dict[str, dict[str, Any]], pictures: dict[str, bytes], model: Model) -> None:
    assert rows.keys() == pictures.keys()
    for uid, picture in pictures.items():
        np.testing.assert_allclose(rows[uid]["vector"], model.encode_image(picture), atol=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_folders_tars_and_parquet_give_the_vectors_of_single_pictures(
    checkpoint: str, model: Model, ray_cluster: None, tmp_path: Path
) -> None:
    pictures = {f"p{k}": encoded(photo(k, 40 + k, 30)) for k in range(20)}
    rotated = photo(99, 50, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures["p7"] = encoded(rotated, exif=exif)
    pictures["p8"] = encoded(photo(98).convert("RGBA"), "PNG")
    for name, content in pictures.items():
        file = tmp_path / "photos" / ("deep/er" if name > "p3" else ".") / f"{name}.JPG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "photos/notes.txt").touch()
    captions = {name: [f"{name} one", f"{name} two"] for name in pictures}
    for number in range(2):
        members: dict[str, Any] = {}
        for name in list(pictures)[number::2]:
            members[f"{name}.jpg"] = pictures[name]
            if name != "p4":
                members[f"{name}.json"] = {"captions": captions[name]}
        (tmp_path / "tars").mkdir(exist_ok=True)
        tar_of(tmp_path / f"tars/{number}.tar", members)
    (tmp_path / "tars/0_stats.json").touch()
    shard = [{"uid": name, "image": pictures[name], "caption": captions[name][0]} for name in pictures]
    write_shard(tmp_path / "shards/a.parquet", shard[:9], [4, 5])
    write_shard(tmp_path / "shards/b.parquet", shard[9:], [11])
    pool = pa.table({"uid": list(pictures), "text": [captions[name][1] for name in pictures]})
    (tmp_path / "meta").mkdir()
    pq.write_table(pool, tmp_path / "meta/m.parquet")

    said = {}
    for kind, more in {"photos": [], "tars": [], "shards": [], "pool": ["--metadata", tmp_path / "meta"]}.items():
        given = tmp_path / ("tars" if kind == "pool" else kind)
        said[kind] = embed("--model", checkpoint, "--input", given, "--output", tmp_path / "out" / kind, *more)
        assert "20 vectors" in said[kind]
    assert "--source folder; not read: 1 .txt" in said["photos"]
    assert "--source webdataset; not read: 1 .json" in said["tars"]
    assert "--source hf-parquet\n" in said["shards"]
    assert "--source datacomp; not read: 1 .json" in said["pool"]

    found = {kind: rows_in(tmp_path / "out" / kind) for kind in said}
    names = {name: f"{'deep/er/' if name > 'p3' else ''}{name}.JPG" for name in pictures}
    check_vectors(found["photos"], {names[name]: picture for name, picture in pictures.items()}, model)
    assert found["photos"][names["p5"]].keys() == {"uid", "vector", "source"}
    assert found["photos"][names["p5"]]["source"] == str(tmp_path / "photos" / names["p5"])
    for kind in ("tars", "shards", "pool"):
        check_vectors(found[kind], pictures, model)
    assert found["tars"]["p5"]["source"] == f"{tmp_path}/tars/1.tar/p5.jpg"
    assert found["shards"]["p1"]["source"] == f"{tmp_path}/shards/a.parquet/1"
    assert (found["tars"]["p4"]["caption"], found["tars"]["p4"]["cosine"]) == (None, None)
    for name in ("p0", "p5"):
        vector = model.encode_image(pictures[name])
        cosines = model.similarity(vector, model.encode_text(captions[name]))[0]
        for kind, best in (("tars", cosines.max()), ("shards", cosines[0]), ("pool", cosines[1])):
            assert found[kind][name]["cosine"] == pytest.approx(best, abs=1e-5)
        assert found["tars"][name]["caption"] == captions[name]
        assert found["pool"][name]["caption"] == [captions[name][1]]
    assert cosines[0] != pytest.approx(cosines[1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.ray
def test_on_s3_the_same_command_continues(
    checkpoint: str, model: Model, s3: Proxy, ray_cluster: None, tmp_path: Path
) -> None:
    pictures = {f"t{tar}-{k}": encoded(photo(10 * tar + k)) for tar in range(3) for k in range(4)}
    fs, _ = filesystem("s3://bucket/pool")
    for tar in range(3):
        members = {f"{name}.jpg": content for name, content in pictures.items() if name.startswith(f"t{tar}")}
        members[f"broken-{tar}.jpg"] = b"not a picture" if tar else encoded(photo(1))[:200]
        fs.put_file(str(tar_of(tmp_path / f"{tar}.tar", members)), f"bucket/pool/{tar}.tar")
    whole = fs.cat_file("bucket/pool/1.tar")
    fs.pipe_file("bucket/pool/1.tar", whole[:3000])
    args = ("--model", checkpoint, "--input", "s3://bucket/pool", "--output", "s3://bucket/out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nev.embed.corpus.PART_BYTES", 1)
        said = embed(*args, code=2)
        assert "2 vector files written, 8 pictures" in said
        assert "1 part could not be read" in said
        assert "s3://bucket/pool/1.tar: not a whole tar file" in said
        assert len(list_vector_files("s3://bucket/out")) == 2

        fs.pipe_file("bucket/pool/1.tar", whole)
        first = list_vector_files("s3://bucket/out")[0]
        fs.rm_file(first.removeprefix("s3://"))
        said = embed(*args)
        assert "2 vector files written, 8 pictures" in said
        assert "; 1 were there" in said
        assert "12 vectors, 3 pictures cannot be used (listed in s3://bucket/out/_bad)" in said
        assert "2 x not an image in a known format" in said
        check_vectors(rows_in("s3://bucket/out"), pictures, model)
        bad = [name for name in list_files("s3://bucket/out") if name.startswith("_bad/")]
        listed = [row for name in bad for row in read_rows(f"s3://bucket/out/{name}")]
        assert {(row["uid"], row["source"]) for row in listed} == {
            (f"broken-{tar}", f"s3://bucket/pool/{tar}.tar/broken-{tar}.jpg") for tar in range(3)
        }
        s3.reset()
        assert "0 vector files written, 0 pictures; 3 were there" in embed(*args)
        assert s3.count("PUT") == 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_task_whose_process_dies_runs_again_from_its_start(ray_cluster: None, tmp_path: Path) -> None:
    def die_once(mark: Path) -> Iterator[str]:
        yield "begun"
        if not mark.exists():
            mark.touch()
            os._exit(1)
        yield "done"

    results = list(ray_run_streaming(die_once, [tmp_path / "mark"], task_bytes=2**20))
    assert (results[0], results[-1]) == ("begun", "done")


@pytest.mark.slow
def test_few_pictures_are_embedded_without_ray(checkpoint: str, model: Model, tmp_path: Path) -> None:
    pictures = {f"p{k}.jpg": encoded(photo(k)) for k in range(3)}
    (tmp_path / "photos").mkdir()
    for name, content in pictures.items():
        (tmp_path / "photos" / name).write_bytes(content)
    args = ["--model", checkpoint, "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    code = (
        "import ray, sys\nfrom nev.commands.main import app\n"
        "try:\n    app(['embed-images', *sys.argv[1:]])\nfinally:\n    assert not ray.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 vector file written, 3 pictures" in done.stdout
    check_vectors(rows_in(tmp_path / "out"), pictures, model)


def test_processes_that_share_a_gpu_share_the_cpus_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "other", "Resources": {"CPU": 4.0}}, {"NodeID": "mine", "Resources": {"CPU": 26.0, "GPU": 4.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    assert threads_beside_gpu() == 3


def read_rows(location: str) -> list[dict[str, Any]]:
    fs, path = filesystem(location)
    rows: list[dict[str, Any]] = pq.read_table(path, filesystem=fs).to_pylist()
    return rows


# What follows needs no cluster: a part is embedded in this process.


@pytest.mark.parametrize(
    ("precision", "width"), [("float32", 16), ("float16", None), ("int8", 20), ("binary", 20), ("binary", None)]
)
def test_forms_are_those_of_encode_image(
    opened: Opened, model: Model, tmp_path: Path, precision: Any, width: int | None
) -> None:
    source = write_tar(tmp_path / "tars")
    run(source, job_for(opened, source, tmp_path / "out", precision=precision, width=width))
    (location,) = list_vector_files(str(tmp_path / "out"))
    table = read_vectors(location)
    pictures = [encoded(photo(k, 60, 40)) for k in range(6)]
    expected = model.encode_image(pictures, precision=precision, width=width)
    stored = as_array(table["vector"])
    assert stored.dtype == expected.dtype
    # A number at the border between two levels, or a sign of a number near 0, may fall on either side: so may one in a hundred.
    differing = np.abs(stored.astype(float) - expected) > {"float32": 1e-6, "float16": 1e-3}.get(precision, 0)
    assert differing.mean() <= (0 if precision.startswith("float") else 0.01)
    spec = read_spec(table.schema, location)
    assert (spec.width, spec.precision) == (width or model.width, precision)
    assert (spec.fingerprint, spec.text_fingerprint) == (model.fingerprint, model.text_fingerprint)
    assert spec.calibration == (model.spec.calibration if width is None else None)


def test_thumbnails_are_small_upright_and_without_metadata(opened: Opened, model: Model, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "taken at home"
    turned = encoded(photo(1, 60, 40), exif=exif)
    source = write_tar(tmp_path / "tars", **{"z.jpg": turned, "tiny.png": encoded(photo(2, 10, 4), "PNG")})
    run(source, job_for(opened, source, tmp_path / "out", thumbnail=24))
    rows = rows_in(tmp_path / "out")
    images = {uid: Image.open(pa.BufferReader(row["thumbnail"])) for uid, row in rows.items()}
    assert {image.format for image in images.values()} == {"JPEG"}
    assert (images["k0"].size, images["z"].size, images["tiny"].size) == ((24, 16), (16, 24), (10, 4))
    assert b"taken at home" not in rows["z"]["thumbnail"]
    near = np.asarray(photo(0, 60, 40).resize((24, 16)), float)
    assert np.abs(np.asarray(images["k0"], float) - near).mean() < 8
    np.testing.assert_allclose(rows["z"]["vector"], model.encode_image(turned), atol=1e-6)


def test_bad_rows_are_listed_with_their_reason(opened: Opened, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "torn.jpg": encoded(photo(1))[:150],
        "huge.png": encoded(Image.new("L", (9000, 9000)), "PNG"),
        "lone.txt": "no picture",
        "status.json": {"status": "failed_to_download"},
        "x.jpg": encoded(photo(3)),
        "x.json": {"uid": "k0"},
        "again.jpg": encoded(photo(4)),
        "again.json": {"uid": "lone"},
        "half.jpg": encoded(photo(3)),
        "half.json": '{"uid": "\\ud83d"}',
    }
    source = write_tar(tmp_path / "tars", **more)
    record = run(source, job_for(opened, source, tmp_path / "out"))
    assert record.rows == 7  # six, and the picture whose uid a row without a picture had
    assert record.bad.keys() == {
        "OSError: Truncated File Read",
        "image is 9000x9000, more than limits.max_pixels",
        "no image member",
        "status failed_to_download",
        "duplicate uid",
        "uid, caption or class name with half a surrogate pair",
    }
    assert len(record.bad) == 6
    listed = pq.read_table(tmp_path / f"out/_bad/part-{source.parts[0].stamp}.parquet").to_pylist()
    assert Counter(row["reason"] for row in listed) == record.bad
    assert {row["uid"] for row in listed} == {"torn", "huge", "lone", "status", "k0", "\\ud83d"}
    assert next(row["source"] for row in listed if row["uid"] == "k0") == f"{tmp_path}/tars/0.tar/x.jpg"
    assert list_vector_files(str(tmp_path / "out")) == [f"{tmp_path}/out/part-{source.parts[0].stamp}.parquet"]


def test_a_part_that_fails_leaves_nothing(opened: Opened, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars")
    tar = tmp_path / "tars/0.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    job = job_for(opened, source, tmp_path / "out", batch_size=1)
    with pytest.raises(ConfigError, match="not a whole tar file"):
        run(source, job)
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == []

    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        run(write_tar(tmp_path / "tars"), job._replace(output=str(tmp_path / "file")))


def test_a_process_with_another_model_writes_nothing(opened: Opened, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars")
    job = job_for(opened, source, tmp_path / "out")
    load_same_model.cache_clear()
    with pytest.raises(ModelError, match="opens another model than the command did"):
        run(source, job._replace(model=job.model._replace(fingerprint="0" * 64)))
    with pytest.raises(ModelError, match="opens another model than the command did"):
        run(source, job._replace(model=job.model._replace(text_fingerprint="0" * 64)))
    assert not (tmp_path / "out").exists()


def test_reasons_without_end_are_one() -> None:
    many = {f"image is {n}x1": 1 for n in range(200)}
    total = count_reasons({"empty": 2}, many, {"empty": 3, "new": 4})
    assert (total["empty"], total["other reasons"], len(total)) == (5, 105, 101)
    assert sum(total.values()) == 209


def test_small_pictures_have_large_batches() -> None:
    assert [choose_batch("cpu", size) for size in (32, 112, 224, 384)] == [256, 64, 16, 16]
    assert choose_batch("cuda", 224) == 256
