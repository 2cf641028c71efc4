"""Options of `captions/*` columns: where the captions come from."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options

PassKey = tuple[str, str | None, str, int]  # captioner, revision, engine, image side
ORIGINS = ("field", "join", "vlm", "endpoint", "tags")
CAPTIONERS = ("vlm", "endpoint", "tags")
"""The origins that read the images."""


# the fields that belong to some of the origins only
OF_TEXTS = ("clean",)
OF_VLM = ("engine",)
OF_ASKED = ("prompt", "max_tokens", "temperature", "image_side", "language")
OF_ENDPOINT = ("model", "api_key_env", "concurrency", "price_in", "price_out", "max_spend")
OF_TAGS = ("top", "probability")
MAX_TOKENS = {"alt": 96, "short": 96, "long": 384, "tags": 128}


class CaptionsColumn(Options):
    """The caption that came with the image; or `field`, `join`, `vlm`, `endpoint` or `tags`: one of them."""

    field: str | None = None
    """Take a field of the samples, instead of the caption; the sources' options say which fields there are."""
    fallback: bool = False
    """A sample without that field takes its caption; else it fails with `no_caption`."""
    join: str | None = None
    """A pattern of .jsonl(.gz) or .parquet files: a table with a caption for each image; or `openmoji`."""
    by: Literal["origin", "key"] = "origin"
    """The key of the join: the image's URL, or its key."""
    key: str | None = None
    """The table's column with it; by default `url` or `key`."""
    column: str = "caption"
    """The table's column with the caption, dotted inside of others."""
    clean: Literal["paper"] | None = None
    """Clean captions as the paper does alt-texts (`microdit.pipeline.content.alt_text`)."""

    vlm: str | None = None
    """A vision-language model: a name of `microdit.model.pretrained.captioners`, a folder, or a hub repository."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The library that runs it. vllm: `pip install "microdit[vllm]"`, many images in flight at a time."""
    endpoint: str | None = None
    """The base URL of a server with OpenAI's API, as in `http://host:8000/v1`."""
    tags: str | None = None
    """A tagger: a name of `microdit.model.pretrained.tagger`."""

    revision: str | None = None
    """A hub revision of `vlm`; of an `endpoint` the one that the user says it serves."""
    kind: Literal["alt", "short", "long", "tags"] | None = None
    """The kind of caption. For `vlm` and `endpoint` it chooses the prompt too, and is `long` by default."""
    prompt: str | None = Field(default=None, min_length=1, max_length=8192)
    """The prompt; by default one for `kind`."""
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    """Tokens of an answer at most; by default 384 of a long one, 128 of tags, 96 of others."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 takes the likeliest token each time; above it each sample is drawn by a seed made of its key."""
    image_side: int = Field(default=768, ge=28, le=4096)
    """An image with a longer side is reduced to it before the model sees it."""
    language: str = Field(default="en", pattern="^[a-z]{2,3}$")
    """An answer in another language is asked for once more, and then fails with `wrong_language`."""

    model: str | None = None
    """The server's name of its model."""
    api_key_env: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable with the server's key, on each machine that sends requests and where a build starts."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests that a worker has in flight."""
    price_in: float | None = Field(default=None, ge=0)
    """The price of a million tokens that the server reads (prompt and image), in any currency,"""
    price_out: float | None = Field(default=None, ge=0)
    """and of a million that it writes."""
    max_spend: float | None = Field(default=None, gt=0)
    """In that currency: the build stops when the column has cost so much (docs/guides/captions.md: what counts)."""

    top: int = Field(default=5, ge=1, le=100)
    """Tags of an image at most,"""
    probability: float = Field(default=0.3, gt=0, lt=1)
    """each at least as probable; a sample without one fails with `no_tag`."""

    @property
    def origin(self) -> str:
        """`source`, or the one of `ORIGINS` that is given."""
        return next((name for name in ORIGINS if getattr(self, name) is not None), "source")

    @property
    def most_tokens(self) -> int:
        """`max_tokens`, or the default for the kind."""
        return self.max_tokens or MAX_TOKENS[self.asked_kind]

    @property
    def asked_kind(self) -> str:
        """`kind`, or its default."""
        return self.kind or "long"

    @model_validator(mode="after")
    def _check_origin(self) -> "CaptionsColumn":
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) > 1:
            raise FieldError((given[0],), f"give either {' or '.join(given)}", getattr(self, given[0]))
        if self.key is not None and self.join is None:
            raise FieldError(("key",), "it is a column of the table of join, and there is none", self.key)
        for origins, names in (
            (("vlm",), OF_VLM),
            (("vlm", "endpoint"), (*OF_ASKED, "revision")),
            (("endpoint",), OF_ENDPOINT),
            (("tags",), OF_TAGS),
            (("source", "field", "join"), OF_TEXTS),
        ):
            for name in names:
                # a default that is written out is allowed, so that a dumped config can be read again
                if getattr(self, name) != type(self).model_fields[name].default and self.origin not in origins:
                    raise FieldError(
                        (name,), f"it is for {' and '.join(origins)}, not for {self.origin}", getattr(self, name)
                    )
        return self

    @model_validator(mode="after")
    def _check_endpoint_options(self) -> "CaptionsColumn":
        if self.endpoint is None:
            return self
        if self.model is None:
            raise FieldError(("model",), "say what the server calls its model", None)
        if self.max_spend is not None and (self.price_in is None or self.price_out is None):
            raise FieldError(
                ("max_spend",), "give price_in and price_out too: tokens are what is counted", self.max_spend
            )
        return self

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("expected a URL as http://host:8000/v1")
            if parts.username or parts.password:
                raise ValueError("it must not hold a password: put the key into a variable, and name it in api_key_env")
        return url


def pass_key(options: CaptionsColumn) -> PassKey:
    """Return the options that the columns of one captioning pass share."""
    return str(options.vlm), options.revision, options.engine, options.image_side
