"""Options of the sources: the blocks under `sources:` of a config."""

from ipaddress import ip_network
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options
from microdit.pipeline.config.files import FileOptions
from microdit.pipeline.config.layouts import FolderSource, JsonlSource, ParquetSource, TfrecordSource, WebdatasetSource
from microdit.pipeline.config.synthesis import SynthesizeSource

SA1B_CAPTIONS = "hf://datasets/PixArt-alpha/SAM-LLaVA-Captions10M/SA1B_caption.tar.gz"
TEXTCAPS_IMAGES = "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
TEXTCAPS_CAPTIONS = "https://dl.fbaipublicfiles.com/textvqa/data/textcaps/TextCaps_0.1_{split}.json"
COCO_IMAGES = "http://images.cocodataset.org/zips/val2014.zip"
OWN_FIELDS = {"final_url", "not_text", "unverified_certificate"}
"""Fields that fetching makes itself."""
COCO_CAPTIONS = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"


class FetchOptions(Options):
    """Options of fetching URLs; `max_bytes` alone is part of a source's fingerprint."""

    concurrency: int = Field(default=64, ge=1, le=4096)
    """Requests in flight per worker, apart from those that have waited for an answer for half a second."""
    timeout: float = Field(default=20.0, gt=0, le=600)
    """Seconds that one URL may cost at most, its retry included, but not the time until its host may be asked."""
    idle_timeout: float = Field(default=8.0, gt=0, le=600)
    """Seconds to wait for a connection, or for the next byte."""
    max_bytes: int = Field(default=32 << 20, ge=1)
    """A longer answer is refused (`too_large`)."""
    max_redirects: int = Field(default=5, ge=0, le=20)
    """Redirects that are followed for one URL."""
    retry_after: float = Field(default=10.0, ge=0, le=600)
    """The longest `Retry-After` that is waited for; if a server asks for more, there is no retry. It holds for all URLs
    of the host, whose pace is learnt by it."""
    user_agent: str = Field(default="Mozilla/5.0 (compatible; microdit/0.1)", pattern="^[ -~]+$")
    """The header `User-Agent`, before `contact`."""
    contact: str = Field(default="", pattern="^[ -~]*$")
    """Your mail address or page, which stands behind the user agent: some servers refuse requests without one."""
    robots_txt: bool = True
    """Ask each host for its robots.txt, and do not fetch what that forbids (`robots_txt`)."""
    opt_out_headers: bool = True
    """Leave out pictures whose answer says `X-Robots-Tag: noai`, `noimageai`, `noindex` or `noimageindex`, or
    `TDM-Reservation: 1`; that word is the reason."""
    allow_networks: list[str] = Field(default=[])
    """Networks (`10.1.0.0/16`) whose addresses may be asked though they are not public. Without it URLs, redirects and
    names that lead to this machine, its network or a cloud's metadata fail (`private_address`)."""

    accept_failing_certificates: bool = False
    """Fetch from hosts whose certificate fails, too, which have expired ones mostly; else their URLs fail
    (`certificate`). Such a picture's field `unverified_certificate` says what was wrong."""

    @property
    def agent(self) -> str:
        """The header `User-Agent`."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent

    @field_validator("allow_networks")
    @classmethod
    def _check_networks(cls, networks: list[str]) -> list[str]:
        for number, network in enumerate(networks):
            try:
                ip_network(network)
            except ValueError as error:
                raise FieldError((number,), f"expected a network such as 10.1.0.0/16 ({error})", network) from None
        return networks


OWN_OPTIONS = {
    *("url_list", "output_folder", "input_format", "url_col", "caption_col", "bbox_col", "output_format"),
    *("number_sample_per_shard", "processes_count", "disable_all_reencoding", "resize_mode", "extract_exif"),
    *("compute_hash", "verify_hash", "incremental_mode", "distributor", "save_additional_columns"),
}
"""Options of img2dataset that a unit sets itself."""


class Img2datasetOptions(Options):
    """Options of `fetcher: img2dataset`."""

    python: str | None = None
    """The interpreter of an environment with img2dataset; by default microdit's own, with its extra `img2dataset`."""
    options: dict[str, Any] = Field(default={})
    """Its own options that say how it fetches, such as `thread_count`, `timeout`, `retries`, `user_agent_token`."""

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in OWN_OPTIONS & set(options):
            raise FieldError((name,), "a unit sets this option of img2dataset itself; leave it out", options[name])
        return options


