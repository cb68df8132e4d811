"""Each field of a schema is described where the field stands, and the reference says its type, bounds and default."""

from __future__ import annotations

import pytest
from helpers.docs import SCHEMAS, config_reference
from pydantic import BaseModel

from nev.config import base, data, experiment, model, train
from nev.config import eval as evaluation
from nev.eval.suite import schema as suite
from nev.sweep import config as sweep


def described_sections() -> list[type[BaseModel]]:
    reference = config_reference()
    schemas = [reference.load_schema(name) for name in SCHEMAS]
    return list(dict.fromkeys(section for schema in schemas for _, section in reference.sections(schema)))


def test_the_sections_of_all_schemas_are_reached() -> None:
    modules = (data, evaluation, experiment, model, suite, sweep, train)
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    assert set(described_sections()) == {c for c in classes if issubclass(c, base.Section) and c is not base.Section}


@pytest.mark.parametrize("section", described_sections(), ids=lambda section: section.__name__)
def test_every_field_has_a_description_of_whole_sentences(section: type[BaseModel]) -> None:
    descriptions = {name: (field.description or "").strip() for name, field in section.model_fields.items()}
    unclear = [name for name, text in descriptions.items() if not text.endswith(".")]
    assert not unclear, f"{section.__name__}: no description under the field, or none that ends in a full stop"


@pytest.mark.parametrize(
    ("section", "field", "kind", "default"),
    [
        (data.Data, "image_size", "integer > 0", "`224`"),
        (
            data.Data,
            "mean",
            "[number ≥ 0 ≤ 1, number ≥ 0 ≤ 1, number ≥ 0 ≤ 1]",
            "`[0.48145466, 0.4578275, 0.40821073]`",
        ),
        (data.Jitter, "hue", "number ≥ 0 ≤ 0.5", "`0`"),
        (model.Vision, "trunk", "text", "**required**"),
        (model.Vision, "pool_heads", "integer > 0, or null", "`null`"),
        (model.Loss, "kind", "`softmax` or `sigmoid`", '`"softmax"`'),
        (model.Loss, "matryoshka", "map from integer > 0 to number > 0", "`{}`"),
        (experiment.Optim, "eps", "number > 0 ≤ 1", "`1e-08`"),
        (experiment.Workers, "max_failures", "integer ≥ -1", "`3`"),
        (sweep.Sweep, "seeds", "list of integer ≥ 0, 1 or more", "`[0]`"),
        (suite.Task, "chance", "number ≥ 0 ≤ 1, or null", "`null`"),
    ],
)
def test_a_type_is_written_with_its_bounds(section: type[BaseModel], field: str, kind: str, default: str) -> None:
    reference, info = config_reference(), section.model_fields[field]
    assert reference.write_type(info.annotation, info.metadata) == kind
    assert reference.write_default(info) == default
