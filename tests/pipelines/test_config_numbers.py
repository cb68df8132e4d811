"""Every number of a configuration has its bounds in the schema, and a key stands once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import load, load_yaml, read_yaml
from nev.sweep.config import Sweep


def list_numbers(schema: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers of a JSON schema, however deep, with their places."""
    if schema.get("type") in ("number", "integer") and "enum" not in schema:
        yield place, schema
    for name, inner in schema.get("properties", {}).items():
        yield from list_numbers(inner, f"{place}.{name}")
    several = [*schema.get("anyOf", []), *schema.get("prefixItems", [])]
    several += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    for inner in several:
        yield from list_numbers(inner, place)
    for name, inner in schema.get("$defs", {}).items():
        yield from list_numbers(inner, name)


@pytest.mark.parametrize("section", [Experiment, Sweep])
def test_every_number_has_bounds(section: type[Experiment]) -> None:
    numbers = list(list_numbers(section.model_json_schema(), section.__name__))
    assert len(numbers) > 10
    for place, number in numbers:
        lower = {"minimum", "exclusiveMinimum"} & number.keys()
        upper = {"maximum", "exclusiveMaximum"} & number.keys()
        assert lower, place
        assert upper, place


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=[0.9, 1.5]", r"optim\.betas\.1: .*less than 1"),
        ("optim.betas=[-0.1, 0.9]", r"optim\.betas\.0: .*greater than or equal to 0"),
        ("seed=1.0e+23", "seed: .*exceeded maximum size"),
        ("seed=9223372036854775808", "seed: .*less than"),
        ("optim.lr=true", r"optim\.lr: a number is needed, not true or false"),
        ("train.steps=false", r"train\.steps: a number is needed"),
        ("optim.lr=1.0e+39", r"optim\.lr: .*less than or equal to"),
        ("optim.lr=.inf", r"optim\.lr: .*finite"),
        ("data.mean=[124, 116, 104]", r"data\.mean\.0: .*less than or equal to 1"),
        ("data.augment.scale=[0.5, 1.5]", r"data\.augment\.scale\.1"),
        ("data.augment.scale=[0.9, 0.5]", r"scale goes from low to high"),
        ("workers.count=true", r"workers\.count: a number is needed"),
        ("data.augment.scale=[0.5, true]", r"data\.augment\.scale: a number is needed"),
        ("loss.matryoshka={32: true}", r"loss\.matryoshka: a number is needed"),
        ("name=2024", r'name: text is needed: write it in quotes, "2024"'),
        ("name=1.5", r'name: text is needed: write it in quotes, "1.5"'),
    ],
)
def test_numbers_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("quickstart", [override])


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("name: a\noptim:\n  lr: 1\nname: b\n", "name", "1 and 4"),
        ("optim:\n  lr: 1\noptim:\n  betas: [0, 0]\n", "optim", "1 and 3"),
        ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", "lr", "2 and 4"),
        ("a:\n- {x: 1, x: 2}\n", "x", "2 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, key: str, lines: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"'{key}' stands twice, in lines {lines}"):
        read_yaml(tmp_path / "c.yaml")


def test_merges_may_change_a_key() -> None:
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\nmore: {<<: *base}\n"
    assert load_yaml(text) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "more": {"a": 1, "b": 2}}
    deep = "b: &b {lr: 1}\nx:\n  y: &a {<<: *b, lr: 2}\nz: {<<: *a, k: 3}\n"
    assert load_yaml(deep) == {"b": {"lr": 1}, "x": {"y": {"lr": 2}}, "z": {"lr": 2, "k": 3}}
    assert load_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


def test_an_override_with_a_key_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        load("quickstart", ["optim={lr: 1, lr: 2}"])
