"""The vectors that a validation has made, kept beside its checkpoint."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from nev.data.sidecar import Encode
from nev.eval.metrics.zeroshot import class_embeddings
from nev.eval.validation.scoring import Embedded
from nev.eval.validation.task import Result, Validation
from nev.eval.validation.texts import Texts, all_captions, caption_owners, load_texts
from nev.storage.files import join
from nev.storage.reading import read_bytes


def load_validation_texts(task: Validation, encode: Encode | None) -> Texts:
    """The class prompts and captions of a task: embedded by `encode` or, without it, as they were embedded before."""
    classes = captions = owner = None
    if task.classes:
        named = task.classes
        classes = class_embeddings(encode, named.names, named.templates) if encode else named.vectors
    if task.retrieval and encode:
        captions = np.asarray(encode(all_captions(task.reader.index)), np.float32)
        owner = caption_owners(task.reader.index)
    elif task.retrieval:
        assert task.text_key
        captions, owner = load_texts(task.reader.index, task.text_key, task.text_width)
    return Texts(classes, captions, owner)


def vectors_file(task: Validation) -> str:
    """The file in a checkpoint that keeps the vectors of its validation: who looks at the results need not embed again.

    Named after what they are of: the set and, where texts are in it, the sentences.
    """
    of = task.reader.index.fingerprint
    if not task.text_key:
        sentences = task.classes and (task.classes.names, task.classes.templates)
        of = hashlib.sha256(json.dumps([of, sentences, task.retrieval]).encode()).hexdigest()
    return f"validation-{of[:16]}.safetensors"


def vectors_to_bytes(task: Validation, result: Result) -> bytes:
    """The vectors as safetensors; those of texts where they are nowhere else."""
    from safetensors.numpy import save

    texts = {} if task.text_key else {k: v for k, v in result.texts._asdict().items() if v is not None}
    return save(result.embedded._asdict() | texts)


def load_vectors(checkpoint: str, task: Validation) -> tuple[Embedded, Texts] | None:
    """The vectors of this validation that a checkpoint keeps, or None."""
    from safetensors.numpy import load

    content = read_bytes(join(checkpoint, vectors_file(task)))
    if content is None:
        return None
    found = load(content)
    embedded = Embedded(**{name: found.pop(name) for name in Embedded._fields})
    return embedded, load_validation_texts(task, None) if task.text_key else Texts(**found)
