"""The checked building blocks of the wire types: text, numbers, times, JSON and names that every store can hold.

They know nothing of runs or machines. Requests are checked strictly (no coercion between JSON types) and unknown keys are
ignored: newer SDKs send keys that we do not know.

One file: a value that two requests share must have one check.
"""

import binascii
import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar
from urllib.parse import unquote
from uuid import UUID

import orjson
import pybase64
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from app.config import Settings
from app.schemas import numbers

MAX_PROMPT_BYTES = 256 * 1024  # bytes of a prompt, a JSON schema, or metadata as JSON; in UTF-8
MAX_LINE = 100_000  # characters in one line of a run's error
MAX_ERROR_BYTES = 256 * 1024  # bytes of all lines as JSON, without the quotes: a page of 100 runs fits into a reply
MAX_DESCRIPTION = 10_000  # characters: a machine shows those of all its pools
MAX_NAME = 255  # characters in a name, also of a variable: each copy of a run in a bulk repeats it
MAX_POOLS = 100  # pools of a run, and of a machine
MAX_IDS = 1_000  # in one list of machines or attachments
MAX_VARIABLES = 1_000  # names in input_values or sensitive_input_values
MAX_REASON = 500  # characters in a reason
MAX_INTEGER = 2**63 - 1

# --- what PostgreSQL and JSON can hold --------------------------------------------------------------------------------


@dataclass(slots=True)
class Reading:
    """The context in which a body is checked, and what its text must be looked at for when it has passed."""

    settings: Settings
    has_fractions: bool = False
    has_tiny: bool = False  # a zero with a point, or a number near it


def storable_text(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("string_nul", "NUL is not allowed")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "lone surrogates are not allowed") from None
    return value


T = TypeVar("T")


# Below it a double has fewer digits.
_SMALLEST_NORMAL = sys.float_info.min


def _storable_json(value: T, info: ValidationInfo) -> T:
    """Refuse what the stores would change or reject. Depth is bounded by the JSON parser (200)."""
    return _checked_json(value, info.context, may_refer=True)


def _storable_input(value: T, info: ValidationInfo) -> T:
    """The same, and `{"$ref": ...}` is refused: we would hand it to the executor as it is, where it means something else."""
    return _checked_json(value, info.context, may_refer=False)


def _checked_json(value: T, reading: Reading | None, *, may_refer: bool) -> T:
    stack: list[Any] = [value]
    has_fractions = has_tiny = has_large = False
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            storable_text(item)
        elif isinstance(item, dict):
            if not may_refer and len(item) == 1 and "$ref" in item:
                raise PydanticCustomError("reference_not_supported", "references are not supported")
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, float):
            has_fractions = True
            if not math.isfinite(item):
                raise PydanticCustomError("finite_number", "numbers must be finite")
            if -_SMALLEST_NORMAL < item < _SMALLEST_NORMAL:
                has_tiny = True
        elif isinstance(item, int) and not -MAX_INTEGER - 1 <= item <= MAX_INTEGER:
            if not numbers.is_kept(item):
                raise PydanticCustomError("number_changed", "a double is not this number")
            has_large = True
    if reading is not None:
        reading.has_fractions |= has_fractions
        reading.has_tiny |= has_tiny
    return _with_doubles(value) if has_large else value


def _with_doubles(value: Any) -> Any:
    """With doubles in the place of whole numbers that do not fit 64 bits."""
    if isinstance(value, dict):
        return {name: _with_doubles(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_doubles(item) for item in value]
    is_large = isinstance(value, int) and not -MAX_INTEGER - 1 <= value <= MAX_INTEGER
    return float(value) if is_large else value


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)?")


def _rfc3339(value: object) -> object:
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise PydanticCustomError("datetime_parsing", "not RFC 3339")
    return value


def _utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("datetime_parsing", "out of range") from None


def whole(value: object, info: ValidationInfo) -> object:
    """1.0 is an integer, as JSON Schema has it: some languages send every number with a fraction."""
    if isinstance(value, float) and isinstance(info.context, Reading):
        info.context.has_fractions = True
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few_bytes(value: T) -> T:
    """The length of text as it is, of other values as JSON."""
    size = len(value.encode() if isinstance(value, str) else orjson.dumps(value))
    if size > MAX_PROMPT_BYTES:
        raise PydanticCustomError("too_many_bytes", "too large", {"max_bytes": MAX_PROMPT_BYTES})
    return value


