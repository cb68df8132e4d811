"""The schema of an experiment: what is read comes back, and what cannot run is refused with its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import flatten, load, parse, read_yaml, to_yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"train": "shards", "block_rows": 8},
    "vision": {"trunk": "vit_tiny_patch16_224"},
    "optim": {"lr": 0.001},
    "train": {"global_batch": 32, "epochs": 2},
    "workers": {"count": 2},
}


def written(folder: Path, raw: Any, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def test_a_file_comes_back_equal_through_yaml(tmp_path: Path) -> None:
    raw = SMALL | {
        "seed": 12,
        "data": {
            "train": "s3://bucket/train",
            "val": "val",
            "block_rows": 8,
            "columns": {"caption": "captions"},
            "augment": {"scale": [0.5, 1.0], "flip": True},
        },
        "text": {"encoder": "nomic", "prefix": "search_query: ", "layer_norm": True},
        "vision": {"trunk": "eva", "trunk_args": {"patch_size": 16, "ref_feat_shape": [14, 14]}, "final_norm": False},
        "loss": {"max_scale": None, "init_scale": 14.285714285714286},
        "optim": {"lr": 1e-05, "betas": [0.9, 0.98], "clip_norm": None},
        "eval": {"zero_shot": {"classes": ["Katze", "öl"], "templates": ["a {}", "the {}."]}, "best": "val/top1"},
    }
    experiment = load(written(tmp_path, raw))
    assert experiment.optim.lr == 1e-5
    assert experiment.data.augment.scale == (0.5, 1.0)
    assert experiment.eval.zero_shot is not None
    assert experiment.eval.zero_shot.classes == ("Katze", "öl")
    assert load(written(tmp_path, to_yaml(experiment), "again.yaml")) == experiment
    assert yaml.safe_load(to_yaml(experiment))["optim"]["eps"] == 1e-8  # defaults are written out


@pytest.mark.parametrize("dotted", ["sed", "data.imagesize", "data.augment.scales", "eval.zero_shot.klasses"])
def test_an_unknown_key_is_named_by_its_dotted_path(dotted: str, tmp_path: Path) -> None:
    zero_shot = "eval={zero_shot: {classes: [cat, dog]}}"
    with pytest.raises(ConfigError, match="unknown key; did you mean") as caught:
        load(written(tmp_path, SMALL), [zero_shot, f"{dotted}=1"])
    assert f"  {dotted}: " in str(caught.value)
    close = {"sed": "seed", "imagesize": "image_size", "scales": "scale", "klasses": "classes"}
    assert re.search(rf"did you mean {close[dotted.split('.')[-1]]}\b", str(caught.value))
    assert "experiment.yaml" in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    raw = SMALL | {"vision": {}, "optim": {"lr": -1}, "sead": 3}
    with pytest.raises(ConfigError, match="3 problem") as caught:
        load(written(tmp_path, raw))
    for place in ("vision.trunk: ", "optim.lr: ", "sead: "):
        assert f"  {place}" in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "block", "workers", "good"), [(32, 8, 4, True), (32, 8, 3, False), (36, 8, 1, False)]
)
def test_the_global_batch_is_whole_blocks_for_every_rank(batch: int, block: int, workers: int, good: bool) -> None:
    sizes = [f"train.global_batch={batch}", f"data.block_rows={block}", f"workers.count={workers}"]
    if good:
        assert parse(Experiment, SMALL, sizes).train.global_batch == batch
        return
    with pytest.raises(ConfigError, match=rf"\({batch}\) must be a multiple .* \({block} x {workers} = "):
        parse(Experiment, SMALL, sizes)


@pytest.mark.parametrize(
    "length", [{}, {"epochs": 1, "steps": 10}, {"steps": 1, "samples": 5}, {"epochs": 1, "steps": 1, "samples": 1}]
)
def test_exactly_one_length_is_given(length: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="exactly one of epochs, steps, samples"):
        parse(Experiment, SMALL | {"train": {"global_batch": 32, **length}})
    for one in ("epochs", "steps", "samples"):
        assert getattr(parse(Experiment, SMALL | {"train": {"global_batch": 32, one: 7}}).train, one) == 7


def test_overrides_are_yaml_and_leave_the_file_as_it_was() -> None:
    before = yaml.safe_dump(SMALL)
    changed = parse(
        Experiment,
        SMALL,
        ["seed=3", "data.augment.flip=true", "loss.max_scale=null", "optim.betas=[0.8, 0.99]", "text.prefix='a=b: '"],
    )
    assert (changed.seed, changed.data.augment.flip, changed.loss.max_scale) == (3, True, None)
    assert (changed.optim.betas, changed.text.prefix) == ((0.8, 0.99), "a=b: ")
    assert changed.data.block_rows == 8
    assert yaml.safe_dump(SMALL) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as section.key=value"),
        ("seed.deeper=1", "'seed' is the value 1, not a section"),
        ("data.train=[1", "not YAML"),
        ("seed=many", "seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Experiment, SMALL | {"seed": 1}, [override])


def test_yaml_tags_are_refused_and_run_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    attack = f"!!python/object/apply:os.mkdir ['{proof}']"
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load(written(tmp_path, f"name: {attack}\n"))
    with pytest.raises(ConfigError, match="not YAML"):
        load(written(tmp_path, SMALL), [f"name={attack}"])
    assert not proof.exists()


def test_what_is_no_yaml_mapping_is_refused(tmp_path: Path) -> None:
    for name, content, message in [
        ("list.yaml", b"- 1\n- 2\n", "a mapping of sections is needed, this is a list"),
        ("empty.yaml", b"", "a mapping of sections is needed"),
        ("broken.yaml", b"a: [1\n", "not readable as YAML"),
        ("binary.yaml", b"\xff\xfe\x00\x81", "not readable as YAML"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match=r"quikstart: no such file\. Did you mean quickstart\? Give a file"):
        load("quikstart")
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not readable"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment.scale=[0, 1]", "data.augment.scale.0: .*greater than 0"),
        ("data.augment.scale=[0.9, 0.5]", "data.augment: scale goes from low to high"),
        ("data.augment.ratio=[2, 1]", "data.augment: .*ratio"),
        ("eval.zero_shot={classes: [a], templates: ['no slot']}", "eval.zero_shot: .*exactly one"),
        ("vision={trunk: v, pretrained: true, weights: w.safetensors}", "vision: .*not both"),
        ("name=../elsewhere", "name: "),
        ("optim.lr=.inf", "optim.lr: .*finite"),
        ("data.mean=[.nan, 0, 0]", "data.mean.0: .*finite"),
        ("data.max_bad_share=1.5", "data.max_bad_share: "),
    ],
)
def test_values_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Experiment, SMALL, [override])


def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave the password out") as caught:
        load(written(tmp_path, SMALL), ["tracking.uri=postgresql://nev:hunter2@db/mlflow"])
    assert "hunter2" not in str(caught.value)
    load(written(tmp_path, SMALL), ["tracking.uri=postgresql://nev@db/mlflow"])


def test_a_section_cannot_be_changed() -> None:
    experiment = parse(Experiment, SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.optim.lr = 2.0  # type: ignore[misc]


def test_flatten_gives_every_leaf_a_dotted_key_and_a_plain_value() -> None:
    flat = flatten(parse(Experiment, SMALL, ["eval.zero_shot={classes: [cat, dog]}"]))
    assert flat["data.augment.flip"] is False
    assert flat["optim.lr"] == 0.001
    assert flat["data.limits.max_pixels"] == 64_000_000
    assert flat["eval.zero_shot.classes"] == "['cat', 'dog']"
    assert flat["data.val"] == "None"
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert {"name", "optim.betas", "vision.trunk_args", "tracking.uri"} <= flat.keys()
    assert "data" not in flat
