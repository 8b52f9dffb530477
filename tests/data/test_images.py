"""Images of rows: what is read, in which forms, and what is refused with which code."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, ImageOps

from data.bad_images import ERRORS, HALF_GREY, PNG, Odd, corpus, turned
from tiny_vision import picture, png
from tunesmith.data.examples import content_hash, examples, input_hash
from tunesmith.data.images import BadImage, check_whole, look_at, pixels_of, thumbnail
from tunesmith.data.placeholders import as_message
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.types import Example, ImageRef, Problem


def question(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A row that asks about images."""
    content = [*parts, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}], **fields}


def read(folder: Path, *rows: Any, **data: Any) -> tuple[list[Example], list[Problem]]:
    """The examples of some rows of a file, and their problems."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    problems: list[Problem] = []
    options = Data(train=(DataFile(path=str(path)),), **data)
    return [example for _, example in examples(options.train, options, problems.append)], problems


def codes(problems: list[Problem]) -> list[str]:
    return [problem.code for problem in problems]


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def odd() -> dict[str, Odd]:
    return corpus()


def code_of(content: bytes) -> str:
    """The code of an image that came with its row; "": it is as good as any."""
    try:
        notes = check_whole(look_at(ImageRef(data=content), Path(), Limits()))
    except BadImage as bad:
        return bad.code if bad.message and bad.fix else "nothing is said of it"
    return notes[0][0] if notes else ""


def test_every_odd_image_has_its_code(odd: dict[str, Odd]) -> None:
    found = {name: code_of(image.content) for name, image in odd.items()}
    assert found == {name: image.code for name, image in odd.items()}
    assert len([image for image in odd.values() if image.code in ERRORS]) >= 60


def test_nothing_is_decoded_of_what_its_header_refuses(odd: dict[str, Odd], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for image in odd.values():
        if image.code in ("image_too_large", "image_format", "image_shape", "animated_image"):
            assert code_of(image.content) == image.code


READ = """
import json, re, sys
from pathlib import Path
from tunesmith.data.images import BadImage, check_whole, look_at, pixels_of
from tunesmith.recipe.schema import Limits
from tunesmith.types import ImageRef

limits, found = Limits(**json.loads(sys.argv[2])), {}
most = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = most()
for path in sorted(Path(sys.argv[1]).iterdir()):
    code = ""
    try:
        image = look_at(ImageRef(path.name), path.parent, limits)
        code = "".join({code for code, _ in check_whole(image)})
        pixels_of(image)
    except BadImage as bad:
        code = bad.code
    found[path.name] = code, most() - before
