"""Images as they come: what is taken, what it becomes, and what every hostile one is told."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.vision import pictures
from qwen_aot.runtime.vision.pictures import FORMATS, MAX_BYTES, MAX_PIXELS, digest_of, open_data_url, open_picture
from tests.vl_checkpoints import noise, png


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form: str, tmp_path: Path) -> None:
    content = saved(Image.fromarray(noise(20, 30)).quantize(16).convert("RGB"), form)
    (tmp_path / "picture").write_bytes(content)  # by its content, whatever it is called
    picture = open_picture(tmp_path / "picture")
    assert picture.size == (30, 20) and picture.image.mode == "RGB"
    assert np.array_equal(picture.image, open_picture(content).image)
    assert open_picture(picture) is picture


def test_a_square_is_the_published_preprocessing() -> None:
    """Torchvision's Resize((s, s), BICUBIC) of an RGB image is Pillow's resize; not a crop, and not torch's."""
    pixels = noise(40, 90)
    square = open_picture(png(pixels)).square(28)
    expected = Image.fromarray(pixels).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
    assert square.dtype == np.uint8 and np.array_equal(square, expected)
    assert not np.array_equal(square, Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR))
    assert digest_of(square) == digest_of(np.array(expected)) != digest_of(255 - square)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("LA", (100, 0), (100, 100, 100)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),  # transparency is dropped, as by the published preprocessing
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_pixels_of_other_modes(mode: str, value: object, expected: tuple[int, int, int]) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    picture = open_picture(saved(Image.new(mode, (8, 8), value), form))  # type: ignore[arg-type]
    assert np.abs(np.asarray(picture.image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_upright(orientation: int) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12] = 255  # a mark in the upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(saved(Image.fromarray(pixels), "PNG", exif=exif))
    turned = {1: "", 2: "h", 3: "hv", 4: "v", 5: "t", 6: "th", 7: "thv", 8: "tv"}[orientation]
    expected = pixels
    for step in turned:
        expected = {"h": expected[:, ::-1], "v": expected[::-1], "t": expected.swapaxes(0, 1)}[step]
    assert np.array_equal(picture.image, expected)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says a size, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


WHOLE = png(noise(30, 30))
GIF = saved(Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 255)])

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", r"is empty; accepted: JPEG, PNG, WEBP, GIF or BMP"),
    "text": (lambda: b"hello there", r"is no image that is known here; accepted: JPEG"),
    "a page": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is no image that is known here"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"is no image that is known here"),
    "TIFF": (lambda: saved(Image.new("L", (9, 9)), "TIFF"), r"is no image that is known here"),
    "cut off": (lambda: WHOLE[: len(WHOLE) // 2], r"is damaged or cut off"),
    "cut in its header": (lambda: WHOLE[:20], r"is (damaged or cut off|no image)"),
    "JPEG cut off": (lambda: saved(Image.fromarray(noise(30, 30)), "JPEG")[:500], r"is damaged or cut off"),
    "a bomb": (lambda: png_of(60_000, 60_000), r"has more than [\d,]+ pixels; accepted: up to 33,554,432"),
    "a bomb that Pillow warns of": (lambda: png_of(10_000, 10_000), r"pixels; accepted: up to 33,554,432"),
    "a large image": (lambda: png_of(8_192, 4_097), r"has 8192 x 4097 pixels; accepted: up to 33,554,432"),
    "less data than pixels": (lambda: png_of(500, 500, b"\0" * 50), r"is damaged or cut off"),
    "no pixels": (lambda: png_of(0, 5), r"is (damaged or cut off|no image)"),
    "a film": (lambda: GIF, r"has 2 frames; accepted: images of one"),
    "too long": (lambda: WHOLE + b"\0" * MAX_BYTES, rf"has [\d,]+ bytes; accepted: up to {MAX_BYTES:,}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_images(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    content = make()
    (tmp_path / "it.png").write_bytes(content)
    for source in (content, tmp_path / "it.png"):
        with pytest.raises(GenerationError, match=message) as raised:
            open_picture(source)
        assert str(raised.value).startswith("the image" if isinstance(source, bytes) else str(tmp_path))


def test_a_size_that_pillow_warns_of_under_ordinary_filters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(GenerationError, match=r"10000 x 10000 pixels; accepted: up to 33,554,432"):
            open_picture(png_of(10_000, 10_000))


def test_the_largest_image_is_within_its_limit() -> None:
    assert MAX_PIXELS == 8_192 * 4_096
    with pytest.raises(GenerationError, match="damaged or cut off"):  # its size is taken, its data aren't there
        open_picture(png_of(8_192, 4_096))


SIDE = 3000  # of pictures whose memory is measured: 34 MiB each, far above what a decoder needs besides


def peak_bytes_per_pixel(content: bytes, path: Path) -> tuple[float, float]:
    """What `open_picture` takes at its peak, and what is kept, in a process of its own that has opened others."""
    path.write_bytes(content)
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from qwen_aot.runtime.vision.pictures import open_picture\n"
        "from tests.runtime.vision.test_pictures import WHOLE_FILES\n"
        "for small in WHOLE_FILES[0], *WHOLE_FILES[2:]:\n"
        "    open_picture(small)\n"
        "content = Path(sys.argv[1]).read_bytes()\n"
        "def kilobytes(name):\n"
        "    return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the peak begins anew
        "before = kilobytes('VmRSS')\n"
        "picture = open_picture(content)\n"
        "print(kilobytes('VmHWM') - before, kilobytes('VmRSS') - before)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, cwd=root
    )
    peak, kept = (int(number) * 1024 / SIDE**2 for number in done.stdout.split())
    return peak, kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is Linux's")
@pytest.mark.parametrize(
    ("form", "orientation", "copies"),  # of 4 bytes for a pixel; an orientation takes one more, WebP's decoder three
    [("PNG", 1, 1), ("PNG", 6, 2), ("JPEG", 1, 1), ("WEBP", 6, 4)],
)
def test_memory_of_a_small_file_of_many_pixels(form: str, orientation: int, copies: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.new("RGB", (SIDE, SIDE), (3, 4, 5)), form, exif=exif)
    assert len(content) < 200_000
    peak, kept = peak_bytes_per_pixel(content, tmp_path / "picture")
    assert peak < 4 * copies + 1 and kept < 5


def test_what_is_kept_of_a_picture_is_what_the_model_sees() -> None:
    picture = open_picture(png(noise(40, 90)))
    reduced = picture.reduced(28)
    assert reduced.size == (28, 28) and reduced.name == picture.name
    assert np.array_equal(reduced.square(28), picture.square(28))


WHOLE_FILES = [
    WHOLE,
    GIF,
    saved(Image.fromarray(noise(30, 30)), "JPEG"),
    saved(Image.fromarray(noise(9, 9)), "WEBP", lossless=True),
    saved(Image.fromarray(noise(9, 9)), "BMP"),
]


@given(
    content=st.sampled_from(WHOLE_FILES),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    end=st.floats(0, 1),
)
def test_damage_is_an_error_or_an_image(content: bytes, places: list[tuple[float, int]], end: float) -> None:
    damaged = bytearray(content[: max(1, round(len(content) * end))])
    for place, value in places:
        damaged[min(int(place * len(damaged)), len(damaged) - 1)] = value
    try:
        picture = open_picture(bytes(damaged))
    except GenerationError:
        return
    assert picture.image.mode == "RGB" and picture.square(14).shape == (14, 14, 3)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"nowhere doesn't exist; accepted: a file of JPEG"):
        open_picture(tmp_path / "nowhere")
    with pytest.raises(GenerationError, match="is a folder; accepted: a file"):
        open_picture(tmp_path)
    with pytest.raises(GenerationError, match="/dev/zero isn't a file; accepted: a file"):
        open_picture(Path("/dev/zero"))


def test_addresses() -> None:
    good = base64.b64encode(WHOLE).decode()
    picture = open_data_url(f"data:image/png;base64,{good}")
    assert np.array_equal(picture.image, open_picture(WHOLE).image)
    for url in ("https://example.org/cat.png", "file:///etc/passwd", "/etc/passwd", "data:text/plain;base64,aGk=",
                f"data:image/png,{good}", "data:image/png;base64", ""):  # fmt: skip
        with pytest.raises(GenerationError, match=r"has the address .*; accepted: data:image/TYPE;base64"):
            open_data_url(url)
    for body in ("no base64!", "AAA", f"{good}\u00e9", f"\ud800{good}"):
        with pytest.raises(GenerationError, match=r"isn't base64 \("):
            open_data_url(f"data:image/png;base64,{body}")
    with pytest.raises(GenerationError, match=r"bytes; accepted: up to"):
        open_data_url("data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 8))


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(GenerationError, match=r"an image needs the package 'PIL'.*\[vision\]"):
        pictures.open_picture(WHOLE)
