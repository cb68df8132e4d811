"""A trained model that one can call: pictures and sentences to vectors of one space, similarity, classes, ranked lists."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nev.config.model_spec import ModelSpec
from nev.data.decode import BadImage
from nev.inference.forward import Embed, make_embedder
from nev.inference.output import Form, Numpy, Torch, VectorFormat, as_vectors, check_output, finish, to_numpy
from nev.inference.pictures import Square, is_single, read_squares
from nev.inference.progress import count_items, show_progress
from nev.inference.ranking import Ranked, rank_vectors
from nev.models.digests import weight_digests
from nev.models.image_encoder import ImageEncoder
from nev.ops.vectors import Floats, are_usable, scale_to_unit, shift_mean

if TYPE_CHECKING:
    from nev.models.text import TextTower

Kind = Literal["query", "document"]
Raise = Literal["raise"]
Mask = Literal["mask"]


class Scored(NamedTuple):
    """A label and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Model:
    """Two towers of one space. `nev.load` opens one.

    location: where the model was opened.
    spec: all that decides a vector, but the weights.
    vision: normalised pixels to unit vectors, in eval mode, on `device`.
    load_text: loads the text tower, on the CPU. Called once, when a sentence is first embedded.
    device: where both towers compute.
    """

    location: str
    spec: ModelSpec
    vision: ImageEncoder
    load_text: Callable[[], TextTower]
    device: torch.device

    @property
    def width(self) -> int:
        """Width D of an embedding."""
        return self.spec.width

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the vector of a picture: weights, vision tower, and pre-processing.

        The whole tower is hashed, 0.3 s for EVA02-B; an export has its model's fingerprint in nev.json.
        """
        spec = self.spec
        if spec.vision_fingerprint:
            return spec.vision_fingerprint
        settings = {"pool", "pool_heads", "head", "standardise", "final_norm", "precision"}
        vision = spec.vision.model_dump(mode="json", include=settings)
        parts = [weight_digests(self.vision), vision, spec.image_size, spec.mean, spec.std]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def text(self) -> TextTower:
        """The text tower, on `device`."""
        tower = self.load_text()
        tower.model.to(self.device)
        return tower

    @cached_property
    def text_fingerprint(self) -> str:
        """sha256 (hex) of what decides the vector of a document: weights, tokenizer, prefix, pooling, length of a cut text."""
        return self._text_of("document").fingerprint

    def _text_of(self, kind: Kind) -> TextTower:
        """The text tower with the prefix of a kind. Training cuts captions short; people's vectors are cut where it ends."""
        return replace(self.text, prefix=self.spec.prompts[kind], max_tokens=self.text.longest)

    def __repr__(self) -> str:
        vision, text = self.spec.vision.trunk, self.spec.text.encoder
        return f"nev.Model({self.spec.name!r}: {vision} into the space of {text}, {self.width} wide, on {self.device})"

    @overload
    def encode_image(
        self, images: Any, *, bad: Raise = "raise", output: Numpy = "numpy", **form: Unpack[Form]
    ) -> NDArray[Any]: ...

    @overload
    def encode_image(
        self, images: Any, *, bad: Raise = "raise", output: Torch, **form: Unpack[Form]
    ) -> torch.Tensor: ...

    @overload
    def encode_image(
        self, images: Any, *, bad: Mask, output: Numpy = "numpy", **form: Unpack[Form]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]: ...

    @overload
    def encode_image(
        self, images: Any, *, bad: Mask, output: Torch, **form: Unpack[Form]
    ) -> tuple[torch.Tensor, NDArray[np.bool_]]: ...

    def encode_image(
        self,
        images: Any,
        *,
        bad: Raise | Mask = "raise",
        batch_size: int = 32,
        width: int | None = None,
        precision: VectorFormat = "float32",
        output: Numpy | Torch = "numpy",
        progress: bool | None = None,
    ) -> Any:
        """Embed pictures: [n, D] in their order, rows of unit length; one picture gives [D].

        images: a picture, or an iterable of pictures: paths, bytes of files, open files, Pillow images, uint8 arrays [h, w, 3].
        bad: for pictures that cannot be used: `raise` BadImage, or `mask`, which returns (vectors, valid), bool [n], with rows
            of zeros for them, and warns with the reasons.
        batch_size: pictures of a forward.
        width: numbers of a vector: the first so many, scaled to unit length again (Matryoshka). None: all D.
        precision: `float32`, `float16`, `int8` (compare by cosine) or `binary` (bits in uint8, compare by Hamming distance).
        output: `numpy`, or `torch` on the CPU.
        progress: a bar on stderr. None: on a terminal, for 512 pictures or more, and for iterables of unknown length.
        Raises TypeError for what is no picture, ValueError for a wrong width or precision.
        """
        check_output(self.width, width, precision, output, batch_size)
        if bad not in ("raise", "mask"):
            raise ValueError(f"bad {bad!r}: it is raise or mask")
        single, spec = is_single(images), self.spec
        items = [images] if single else images
        embed = make_embedder(self.vision, spec.mean, spec.std, self.device, batch_size)
        parts, reasons = [np.zeros((0, self.width), np.float32)], list[str]()
        with show_progress("pictures", count_items(items), progress) as advance:
            for squares in read_squares(items, spec.image_size, spec.limits, batch_size):
                if bad == "raise":
                    _raise_first([square.reason for square in squares], len(reasons))
                with torch.autocast(self.device.type, enabled=False):  # a caller's autocast must not reach the tower
                    vectors, new = encode_squares(squares, embed, self.width)
                if bad == "raise":
                    _raise_first(new, len(reasons))
                parts.append(vectors)
                reasons += new
                advance(len(squares))
        vectors = finish(np.concatenate(parts), width, precision, output, single)
        if bad == "raise":
            return vectors
        if counts := Counter(filter(None, reasons)):
            listed = "; ".join(f"{number} x {reason}" for reason, number in counts.most_common(5))
            warnings.warn(f"{counts.total()} of {len(reasons)} pictures cannot be used: {listed}", stacklevel=2)
        return vectors, np.array([not reason for reason in reasons], bool)

    @overload
    def encode_text(
        self, texts: str | Sequence[str], *, kind: Kind = "query", output: Numpy = "numpy", **form: Unpack[Form]
    ) -> NDArray[Any]: ...

    @overload
    def encode_text(
        self, texts: str | Sequence[str], *, kind: Kind = "query", output: Torch, **form: Unpack[Form]
    ) -> torch.Tensor: ...

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        kind: Kind = "query",
        batch_size: int = 64,
        width: int | None = None,
        precision: VectorFormat = "float32",
        output: Numpy | Torch = "numpy",
        progress: bool | None = None,
    ) -> Any:
        """Embed sentences: [n, D] in their order, rows of unit length; one sentence gives [D].

        kind: `query` or `document`, for encoders that tell them apart by a prefix; the prefix is added here.
        batch_size: most sentences of a forward. Long sentences have smaller batches (`nev.models.text.BATCH_TOKENS`).
        Other arguments and errors as `encode_image`. Raises TypeError for a sentence that is no str, ValueError for half a
        character in a str.
        """
        check_output(self.width, width, precision, output, batch_size)
        if kind not in self.spec.prompts:
            raise ValueError(f"kind {kind!r}: it is {' or '.join(self.spec.prompts)}")
        single = isinstance(texts, str)
        sentences = [texts] if isinstance(texts, str) else _as_list(texts)
        tower = self._text_of(kind)
        with show_progress("sentences", len(sentences), progress) as advance:
            done = 0

            def report(count: int) -> None:
                nonlocal done
                advance(count - done)
                done = count

            vectors = tower.encode(sentences, batch_size, report)
        return finish(vectors, width, precision, output, single)

    def similarity(self, left: ArrayLike, right: ArrayLike) -> Floats:
        """Cosines of two sets of vectors, [n, D] and [m, D] (or one vector, [D]): float32 [n, m]. int8 vectors are fine, too.

        A row of zeros, which stands for a bad picture, has the cosine 0; a row with NaN has NaN.
        Raises ValueError for vectors of different widths, and for binary ones; TypeError for what is no vector.
        """
        rows = [np.atleast_2d(to_numpy(side)) for side in (left, right)]
        for side in rows:
            if side.dtype == np.uint8:
                raise ValueError("binary vectors have no cosine: compare them by Hamming distance")
            if side.dtype.kind not in "fi":
                raise TypeError(f"similarity compares vectors, and this is an array of {side.dtype}: encode it first")
            if side.ndim != 2:
                raise ValueError(f"similarity compares vectors, [n, D], and this is an array {list(side.shape)}")
        if rows[0].shape[1] != rows[1].shape[1]:
            raise ValueError(f"vectors of {rows[0].shape[1]} and of {rows[1].shape[1]} numbers cannot be compared")
        a, b = (scale_to_unit(side.astype(np.float32)) for side in rows)
        return np.asarray(a @ b.T, np.float32)

    def classify(
        self, images: Any, labels: Sequence[str], *, templates: Sequence[str] = ("a photo of a {}.",), top: int = 5
    ) -> list[Any]:
        """Zero-shot classification (Radford et al. 2021): the most probable labels of each picture, best first.

        images: as `encode_image`. labels: names of the classes. templates: sentences with one `{}` for the name.
        top: labels a picture. Returns a list of `Scored` for one picture, a list of such lists for several.
        Raises ValueError for no label, a label twice, no template, a template without exactly one `{}`, and `top` below 1.
        """
        _check_top(top)
        names = [labels] if isinstance(labels, str) else list(labels)
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not templates:
            raise ValueError("templates: at least one sentence with a {} for the class name")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"labels: at least one, and each once, not {names[:8]}")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' for the class name: {template!r}")
        sentences = [template.replace("{}", name) for name in names for template in templates]
        classes = self.encode_text(sentences).reshape(len(names), len(templates), -1).mean(axis=1)
        logits = self.spec.logit_scale * self.similarity(self.encode_image(images), classes)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = odds / odds.sum(axis=1, keepdims=True)
        scored = [[Scored(names[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]] for row in shares]
        return scored[0] if is_single(images) else scored

    def rank(
        self,
        query: Any,
        *,
        images: Any = (),
        texts: Sequence[str] | ArrayLike = (),
        top: int = 10,
        calibrated: bool = True,
    ) -> list[Ranked]:
        """Rank pictures and sentences in one list for a query, best first.

        query: a sentence (str), a picture in another form than a path in a str, or a vector of this model, float [D], which is
            taken as it is, as a sentence's.
        images: pictures as in `encode_image`, or their vectors, float [n, D].
        texts: sentences, which are embedded as documents, or their vectors, float [m, D].
        top: length of the list.
        calibrated: move pictures by the distance between the means of both modalities, which the model knows from validation: the
            modality gap would put all texts before all pictures (Liang et al. 2022). A model without the means ranks by cosine.
        Vectors of zeros, which `bad="mask"` gives for bad pictures, and vectors with NaN are left out of the list.
        Raises BadImage for a bad picture, ValueError for vectors of another model, and for `top` below 1.
        """
        _check_top(top)
        query_vector, pictures, sentences = (
            as_vectors(items, what, self.width)
            for items, what in ((query, "query"), (images, "images"), (texts, "texts"))
        )
        query_is_picture = query_vector is None and not isinstance(query, str)
        if query_vector is None:
            query_vector = self.encode_image([query]) if query_is_picture else self.encode_text([query])
        if len(query_vector) != 1 or not are_usable(query_vector).all():
            raise ValueError(
                f"rank takes one query of {self.width} numbers, finite and not all 0; this is {list(query_vector.shape)}"
            )
        pictures = np.atleast_2d(self.encode_image(images)) if pictures is None else pictures
        if sentences is None:
            sentences = np.atleast_2d(self.encode_text(texts, kind="document"))  # type: ignore[call-overload]
        means = self.spec.calibration
        if calibrated and means:
            image_mean, text_mean = (np.asarray(mean, np.float32) for mean in (means.image_mean, means.text_mean))
            pictures = shift_mean(pictures, image_mean, text_mean)
            query_vector = shift_mean(query_vector, image_mean, text_mean) if query_is_picture else query_vector
        return rank_vectors(query_vector, pictures, sentences, top)


def encode_squares(squares: list[Square], embed: Embed, width: int) -> tuple[Floats, list[str]]:
    """Vectors, zeros for bad pictures; and why pictures are bad, else empty."""
    reasons = [square.reason for square in squares]
    good = [n for n, reason in enumerate(reasons) if not reason]
    out = np.zeros((len(squares), width), np.float32)
    if good:
        out[good] = embed(np.stack([squares[n].pixels for n in good]))
        for n in np.flatnonzero(~np.isfinite(out).all(axis=1)):
            out[n], reasons[n] = 0, "the model gives no finite vector for it"
    return out, reasons


def _raise_first(reasons: Sequence[str], start: int) -> None:
    """Raise BadImage for the first bad picture. start: number of the first picture."""
    for number, reason in enumerate(reasons, start):
        if reason:
            raise BadImage(f"picture {number}: {reason} (bad='mask' would leave such pictures out)")


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top {top}: at least 1")


def _as_list(texts: Any) -> list[str]:
    if isinstance(texts, bytes) or hasattr(texts, "getexif") or not isinstance(texts, Iterable):
        raise TypeError(
            f"a sentence or a list of sentences is needed, not {type(texts).__name__}; pictures go to encode_image"
        )
    return list(texts)
