"""The wire types of files: those sent with a run, and those that an executor hands in."""

import re
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.errors import PayloadTooLarge
from app.schemas.values import (
    EXAMPLE_ID,
    MAX_NAME,
    Assignment,
    Attempt,
    Base64,
    FileName,
    InputName,
    InputPath,
    Payload,
    Reading,
    Reply,
    TargetPath,
    Timestamp,
    example,
    landing_path,
)

AttachmentType = Literal["input", "output"]
_MEDIA_TYPE = r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}( ?; ?[A-Za-z0-9_-]+=[A-Za-z0-9_.-]+)*"


def _media_type(value: str) -> str:
    if not re.fullmatch(_MEDIA_TYPE, value):
        raise PydanticCustomError("media_type", "not a media type")
    return value


MediaType = Annotated[
    str, Field(max_length=MAX_NAME, json_schema_extra={"pattern": f"^{_MEDIA_TYPE}$"}), AfterValidator(_media_type)
]


class File(Payload):
    """A file of a run."""

    filename: FileName = Field(
        description="Bare file name, without any path; at most 255 bytes of UTF-8.", examples=["invoice.pdf"]
    )
    content: Base64 = Field(description="The bytes, base64.", examples=["aGVsbG8="])
    target_path: TargetPath | None = Field(None, description="Where to put it on the machine (Windows or POSIX path).")
    cleanup_imports_after_run: bool | None = Field(
        default=False, description="Delete it from the machine after the run."
    )


class FileInput(File):
    """A file for the machine. Its name and path are such that Windows can store it."""

    filename: InputName = Field(
        description="Bare file name that Windows can store, without any path; at most 255 bytes of UTF-8.",
        examples=["invoice.pdf"],
    )
    target_path: InputPath | None = Field(
        None,
        description="Where to put it on the machine (Windows or POSIX path that Windows can store). Each file of a request has"
        " its own; without one the file name counts.",
    )


def _no_more_than_may_be_sent(value: object, info: ValidationInfo) -> object:
    """Before any file is looked at. How many it may be is a setting, given as the context of a request."""
    reading = info.context
    if isinstance(reading, Reading) and isinstance(value, list) and len(value) > reading.settings.max_files:
        raise PayloadTooLarge(f"At most {reading.settings.max_files} files can be sent; send fewer file_inputs.")
    return value


def _one_file_each(files: list[FileInput]) -> list[FileInput]:
    """The second of two files on one path would overwrite the first."""
    taken: set[tuple[str, ...]] = set()
    errors: list[InitErrorDetails] = []
    for place, file in enumerate(files):
        path = landing_path(file.filename, file.target_path)
        if path in taken:
            field = "filename" if file.target_path is None else "target_path"
            error = PydanticCustomError("same_path", "another file lands there")
            errors.append(InitErrorDetails(type=error, loc=(place, field), input=None))
        taken.add(path)
    if errors:
        raise ValidationError.from_exception_data("file_inputs", errors, hide_input=True)
    return files


FileInputs = Annotated[list[FileInput], BeforeValidator(_no_more_than_may_be_sent), AfterValidator(_one_file_each)]


class RunAttachmentCreate(File):
    """A file that an executor hands in for its run."""

    model_config = example(
        run_id=EXAMPLE_ID, filename="report.csv", content="YSxiCg==", content_type="text/csv", attachment_type="output"
    )

    run_id: UUID = Field(description="The run; it must be running.")
    content_type: MediaType = Field(description="Media type.", examples=["text/csv"])
    attachment_type: Annotated[AttachmentType, WithJsonSchema({"type": "string", "enum": ["output"]})] = Field(
        description="Only `output` can be added to an existing run."
    )
    expires_at: Timestamp | None = Field(
        None, description="When the file is deleted; null keeps it as long as the run."
    )
    attempt: Attempt | None = Field(None, description="The attempt this file is of; an older one is refused.")
    assignment: Assignment | None = Field(
        None, description="The assignment this file is of; an older one is refused. Required with claim."
    )
    claim: UUID | None = Field(
        None,
        description="The claim that began the attempt; required if it was begun with one, and no other is accepted.",
    )


class RunAttachmentUpdate(Payload):
    """Absent keeps the expiry, null removes it."""

    model_config = example(expires_at="2030-01-31T12:00:00Z")

    expires_at: Timestamp | None = Field(
        None, description="When the file is deleted; null keeps it as long as the run."
    )
    attempt: Attempt | None = Field(
        None, description="The attempt the file is of; an older one is refused. Required of a key bound to a machine."
    )
    assignment: Assignment | None = Field(
        None, description="The assignment the file is of; an older one is refused. Required with claim."
    )
    claim: UUID | None = Field(
        None,
        description="The claim that began the attempt; another one is refused. Required of a key bound to a machine.",
    )


class RunAttachmentResponse(Reply):
    """A file of a run."""

    id: UUID
    run_id: UUID
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    organization_id: str | None
    attachment_type: AttachmentType
    filename: str
    content_type: str
    size_bytes: int = Field(description="Size of the file itself.")
    storage_path: str = Field(description="Key in the file store; empty once an expired input's bytes were deleted.")
    target_path: str | None = Field(description="Where to put it on the machine.")
    cleanup_imports_after_run: bool = Field(description="Delete it from the machine after the run.")
    created_at: datetime
    expires_at: datetime | None = Field(description="When the file is deleted; null keeps it as long as the run.")
    attempt: int | None = Field(
        description="Of an output file of an earlier attempt: that attempt. null: a file that the run has now."
    )


class DownloadUrlResponse(Reply):
    """A URL that works without an API key until it expires."""

    url: str = Field(description="Good for GET alone.")
    expires_in: int = Field(description="Seconds.")
