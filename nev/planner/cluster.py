"""The machines of a plan: which node, how many, what joins them. Checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from nev.config.base import ConfigError
from nev.planner.hardware import Gpu, Hardware, Node, Prices, find
from nev.planner.network import Fabric
from nev.planner.number import Numbers


@dataclass(frozen=True)
class Cluster:
    """The machines.

    gpu_name, gpu: the kind of GPU.
    node_name, node: the type of its nodes.
    world: GPUs, a rank each.
    decoder_name, decoder: the type of a node that decodes.
    head_name: the type of the head.
    decoders: the most decoders; None for as many as are needed.
    spot: whether the GPU nodes are spot nodes.
    """

    gpu_name: str
    gpu: Gpu
    node_name: str
    node: Node
    world: int
    decoder_name: str
    decoder: Node
    head_name: str
    decoders: int | None
    spot: bool

    @property
    def nodes(self) -> int:
        """GPU nodes."""
        return self.world // self.node.gpus

    def fabric(self, numbers: Numbers) -> Fabric:
        """What joins the GPUs."""
        return Fabric(
            gpus=self.node.gpus,
            link_bytes_s=self.gpu.link_gb_s * 1e9,
            node_bytes_s=self.node.network_gbit_s * 1e9 / 8,
            share=numbers["network_share"].value,
            link_latency_s=numbers["link_latency_s"].value,
            node_latency_s=numbers["network_latency_s"].value,
        )


def make_cluster(
    hardware: Hardware, gpu: str, gpus: int, node: str | None = None, decoders: int | None = None, spot: bool = False
) -> Cluster:
    """Choose the machines. Raises ConfigError for unknown names, a node with other GPUs, and a part of a node."""
    kind = find(hardware.gpus, gpu, "GPU")
    name = node or kind.node
    chosen = find(hardware.nodes, name, "type of node")
    others = [each for each, facts in hardware.nodes.items() if facts.gpu == gpu and each != name]
    if chosen.gpu != gpu:
        raise ConfigError(f"--node {name} has {chosen.gpu or 'no'} GPUs, not {gpu}; with {gpu} are {', '.join(others)}")
    if gpus % chosen.gpus:
        low = gpus // chosen.gpus * chosen.gpus
        near = " or ".join(str(count) for count in (low, low + chosen.gpus) if count)
        smaller = [each for each in others if gpus % hardware.nodes[each].gpus == 0]
        hint = f", or --node {smaller[0]}, which has {hardware.nodes[smaller[0]].gpus}" if smaller else ""
        raise ConfigError(
            f"--gpus {gpus} is no whole number of {name}, which has {chosen.gpus} GPUs and is paid whole: give {near}{hint}"
        )
    decoder = find(hardware.nodes, hardware.decoder, "type of node")
    return Cluster(gpu, kind, name, chosen, gpus, hardware.decoder, decoder, hardware.head, decoders, spot)


def node_price(prices: Prices, name: str, spot: bool) -> float | None:
    """USD an hour of a node; None where it is not known."""
    price = prices.instances.get(name)
    if price is None:
        return None
    return price.spot if spot else price.on_demand
