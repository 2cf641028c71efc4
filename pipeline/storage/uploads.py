"""Uploads in parts that were begun and never ended: S3 keeps, and charges for, their parts; other buckets drop them."""

from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from microdit.pipeline.base.errors import RequestError


def old_uploads(url: str, limit: datetime) -> list[tuple[Any, dict[str, str]]]:
    """Those below `url` begun before `limit`, as boto3's client and its arguments for `abort_multipart_upload`.

    Raises:
        RequestError: S3 does not list them.
    """
    where = urlsplit(url)
    if where.scheme != "s3":
        return []
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3")
    pages = client.get_paginator("list_multipart_uploads").paginate(
        Bucket=where.netloc, Prefix=f"{where.path.strip('/')}/".removeprefix("/")
    )
    try:
        return [
            (client, {"Bucket": where.netloc, "Key": item["Key"], "UploadId": item["UploadId"]})
            for page in pages
            for item in page.get("Uploads", [])
            if item["Initiated"] <= limit
        ]
    except (ClientError, BotoCoreError) as error:
        raise RequestError(f"{url}: its unfinished uploads cannot be listed: {error}") from error
