"""`nev filter`: near-duplicates against brute force, in one cluster and in several; cosines, shares, and the list of uids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nev.commands.main import app
from nev.config.base import ConfigError
from nev.data.uids import hash_uids, read_uids
from nev.data.vectors import VectorSpec, make_table, write_vectors
from nev.embed import clusters, duplicates
from nev.embed.clusters import make_clusters
from nev.embed.duplicates import find_duplicates
from nev.embed.selection import read_pool, select_uids
from nev.ops.vectors import restore, round_to, scale_to_unit
from nev.storage.reading import DataError

WIDTH = 12


def draw(seed: int, count: int, width: int = WIDTH) -> np.ndarray:
    """Unit vectors, of which many lie near each other, in chains and groups."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 4), width))
    near = centres[rng.integers(0, len(centres), count)] + 0.15 * rng.standard_normal((count, width))
    return scale_to_unit(near.astype(np.float32))


def write_pool(
    folder: Path,
    vectors: np.ndarray,
    cosines: list[float | None] | None = None,
    files: int = 3,
    precision: Any = "float32",
) -> Path:
    spec = VectorSpec(model="m", fingerprint="f", text_fingerprint="t", width=vectors.shape[1], precision=precision)
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), files)):
        columns = {"cosine": [cosines[row] for row in rows]} if cosines else {}
        table = make_table([f"row-{row}" for row in rows], round_to(vectors[rows], precision), spec, **columns)
        write_vectors(str(folder / f"part-{number}.parquet"), table)
    return folder


