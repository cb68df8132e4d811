"""Tables of captions as people have them: COCO's, Windows' paths, other encodings, captions that are no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.pictures import encoded, photo
from helpers.sources import read

from nev.config.base import ConfigError
from nev.data.sources import SourceOptions

DEFAULT = SourceOptions()


def write_pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photo(number)))


def captions_of(table: Path) -> dict[str, list[str]]:
    rows = list(read("folder-captions", [table], DEFAULT))
    assert all("reject" not in row for row in rows)
    return {row["uid"]: list(row["caption"] or []) for row in rows}


def test_coco_s_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg", "sub/b.jpg")
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg", "height": 20}, {"id": 3, "file_name": "sub/b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "a dog"},
            {"id": 2, "image_id": 3, "caption": "a cat"},
            {"id": 3, "image_id": 7, "caption": "the dog"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert captions_of(tmp_path / "captions.json") == {"a.jpg": ["a dog", "the dog"], "sub/b.jpg": ["a cat"]}


@pytest.mark.parametrize(
    "content", ["[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}', '[{"image": "a"}]', "3"]
)
def test_other_json_is_not_taken_for_coco_s(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"t\.json: not COCO's captions .*\.jsonl|names a picture"):
        captions_of(tmp_path / "t.json")


def test_paths_of_windows(tmp_path: Path) -> None:
    write_pictures(tmp_path, "cat/1.jpg", "dog/deep/2.jpg")
    (tmp_path / "t.csv").write_text("file,caption\ncat\\1.jpg,a cat\ndog\\deep\\2.jpg,a dog\n")
    assert captions_of(tmp_path / "t.csv") == {"cat/1.jpg": ["a cat"], "dog/deep/2.jpg": ["a dog"]}


def test_a_name_with_a_backslash_is_itself(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a\\b.jpg")
    (tmp_path / "t.csv").write_text("file,caption\na\\b.jpg,odd\n")
    assert captions_of(tmp_path / "t.csv") == {"a\\b.jpg": ["odd"]}


def test_another_encoding_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("file,caption\na.jpg,a café\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"not in UTF-8 \(byte 0xe9 at 24\)\. .*iconv -f cp1252 -t utf-8 t\.csv"):
        captions_of(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("file,caption\na.jpg,a café\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"iconv -f utf-16 -t utf-8 t\.csv > utf8-t\.csv"):
        captions_of(tmp_path / "t.csv")


def test_a_folder_with_coco_alone_says_how_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"\(it holds: \.json\)\. COCO's captions are read where their \.json is named"
    ):
        captions_of(tmp_path)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ({"en": "a dog", "de": "ein Hund"}, r"t\.jsonl:2: 'caption' is an object with the keys en, de"),
        (2024, r"t\.jsonl:2: 'caption' is 2024, and a text is needed: write it in quotes"),
        (True, r"t\.jsonl:2: 'caption' is True"),
        (["a dog", 3], r"t\.jsonl:2: 'caption' is 3"),
        ([["a dog"]], r"t\.jsonl:2: 'caption' is \['a dog'\]"),
    ],
)
def test_captions_that_are_no_text_are_named(caption: object, message: str, tmp_path: Path) -> None:
    rows = [{"file": "a.jpg", "caption": "a dog"}, {"file": "b.jpg", "caption": caption}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=message):
        captions_of(tmp_path / "t.jsonl")


def test_missing_captions_are_none(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text(
        '{"file": "a.jpg", "caption": null}\n{"file": "a.jpg", "caption": NaN}\n{"file": "a.jpg"}\n'
    )
    assert captions_of(tmp_path / "t.jsonl") == {"a.jpg": []}
