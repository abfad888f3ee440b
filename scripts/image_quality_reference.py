#!/usr/bin/env python3
"""Makes tests/data/image-quality/expected.csv: PSNR and SSIM of pairs of pictures as scikit-image computes them.

    python3 -m venv venv && venv/bin/pip install scikit-image && venv/bin/python scripts/image_quality_reference.py

The pictures are integer formulas that tests/image/quality_test.cpp repeats, so that nothing but the numbers is stored.
SSIM is that of Wang et al. as published: Gaussian window of sigma 1.5 (11x11), population covariance, data range 255.
"""

from pathlib import Path

import numpy as np
import skimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "image-quality" / "expected.csv"


def picture(width, height):
    """Waves, an edge, a smooth corner."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * x // (7 + c) + 3 * y * (c + 1) + np.where(x > y, 90, 0)) % 256).astype(np.uint8)


def noise(shape, amount):
    """A counter, hashed: numbers from -amount to amount."""
    h = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(2654435761)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(2246822519)
    return ((h >> np.uint32(8)) % np.uint32(2 * amount + 1)).astype(np.int64).reshape(shape) - amount


def changed(image, kind):
    if kind.startswith("noise"):
        return np.clip(image.astype(np.int64) + noise(image.shape, int(kind[5:])), 0, 255).astype(np.uint8)
    if kind == "posterised":
        return image & 0xE0
    if kind == "shifted":
        return np.roll(image, 1, axis=1)
    if kind == "darker":
        return (image.astype(np.int64) * 3 // 4).astype(np.uint8)
    assert kind == "inverted"
    return 255 - image


def main():
    rows = [f"# made by scripts/image_quality_reference.py, scikit-image {skimage.__version__}", "width,height,change,psnr,ssim"]
    for width, height in [(96, 64), (11, 11), (37, 53)]:
        a = picture(width, height)
        for kind in ["noise1", "noise20", "noise90", "posterised", "shifted", "darker", "inverted"]:
            b = changed(a, kind)
            ssim = structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                         data_range=255, channel_axis=2)
            rows.append(f"{width},{height},{kind},{peak_signal_noise_ratio(a, b, data_range=255):.9f},{ssim:.9f}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
