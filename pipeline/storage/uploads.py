"""List unfinished multipart uploads, whose parts S3 keeps and charges for; other buckets drop them."""

from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from microdit.pipeline.base.errors import RequestError


def old_uploads(url: str, limit: datetime) -> list[tuple[Any, dict[str, str]]]:
    """List the uploads below `url` begun before `limit`: boto3's client and its arguments for `abort_multipart_upload`.

    Raises:
        RequestError: S3 does not list them.
    """
    bucket = urlsplit(url)
    if bucket.scheme != "s3":
        return []
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3")
    pages = client.get_paginator("list_multipart_uploads").paginate(
        Bucket=bucket.netloc, Prefix=f"{bucket.path.strip('/')}/".removeprefix("/")
    )
    try:
        return [
            (client, {"Bucket": bucket.netloc, "Key": item["Key"], "UploadId": item["UploadId"]})
            for page in pages
            for item in page.get("Uploads", [])
            if item["Initiated"] <= limit
        ]
    except (ClientError, BotoCoreError) as error:
        raise RequestError(f"{url}: its unfinished uploads cannot be listed: {error}") from error
