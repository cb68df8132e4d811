"""A model that many processes open, each by itself: all have to open the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nev.config.model_spec import ModelError

if TYPE_CHECKING:
    from nev.inference.model import Model


class ModelPlace(NamedTuple):
    """A model as each process opens it.

    location, text, revision, trust_remote_code: arguments of `nev.load`.
    fingerprint: of the vision tower.
    text_fingerprint: of the text tower. None: no text is embedded.
    """

    location: str
    text: str | None
    revision: str | None
    trust_remote_code: bool
    fingerprint: str
    text_fingerprint: str | None


def open_model(
    location: str, text: str | None, revision: str | None, trust_remote_code: bool, with_text: bool
) -> tuple[Model, ModelPlace]:
    """Open a model on the CPU, and say where tasks open the same: of a run, the checkpoint. Arguments of `nev.load`.

    with_text: whether tasks embed texts, too. Raises ModelError as `nev.load` does.
    """
    from nev.inference.checkpoints import choose_checkpoint
    from nev.inference.load import load

    location = choose_checkpoint(_absolute(location))
    text = text and _absolute(text)
    model = load(location, device="cpu", text=text, revision=revision, trust_remote_code=trust_remote_code)
    text_fingerprint = model.text_fingerprint if with_text else None
    return model, ModelPlace(location, text, revision, trust_remote_code, model.fingerprint, text_fingerprint)


def _absolute(location: str) -> str:
    """A local path as an absolute path, for processes in other folders. Another place, or a name on a hub, as it is."""
    path = Path(location).expanduser()
    return str(path.absolute()) if path.exists() else location


@functools.lru_cache(maxsize=1)
def load_same_model(place: ModelPlace, device: str) -> Model:
    """The model, opened once in a process. Raises ModelError where it is not the model that the command has opened."""
    from nev.inference.load import load

    model = load(
        place.location,
        device=device,
        text=place.text,
        revision=place.revision,
        trust_remote_code=place.trust_remote_code,
    )
    if model.fingerprint != place.fingerprint or place.text_fingerprint not in (None, model.text_fingerprint):
        raise ModelError(
            f"{place.location}: this process opens another model than the command did. Put the same model on every node, or on "
            "s3://, do not change it meanwhile, and run the same command again."
        )
    return model
