"""The way of the pictures: what decoding, networks, S3 and the one coordinator of a stream can give, in images a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Picture:
    """What a training row costs on its way.

    stored: bytes in the store, text vector and uid included.
    decoded: bytes of a row of a block.
    decode_images_s: rows a second that a vCPU makes.
    """

    stored: float
    decoded: float
    decode_images_s: float


@dataclass(frozen=True)
class Source:
    """How blocks are read.

    block_rows: rows of a block, R.
    groups_a_block: row groups that a block touches.
    requests_a_group: requests of a row group.
    requests_s: requests a second that the store answers.
    blocks_s: blocks a second that the stream's coordinator hands out.
    """

    block_rows: int
    groups_a_block: float
    requests_a_group: float
    requests_s: float
    blocks_s: float


@dataclass(frozen=True)
class Machines:
    """What decodes and receives.

    gpu_nodes, gpu_vcpus, gpu_gbit_s: number, free vCPUs and TCP bandwidth of a GPU node.
    decoders, decoder_vcpus, decoder_gbit_s: the same of the decoders.
    """

    gpu_nodes: int
    gpu_vcpus: float
    gpu_gbit_s: float
    decoders: int
    decoder_vcpus: float
    decoder_gbit_s: float


def decoders_needed(images_s: float, picture: Picture, gpu_nodes: int, gpu_vcpus: float, decoder_vcpus: float) -> int:
    """Nodes that must decode beside the GPU nodes for a rate of `images_s`."""
    missing = images_s / picture.decode_images_s - gpu_nodes * gpu_vcpus
    return max(0, math.ceil(missing / decoder_vcpus - 1e-9))


def stream_limits(picture: Picture, source: Source, machines: Machines) -> dict[str, float]:
    """Images a second that each part of the way can give, by the part's name."""
    own, others = machines.gpu_nodes * machines.gpu_vcpus, machines.decoders * machines.decoder_vcpus
    gpu_bytes = machines.gpu_nodes * machines.gpu_gbit_s * GBIT
    decoder_bytes = machines.decoders * machines.decoder_gbit_s * GBIT
    away = others / (own + others) if others else 0.0  # share of the pictures that decoders make
    read_here = gpu_bytes / ((1 - away) * picture.stored + away * picture.decoded)
    read_there = decoder_bytes / (away * picture.stored) if away else math.inf
    send = decoder_bytes / (away * picture.decoded) if away else math.inf
    rows_a_request = source.block_rows / (source.groups_a_block * source.requests_a_group)
    return {
        "decode": (own + others) * picture.decode_images_s,
        "ingress": min(read_here, read_there),
        "object store": send,
        "S3 requests": source.requests_s * rows_a_request,
        "coordinator": source.blocks_s * source.block_rows,
    }


def requests_of(images: float, source: Source) -> float:
    """Requests to the store for a number of images."""
    return images / source.block_rows * source.groups_a_block * source.requests_a_group
