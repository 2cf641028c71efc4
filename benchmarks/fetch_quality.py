"""Compare reduced pictures with a filter in floating point, for `benchmarks/fetch.py`."""

import io
import statistics
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

MOST = 64  # pictures that are compared


def psnr(folder: Path) -> dict[str, float]:
    """Return the mean PSNR of what each program made of the pictures, in dB."""
    kept = {"microdit": folder / "microdit", "img2dataset": folder / "img2dataset"}
    return {name: round(statistics.mean(_psnrs(made, folder / "www")), 2) for name, made in kept.items()}


def _psnrs(made: Path, originals: Path) -> list[float]:
    found: list[float] = []
    for path in sorted(made.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                if not name.endswith(".jpg") or len(found) == MOST:
                    continue
                about, data = tar.extractfile(members[name[:-3] + "json"]), tar.extractfile(member)
                assert about is not None and data is not None
                url = about.read().decode().partition("/127.0.0.1:")[2].partition(".jpg")[0]
                picture = np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB"), np.float64)
                reference = _reduced(originals / f"{url.rpartition('/')[2]}.jpg", picture.shape[1::-1])
                found.append(float(10 * np.log10(255**2 / np.mean((picture - reference) ** 2))))
    return found


def _reduced(path: Path, size: tuple[int, int]) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    channels = [np.asarray(Image.fromarray(pixels[..., i]).resize(size, Image.Resampling.LANCZOS)) for i in range(3)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.float64)
