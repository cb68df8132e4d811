"""The benchmark of a corpus's vectors: what it reports, and that its pieces measure what they say, small and without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.pictures import rows_of, write_shard

from benchmarks import embed
from benchmarks.contestants import corpus, processes


@pytest.mark.slow
def test_a_bare_loop_embeds_the_pictures_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    write_shard(tmp_path / "shards/0.parquet", rows_of(12), [12])
    model = corpus.save_random_model(tmp_path, ["data.image_size=24"])
    assert corpus.forward_per_s(model, str(tmp_path / "shards"), (4, 8), 0.02, decoded=10) > 0
    assert corpus.dataloader_per_s(model, str(tmp_path / "shards"), 2, 0.02) > 0


def test_the_rate_is_that_of_the_command_s_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"{number}.parquet").touch()
    output = tmp_path / "out"
    output.mkdir()
    given: list[str] = []

    def run(script: str, *args: str) -> str:
        assert script == "pipelines/embed_images.py"
        assert not output.exists(), "vectors of before would be skipped"
        given.extend(args)
        return (
            "parts embedded 0/2  16 pictures, 99 pictures/s\nparts embedded 2/2  8,192 pictures, 1,200 pictures/s\n"
            "2 vector files written, 8,192 pictures, 1,085 pictures/s; 0 were there\nout: 8,192 vectors\n"
        )

    monkeypatch.setattr(corpus, "run_script", run)
    done = corpus.embed_corpus("model", str(tmp_path), output, 2)
    assert (done.pictures_per_s, done.pace_per_s) == (1085, 1200)
    assert given.count("--input") == 2
    monkeypatch.setattr(corpus, "run_script", lambda *args: "0 vector files written, 0 pictures; 2 were there\n")
    with pytest.raises(processes.BenchmarkFailed, match="no rate"):
        corpus.embed_corpus("model", str(tmp_path), output, None)


def test_embed_reports_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "draw_pictures", lambda folder, count: "shards")
    monkeypatch.setattr(corpus, "embed_corpus", lambda *args: corpus.Embedded(90.0, 95.0, 12.0))
    monkeypatch.setattr(
        processes,
        "in_own_process",
        lambda function, *args: {corpus.forward_per_s: 100.0, corpus.dataloader_per_s: 50.0}.get(function, "model"),
    )
    embed.main(pictures=4096, repetitions=2, results=tmp_path)
    written = json.loads((tmp_path / "embed.json").read_text())
    assert written["ratios"] == {
        "embed_pace_vs_dataloader": 1.9,
        "embed_vs_forward": 0.9,
        "vit_s_embed_vs_forward": 0.9,
    }
    assert written["goals"] == {"embed_vs_forward": 0.85, "vit_s_embed_vs_forward": 0.85}
    assert written["repetitions"]["embed_wall_s"] == [12.0, 12.0]
    assert written["figures"]["vit_s_embed_pace_per_s"] == 95.0
    embed.main(pictures=4096, large_shards=0, repetitions=1, results=tmp_path)
    assert json.loads((tmp_path / "embed.json").read_text())["ratios"] == {
        "embed_pace_vs_dataloader": 1.9,
        "embed_vs_forward": 0.9,
    }
