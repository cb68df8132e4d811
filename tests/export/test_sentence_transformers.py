"""The format `sentence-transformers`: both towers in one folder, opened in a fresh process with and without nev."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import LITE0, LOCKED_LITE0, TINY_VIT, make_experiment, write_checkpoint
from helpers.pictures import photo
from helpers.processes import run_python
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

import nev
from nev.config.model_spec import ModelError
from nev.export import sentence_transformers as form
from nev.export.export import export
from nev.export.parts import SENTENCES, Options, make_image_processor, normalise_squares, sample_pictures
from nev.inference.model import Model

EVA = {"trunk": "eva02_base_patch14_224", "trunk_args": {**TINY_VIT, "ref_feat_shape": [4, 4]}}
NOMIC = {"max_tokens": 24, "prefix": "search_query: ", "layer_norm": True, "pooling": "cls"}
PLAIN: dict[str, dict[str, Any]] = {
    "cls": {"pool": "cls", "head": "linear", "dropout": 0.1},
    "mean": {"pool": "mean", "trunk_args": {**TINY_VIT, "reg_tokens": 3}},
    "map": {"pool": "map", "head": "mlp"},
    "own": {"pool": "own", "head": "mlp", "head_hidden": 20},
    "no last norm": {"pool": "mean", "final_norm": False},
    "eva, mean": {**EVA, "pool": "mean"},
    "eva, mean, no last norm": {**EVA, "pool": "mean", "final_norm": False},
    "eva, map": {**EVA, "pool": "map", "pool_heads": 2, "pool_hidden": 77},
    "eva, own": {**EVA, "pool": "own"},
    "feature map": {"trunk": "resnet10t", "trunk_args": {}, "pool": "mean"},
    "feature map, own": {"trunk": "convnext_atto", "trunk_args": {}, "pool": "own"},
}
WITH_NEV: dict[str, dict[str, Any]] = {
    "nomic": {**EVA, "final_norm": False},
    "class token and mean": {"pool": "cls+mean"},
    "swiglu": {"pool": "cls", "head": "swiglu"},
    "other heads of map": {"pool": "map", "pool_heads": 2},  # timm's has the same tensors, and gives other vectors
    "other width of map": {"pool": "map", "pool_hidden": 100},
    "map over a feature map": {**LITE0, "pool": "map"},
    "norm behind the mean": {"trunk": "convnext_atto", "trunk_args": {}, "pool": "mean"},
}
OPEN = """
import numpy as np, torch
from sentence_transformers import SentenceTransformer
root, *names = sys.argv[1:]
texts = np.load(f"{root}/texts.npy").tolist()
for name in names:
    name, _, trust = name.partition(":")
    folder, expected = f"{root}/{name}/st", np.load(f"{root}/{name}/expected.npz")
    model = SentenceTransformer(folder, trust_remote_code=trust == "trust", device="cpu")
    for again in (False, True):
        features = {"pixel_values": torch.from_numpy(expected["pixels"]), "modality": "image"}
        with torch.no_grad():
            pictures = model.eval()(features)["sentence_embedding"].numpy()
        queries = model.encode(texts, prompt_name="query", modality="text")
        both = model.encode_query(texts), model.encode_document(texts)
        print(np.abs(pictures - expected["pictures"]).max(), np.abs(queries - expected["query"]).max(),
              np.abs(both[0] - expected["query"]).max(), np.abs(both[1] - expected["document"]).max(),
              tuple(model.similarity(queries, pictures).shape))
        if trust == "trust":
            break  # the code is not saved again
        model.save_pretrained(f"{root}/{name}/again", create_model_card=False)
        model = SentenceTransformer(f"{root}/{name}/again", device="cpu")
