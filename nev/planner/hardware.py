"""GPUs, the nodes that hold them, and prices: data files with a schema, and a user's own prices before the shipped ones."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, TypeVar

from pydantic import Field

from nev.config.base import ConfigError, Positive, Section
from nev.config.file import load_yaml, parse, read_yaml

Rate = Annotated[float, Field(gt=0, le=1e9)]
Usd = Annotated[float, Field(ge=0, le=1e6)]
Entry = TypeVar("Entry")


class Gpu(Section):
    """A kind of GPU."""

    devices: tuple[str, ...] = ()
    """Names that PyTorch gives the GPU."""
    peak_tflops: Rate
    """Dense bf16, in TFLOP/s."""
    memory_gib: Rate
    """Memory, in GiB."""
    memory_gb_s: Rate
    """Bandwidth of the memory, in GB/s."""
    link_gb_s: Rate
    """Bandwidth to the other GPUs of the node, one way, in GB/s."""
    node: str
    """Type of node where none is given."""
    source: str
    """Where the numbers are from."""
    date: datetime.date
    """Date of the entry."""


class Node(Section):
    """A type of machine."""

    gpu: str | None = None
    """Kind of its GPUs. null: none."""
    gpus: int = Field(default=0, ge=0, le=1024)
    """Number of its GPUs."""
    vcpus: Positive
    """Number of its vCPUs."""
    network_gbit_s: Rate
    """Bandwidth of the node for collectives, one way, in Gbit/s."""
    tcp_gbit_s: Rate
    """Bandwidth of the node for all other traffic, one way, in Gbit/s."""
    source: str
    """Where the numbers are from."""
    date: datetime.date
    """Date of the entry."""


class Hardware(Section):
    """All kinds of GPUs and types of nodes."""

    gpus: dict[str, Gpu]
    """GPUs by name."""
    nodes: dict[str, Node]
    """Nodes by name."""
    decoder: str
    """Type of a node that decodes."""
    head: str
    """Type of the head node."""


class InstancePrice(Section):
    """Price of a node, in USD an hour."""

    on_demand: Usd
    """Price on demand."""
    spot: Usd | None = None
    """Price of a spot node. null: not known."""


class Prices(Section):
    """A file of prices: `nev plan --prices FILE`, in YAML or JSON."""

    date: datetime.date
    """When these prices held."""
    source: str
    """Where they are from."""
    instances: dict[str, InstancePrice] = Field(default={})
    """Prices of nodes, by type."""
    nodes: dict[str, Node] = Field(default={})
    """Further types of nodes, or other numbers for a known type."""
    s3_usd_per_1000_requests: Usd | None = None
    """Price of 1,000 GET or HEAD requests. null: as shipped."""


@cache
def shipped_hardware() -> Hardware:
    """The GPUs and nodes that nev knows."""
    return Hardware.model_validate(_read_shipped("hardware.yaml"))


@cache
def shipped_prices() -> Prices:
    """The prices that nev knows."""
    return Prices.model_validate(_read_shipped("prices.yaml"))


def _read_shipped(name: str) -> object:
    return load_yaml(files("nev.planner").joinpath(name).read_text(encoding="utf-8"))


def load_prices(path: str | None) -> tuple[Hardware, Prices]:
    """Hardware and prices, with those of a user's file before the shipped ones.

    path: file of the schema `Prices`; None for the shipped prices alone.
    Raises ConfigError for a file that is absent or has an unknown key, and for the price of an unknown type of node.
    """
    hardware, shipped = shipped_hardware(), shipped_prices()
    if path is None:
        return hardware, shipped
    given = parse(Prices, read_yaml(path), where=path)
    hardware = hardware.model_copy(update={"nodes": {**hardware.nodes, **given.nodes}})
    for name in given.instances:
        find(hardware.nodes, name, "type of node", f"{path}: instances: ")
    for name, node in given.nodes.items():
        if node.gpu is not None:
            find(hardware.gpus, node.gpu, "GPU", f"{path}: nodes.{name}: ")
    per_1000 = given.s3_usd_per_1000_requests
    merged = {
        "instances": {**shipped.instances, **given.instances},
        "s3_usd_per_1000_requests": shipped.s3_usd_per_1000_requests if per_1000 is None else per_1000,
    }
    return hardware, given.model_copy(update=merged)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that PyTorch gives it; None for a name that is not known."""
    gpus = shipped_hardware().gpus.values()
    return next((gpu.peak_tflops * 1e12 for gpu in gpus if device in gpu.devices), None)


def find(entries: Mapping[str, Entry], name: str, kind: str, where: str = "") -> Entry:
    """An entry by its name. Raises ConfigError for an unknown name, with the known ones that are close."""
    if name in entries:
        return entries[name]
    close = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(entries)}"
    raise ConfigError(f"{where}no {kind} {name!r} is known here; {hint}")
