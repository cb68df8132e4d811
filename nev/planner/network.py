"""Time of a collective over two tiers: between the GPUs of a node, and between nodes (ring algorithms, NCCL's model)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """A kind of collective of a step.

    kind: all_reduce, all_gather or reduce_scatter.
    purpose: what is sent.
    calls: calls a step.
    nbytes: bytes of the whole buffers of these calls.
    hidden: share of the time that computation hides.
    """

    kind: str
    purpose: str
    calls: int
    nbytes: float
    hidden: float = 0.0


@dataclass(frozen=True)
class Fabric:
    """What joins the GPUs.

    gpus: of a node.
    link_bytes_s: from a GPU to the others of its node.
    node_bytes_s: from a node to other nodes.
    share: of these rates that a large collective reaches.
    link_latency_s, node_latency_s: of a hop.
    """

    gpus: int
    link_bytes_s: float
    node_bytes_s: float
    share: float
    link_latency_s: float
    node_latency_s: float


def collective_s(message: Message, world: int, fabric: Fabric) -> float:
    """Seconds of a step's calls of a collective; 0 for one rank.

    A ring of n ranks passes (n-1)/n of the buffer through each of them, an all-reduce twice: 2(n-1)/n S/bw. Inside a node the
    ring is over its g GPUs with the whole buffer; between N nodes each GPU sends its 1/g of the buffer through its share of the
    node's network, which is the whole buffer through the whole network.
    """
    inside = min(fabric.gpus, world)
    nodes = -(-world // inside)
    passes = 2 if message.kind == "all_reduce" else 1
    inside_s = (inside - 1) / inside * message.nbytes / (fabric.link_bytes_s * fabric.share)
    between_s = (nodes - 1) / nodes * message.nbytes / (fabric.node_bytes_s * fabric.share)
    latency_s = (inside - 1) * fabric.link_latency_s + (nodes - 1) * fabric.node_latency_s
    return passes * (inside_s + between_s + message.calls * latency_s)


def exposed_s(messages: Iterable[Message], world: int, fabric: Fabric, hideable_s: float) -> float:
    """Seconds of a step in which ranks wait for collectives.

    hideable_s: computation behind which collectives can hide at all, as the backward is for gradients.
    """
    times = [(message.hidden, collective_s(message, world, fabric)) for message in messages]
    hidden = sum(share * seconds for share, seconds in times)
    return sum(seconds for _, seconds in times) - min(hidden, hideable_s)
