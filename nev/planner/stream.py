"""The way of the pictures: what decoding, networks, S3 and the coordinators of streams can give, in images a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Picture:
    """What a training row costs on its way.

    stored: bytes read from the store, text vector and uid included, and what a block reads of a row group for its neighbour.
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
    blocks_s: blocks a second that the coordinators of all streams hand out.
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


def decoder_images_s(picture: Picture, vcpus: float, gbit_s: float) -> dict[str, float]:
    """Images a second of a node that decodes: by its vCPUs, by what it sends, and by what it reads."""
    return {
        "decode": vcpus * picture.decode_images_s,
        "send": gbit_s * GBIT / picture.decoded,
        "read": gbit_s * GBIT / picture.stored,
    }


def decoders_needed(images_s: float, picture: Picture, machines: Machines) -> int:
    """Nodes that must decode beside the GPU nodes for a rate of `images_s`."""
    each = min(decoder_images_s(picture, machines.decoder_vcpus, machines.decoder_gbit_s).values())
    missing = images_s - machines.gpu_nodes * machines.gpu_vcpus * picture.decode_images_s
    return max(0, math.ceil(missing / each - 1e-9))


def stream_limits(picture: Picture, source: Source, machines: Machines) -> dict[str, float]:
    """Images a second that each part of the way can give, by the part's name.

    GPU nodes decode first; what they cannot, comes from the decoders. So a GPU node receives stored pictures of its own share
    and decoded ones of the rest.
    """
    own = machines.gpu_nodes * machines.gpu_vcpus * picture.decode_images_s
    each = decoder_images_s(picture, machines.decoder_vcpus, machines.decoder_gbit_s)
    received = machines.gpu_nodes * machines.gpu_gbit_s * GBIT
    if own * picture.stored >= received or not machines.decoders:
        ingress = received / picture.stored
    else:
        ingress = own + (received - own * picture.stored) / picture.decoded
    rows_a_request = source.block_rows / (source.groups_a_block * source.requests_a_group)
    return {
        "decode": own + machines.decoders * each["decode"],
        "ingress": min(ingress, own + machines.decoders * each["read"] if machines.decoders else math.inf),
        "object store": own + machines.decoders * each["send"] if machines.decoders else math.inf,
        "S3 requests": source.requests_s * rows_a_request,
        "coordinator": source.blocks_s * source.block_rows,
    }


def requests_of(images: float, source: Source) -> float:
    """Requests to the store for a number of images."""
    return images / source.block_rows * source.groups_a_block * source.requests_a_group
