"""A checkpoint as a model of mteb (https://github.com/embeddings-benchmark/mteb), for texts, images, and both (MIEB).

mteb is an extra: pip install 'nev[mteb]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from nev.common.errors import first_line
from nev.config.base import ConfigError
from nev.config.data import Limits
from nev.data.decode import BadImage
from nev.inference.forward import Embed
from nev.inference.pictures import read_square

if TYPE_CHECKING:
    from mteb.types import PromptType
    from numpy.typing import NDArray

    from nev.models.text import TextTower

# The prefix of nomic-embed-text for each kind of task (https://huggingface.co/nomic-ai/nomic-embed-text-v1.5).
NOMIC_PROMPTS = {
    "Classification": "classification: ",
    "MultilabelClassification": "classification: ",
    "Clustering": "clustering: ",
    "PairClassification": "classification: ",
    "STS": "classification: ",
    "Summarization": "classification: ",
    "query": "search_query: ",
    "document": "search_document: ",
}


class MtebModel(AbsEncoder):
    """A model of mteb. The vector of an item with a text and an image is the sum of both vectors, as in mteb.

    text: a tower whose prefix is one of nomic's gets the prefix that fits the task; any other tower keeps its prefix.
    embed: uint8 [n, S, S, 3] to float32 [n, D], rows of unit length.
    """

    def __init__(self, name: str, revision: str, text: TextTower, embed: Embed, image_size: int) -> None:
        self.text, self.embed, self.image_size = text, embed, image_size
        self.prompts = NOMIC_PROMPTS if text.prefix in NOMIC_PROMPTS.values() else {}
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"nev/{name}",
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=text.max_tokens,
            embed_dim=text.width,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=bool(self.prompts),
            training_datasets=None,
            modalities=["text", "image"],
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Batches with `text`, `image` or both to float32 [n, D]."""
        vectors = [self._batch(batch, self._prefix(task_metadata.type, prompt_type)) for batch in inputs]
        return np.concatenate(vectors) if vectors else np.zeros((0, self.text.width), np.float32)

    def _batch(self, batch: dict[str, Any], prefix: str) -> NDArray[np.float32]:
        sides = []
        if "text" in batch:
            sides.append(self._texts(batch["text"], prefix))
        if "image" in batch:
            sides.append(self.embed(views(batch["image"], self.image_size)))
        if not sides:
            raise ValueError(f"nev embeds texts and images, and this batch has {sorted(batch)}")
        return np.asarray(sum(sides), np.float32)

    def _texts(self, texts: Sequence[str], prefix: str) -> NDArray[np.float32]:
        return replace(self.text, prefix=prefix).encode(list(texts))

    def _prefix(self, task: str, prompt_type: PromptType | None) -> str:
        by_task = self.prompts.get(task) or self.prompts.get(str(getattr(prompt_type, "value", prompt_type)))
        return by_task or self.text.prefix


def views(images: Sequence[Any], size: int) -> NDArray[np.uint8]:
    """What the model sees of Pillow images of any size and mode: uint8 [n, S, S, 3]. Raises BadImage."""
    squares = [read_square(image, size, Limits()) for image in images]
    for square in squares:
        if square.reason:
            raise BadImage(square.reason)
    return np.stack([square.pixels for square in squares])


def run_mteb(model: MtebModel, names: Sequence[str]) -> dict[str, float]:
    """The main score of each task of mteb, which fetches the data from the hub.

    Raises ConfigError for a task that mteb does not know, and for data that cannot be fetched.
    """
    import mteb
    from datasets.exceptions import DatasetNotFoundError

    try:
        tasks = mteb.get_tasks(tasks=list(names))
    except KeyError as error:
        message = str(error.args[0]).removeprefix("KeyError: ")
        raise ConfigError(f"--mteb: {message} `mteb available-tasks` lists the names.") from error
    try:
        encoder: Any = model  # mteb's protocol has a constructor that takes a name
        scores = mteb.evaluate(encoder, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    except (OSError, DatasetNotFoundError) as error:  # bases of the errors of the hub and of requests
        raise ConfigError(
            f"--mteb: the data of {', '.join(names)} cannot be had ({first_line(error)}). It comes from the hub, which "
            "this machine has to reach (HF_HUB_OFFLINE must not be set)."
        ) from error
    return {result.task_name: float(result.get_score()) for result in scores.task_results}
