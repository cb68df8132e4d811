"""The vectors of a validation: the file beside the checkpoint, and the vectors of the texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from nev.data.text_sidecar import Encode
from nev.eval.metrics.zeroshot import class_embeddings
from nev.eval.suite.vectors import Embedded, Texts
from nev.eval.validation.task import Result, Validation, read_labels
from nev.eval.validation.texts import read_caption_vectors, read_captions
from nev.runs.checkpoint import MEANS, VECTORS
from nev.storage.files import join
from nev.storage.reading import read_bytes


def load_texts(task: Validation, encode: Encode | None, captions: Sequence[Sequence[str]] | None = None) -> Texts:
    """The vectors of the class prompts and captions that a validation needs.

    encode: embeds the texts. None: class vectors are those of the driver, captions' vectors come from the sidecars.
    captions: of each row, where these have been read already.
    """
    classes = sentences = owner = None
    if task.classes:
        classes = task.classes.vectors
        classes = class_embeddings(encode, task.classes.names, task.classes.templates) if encode else classes
    if task.retrieval and encode:
        captions = read_captions(task.reader.index) if captions is None else captions
        owner = np.repeat(np.arange(len(captions)), [len(of_row) for of_row in captions])
        sentences = np.asarray(encode([caption for of_row in captions for caption in of_row]), np.float32)
    elif task.retrieval:
        assert task.text_key
        sentences, owner = read_caption_vectors(task.reader.index, task.text_key, task.text_width)
    return Texts(classes, sentences, owner)


def vectors_file(task: Validation) -> str:
    """Name of the file in a checkpoint that holds the vectors of this validation.

    The name depends on the set, and on the sentences where the file holds vectors of texts.
    """
    digest = task.reader.index.fingerprint
    if not task.text_key:
        prompts = task.classes and (task.classes.names, task.classes.templates)
        digest = hashlib.sha256(json.dumps([digest, prompts, task.retrieval]).encode()).hexdigest()
    return f"{VECTORS}{digest[:16]}.safetensors"


def vectors_to_bytes(task: Validation, result: Result) -> bytes:
    """The vectors as safetensors. Vectors of texts are included where no sidecar holds them.

    Where captions were scored, the means of the pictures' and of the captions' vectors are included, for ranked lists.
    """
    from safetensors.numpy import save

    embedded, captions, means = result.embedded, result.texts.captions, {}
    if captions is not None and embedded.valid.any():
        means[MEANS] = np.stack([embedded.images[embedded.valid].mean(axis=0), captions.mean(axis=0)])
    texts = {} if task.text_key else {k: v for k, v in result.texts._asdict().items() if v is not None}
    return save(embedded._asdict() | texts | means)


def load_vectors(checkpoint: str, task: Validation) -> tuple[Embedded, Texts] | None:
    """The vectors of this validation from a checkpoint, with the set's labels; None where the checkpoint has no such file."""
    from safetensors.numpy import load

    content = read_bytes(join(checkpoint, vectors_file(task)))
    if content is None:
        return None
    tensors = load(content)
    tensors.pop(MEANS, None)
    embedded = Embedded(**{name: tensors.pop(name) for name in Embedded._fields})
    embedded = embedded._replace(labels=read_labels(task.reader.index))  # as the set has them now
    return embedded, load_texts(task, None) if task.text_key else Texts(**tensors)