def _few_bytes_in_all(value: list[str]) -> list[str]:
    if sum(len(orjson.dumps(line)) - 2 for line in value) > MAX_ERROR_BYTES:
        raise PydanticCustomError("too_many_bytes_in_all", "too large", {"max_bytes": MAX_ERROR_BYTES})
    return value


def _short_names(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if any(len(name) > MAX_NAME for name in value):
        raise PydanticCustomError("name_too_long", "name too long", {"max_length": MAX_NAME})
    return value


@lru_cache
def _alias_path(mount: str, prefix: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(mount)}/{re.escape(prefix)}/[^#]+#.*")


def _is_alias(value: str, settings: Settings) -> bool:
    """Whether this text has the form of the aliases that replies show (stores/vault.py), of any organization."""
    scheme, separator, rest = value.strip().partition("://")
    if not separator or scheme.lower() not in ("vault", "vault+json") or any(char.isspace() for char in rest):
        return False
    return _alias_path(settings.vault_mount, settings.vault_prefix).fullmatch(unquote(rest)) is not None


def _no_alias(value: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
    """A caller that sends a run's aliases back as its secrets would lose the secrets."""
    reading = info.context
    if not isinstance(reading, Reading):
        return value
    for name, secret in value.items():
        stack: list[Any] = [secret]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                if _is_alias(item, reading.settings):
                    raise PydanticCustomError("secret_alias", "an alias is no secret", {"name": name})
            elif isinstance(item, dict):
                stack.extend(item.values())
            elif isinstance(item, list):
                stack.extend(item)
    return value


def _not_supported(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("not_supported", "not supported")


# The patterns say in the document what the validators check; those give the better sentences.
NO_NUL = {"pattern": "^[^\\u0000]*$"}

Attempt = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)]
Assignment = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=1, le=1000), BeforeValidator(whole)]
AtMostRuns = Annotated[int, Field(ge=0, le=10_000), BeforeValidator(whole)]
# A length before a validator, or its error would be the one of a list.
Line = Annotated[str, Field(max_length=MAX_LINE, json_schema_extra=NO_NUL), AfterValidator(storable_text)]
Lines = Annotated[list[Line], Field(max_length=1000, fail_fast=True), AfterValidator(_few_bytes_in_all)]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION, json_schema_extra=NO_NUL), AfterValidator(storable_text)]
Name = Annotated[str, Field(max_length=MAX_NAME, json_schema_extra=NO_NUL), AfterValidator(storable_text)]
NonEmptyName = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME, json_schema_extra=NO_NUL), AfterValidator(storable_text)
]
ErrorCode = Annotated[str, Field(pattern=r"^[a-z0-9_.]{1,100}$")]
# The text of a search; an empty text is no search.
SearchText = Annotated[str, Field(max_length=200, json_schema_extra=NO_NUL), AfterValidator(storable_text)]
Reason = Annotated[str, Field(max_length=MAX_REASON, json_schema_extra=NO_NUL), AfterValidator(storable_text)]


def _digits(value: object) -> object:
    """Pydantic also reads " 1 ", "+1" and "1_000" as numbers."""
    if isinstance(value, str) and not re.fullmatch("[0-9]{1,19}", value):
        raise PydanticCustomError("int_parsing", "not an integer")
    return value


# In a path.
Number = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(_digits)]
# In a query; the empty text is false, as the vendor's clients send it.
Flag = Annotated[bool, BeforeValidator(lambda value: value or False)]
Prompt = Annotated[
    str,
    Field(json_schema_extra=NO_NUL | {"maxLength": MAX_PROMPT_BYTES}),
    AfterValidator(storable_text),
    AfterValidator(_few_bytes),
]
JsonObject = Annotated[
    dict[str, JsonValue], Field(json_schema_extra={"propertyNames": NO_NUL}), AfterValidator(_storable_json)
]
Metadata = Annotated[JsonObject, AfterValidator(_few_bytes)]
_Named = Annotated[
    dict[str, JsonValue],
    Field(max_length=MAX_VARIABLES, json_schema_extra={"propertyNames": NO_NUL | {"maxLength": MAX_NAME}}),
    AfterValidator(_short_names),
]
Variables = Annotated[_Named, AfterValidator(_storable_json)]
# Those that a run is to begin with. What an executor reports of them is kept as it is.
Inputs = Annotated[_Named, AfterValidator(_storable_input)]
Secrets = Annotated[_Named, AfterValidator(_storable_input), AfterValidator(_no_alias)]
# What we know of and do not do. Ignoring it would change in silence what the caller asked for.
NotSupported = Annotated[
    None, BeforeValidator(_not_supported), Field(description="Not supported: anything but null is refused.")
]
# A time without an offset is read as UTC: the SDK sends what datetime.isoformat() gives. Strings alone pass the first check;
# strict would then refuse them too, because what a validator returns no longer counts as JSON.
Timestamp = Annotated[datetime, Field(strict=False), BeforeValidator(_rfc3339), AfterValidator(_utc)]
# Lists end at the first item that is wrong: an error for each of a million items would cost seconds and a gigabyte.
PoolIds = Annotated[list[UUID], Field(max_length=MAX_POOLS, fail_fast=True)]
Ids = Annotated[list[UUID], Field(max_length=MAX_IDS, fail_fast=True)]