"""


def make_model(folder: Path, vision: dict[str, Any], **sections: Any) -> Model:
    if "text" in sections:
        sections["text"] = {**sections["text"], "encoder": str(folder / "encoder")}
    return nev.load(write_checkpoint(make_experiment(folder, vision, **sections)), device="cpu")


def needs_nev(folder: Path) -> bool:
    config = json.loads((folder / form.PICTURES / "config.json").read_text())
    assert config["model_type"] in ("nev_vision", "timm_wrapper")
    assert (config["model_type"] == "nev_vision") == (folder / "modeling_nev.py").exists()
    return bool(config["model_type"] == "nev_vision")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_a_tower_that_timm_can_compute_needs_no_nev(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, PLAIN[name])
    done = export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    assert not needs_nev(tmp_path / "st")
    assert [check.consumer for check in done.checks] == ["sentence-transformers"] * 3 + ["nev.load"] * 2
    assert max(check.difference for check in done.checks) <= 1e-5
    assert "import nev" not in (tmp_path / "st" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_NEV)
def test_another_tower_is_the_model_of_nev(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, WITH_NEV[name])
    done = export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    assert needs_nev(tmp_path / "st")
    assert max(check.difference for check in done.checks) <= 1e-5
    assert "import nev  # registers" in (tmp_path / "st" / "README.md").read_text()


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    """The code of the card, and towers in number: without nev where timm computes the tower; else with nev, or with the
    single file and the flag. Also once saved again.
    """
    photo(0).save(tmp_path / "photo.jpg")
    texts = [*SENTENCES, "  spaces \n"]
    np.save(tmp_path / "texts.npy", np.array(texts))
    squares = sample_pictures(32)
    for name, vision in (("map", PLAIN["map"]), ("eva", PLAIN["eva, map"]), ("nomic", WITH_NEV["nomic"])):
        model = make_model(tmp_path / name, vision, text=NOMIC if name != "map" else {"max_tokens": 24})
        export(model, "sentence-transformers", str(tmp_path / name / "st"), Options())
        texts_by_kind: dict[str, Any] = {kind: model.encode_text(texts, kind=kind) for kind in ("query", "document")}
        pixels = normalise_squares(model, squares)
        np.savez(tmp_path / name / "expected.npz", pixels=pixels, pictures=model.encode_image(squares), **texts_by_kind)
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    names = ("map", "eva", "nomic:trust")
    card = (tmp_path / "map" / "st" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    code = code.replace("PATH", str(tmp_path / "map" / "st")).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    first, *lines = run_python(code + OPEN, tmp_path, *names, without=("nev",), environment=environment).splitlines()
    printed = re.fullmatch(r"tensor\(\[\[(.*)\]\]\)", first)
    assert printed
    model = nev.load(tmp_path / "map" / "st", device="cpu")
    picture, text = model.encode_image(tmp_path / "photo.jpg"), model.encode_text("a dog in the snow")
    assert float(printed[1]) == pytest.approx(float(picture @ text), abs=1e-4)
    assert "library_name: sentence-transformers" in card
    for file in (tmp_path / "map" / "st").rglob("*.*"):  # no path of this machine
        assert file.suffix == ".safetensors" or str(tmp_path) not in file.read_text(), file
    lines += run_python("import nev\n" + OPEN, tmp_path, "nomic", environment=environment).splitlines()
    assert len(lines) == 2 + 2 + 1 + 2
    for line in lines:
        *differences, shape = line.split(maxsplit=4)
        assert max(map(float, differences)) <= 1e-5, line
        assert shape == f"({len(texts)}, {len(squares)})"


@pytest.mark.slow
@pytest.mark.parametrize("vision", [{"pool": "mean", "standardise": True, "head": "mlp"}, {"pool": "own"}])
def test_a_locked_trunk_is_plain_up_to_the_rounding_of_its_features(vision: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path, {**LOCKED_LITE0, **vision})
    done = export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    assert not needs_nev(tmp_path / "st")
    assert done.checks[0].by_cosine
    assert done.checks[0].gap <= 1e-5
    assert "rounds the features" in (tmp_path / "st" / "README.md").read_text()
    again = nev.load(tmp_path / "st", device="cpu")
    assert not again.spec.vision.standardise  # the first layer of the head has taken it in
    squares = sample_pictures(32)
    np.testing.assert_allclose(again.encode_image(squares), model.encode_image(squares), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("vision", [{"pool": "mean", "precision": "bf16"}, {"pool": "map", "keep": "tokens"}])
def test_other_features_of_a_locked_trunk_are_computed_by_nev(vision: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path, {**LOCKED_LITE0, **vision})
    done = export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    assert needs_nev(tmp_path / "st")
    assert max(check.difference for check in done.checks) <= 1e-4


def test_texts_and_pictures_go_their_own_ways(tmp_path: Path) -> None:
    """A path is a picture unless the caller says that it is text. A mixed list is refused, and so is the other modality."""
    model = make_model(tmp_path, PLAIN["cls"])
    export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    opened = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    path = str(tmp_path / "photo.png")
    photo(1, 60, 40).save(path)
    picture, text = model.encode_image(path), model.encode_text(path)
    np.testing.assert_allclose(opened.encode([path]), picture[None], atol=1e-5)
    np.testing.assert_allclose(opened.encode([path], modality="text"), text[None], atol=1e-5)
    np.testing.assert_allclose(opened.encode([Image.open(path)], prompt_name="query"), picture[None], atol=1e-5)
    sizes = [photo(seed, width, height) for seed, (width, height) in enumerate([(60, 40), (33, 120), (7, 5), (32, 32)])]
    np.testing.assert_allclose(opened.encode(sizes, batch_size=3), model.encode_image(sizes), atol=1e-5)
    assert opened.encode([], modality="text").shape == (0,)
    with pytest.raises(ValueError, match="mixes multiple modalities"):
        opened.encode(["a dog", sizes[0]])
    with pytest.raises(ValueError, match="'text' is not supported"):
        opened.encode(["a dog"], modality="image")
    assert opened.get_embedding_dimension() == model.width
    assert opened.max_seq_length == model.text.longest


def test_the_image_processor_shows_what_nev_shows(tmp_path: Path) -> None:
    model = make_model(tmp_path, PLAIN["cls"])
    modes = ("RGB", "L", "RGBA", "LA", "P", "CMYK", "1")
    pictures = [photo(n, 61 + 9 * n, 40).convert(mode) for n, mode in enumerate(modes)]
    pictures += [photo(9, 5, 7), photo(10, 32, 32), photo(11, 33, 31)]
    assert pixel_difference(model, pictures) <= 1e-6


def pixel_difference(model: Model, pictures: list[Image.Image]) -> float:
    """The largest difference of a normalised pixel between the processor of an export and nev."""
    from nev.inference.pictures import read_square

    theirs = make_image_processor(model.spec)(pictures, return_tensors="pt")["pixel_values"].numpy()
    squares = [read_square(picture, model.spec.image_size, model.spec.limits).pixels for picture in pictures]
    return float(np.abs(theirs - normalise_squares(model, np.stack(squares))).max())


@pytest.mark.slow
def test_photographs_look_the_same(tmp_path: Path, data_folder: Path) -> None:
    """Real photographs through a trained trunk: with the consumer's own pre-processing the vectors are nev's."""
    model = make_model(
        tmp_path,
        {**LOCKED_LITE0, "pool": "mean"},
        data={"train": "train", "image_size": 224, "block_rows": 8, "augment": None},
    )
    export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    files = sorted(map(str, (data_folder / "imagenet_sample").glob("*.JPEG")))[:12]
    files += sorted(map(str, (data_folder / "satellite" / "cloudy").glob("*.jpg")))[:4]  # CMYK
    assert len(files) == 16
    opened, ours = SentenceTransformer(str(tmp_path / "st"), device="cpu"), model.encode_image(files)
    upright = [ImageOps.exif_transpose(Image.open(file)) for file in files]
    assert pixel_difference(model, upright[:12]) <= 1e-6
    for given in (upright, files):
        assert (1 - (opened.encode(given) * ours).sum(axis=1)).max() <= 1e-5


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, PLAIN["cls"])
    with pytest.raises(ModelError, match=r"both towers in one folder: leave out --no-text"):
        export(model, "sentence-transformers", str(tmp_path / "st"), Options(text=False))
    wrong = model.spec.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    monkeypatch.setattr(form, "make_image_processor", lambda spec: make_image_processor(wrong))
    with pytest.raises(ModelError, match=r"the vectors are not the model's: sentence-transformers, pictures"):
        export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    own = type("OwnModel", (type(model.text.model),), {"__module__": "transformers_modules.own"})
    model.text.model.__class__ = own
    with pytest.raises(ModelError, match=r"has code of its own.*: give the format hf"):
        export(model, "sentence-transformers", str(tmp_path / "st"), Options())
    assert not (tmp_path / "st").exists()


def test_the_weights_are_the_same_each_time(tmp_path: Path) -> None:
    """BERT's pooler, which no model of nev uses, is not written with random numbers."""
    model = make_model(tmp_path, PLAIN["cls"])
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        export(model, "sentence-transformers", str(tmp_path / name), Options())
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.safetensors"))
    assert [str(file.parent) for file in files] == [form.PICTURES, "image_1_Dense", form.TEXT]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
