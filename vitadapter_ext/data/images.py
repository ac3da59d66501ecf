"""How does a picture file become an RGB picture, and which files of a folder cannot?"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

# Pillow looks at what is in a file, not at its name, and would hand a PostScript one to Ghostscript: a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MOST_UNREADABLE = 0.05  # of all images; more than that means that something is wrong with the data as a whole


def open_rgb(path: str | os.PathLike) -> Image.Image:
    """The picture in the file as RGB, upright as its camera meant it; `OSError` and others for what cannot be decoded.

    16 bits are scaled to 8, transparency is laid on white, CMYK, palettes and grey are converted.
    """
    with Image.open(path, formats=_FORMATS) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as RGB."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Decodes every file once, in threads; returns what is wrong with those that cannot be decoded whole.

    A JPEG is decoded at an eighth of its size, which is cheap and still reads every byte.
    """
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        found = zip(paths, pool.map(_problem, paths), strict=True)
        return {path: problem for path, problem in found if problem}


def _problem(path: Path) -> str:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except UnidentifiedImageError:  # its text repeats the path
        return "not an image"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return " ".join(str(error).split()) or type(error).__name__
    return ""
