"""Pictures for the tests of the training driver: noise in two colours, easy to tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image


def red_and_blue(root: Path, count: int) -> Path:
    """Fills `root` with two folders, blue and red, of `count` JPEGs each, and returns it."""
    noise = np.random.default_rng(0)
    for name, colour in (("blue", (60, 60, 190)), ("red", (190, 60, 60))):
        (root / name).mkdir()
        for index in range(count):
            pixels = noise.normal(colour, 50, (40, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.jpg")
    return root
