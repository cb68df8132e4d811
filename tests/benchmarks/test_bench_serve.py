"""The benchmark of the server: its load measures what it says, and the plain endpoint is the same model."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers.models import make_experiment, write_checkpoint
from helpers.serving import counting_engine, run_in_thread

from benchmarks import serve
from benchmarks.contestants import load, servers
from nev.inference.load import load as load_model
from nev.serve.app import make_app
from nev.serve.settings import Settings
from nev.serve.torch_engine import make_engine


def test_the_plain_endpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(make_experiment(tmp_path)), device="cpu")
    head = {"content-type": "application/json"}
    with TestClient(make_app(make_engine(model))) as ours, TestClient(servers.make_plain_app(model)) as plain:
        for kind in ("text", "image"):
            for body in load.make_bodies(kind)[:3]:
                rows = [
                    client.post("/v1/embeddings", content=body, headers=head).json()["data"][0]["embedding"]
                    for client in (ours, plain)
                ]
                one, other = (np.frombuffer(base64.b64decode(row), "<f4") for row in rows)
                np.testing.assert_allclose(one, other, atol=1e-5)


def test_load_counts_answers_and_errors() -> None:
    engine, _ = counting_engine()
    with run_in_thread(make_app(engine, settings=Settings(max_items=1))) as url:
        bodies = [*load.make_bodies("text")[:3], json.dumps({"input": ["a", "b"]}).encode()]
        done = asyncio.run(load._ask_closely(url, os.getpid(), bodies, 4, 0.3))
        assert set(done.statuses) == {"200", "422"}
        assert done.errors == done.statuses["422"]
        assert sum(done.statuses.values()) == len(done.latencies)
        assert done.percentile(0.5) <= done.percentile(0.99)
        assert done.cpu_ms > 0
        over = asyncio.run(load._ask_at_rate(url, os.getpid(), bodies[:3], 50, 0.5))
        assert 15 <= over.statuses["200"] <= 30
    gone = asyncio.run(load._ask_closely(url, os.getpid(), bodies, 1, 0.05))
    assert gone.errors == len(gone.latencies) > 0


def test_ratios_have_the_goals_of_their_names() -> None:
    figures = {f"{kind}_{what}_c16_per_s": [1.0] for kind in servers.KINDS for what in ("text", "image")}
    figures["ray_text_c64_per_s"] = figures["plain_text_c64_per_s"] = figures["nev_int8_or_bf16_image_c16_per_s"] = [
        1.0
    ]
    ratios = serve.make_ratios(figures)
    assert {key: ratio.goal for key, ratio in ratios.items() if ratio.goal} == serve.GOALS
    assert ratios["text_vs_fastapi_c16"].over == "nev_text_c16_per_s"
    assert ratios["image_int8_vs_fastapi_c16"].over == "nev_int8_image_c16_per_s"
    assert ratios["serve_text_vs_fastapi_c64"].under == "plain_text_c64_per_s"
    assert ratios["text_vs_infinity_c16"].under == "infinity_text_c16_per_s"
    with pytest.raises(KeyError):
        ratios["text_int8_vs_fastapi_c64"]
