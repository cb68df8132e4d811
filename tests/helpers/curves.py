"""Published scaling curves, and what their publishers say of the runs: the facts that a prediction may use."""

from __future__ import annotations

from dataclasses import dataclass

from nev.planner.cluster import make_cluster
from nev.planner.hardware import shipped_hardware
from nev.planner.network import Message
from nev.planner.number import shipped_numbers
from nev.planner.step import compute_from_step, step_time

FP32, DDP_BUCKET, NEMO_CHUNK = 4, 25 * 2**20, 125e6


@dataclass(frozen=True)
class Curve:
    """A weak-scaling curve: the same images on each GPU, more GPUs.

    node: type of node in `nev/planner/hardware.yaml`, with its GPU.
    local: pairs of a GPU and step.
    parameters: trained ones, whose gradients go over the network in float32.
    width: of an embedding; both towers' embeddings are gathered in float32, and their gradients are scattered back.
    bucket: bytes of one all-reduce of gradients.
    hidden: share of the gradients' all-reduce behind the backward; None for the shipped number.
    pairs_s: measured pairs a second by the number of GPUs.
    source: of all this.
    """

    gpu: str
    node: str
    local: int
    parameters: float
    width: int
    bucket: float
    hidden: float | None
    pairs_s: dict[int, float]
    source: str


NEMO = (
    "docs.nvidia.com/nemo-framework, CLIP, performance; micro_batch_size 88, output_dim 1024, gather_with_grad, "
    "async_grad_allreduce false (nothing hidden), grad_allreduce_chunk_size_mb 125 of NeMo-Framework-Launcher's vit_g_14.yaml; "
    "1.37 billion parameters as open_clip's ViT-g-14"
)
LAION = (
    "github.com/LAION-AI/open-clap-scaling: DDP on JUPITER, BS 616 and 416; parameters of HTSAT and RoBERTa-base, about"
)
CURVES = {
    "NeMo CLIP g/14, A100": Curve(
        "a100-80", "dgx-a100", 88, 1.367e9, 1024, NEMO_CHUNK, 0.0,
        {8: 559, 16: 1115, 32: 2190, 64: 4407, 128: 8633}, NEMO,
    ),
    "NeMo CLIP g/14, H100": Curve(
        "h100", "dgx-h100", 88, 1.367e9, 1024, NEMO_CHUNK, 0.0,
        {8: 935, 16: 1795, 32: 3502, 64: 6771, 128: 13829}, NEMO,
    ),
    "CLAP HTSAT-tiny, GH200": Curve(
        "gh200", "jupiter-gh200", 616, 1.55e8, 512, DDP_BUCKET, None,
        {4: 2495, 8: 4966, 16: 9865, 32: 19572, 64: 38512, 128: 75008, 256: 146767, 512: 278833}, LAION,
    ),
    "CLAP HTSAT-base, GH200": Curve(
        "gh200", "jupiter-gh200", 416, 2.0e8, 512, DDP_BUCKET, None,
        {4: 2153, 8: 4244, 16: 8379, 32: 16701, 64: 32502, 128: 64691, 256: 124245, 512: 232876}, LAION,
    ),
}  # fmt: skip


def messages(curve: Curve, world: int) -> list[Message]:
    """The collectives of a step."""
    hidden = shipped_numbers()["overlap"].value if curve.hidden is None else curve.hidden
    gradients = curve.parameters * FP32
    embeddings = 2 * curve.width * FP32 * curve.local * world
    return [
        Message("all_reduce", "gradients", -int(-gradients // curve.bucket), gradients, hidden),
        Message("all_gather", "embeddings", 2, embeddings),
        Message("reduce_scatter", "gradients of the embeddings", 2, embeddings),
    ]


def predict(curve: Curve) -> dict[int, tuple[float, float]]:
    """(predicted, published) efficiency by the number of GPUs. The first point gives the GPU's rate, and nothing else."""
    numbers, first = shipped_numbers(), min(curve.pairs_s)
    cluster = make_cluster(shipped_hardware(), curve.gpu, first, curve.node)
    fabric, deviation = cluster.fabric(numbers), numbers["straggler"].value
    step_s = curve.local * first / curve.pairs_s[first]
    compute = compute_from_step(step_s, messages(curve, first), first, fabric, deviation)
    found = {}
    for world, measured in curve.pairs_s.items():
        predicted = curve.local / step_time(compute, messages(curve, world), world, fabric, deviation).total
        alone = curve.pairs_s[first] / first
        found[world] = predicted / alone, measured / world / alone
    return found