# --- files ------------------------------------------------------------------------------------------------------------

_HIDDEN = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_HIDDEN}]")
_FILENAME = {"pattern": rf"^(?![\s.]*$)(?![A-Za-z]:)[^{_HIDDEN}/\\]*[^{_HIDDEN}/\\\s][^{_HIDDEN}/\\]*$"}
_TARGET_PATH = {"pattern": rf"^(?!(.*[/\\:])?[\s.]*\.[\s.]*([/\\:]|$))[^{_HIDDEN}]*[^{_HIDDEN}\s][^{_HIDDEN}]*$"}
_DRIVE = re.compile(r"[A-Za-z]:")  # on Windows, what follows is on another drive
_NO_NAME = re.compile(r"[\s.]*")  # Windows takes dots and spaces from the end of a name


def _filename(value: str) -> str:
    """A bare name: it becomes a path on the machine and a Content-Disposition here."""
    if (
        _NO_NAME.fullmatch(value)
        or _DRIVE.match(value)
        or "/" in value
        or "\\" in value
        or _CONTROL.search(value)
        or len(value.encode()) > MAX_NAME
    ):
        raise PydanticCustomError("filename", "unsafe filename")
    return value


def _target_path(value: str) -> str:
    """A path on the machine, Windows or POSIX: never climbing, never hiding characters."""
    parts = re.split(r"[/\\:]", value)  # C:.. climbs from C:'s current folder
    if not value.strip() or _CONTROL.search(value) or any("." in part and _NO_NAME.fullmatch(part) for part in parts):
        raise PydanticCustomError("target_path", "unsafe path")
    return value


# --- names that Windows can store too -------------------------------------------------------------------------------------

_TAKEN = r'<>:"/\\|?*'
_DEVICE_NAME = (
    r"(?:[cC][oO][nN](?:[iI][nN]\$|[oO][uU][tT]\$)?|[pP][rR][nN]|[aA][uU][xX]|[nN][uU][lL]"
    r"|(?:[cC][oO][mM]|[lL][pP][tT])[0-9¹²³])"
)
_DEVICE = re.compile(_DEVICE_NAME + r" *(?:\..*)?")  # whatever follows the dot: CON.txt is the console
# Before the drive: "do not interpret what follows".
_VERBATIM = re.compile(r"[/\\]{2}\?[/\\]")
_PART = rf"(?!{_DEVICE_NAME} *(?:[./\\]|$))[^{_HIDDEN}{_TAKEN}]{{0,254}}[^{_HIDDEN}{_TAKEN} .]"
_INPUT_NAME = {"pattern": rf"^(?![\s.]*$){_PART}$"}
_INPUT_PATH = {
    "pattern": rf"^(?!\s*$)(?!(.*[/\\:])?[\s.]*\.[\s.]*([/\\:]|$))([/\\]{{2}}\?[/\\])?([A-Za-z]:)?"
    rf"[/\\]*({_PART}([/\\]+{_PART})*[/\\]*)?$"
}
_TAKEN_CHARACTER = re.compile(f"[{_TAKEN}]")


def _can_windows_store(part: str) -> bool:
    return not (
        _TAKEN_CHARACTER.search(part)
        or part.endswith((".", " "))
        or _DEVICE.fullmatch(part)
        or len(part.encode("utf-16-le")) > 2 * MAX_NAME
    )


def _input_name(value: str) -> str:
    if not _can_windows_store(value):
        raise PydanticCustomError("windows_filename", "Windows cannot store it")
    return value


