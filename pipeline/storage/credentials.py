"""Credentials of S3 as boto3's chain finds them, and what to do when they expire in the middle of the work."""

import os
import re
import time
from typing import Any, NamedTuple

from microdit.pipeline.base.errors import CredentialsExpired, first_line

EXPIRED = re.compile(
    r"<Code>(ExpiredToken|ExpiredTokenException|RequestExpired|TokenRefreshRequired)</Code>"
    r"|(?i:SSO session|sso token|security token|credentials)[^\n]{0,80} (has|have|is|are) (still )?expired"
    r"|(?i:error when retrieving token from sso)"
)
PATIENCE = 40.0  # seconds to wait for new ones before that is said; builds ask again after it
LOOK_EVERY = 2.0  # seconds between two looks at the chain


class Credentials(NamedTuple):
    """Identity of credentials, and the way boto3 found them: `env`, `shared-credentials-file`, `sso`, ..."""

    key: str = ""
    token: str = ""
    method: str = ""

    @property
    def advice(self) -> str:
        """Say how to renew them."""
        if self.method == "env":
            return (
                "they stand in the environment (AWS_ACCESS_KEY_ID), which cannot change while a program runs: set new "
                "ones, or use a profile or a role, and run the same command again"
            )
        return (
            f"they come from boto3's {self.method or 'chain'}: renew them (aws sso login, or a new ~/.aws/credentials) "
            "on every machine, and the work goes on"
        )


def used_by(bucket: Any) -> Credentials:
    """Return what obstore's bucket has: of its provider, else of the environment."""
    provider = getattr(bucket, "credential_provider", None)
    if provider is None:
        key, token = (os.environ.get(f"AWS_{name}", "") for name in ("ACCESS_KEY_ID", "SESSION_TOKEN"))
        return Credentials(key, token, "env")
    return _frozen(provider.credentials)


def found_now() -> Credentials:
    """Ask boto3's chain from its beginning: files that have changed are read again. Empty if it finds none."""
    import boto3

    return _frozen(boto3.Session().get_credentials())


def _frozen(credentials: Any) -> Credentials:
    from botocore.exceptions import BotoCoreError

    try:
        now = None if credentials is None else credentials.get_frozen_credentials()
    except (BotoCoreError, RuntimeError):  # what they are renewed with has expired as well, or gave expired ones
        now = None
    return (
        Credentials("", "", getattr(credentials, "method", ""))
        if now is None
        else Credentials(now.access_key or "", now.token or "", credentials.method or "")
    )


def is_expired(error: Exception) -> bool:
    """Recognise that credentials have expired in what a bucket answered, or boto3 said."""
    return bool(EXPIRED.search(str(error)))


def wait_for_others(url: str, bucket: Any, error: Exception) -> None:
    """Wait until boto3's chain has other credentials than obstore's bucket; whoever calls opens the bucket again.

    Raises:
        CredentialsExpired: it has none for `PATIENCE` seconds, or none can come.
    """
    used, until = used_by(bucket), time.monotonic() + PATIENCE
    while (now := found_now())[:2] == used[:2] or not now.key:
        if used.method == "env" or time.monotonic() + LOOK_EVERY > until:
            reason = EXPIRED.search(str(error))
            words = reason[1] if reason and reason[1] else first_line(error)
            raise CredentialsExpired(
                f"{url}: the credentials have expired ({words}); {used.advice}", used.method != "env"
            ) from error
        time.sleep(LOOK_EVERY)