class UrlsSource(Options):
    """A list of rows with a URL and a caption each.

    `url<TAB>caption` as CC12M is published, `caption<TAB>url` as CC3M is, or a TSV or CSV whose first line names its
    columns, in UTF-8 or UTF-16; JSON lines; Parquet tables. Text may be compressed with gzip, zstd, bzip2 or xz.
    """

    adapter: Literal["urls"]
    list: str
    """The list: a file, or a pattern of several of one kind, here, `https://`, `s3://` or `hf://`. What is not one
    plain file of this machine is copied into the scratch folder, unpacked."""
    url: str | int | None = None
    """The column with the URL: its name, or its number from 1; by default it is found by its name or content."""
    caption: str | int | None = None
    """The column with the caption, as `url`; empty for none."""
    fields: dict[str, str | int] = Field(default={})
    """Further columns that become fields of a sample, by the field's name."""
    md5: str | int | None = None
    """The column with the MD5 of the bytes, as 32 hexadecimal digits. Other bytes fail with `wrong_checksum`."""
    sha256: str | int | None = None
    """The column with their SHA-256, as `md5`."""
    license: str = ""
    """The licence of every sample."""
    unit_inputs: int = Field(default=4096, ge=1, le=1_000_000)
    """Lines of a unit, which one worker fetches."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first lines only, to try things."""
    fetch: FetchOptions = FetchOptions()
    """Options of fetching the URLs."""
    fetcher: Literal["microdit", "img2dataset"] = "microdit"
    """Fetching program. img2dataset heeds no robots.txt, bounds no sizes, and follows redirects to any address; what it
    failed to fetch for a transient reason is fetched again by microdit."""
    img2dataset: Img2datasetOptions = Img2datasetOptions()
    """Options of `fetcher: img2dataset`."""

    @model_validator(mode="after")
    def _check_columns(self) -> "UrlsSource":
        given: dict[tuple[str, ...], Any] = {(n,): getattr(self, n) for n in ("url", "caption", "md5", "sha256")}
        given |= {("fields", name): column for name, column in self.fields.items()}
        for where, column in given.items():
            if (column == "" and where != ("caption",)) or (isinstance(column, int) and column < 1):
                raise FieldError(where, "expected the name of a column, or its number from 1", column)
        for name in OWN_FIELDS & set(self.fields):
            raise FieldError(("fields", name), "fetching makes a field of this name; take another", name)
        return self


class OpenmojiSource(Options):
    """The demo's input: OpenMoji drawings, served over HTTP on this machine, some of them broken on purpose."""

    adapter: Literal["openmoji"]
    cache: str | None = None
    """Folder of the prepared images (default: `microdit` in `$XDG_CACHE_HOME` or `~/.cache`)."""
    unit_inputs: int = Field(default=512, ge=1, le=1_000_000)
    """Drawings of a unit."""
    limit: int | None = Field(default=None, ge=1)
    """Take that many drawings only."""
    fetch: FetchOptions = FetchOptions(timeout=12.0, idle_timeout=6.0, max_bytes=4 << 20)
    """Options of fetching the drawings."""


# -- files -----------------------------------------------------------------------------------------------------------
class Img2datasetSource(FileOptions):
    """A folder that img2dataset has written: tars, parquet tables, or files in folders."""

    adapter: Literal["img2dataset"]
    folder: str
    """The folder, here, in a bucket or on the hub (`hf://datasets/OWNER/NAME/FOLDER`)."""
    caption: str = "caption"
    """The column with the caption; all others are fields."""


# -- datasets by name ------------------------------------------------------------------------------------------------
class Sa1bSource(FileOptions):
    """SA-1B: from Meta, by the list of links that comes with its licence, or from a mirror of tars."""

    adapter: Literal["sa1b"]
    links: str | None = None
    """Meta's list: `file_name<TAB>cdn_link` lines. Its links expire; then get a new list and go on."""
    files: str | None = None
    """Instead of `links`: a pattern of tars with `sa_<number>.jpg` members, and perhaps captions as `.txt`."""
    captions: str | None = SA1B_CAPTIONS
    """The captions: a tar.gz of `sa_<number>.txt`, or .parquet or .jsonl(.gz) tables; null: only those in the tars."""
    captions_key: str = "__key__"
    """The column of a caption table with `sa_<number>`."""
    captions_text: str = "txt"
    """The column of a caption table with the caption."""
    caption: Literal["joined", "txt"] = "joined"
    """The sample's caption: the joined one (LLaVA's, in the paper), or the one in the tar. Both are fields, too."""
    require_caption: bool = True
    """An image without that caption fails (`no_caption`); the paper leaves it out, too. LLaVA's captions are of 10 of
    the 11 million images."""

    @model_validator(mode="after")
    def _check_origin(self) -> "Sa1bSource":
        if (self.links is None) == (self.files is None):
            raise FieldError(("links",), "give either links (Meta's list) or files (a mirror)", self.links)
        if self.caption == "joined" and self.captions is None:
            raise FieldError(
                ("caption",), "there are no captions to join; give captions, or caption: txt", self.caption
            )
        return self


