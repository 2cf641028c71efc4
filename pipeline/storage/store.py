"""Choose the store of a root: a folder, or a bucket prefix on S3, GCS or Azure.

The contract: docs/reference/corpus.md, section 1.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage.bucket import SCHEMES, Bucket
from microdit.pipeline.storage.disk import Disk

Store = Disk | Bucket


def open_store(url: str | Path) -> Store:
    """Open the store of immutable objects under a root.

    Args:
        url: a folder, or `s3://bucket/prefix`, `gs://...`, `az://...`. Credentials of S3 are those of boto3
            (environment, profile, instance role); `AWS_ENDPOINT_URL` names another server than Amazon's.

    Raises:
        RequestError: if the URL is of no known kind, or names no bucket.
    """
    text = str(url)
    scheme = urlsplit(text).scheme
    if scheme in SCHEMES:
        return Bucket(text)
    if "://" in text and scheme != "file":
        known = ", ".join(f"{s}://" for s in SCHEMES)
        raise RequestError(f"corpus {text!r}: scheme {scheme!r} is not known; give a folder, or one of {known}")
    return Disk(unquote(text.removeprefix("file://")) if text.startswith("file://") else text)