print(json.dumps(found))
"""
"""Reads a folder of images as a model sees them, in a process without torch: Pillow's memory is not Python's."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's own peak is read from /proc")
def test_no_odd_image_takes_much_memory(odd: dict[str, Odd], tmp_path: Path) -> None:  # trap: I16
    names = dict(zip((f"{number:03}" for number in range(len(odd))), odd, strict=True))
    for number, name in names.items():
        (tmp_path / number).write_bytes(odd[name].content)

    def check(folder: Path, **limits: int) -> None:
        words = [sys.executable, "-c", READ, str(folder), json.dumps(limits)]
        read = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        assert [names[number] for number, (code, _) in read.items() if code != odd[names[number]].code] == []
        assert [names[number] for number, (_, grown) in read.items() if grown >= 100 * 2**20] == []

    check(tmp_path)
    (bomb,) = (number for number, name in names.items() if name == "bomb")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / bomb, tmp_path / "alone")
    with pytest.raises(AssertionError):  # its pixels are decoded
        check(tmp_path / "alone", image_pixels=10**9)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("missing.png", "no_such_image"),
        (".", "no_such_image"),
        ("../secret.png", "image_outside"),
        ("/etc/passwd", "image_outside"),
        ("link.png", "image_outside"),
        ("https://example.org/a.png", "image_address"),
        ("http://169.254.169.254/latest", "image_address"),
        ("file:///etc/passwd", "image_address"),
        ("s3://bucket/a.png", "image_address"),
        ("data:image/png,abc", "image_form"),
        ("data:image/png;base64,@@@", "image_form"),
        ("", "image_form"),
        (7, "image_form"),
        ([], "image_form"),
    ],
)
def test_a_place_that_is_none_is_refused_by_its_code(value: Any, code: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    found, problems = read(folder, question({"type": "image_url", "image_url": {"url": value}}))
    assert found == []
    assert codes(problems) == [code]
    assert problems[0].source.line == 1
    assert problems[0].fix


FORMS = {
    "OpenAI's parts with a path": question({"type": "image_url", "image_url": {"url": "a.png"}}),
    "OpenAI's parts with a data URI": question({"type": "image_url", "image_url": {"url": uri(PNG), "detail": "high"}}),
    "transformers' parts with path": question({"type": "image", "path": "a.png"}),
    "transformers' parts with image": question({"type": "image", "image": "a.png"}),
    "transformers' parts with base64": question({"type": "image", "base64": base64.b64encode(PNG).decode()}),
    "parts that take the row's own": question({"type": "image"}, images=["a.png"]),
    "bytes and path": question({"type": "image"}, images=[{"bytes": None, "path": "a.png"}]),
    "LLaVA": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                   {"from": "gpt", "value": "this"}]},
    "Alpaca": {"image": "a.png", "instruction": "What?", "output": "this"},
    "a prompt with a marker": {"images": ["a.png"], "prompt": "<image>What?", "completion": "this"},
    "a prompt without one": {"images": ["a.png"], "prompt": "What?", "completion": "this"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_row_gives_the_same_turns(form: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (example,), problems = read(tmp_path, FORMS[form])
    assert problems == []
    asked, answer = example.parts
    assert (asked.text, answer.text) == ("What?", "this")
    assert [(place, image.width, image.height) for place, image in asked.images] == [(0, 24, 16)]
    assert as_message(asked)["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_parquet_brings_the_bytes_of_images(tmp_path: Path) -> None:
    columns = {"prompt": ["What?"] * 2, "completion": ["this"] * 2}
    for number, images in enumerate(([[{"bytes": PNG, "path": None}]] * 2, [[PNG], [PNG]])):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({**columns, "images": images}), path)
        data = Data(train=(DataFile(path=str(path)),))
        problems: list[Problem] = []
        found = [example for _, example in examples(data.train, data, problems.append)]
        assert problems == []
        assert [example.images[0].data for example in found] == [PNG, PNG]


def test_images_stand_where_their_markers_do(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(picture(ord(name))))
    text = "Before\n<image>\nbetween <image> after"
    row = {"images": ["a.png", "b.png"], "prompt": text, "completion": "this"}
    (example,), _ = read(tmp_path, row)
    assert as_message(example.parts[0])["content"] == [
        {"type": "text", "text": "Before\n"},
        {"type": "image"},
        {"type": "text", "text": "between "},
        {"type": "image"},
        {"type": "text", "text": " after"},
    ]
    assert [Path(image.path).name for image in example.images] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (question({"type": "image"}), "images_missing"),
        (question({"type": "image"}, images=["a.png", "a.png"]), "images_missing"),
        (question(images=["a.png"]), "images_missing"),
        ({"messages": [{"role": "user", "content": "Hi"},
                       {"role": "assistant", "content": [{"type": "text", "text": "a"},
                                                         {"type": "image", "path": "a.png"}]}]}, "image_role"),
        ({"messages": [{"role": "system", "content": [{"type": "image", "path": "a.png"}]},
                       {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}, "image_role"),
        (question({"type": "video", "path": "a.mp4"}), "unsupported_content"),
        (question({"type": "input_audio", "input_audio": {}}), "unsupported_content"),
        (question(*[{"type": "image", "path": "a.png"}] * 65), "too_many_images"),
    ],
)  # fmt: skip
def test_images_that_do_not_agree_with_their_row(row: Any, code: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    found, problems = read(tmp_path, row)
    assert found == []
    assert set(codes(problems)) == {code}


@pytest.mark.parametrize("task", ["prefer", "reward", "reinforce"])
def test_rows_of_other_tasks_refuse_images_by_name(task: str, tmp_path: Path) -> None:
    row = {"prompt": "What?", "chosen": "this", "rejected": "that", "images": ["a.png"]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    problems: list[Problem] = []
    data = Data(train=(DataFile(path=str(path)),))
    assert list(examples(data.train, data, problems.append, task=task)) == []
    assert codes(problems) == ["no_images_here"]


def test_a_marker_in_a_row_without_images_is_text(tmp_path: Path) -> None:
    (example, no_image), _ = read(
        tmp_path,
        {"prompt": "write <image> here", "completion": "this"},
        {"prompt": "and <image>", "completion": "this", "image": ""},
    )
    assert (no_image.parts[0].text, no_image.images) == ("and <image>", ())
    assert (example.parts[0].text, example.images) == ("write <image> here", ())


def test_a_folder_of_images_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(PNG)
    row = question({"type": "image", "path": "a.png"})
    assert codes(read(tmp_path / "rows", row)[1]) == ["no_such_image"]
    (example,), problems = read(tmp_path / "rows", row, image_folder=str(tmp_path / "photos"))
    assert (problems, example.images[0].width) == ([], 24)


def shown_plainly(content: bytes) -> Image.Image:
    """The planted bug: what Pillow alone makes of a file."""
    with Image.open(io.BytesIO(content)) as stored:
        return stored.convert("RGB")


def seen(content: bytes) -> ImageRef:
    return look_at(ImageRef(data=content), Path(), Limits())


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_of_exif_is_made(turn: int) -> None:  # trap: I7
    content = turned(turn, "PNG")
    image = seen(content)
    with Image.open(io.BytesIO(content)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))

    def check(shown: Image.Image) -> None:
        assert shown.size == (image.width, image.height) == ((20, 30) if turn >= 5 else (30, 20))
        assert np.array_equal(np.asarray(shown), upright)

    check(pixels_of(image))
    if turn > 1:
        with pytest.raises(AssertionError):
            check(shown_plainly(content))
    assert [code for code, _ in check_whole(image)] == (["image_rotated"] if turn > 1 else [])


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (png(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), 255),
        (png(Image.new("P", (4, 4), 0), transparency=0), 255),
        (png(Image.fromarray(np.full((4, 4), 32_768, np.uint16))), 128),
        (HALF_GREY, 128),
    ],
    ids=["transparent", "transparent in a palette", "16 bits", "16 bits with another value that is transparent"],
)
def test_transparent_places_are_white_and_16_bits_are_scaled(content: bytes, value: int) -> None:  # trap: I8
    def check(shown: Image.Image) -> None:
        assert set(np.asarray(shown).ravel().tolist()) == {value}

    check(pixels_of(seen(content)))
    with pytest.raises(AssertionError):
        check(shown_plainly(content))


@pytest.mark.parametrize(("mode", "noted"), [("L", []), ("1", []), ("P", []), ("CMYK", ["image_converted"]),
                                         ("RGBA", ["image_converted"]), ("LA", ["image_converted"])])  # fmt: skip
def test_each_mode_becomes_rgb_and_is_noted_where_it_loses(mode: str, noted: list[str]) -> None:
    image = seen(png(picture(5).convert(mode), format="JPEG" if mode == "CMYK" else "PNG"))
    assert pixels_of(image).mode == "RGB"
    assert [code for code, _ in check_whole(image)] == noted


def test_hashes_follow_from_pixels_and_inputs_from_them_alone(tmp_path: Path) -> None:
    def row(name: str, text: str) -> dict[str, Any]:
        return {"images": [name], "prompt": text, "completion": "this"}

    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "same.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(png(picture(2)))
    found, _ = read(
        tmp_path, row("a.png", "What?"), row("same.png", "What?"), row("b.png", "What?"), row("a.png", "Who?")
    )
    contents, inputs = zip(*((content_hash(example), input_hash(example)) for example in found), strict=True)
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    assert inputs[0] == inputs[1] == inputs[3] != inputs[2]


def test_a_thumbnail_is_small_and_says_nothing_of_where_it_was_taken() -> None:
    exif = Image.Exif()
    exif[271] = "a maker"
    exif.get_ifd(34853)[1] = "N"
    content = png(picture(1, 400, 300), format="JPEG", exif=exif)
    made = thumbnail(look_at(ImageRef(data=content), Path(), Limits()))
    with Image.open(io.BytesIO(base64.b64decode(made.partition(",")[2]))) as small:
        assert small.size == (160, 120)
        assert dict(small.getexif()) == {}
