"""Experiments as files: YAML is read safely, overrides are applied, and all problems are reported at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nev.config.base import ConfigError, Section, list_kinds
from nev.config.experiment import Experiment

Section_ = TypeVar("Section_", bound=Section)


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Experiment:
    """Read an experiment.

    path: a YAML file, or the name of a shipped experiment (`quickstart`).
    overrides: `section.key=value`, with YAML values.
    Raises ConfigError, which lists every problem with its dotted key.
    """
    return parse(Experiment, read_config(path), overrides, where=str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file, or a shipped experiment or sweep by its name: `quickstart`, `ablations/batch_size`.

    An existing file has priority over a shipped name. Raises ConfigError for a path that is neither.
    """
    shipped = shipped_configs()
    if not Path(path).exists() and str(path) in shipped:
        return read_yaml(shipped[str(path)])
    beside = [str(file) for file in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*beside, *shipped], n=2, cutoff=0.8)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return read_yaml(path, f"{hint}Give a file, or one of the shipped {', '.join(shipped)}.")


def shipped_configs() -> dict[str, Path]:
    """The files of the experiments and sweeps that come with nev, by name. A checkout has them in `configs/`."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def read_yaml(path: str | Path, otherwise: str = "") -> dict[str, Any]:
    """Read a YAML mapping with the safe loader (no tags).

    otherwise: advice for the message where there is no such file.
    Raises ConfigError for a file that is missing, is not YAML, or is not a mapping.
    """
    try:
        raw = load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. {otherwise}".rstrip()) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of sections is needed, this is a {type(raw).__name__}")
    return raw


def load_yaml(text: str | bytes) -> Any:
    """The content of YAML, without tags. Raises yaml.YAMLError, also for a key that stands twice: the first would be lost."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """The safe loader, for mappings whose keys stand once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written, before `<<` merges others into it: that may give keys again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in first:
                    message = f"the key {key.value!r} stands twice, in lines {first[name]} and {line}: join them"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                first[name] = line
        return node


def parse(
    schema: type[Section_], raw: dict[str, Any], overrides: tuple[str, ...] | list[str] = (), where: str = "config"
) -> Section_:
    """Apply the overrides to `raw` and validate the result.

    where: the source of `raw`, for messages.
    Raises ConfigError, which names each wrong key by its dotted path.
    """
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        try:
            raw = _replace(raw, dotted.split("."), load_yaml(value), override)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [
            "  " + ": ".join(filter(None, [".".join(_list_keys(item)), explain_problem(schema, item)]))
            for item in error.errors()
        ]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None


def _replace(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        return {**tree, head: value}
    child = tree.get(head) or {}
    if isinstance(child, list):
        if not rest[0].isdecimal() or int(rest[0]) >= len(child):
            raise ConfigError(f"override {override!r}: {head} is a list of {len(child)}, from {head}.0 on")
        at = int(rest[0])
        inner = _replace({rest[0]: child[at]}, rest, value, override)[rest[0]]
        return {**tree, head: [*child[:at], inner, *child[at + 1 :]]}
    if not isinstance(child, dict):
        raise ConfigError(f"override {override!r}: {head!r} is the value {child!r}, not a section")
    return {**tree, head: _replace(child, rest, value, override)}


def flatten(section: BaseModel) -> dict[str, str | int | float | bool]:
    """Plain values by dotted key, as MLflow's parameters need them."""
    flat: dict[str, str | int | float | bool] = {}
    names = {field.alias or name: name for name, field in type(section).model_fields.items()}
    for key, value in section.model_dump(mode="json").items():
        child = getattr(section, names[key])
        if isinstance(child, BaseModel):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(child).items()})
        else:
            flat[key] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


def to_yaml(section: BaseModel) -> str:
    """The section as YAML, with all defaults. `load` reads an equal section from it."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, width=120)


def explain_problem(schema: type[BaseModel], problem: Any) -> str:
    """A validation error of pydantic in plain words. For an unknown key, with similar known keys."""
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        return f'text is needed: write it in quotes, "{problem["input"]}"'
    if problem["type"] != "extra_forbidden":
        return str(problem["msg"]).removeprefix("Value error, ")
    *sections, key = _list_keys(problem)
    for name in sections:
        if name.isdecimal():  # of a list
            continue
        kind = schema.model_fields[name].annotation if name in schema.model_fields else None
        types = [cls for cls in list_kinds(kind) if isinstance(cls, type) and issubclass(cls, BaseModel)]
        if not types:
            return "unknown key"
        schema = types[0]
    known = [field.alias or name for name, field in schema.model_fields.items()]
    if close := difflib.get_close_matches(key, known, n=3):
        return f"unknown key; did you mean {' or '.join(close)}?"
    return f"unknown key; the keys are {', '.join(known)}"


def _list_keys(problem: Any) -> list[str]:
    """The keys of a value, from the outermost. pydantic puts the tags of unions between them (`nev.config.data`)."""
    return [str(key) for key in problem["loc"] if not str(key).startswith("<")]
