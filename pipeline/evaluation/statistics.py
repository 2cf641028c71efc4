"""Hold, read and write mean and covariance of features, in the forms of `.npz` files that others publish."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microdit.pipeline.base.errors import RequestError, first_line

MEANS, COVARIANCES = ("mu", "ref_mu", "dino_mu"), ("sigma", "ref_sigma", "dino_sigma")  # keys that are in use
MADE_BY, COUNT = "features", "count"  # our own files say by which features, and of how many pictures
LARGEST = 1 << 30  # bytes of a file, before it is unpacked and after
BLOCK = 8192


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and covariance (D, D), float64, of the features of a set of pictures."""

    mean: np.ndarray
    covariance: np.ndarray
    features: str = ""
    """Which features these are: the identity of an extractor; empty in files of others, which do not say."""
    count: int | None = None

    @classmethod
    def of(cls, features: np.ndarray, name: str = "") -> "FeatureStatistics":
        """Compute the statistics of features (N, D), with N - 1 as the divisor of the covariance."""
        mean = features.mean(0, dtype=np.float64)
        squares = np.zeros((features.shape[1],) * 2)
        for start in range(0, len(features), BLOCK):
            centred = features[start : start + BLOCK].astype(np.float64) - mean
            squares += centred.T @ centred
        return cls(mean, squares / (len(features) - 1), name, len(features))

    def write(self, path: Path) -> None:
        """Write a file that `read` takes, and every tool that reads the keys `mu` and `sigma`."""
        arrays = {"mu": self.mean, "sigma": self.covariance, MADE_BY: np.array(self.features)}
        if self.count is not None:
            arrays[COUNT] = np.array(self.count)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> "FeatureStatistics":
        """Read a statistics file, of our own or with one of the pairs of keys that other tools write.

        Raises:
            RequestError: it is none, too large, or its arrays are no mean and covariance.
        """
        wanted = f"expected an .npz file with {' or '.join(map('/'.join, zip(MEANS, COVARIANCES, strict=True)))}"
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > LARGEST:
                raise RequestError(f"reference {path}: {unpacked:,} bytes; statistics have at most {LARGEST:,}")
            with np.load(path, allow_pickle=False) as arrays:
                keys = next((pair for pair in zip(MEANS, COVARIANCES, strict=True) if {*pair} <= {*arrays.files}), None)
                if keys is None:
                    raise RequestError(f"reference {path}: it has the keys {', '.join(arrays.files)}; {wanted}")
                mean, covariance = (arrays[key] for key in keys)
                name = str(arrays[MADE_BY]) if MADE_BY in arrays.files else ""
                count = int(arrays[COUNT]) if COUNT in arrays.files else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise RequestError(f"reference {path}: it cannot be read ({first_line(error)}); {wanted}") from None
        mean, covariance = np.atleast_1d(np.squeeze(mean)), np.asarray(covariance)
        numbers = all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance))
        if not numbers or mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise RequestError(
                f"reference {path}: a mean of shape {mean.shape} and a covariance of shape {covariance.shape}; "
                "expected (D,) and (D, D) of floats"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise RequestError(f"reference {path}: its numbers are not all finite; make it again")
        return cls(mean.astype(np.float64), covariance.astype(np.float64), name, count)
