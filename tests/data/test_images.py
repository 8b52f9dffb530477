"""Images of rows: what is read, in which forms, and what is refused with which code."""

import base64
import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, ImageOps

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


PNG = png(picture(1))


def _with_exif(turn: int, fmt: str = "JPEG") -> bytes:
    image = picture(2, 30, 20)
    exif = Image.Exif()
    exif[274] = turn
    return png(image, format=fmt, exif=exif)


def _claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _bomb() -> bytes:
    """30 kB that would be 300 MB of pixels."""
    return png(Image.new("1", (20_000, 10_000)))


def _animated(fmt: str) -> bytes:
    content = io.BytesIO()
    frames = [picture(number) for number in (3, 4)]
    frames[0].save(content, fmt, save_all=True, append_images=frames[1:])
    return content.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "image_format"),
    "html": (b"<!DOCTYPE html><p>404", "image_format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_format"),
    "pdf": (b"%PDF-1.7 ...", "image_format"),
    "text": (b"not an image at all", "image_format"),
    "json": (b'{"a": 1}', "image_format"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "image_format"),
    "tiff": (png(picture(1), format="TIFF"), "image_format"),
    "ico": (png(picture(1), format="ICO"), "image_format"),
    "ppm": (png(picture(1), format="PPM"), "image_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format"),
    "png signature alone": (PNG[:8], "damaged_image"),
    "png of a header": (PNG[:30], "damaged_image"),
    "wrong check sum": (PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:], "damaged_image"),
    "jpeg of three bytes": (b"\xff\xd8\xff", "damaged_image"),
    "claims 100,000 pixels a side": (_claiming(100_000, 100_000), "image_too_large"),
    "claims 6,000 x 5,000": (_claiming(6_000, 5_000), "image_too_large"),
    "bomb": (_bomb(), "image_too_large"),
    "huge file": (PNG + b"\0" * 21 * 2**20, "image_too_large"),
    "gif that moves": (_animated("GIF"), "animated_image"),
    "webp that moves": (_animated("WEBP"), "animated_image"),
    "png that moves": (_animated("PNG"), "animated_image"),
    **{f"png cut at {tenth}0 %": (png(picture(9, 64, 64))[: 1300 * tenth], "damaged_image") for tenth in range(1, 9)},
    **{
        f"jpeg cut at {tenth}0 %": (
            (content := png(picture(9, 64, 64), format="JPEG"))[: len(content) * tenth // 10],
            "damaged_image",
        )
        for tenth in range(3, 10)
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_by_its_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap: I16
    content, code = BAD[name]
    if code in ("image_too_large", "image_format"):  # no pixel of it is decoded: tracemalloc does not see Pillow's own
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    (tmp_path / "image").write_bytes(content)
    for ref in (ImageRef("image"), ImageRef(data=content)):
        tracemalloc.start()
        with pytest.raises(BadImage) as refused:
            check_whole(look_at(ref, tmp_path, Limits()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert refused.value.code == code
        assert refused.value.fix
        assert peak < 100 * 2**20


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
    content = _with_exif(turn, "PNG")
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
    ],
    ids=["transparent", "transparent in a palette", "16 bits"],
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