class Cc12mSource(FileOptions):
    """CC12M as published in pixparse/cc12m-wds: 10,968,539 images in 2,176 tars."""

    adapter: Literal["cc12m"]
    files: str = "hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar"
    """A pattern of its tars."""
    llavanext: str | None = None
    """A pattern of the table with LLaVA-NeXT's captions, which become the fields `llavanext_long` and
    `llavanext_short`: hf://datasets/CaptionEmporium/conceptual-captions-cc12m-llavanext/train.jsonl.gz"""
    caption: Literal["alt", "llavanext_long", "llavanext_short"] = "alt"
    """The sample's caption: the image's alt-text, or one of LLaVA-NeXT's."""
    clean: bool = False
    """Clean the alt-text as the paper does; the field `alt` keeps it uncleaned."""
    require_caption: bool = True
    """An image without that caption fails (`no_caption`)."""

    @model_validator(mode="after")
    def _check_caption(self) -> "Cc12mSource":
        if self.caption != "alt" and self.llavanext is None:
            raise FieldError(("caption",), "this caption is in a table; give llavanext, where it is", self.caption)
        return self


class JourneydbSource(FileOptions):
    """JourneyDB: Midjourney's images; its terms must be accepted on the hub."""

    adapter: Literal["journeydb"]
    root: str = "hf://datasets/JourneyDB/JourneyDB"
    """The folder with `data/train/imgs` and the others."""
    splits: list[Literal["train", "valid"]] = Field(default=["train"], min_length=1)
    """The splits to take, in this order; the test images have no prompts."""
    caption: Literal["prompt", "task2"] = "prompt"
    """The sample's caption: the prompt, or the caption that GPT-3.5 made of it. Both are fields, too."""
    prompt_fallback: bool = False
    """Take the prompt for an image whose task2 caption is missing or has fewer than three words."""
    strip_flags: bool = False
    """Cut Midjourney's flags (`--ar 16:9 --v 5`) off the prompt."""
    require_caption: bool = True
    """An image without that caption fails (`no_caption`): about 6% of them are in no table."""

    @model_validator(mode="after")
    def _check_splits(self) -> "JourneydbSource":
        if len(set(self.splits)) < len(self.splits):
            raise FieldError(("splits",), "expected each split once", self.splits)
        return self


class DiffusiondbSource(FileOptions):
    """DiffusionDB: Stable Diffusion's images with their users' prompts."""

    adapter: Literal["diffusiondb"]
    root: str = "hf://datasets/poloclub/diffusiondb"
    """The folder with `metadata-large.parquet` and the folders of zips."""
    subset: Literal["2m", "large"] = "large"
    """2m: 2 million PNGs; large: 14 million WebPs, those 2 million among them."""
    image_nsfw: float | None = Field(default=0.2, ge=0)
    """An image with a higher score fails (`nsfw`); 2 is one that is blurred. Null: any score, and no table is read."""
    prompt_nsfw: float | None = Field(default=0.2, ge=0)
    """The same for the prompt's score."""


class TextcapsSource(FileOptions):
    """TextCaps: photos with writing in them, five captions each."""

    adapter: Literal["textcaps"]
    images: str = TEXTCAPS_IMAGES
    """The zip with the images of all splits."""
    captions: str = TEXTCAPS_CAPTIONS
    """The json with the captions; `{split}` stands for the split's name."""
    splits: list[Literal["train", "val"]] = Field(default=["train", "val"], min_length=1)
    """The splits to take. Images of others in the zip are skipped."""


class CocoSource(FileOptions):
    """COCO 2014 val: images to judge by, not to train on."""

    adapter: Literal["coco"]
    images: str = COCO_IMAGES
    """The zip with the images."""
    captions: str = COCO_CAPTIONS
    """The zip with `captions_val2014.json` in it, or that file."""
    choose: int | None = Field(default=30_000, ge=1)
    """Number of the 40,504 images to take, chosen by `seed`; null takes all."""
    seed: int = 2014
    """The images with the smallest sha256 of `<seed>:<image id>` are chosen, so that everyone has the same."""


SourceOptions = Annotated[
    UrlsSource
    | OpenmojiSource
    | WebdatasetSource
    | ParquetSource
    | FolderSource
    | JsonlSource
    | TfrecordSource
    | Img2datasetSource
    | Sa1bSource
    | Cc12mSource
    | JourneydbSource
    | DiffusiondbSource
    | TextcapsSource
    | CocoSource
    | SynthesizeSource,
    Field(discriminator="adapter"),
]

ADAPTERS = [get_args(kind.model_fields["adapter"].annotation)[0] for kind in get_args(get_args(SourceOptions)[0])]
