"""Pictures: an image file becomes the square of pixels that a vision engine takes, or a defined error.

What is hostile is refused before it costs anything: the size of the file, and of the image by its header. Nothing is
ever fetched from an address, and no path is taken from a text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.extras import missing_package

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "Picture", "open_picture"]

# Pillow's names of what is decoded; its other decoders aren't asked (one of them runs another program).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 << 20  # of a file
# Of an image: 128 MiB once decoded (Pillow has 4 bytes for a pixel of RGB). Decoding takes up to 512 MiB: WebP's own
# decoder holds two frames besides Pillow's two.
MAX_PIXELS = 1 << 25

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_DATA_URL = "data:image/"
# What Pillow raises of a file that is damaged.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, upright and in red, green and blue.

    Attributes:
        image: Pillow's; decoded.
        name: for messages: where it came from.
    """

    image: Image = field(repr=False)
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = self.image.size
        return width, height

    def reduced(self, size: int) -> Picture:
        """What is left of it where only its `square` of this size is wanted again: that square, as a picture."""
        from PIL import Image

        return Picture(Image.fromarray(self.square(size)), self.name)

    def square(self, size: int) -> NDArray[np.uint8]:
        """The pixels [size, size, 3] that a vision engine takes: resized to a square whatever its shape, bicubic.

        Source: the published preprocessing, torchvision's Resize((size, size), BICUBIC) of an RGB image, which is
        Pillow's own resize.
        """
        from PIL import Image

        resized = self.image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized, np.uint8)


def digest_of(pixels: NDArray[np.uint8]) -> bytes:
    """What tells these pixels from others [32 bytes]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def open_picture(source: Picture | Path | bytes, name: str | None = None) -> Picture:
    """Decodes an image: JPEG, PNG, WebP, GIF or BMP, of one frame.

    It is turned upright as its EXIF orientation says. Transparency is dropped, as the published preprocessing drops it
    (Pillow's convert("RGB")): what stands behind it is seen.

    Args:
        source: a file, or its content.
        name: for messages; None: the file's name, or "the image".

    Raises:
        GenerationError: the file can't be read, is too large, isn't such an image, is damaged, or has several frames;
            Pillow isn't installed.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Path):
        name, content = name or str(source), _read(source)
    else:
        name, content = name or "the image", bytes(source)
    if not content:
        raise GenerationError(f"{name} is empty; accepted: {_accepted()}")
    if len(content) > MAX_BYTES:
        raise _too_long(name, len(content))
    return Picture(_decode(content, name), name)


def open_data_url(url: str, name: str = "the image") -> Picture:
    """Decodes an image that an address holds itself: `data:image/png;base64,...`. No other address is ever followed.

    Raises:
        GenerationError: it is another address, isn't base64, or see `open_picture`.
    """
    head, comma, body = url.partition(",")
    if not head.startswith(_DATA_URL) or not comma or not head.endswith(";base64"):
        shown = url if len(url) <= 60 else f"{url[:57]}..."
        raise GenerationError(
            f"{name} has the address {shown!r}; accepted: data:image/TYPE;base64,... with the image itself: no address "
            "is ever followed"
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise _too_long(name, len(body) * 3 // 4)
    try:
        content = base64.b64decode(body, validate=True)
    except ValueError as error:  # of a letter beyond ASCII no binascii.Error, which is one
        raise GenerationError(f"{name} isn't base64 ({error}); accepted: data:image/TYPE;base64,...") from error
    return open_picture(content, name)


def _read(path: Path) -> bytes:
    """No more of a file than is taken: a device may never end."""
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "isn't a file" if path.exists() else "doesn't exist"
            raise GenerationError(f"the image {path} {what}; accepted: a file of {_accepted()}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise GenerationError(f"the image {path} can't be read ({error.strerror}): check its permissions") from error
    if len(content) > MAX_BYTES:
        raise _too_long(str(path), path.stat().st_size)
    return content


def _decode(content: bytes, name: str) -> Image:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise GenerationError(missing_package("an image", error)) from error
    try:
        image: Any = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_large(name, f"{width} x {height} pixels")
        frames = int(getattr(image, "n_frames", 1))
        if frames > 1 and image.format in FORMATS:  # a JPEG of several (MPO) is a photograph with its previews
            raise GenerationError(f"{name} has {frames} frames; accepted: images of one: save the one that is meant")
        if image.mode in _SIXTEEN_BITS:
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        elif image.mode not in _MODES:
            raise GenerationError(
                f"{name} has pixels of mode {image.mode}; accepted: {', '.join(_MODES)}: save it as 8-bit RGB"
            )
        ImageOps.exif_transpose(image, in_place=True)  # else it copies what is upright as well
        if image.mode == "RGB" and image.format != "WEBP":
            return image  # type: ignore[no-any-return]
        return image.convert("RGB")  # type: ignore[no-any-return]  # of WebP a copy, which lets its decoder go
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise GenerationError(f"{name} is no image that is known here; accepted: {_accepted()}") from error
    except MemoryError as error:
        raise GenerationError(f"there is no memory to decode {name}: give a smaller image") from error
    except _DAMAGE as error:
        raise GenerationError(f"{name} is damaged or cut off ({error}): save or send it again") from error


def _accepted() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def _too_long(name: str, size: int) -> GenerationError:
    return GenerationError(f"{name} has {size:,} bytes; accepted: up to {MAX_BYTES:,}: give a smaller image")


def _too_large(name: str, size: str) -> GenerationError:
    return GenerationError(f"{name} has {size}; accepted: up to {MAX_PIXELS:,}: make it smaller, the model sees few")