def _parts(path: str) -> tuple[str, list[str]]:
    """What a path on a machine begins with (a drive, a server, the root or nothing), and its names."""
    rest = _VERBATIM.sub("", path, count=1) if _VERBATIM.match(path) else path
    drive = rest[:2] if _DRIVE.match(rest) else ""
    names = re.split(r"[/\\]", rest[len(drive) :])
    depth = next((place for place, name in enumerate(names) if name), len(names))
    return drive + "/" * min(depth, 2), [name for name in names if name]


def _input_path(value: str) -> str:
    if not all(_can_windows_store(name) for name in _parts(value)[1]):
        raise PydanticCustomError("windows_path", "Windows cannot store it")
    return value


def landing_path(filename: str, target_path: str | None) -> tuple[str, ...]:
    """Where a file lands on the machine, the same for all spellings that some system takes for one path."""
    path = filename if target_path is None else target_path
    begin, names = _parts(path)
    if path.endswith(("/", "\\")):
        names.append(filename)
    return (begin.lower(), *(_folded(name.rstrip(". ")) for name in names))


def _folded(name: str) -> str:
    """Canonical caseless matching, as The Unicode Standard defines it (3.13, D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _base64(value: object) -> object:
    """RFC 4648 section 4, strictly: no whitespace, no missing padding, no other alphabet."""
    if not isinstance(value, str):
        return value  # the type check says what is wrong
    try:
        return pybase64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("base64", "not base64") from None


Base64 = Annotated[
    bytes, BeforeValidator(_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64", "format": "byte"})
]
FileName = Annotated[
    str,
    Field(min_length=1, max_length=MAX_NAME, json_schema_extra=_FILENAME),
    AfterValidator(storable_text),
    AfterValidator(_filename),
]
TargetPath = Annotated[
    str,
    Field(max_length=4096, json_schema_extra=_TARGET_PATH),
    AfterValidator(storable_text),
    AfterValidator(_target_path),
]


InputName = Annotated[FileName, Field(json_schema_extra=_INPUT_NAME), AfterValidator(_input_name)]
InputPath = Annotated[TargetPath, Field(json_schema_extra=_INPUT_PATH), AfterValidator(_input_path)]


class Payload(BaseModel):
    """A request body."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    # An example of a body for the schema.
    EXAMPLE_NAMES: ClassVar[tuple[str, ...]] = ("example",)

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        """Its examples by name, in OpenAPI's form. Programs that try requests out begin with the first."""
        extra = cls.model_config.get("json_schema_extra")
        bodies = extra.get("examples") if isinstance(extra, dict) else None
        if not isinstance(bodies, list):
            return {}
        return {name: {"value": body} for name, body in zip(cls.EXAMPLE_NAMES, bodies, strict=True)}


Unsupported = Annotated[None, Field(description="Not supported; always null.")]

EXAMPLE_ID = "3c90c3cc-0d44-4b50-8888-8dd25736052a"


def example(**values: Any) -> ConfigDict:
    """A body for the document; ids in it stand for the caller's own."""
    return examples(values)


def examples(*bodies: dict[str, Any]) -> ConfigDict:
    """Several bodies for the document, which EXAMPLE_NAMES names."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class Reply(BaseModel):
    """A reply: every key is always present."""

    model_config = ConfigDict(json_schema_mode_override="serialization")


class Included(Reply):
    """An object that an item of the reply names, with the fields of its own model."""

    model_config = ConfigDict(extra="allow")

    type: Literal["workflow", "machine", "pool"] = Field(description="What it is.")
    id: UUID = Field(description="Its id, as the item names it.")


class WithIncluded(Reply):
    """A reply that `include` can add objects to."""

    included: list[Included] = Field(
        default=[], description="Only if `include` is given: what it asks for, each object once."
    )


class Page(Reply, Generic[T]):
    """One page of a list."""

    items: list[T]
    total: int = Field(
        description="Items in all pages. Up to 10,000 it is exact to the moment; a larger number is at most a second old."
    )
    total_is_estimate: bool = Field(
        description="true: counting would take longer than a second, and total is an estimate, at most a minute old."
    )
    skip: int = Field(description="Items passed over.")
    limit: int = Field(description="Most items in a page.")
    next: str | None = Field(description="Send it as `after` for the page that follows; null: there is none.")


class SearchedPage(Page[T], Generic[T]):
    """One page of a list that can be searched."""

    search_is_partial: bool = Field(
        description="true: a search has not looked at everything: it looks at 10,000 at most, and for a second. total is what"
        " was found so far. Go on with `next`, also if the page is empty."
    )
