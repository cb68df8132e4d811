"""What the pictures' way gives, against hand calculations, and that more machines never give less."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nev.planner.stream import Machines, Picture, Source, decoders_needed, requests_of, stream_limits

PICTURE = Picture(stored=32_000, decoded=150_000, decode_images_s=500)
SOURCE = Source(block_rows=256, groups_a_block=1.5, requests_a_group=6, requests_s=5500, blocks_s=100)


def test_the_limits_by_hand() -> None:
    """Two GPU nodes of 8 free vCPUs and 10 Gbit/s make 8,000 images/s, and one decoder of 16 vCPUs and 5 Gbit/s."""
    limits = stream_limits(PICTURE, SOURCE, Machines(2, 8, 10, 1, 16, 5))
    assert limits["decode"] == 8000 + 16 * 500
    assert limits["object store"] == pytest.approx(8000 + 5e9 / 8 / 150_000)
    received = 2 * 10e9 / 8
    assert limits["ingress"] == pytest.approx(8000 + (received - 8000 * 32_000) / 150_000)
    assert limits["S3 requests"] == pytest.approx(5500 * 256 / 9)
    assert limits["coordinator"] == 25_600


def test_without_decoders_nothing_is_sent() -> None:
    limits = stream_limits(PICTURE, SOURCE, Machines(2, 8, 10, 0, 16, 5))
    assert limits["object store"] == math.inf
    assert limits["ingress"] == pytest.approx(2 * 10e9 / 8 / 32_000)


@given(images_s=st.floats(1, 1e7), nodes=st.integers(1, 100), spare=st.floats(0, 100), gbit=st.floats(0.1, 100))
def test_the_needed_decoders_suffice_and_one_less_does_not(
    images_s: float, nodes: int, spare: float, gbit: float
) -> None:
    machines = Machines(nodes, spare, 1e6, 0, 32, gbit)
    count = decoders_needed(images_s, PICTURE, machines)

    def given_by(decoders: int) -> float:
        limits = stream_limits(PICTURE, SOURCE, replace(machines, decoders=decoders))
        return min(limits[name] for name in ("decode", "object store", "ingress"))

    assert given_by(count) >= images_s * (1 - 1e-6)
    assert count == 0 or given_by(count - 1) < images_s * (1 + 1e-6)


@given(nodes=st.integers(1, 50), decoders=st.integers(1, 200))
def test_a_decoder_more_never_gives_less(nodes: int, decoders: int) -> None:
    fewer, more = (
        stream_limits(PICTURE, SOURCE, Machines(nodes, 4, 100, count, 32, 12.5)) for count in (decoders, decoders + 1)
    )
    assert more["decode"] == pytest.approx(fewer["decode"] + 32 * 500)
    assert all(more[name] >= fewer[name] * (1 - 1e-9) for name in more)


def test_requests_of_the_paper_s_epoch() -> None:
    """As docs/scaling.md has them: 6 g x 6,043,904 blocks."""
    assert requests_of(6_043_904 * 256, SOURCE) == pytest.approx(54.4e6, rel=1e-3)
