"""Find passwords and signatures in URLs, and leave them out of what is kept and shown."""

import base64
import re
from urllib.parse import unquote, urlsplit

USER = re.compile(r"(?<=://)[^/?#\s'\"<>]*@")
NAMES = (
    "x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential|awsaccesskeyid|"
    "googleaccessid|key-pair-id|signature|sig|hmac|hdnts|hdnea|token|access_token|auth_token|oauth_token|jwt|auth|"
    "authorization|api_key|api-key|apikey|password|passwd|secret|client_secret"
)
PARAMETER = re.compile(rf"([?&;](?:{NAMES})=)(?!\*\*\*)[^&;#\s'\"<>]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Leave out user names and passwords of the URLs in a text, and the values of parameters that are signatures."""
    if "://" in text:
        text = USER.sub("", text)
    return PARAMETER.sub(r"\1***", text) if "=" in text else text


def has_secrets(text: str) -> bool:
    return without_secrets(text) != text


def split_login(url: str) -> tuple[str, str | None]:
    """Return a URL without user name and password, and the header `Authorization` that sends them; None without any."""
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = login.partition(":")
    encoded = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return USER.sub("", url, count=1), f"Basic {encoded}"