def keep_greedily(vectors: np.ndarray, threshold: float, order: list[int]) -> dict[int, int]:
    """By the definition, one row at a time: the row that stays for each row that does not."""
    staying: list[int] = []
    left: dict[int, int] = {}
    for row in order:
        cosines = [float(vectors[row] @ vectors[other]) for other in staying]
        if cosines and max(cosines) >= threshold:
            left[row] = staying[int(np.argmax(cosines))]
        else:
            staying.append(row)
    return left


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 60),
    threshold=st.sampled_from([0.5, 0.8, 0.93]),
    block=st.integers(1, 20),
)
def test_one_of_each_group_stays_as_by_brute_force(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, threshold: float, block: int
) -> None:
    vectors = draw(seed, count)
    scores = np.random.default_rng(seed).permutation(count).astype(np.float32)
    pool, _ = read_pool(str(write_pool(tmp_path_factory.mktemp("pool"), vectors, files=2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK", block)
        found = find_duplicates(pool, threshold, scores)
    expected = keep_greedily(vectors, threshold, np.argsort(-scores, kind="stable").tolist())
    assert dict(zip(found.rows.tolist(), found.originals.tolist(), strict=True)) == expected
    np.testing.assert_allclose(
        found.cosines, [vectors[row] @ vectors[other] for row, other in sorted(expected.items())], atol=1e-6
    )


def test_several_clusters_hold_what_is_promised_and_little_is_missed(tmp_path: Path) -> None:
    vectors = draw(7, 1500, 32)
    pool, _ = read_pool(str(write_pool(tmp_path, vectors)))
    with make_clusters(pool, 8) as divided:
        assert sorted(divided.rows.tolist()) == list(range(1500))
        np.testing.assert_array_equal(divided.vectors, vectors[divided.rows])
        label = np.empty(1500, int)
        for number, (start, stop) in enumerate(zip(divided.bounds[:-1], divided.bounds[1:], strict=True)):
            assert (np.diff(divided.rows[start:stop]) > 0).all()
            label[divided.rows[start:stop]] = number
    assert len(np.unique(label)) == 8
    found = find_duplicates(pool, 0.9, clusters=8)
    staying = np.setdiff1d(np.arange(1500), found.rows)
    assert not np.isin(found.originals, found.rows).any()
    assert (label[found.rows] == label[found.originals]).all()
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(found.cosines, cosines[found.rows, found.originals], atol=1e-6)
    assert (found.cosines >= 0.9).all()
    near = (cosines >= 0.9) & (label[:, None] == label) & ~np.eye(1500, dtype=bool)
    assert not near[np.ix_(staying, staying)].any()
    whole = find_duplicates(pool, 0.9)
    assert 0.9 * len(whole.rows) < len(found.rows) <= len(whole.rows) < 1400  # the rest are pairs in two clusters


def test_rows_that_do_not_take_part_are_not_compared(tmp_path: Path) -> None:
    vectors = np.repeat(draw(1, 5), 2, axis=0)  # rows 2k and 2k + 1 are equal
    pool, _ = read_pool(str(write_pool(tmp_path, vectors)))
    pool.chosen[[0, 3]] = False
    found = find_duplicates(pool, 0.999)
    assert (found.rows.tolist(), found.originals.tolist()) == ([5, 7, 9], [4, 6, 8])


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_stored_forms_are_compared_by_their_cosine(tmp_path: Path, precision: str) -> None:
    vectors = draw(3, 40, 20)  # 20 is no multiple of 8
    pool, _ = read_pool(str(write_pool(tmp_path, vectors, precision=precision)))
    stored = restore(round_to(vectors, precision), precision, 20)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)
    if precision == "binary":
        np.testing.assert_array_equal(np.sign(stored), np.where(vectors > 0, 1, -1))
    else:
        np.testing.assert_allclose(stored, vectors, atol={"float16": 1e-3, "int8": 5e-3}[precision])
    found = find_duplicates(pool, 0.85)  # signs of 20 numbers have the cosines 0.8, 0.9 and 1: no rounding decides
    assert found.rows.tolist() == sorted(keep_greedily(stored, 0.85, list(range(40))))
    np.testing.assert_allclose(found.cosines, (stored[found.rows] * stored[found.originals]).sum(1), atol=1e-6)


def test_a_disk_without_room_is_seen_before_vectors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _ = read_pool(str(write_pool(tmp_path, draw(0, 10))))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(ConfigError, match=r"Set TMPDIR to a larger disk"):
        find_duplicates(pool, 0.9)


def test_sixteen_thousand_rows_are_one_cluster() -> None:
    assert clusters.count_clusters(clusters.EXACT_ROWS) == 1
    assert clusters.count_clusters(2 * 10**6) == 1000


def listed(output: Path) -> list[str]:
    return pq.read_table(output)["uid"].to_pylist()


def test_the_command_writes_the_uids_that_prepare_reads(tmp_path: Path) -> None:
    vectors = np.repeat(draw(5, 6, 32), 2, axis=0)
    cosines = [0.3, 0.4, None, 0.1, 0.25, 0.25, 0.2, 0.35, 0.05, None, 0.15, 0.1]
    folder = write_pool(tmp_path / "vectors", vectors, cosines)
    output = tmp_path / "keep.parquet"
    args = ["filter", "--vectors", str(folder), "--min-cosine", "0.1", "--dedupe-vectors", "0.999"]
    shown = CliRunner().invoke(app, [*args, "--output", str(output)], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    # 2 and 9 have no caption, 8 is below; of equal pictures the one with the better caption stays, else the first.
    assert listed(output) == ["row-1", "row-3", "row-4", "row-7", "row-10"]
    np.testing.assert_array_equal(read_uids(output), np.sort(hash_uids(listed(output))))
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    duplicates_file = tmp_path / "keep-duplicates.parquet"
    assert lines[1:] == [
        "12 vectors",
        "2 left out: no caption",
        "1 left out: cosine below 0.1000",
        f"4 left out: near-duplicates, listed in {duplicates_file}",
        f"5 chosen, listed in {output}",
    ]
    pairs = pq.read_table(duplicates_file).to_pylist()
    assert [(row["uid"], row["duplicate_of"]) for row in pairs] == [
        ("row-0", "row-1"),
        ("row-5", "row-4"),
        ("row-6", "row-7"),
        ("row-11", "row-10"),
    ]
    assert all(row["cosine"] == pytest.approx(1) for row in pairs)


def test_a_share_is_of_the_rows_with_captions(tmp_path: Path) -> None:
    cosines = [0.1, None, 0.3, 0.2, 0.4, None, 0.5, 0.5]
    folder = str(write_pool(tmp_path / "vectors", draw(5, 8), cosines))
    output = tmp_path / "keep.parquet"
    chosen = select_uids(folder, str(output), top_share=0.5)
    assert listed(output) == ["row-4", "row-6", "row-7"]
    assert (chosen.rows, chosen.unscored, chosen.below, chosen.near, chosen.chosen) == (8, 2, 3, 0, 3)
    assert select_uids(folder, str(output), min_cosine=0.45, top_share=0.5).chosen == 2
    # A score is compared as it is stored: the float32 of 0.3 is less than the float64 of 0.3 would have it.
    assert select_uids(folder, str(output), min_cosine=0.3).chosen == 4


def test_what_cannot_be_chosen_is_said(tmp_path: Path) -> None:
    folder = str(write_pool(tmp_path / "vectors", draw(5, 8)))
    with pytest.raises(ConfigError, match=r"no picture has a cosine.*--no-captions"):
        select_uids(folder, str(tmp_path / "k.parquet"), min_cosine=0.3)
    scored = str(write_pool(tmp_path / "scored", draw(5, 2), [0.1, 0.2], files=1))
    with pytest.raises(ConfigError, match=r"no row of 2 is left\. The largest cosine is 0\.2000"):
        select_uids(scored, str(tmp_path / "k.parquet"), min_cosine=0.3)
    other = make_table(["x"], draw(0, 1), VectorSpec(model="m", fingerprint="g", text_fingerprint="t", width=WIDTH))
    write_vectors(f"{folder}/part-9.parquet", other)
    with pytest.raises(DataError, match="different models or forms"):
        read_pool(folder)
    for args, message in (([], "nothing to choose by"), (["--min-cosine", "0.1"], "name of a .parquet file")):
        done = CliRunner().invoke(app, ["filter", "--vectors", folder, "--output", "keep.txt", *args])
        assert done.exit_code == 2
        assert message in done.stderr
