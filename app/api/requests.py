"""From the wire to a checked model: the body with its limits, and the Idempotency-Key."""

import asyncio
import codecs
import re
import time
from collections.abc import Callable, Coroutine
from functools import cache, partial
from io import BytesIO
from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from app.access.auth import still_valid
from app.api import body_cost
from app.api.validation import FREE_FORM, SENTENCES, invalid, place_of
from app.config import MIB, Settings
from app.errors import Invalid, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from app.idempotency import WriteRequest, fingerprint
from app.limits import memory_budget
from app.schemas import numbers
from app.schemas.values import Reading
from app.services import Services

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_JSON = re.compile(r"\s*application/([A-Za-z0-9.+-]+\+)?json\s*(;.*)?", re.IGNORECASE)
_KEY = re.compile(r"[!-~]{1,255}")
_ENTITY_TAG = re.compile(r'"([!#-~]{0,200})"')

# What begins a text in UTF-16 or UTF-32.
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

_SHORTEST_ID = 32  # characters: hexadecimal digits alone

# A key is looked up again if it was found longer ago than this.
KNOWN_SECONDS = 1.0

# Shorter bodies are not weighed.
LIGHT_BYTES = memory_budget.FREE_BYTES
# Bodies of more bytes or values are parsed in a thread, because they may take longer than a few milliseconds.
QUICK_BYTES = 2 * MIB
QUICK_VALUES = 2_000
# Fields that make a body long; without one of them it is refused early.
_LONG = frozenset({"file_inputs", "content", "run_message_history"})


def services(request: Request) -> Services:
    """What the application that serves this request works with."""
    found: Services = request.app.state.services
    return found


# --- reading a body ---------------------------------------------------------------------------------------------------


async def _read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises PayloadTooLarge and Overloaded before it holds too much, RequestTimeout for a slow sender."""
    too_large = PayloadTooLarge(
        f"The body of this request may have at most {limit} bytes; send fewer or smaller values."
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        if int(declared) > limit:
            raise too_large
        await memory_budget.reserve(int(declared))
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType
    settings = services(request).settings
    loop = asyncio.get_running_loop()
    # In each stretch of that many seconds so many bytes must come, or the rest: a fast start buys no time for later.
    seconds = settings.body_timeout_seconds
    wanted = seconds * settings.body_min_bytes_per_second
    buffer, promised = BytesIO(), memory_budget.FREE_BYTES if not declared else limit
    try:
        async with asyncio.timeout(seconds) as timeout:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                buffer.write(message.get("body", b""))
                size = buffer.tell()
                if size > limit:
                    raise too_large
                if not message.get("more_body", False):
                    break
                if size > promised:  # no length was declared
                    timeout.reschedule(None)
                    promised = min(2 * size, limit)
                    await memory_budget.reserve(promised)
                    timeout.reschedule(loop.time() + seconds)
                if size >= wanted:
                    wanted = size + seconds * settings.body_min_bytes_per_second
                    timeout.reschedule(loop.time() + seconds)
    except TimeoutError:
        raise RequestTimeout from None
    buffer.seek(0)
    if buffer.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        if size == len(codecs.BOM_UTF8):
            return b""
        buffer.seek(0)
        buffer.write(b"   ")  # white space means nothing to JSON, and to cut the mark off would copy the body
    return buffer.getvalue()  # without a copy, unlike bytes(bytearray)


def known_tags(request: Request) -> frozenset[str]:
    """The entity tags of If-None-Match (RFC 9110 section 13.1.2), as weak ones."""
    given = ",".join(request.headers.getlist("if-none-match"))
    return frozenset(f'W/"{tag}"' for tag in _ENTITY_TAG.findall(given))


def is_head(request: Request) -> bool:
    """Whether only the head of the reply is wanted; the request's method reads GET."""
    return "is_head" in request.scope["state"]


def may_still_send(request: Request) -> bool:
    """Whether the client's sending side is open. A client that closed it may read on, or may be gone: nothing tells which."""
    return "client_has_ended" not in request.scope["state"]


async def while_connected(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do work that takes long, for as long as the client is connected. Raises ClientDisconnect."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.create_task(leave())
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            left.result()
            raise ClientDisconnect
        task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def still_known(request: Request) -> None:
    """Raises Unauthorized if the key was revoked, or expired, while its request took long."""
    if time.monotonic() - request.state.known_at > KNOWN_SECONDS:
        async with services(request).database.connection() as connection:
            await still_valid(connection, request.state.principal)
        request.state.known_at = time.monotonic()


async def read(request: Request, model: type[Model]) -> tuple[Model, WriteRequest]:
    """The body as `model` (an absent body equals `{}`) and what idempotency needs to know of the request.

    Raises Invalid, PayloadTooLarge, UnsupportedMediaType, RequestTimeout, Unauthorized, QuotaExceeded, Overloaded and
    ClientDisconnect.
    """
    settings = services(request).settings
    raw = await _read_body(request, _limit(settings, model))
    if len(raw) <= LIGHT_BYTES or "idempotency-key" not in request.headers:
        write = _write(request, settings, raw)
    else:  # the whole body is hashed
        write = await asyncio.to_thread(_write, request, settings, raw)
    return await _parsed(request, raw, model), write


async def read_only(request: Request, model: type[Model]) -> Model:
    """The body of a request that changes nothing: an Idempotency-Key is not looked at."""
    raw = await _read_body(request, _limit(services(request).settings, model))
    return await _parsed(request, raw, model)


async def read_write(request: Request) -> WriteRequest:
    """For writes without a meaningful body (DELETE)."""
    settings = services(request).settings
    raw = await _read_body(request, min(settings.max_body_bytes, settings.max_small_body_bytes))
    await still_known(request)
    return _write(request, settings, raw)


async def _parsed(request: Request, raw: bytes, model: type[Model]) -> Model:
    """The body as `model`; what it takes in memory is held. Raises Unauthorized if the key is no longer good."""
    settings = services(request).settings
    if raw and not _JSON.fullmatch(request.headers.get("content-type", "application/json")):
        raise UnsupportedMediaType
    if len(raw) <= LIGHT_BYTES:
        parsed = _parse(raw or b"{}", model, settings)
    else:
        most = body_cost.most_values(raw) if len(raw) <= QUICK_BYTES else None
        run = _at_once if most is not None and most <= QUICK_VALUES else partial(_in_turn, request)
        before = await run(body_cost.before, raw, settings, most)
        await memory_budget.reserve(before)
        parsed, weight = await run(_parse_and_weigh, raw, model, settings, before - len(raw))
        memory_budget.charge_or_refuse(weight)
    await still_known(request)
    return parsed


def is_true(request: Request, name: str) -> bool:
    """A parameter of the query that is true or false; absent is false. Raises Invalid."""
    given = request.query_params.getlist(name)
    if len(given) > 1 or any(value not in ("true", "false") for value in given):
        raise Invalid((("query", name), "Must be true or false, once.", "bool_parsing"))
    return given == ["true"]


async def _at_once(work: Callable[..., T], *arguments: object) -> T:
    return work(*arguments)


async def _in_turn(request: Request, work: Callable[..., T], *arguments: object) -> T:
    """In a thread, one at a time and the organizations in turns: while Python's parser works, nothing else does."""
    turn = services(request).parsing.reservation(request.state.principal.organization_id)
    await turn.reserve(1)
    try:
        return await asyncio.to_thread(work, *arguments)
    finally:
        turn.release()


@cache
def _is_long(model: type[BaseModel]) -> bool:
    return not _LONG.isdisjoint(model.model_fields)


def _limit(settings: Settings, model: type[BaseModel]) -> int:
    return settings.max_body_bytes if _is_long(model) else min(settings.max_body_bytes, settings.max_small_body_bytes)


def _parse_and_weigh(raw: bytes, model: type[Model], settings: Settings, values: int) -> tuple[Model, int]:
    parsed = _parse(raw, model, settings)
    return parsed, body_cost.after(raw, parsed, settings, values)


def _parse(raw: bytes, model: type[Model], settings: Settings) -> Model:
    reading = Reading(settings)
    try:
        parsed = model.model_validate_json(raw, context=reading)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        if errors[0]["type"] == "json_invalid" and not _is_utf8(raw):
            errors[0]["type"] = "json_encoding"
        raise invalid(errors, ("body",)) from None
    if reading.has_fractions:
        _refuse_changed_numbers(raw, model, has_tiny=reading.has_tiny)
    return parsed


def _refuse_changed_numbers(raw: bytes, model: type[BaseModel], *, has_tiny: bool) -> None:
    """Raises Invalid for numbers that the parser has changed, in fields that we know. Files have none that count."""
    fields = model.model_fields.keys() - {"file_inputs"}
    found = {names for names in numbers.changed(raw, has_tiny=has_tiny) if not fields.isdisjoint(names[:1])}
    places = {names[:1] if FREE_FORM.isdisjoint(names) else place_of(names) for names in found}
    if places:
        raise Invalid(*((("body", *place), SENTENCES["number_changed"], "number_changed") for place in sorted(places)))


def _is_utf8(raw: bytes) -> bool:
    if raw.startswith(_OTHER_MARKS) or b"\0" in raw[:4]:  # JSON begins with two characters of ASCII
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(raw), MIB):
            decoder.decode(raw[start : start + MIB])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _one_spelling(path: str) -> str:
    """The path with its ids in lower case and with dashes: that is how most callers write them."""
    return "/".join(_one_spelling_of_id(part) if len(part) >= _SHORTEST_ID else part for part in path.split("/"))


def _one_spelling_of_id(part: str) -> str:
    try:
        return str(UUID(part))
    except ValueError:
        return part


def _write(request: Request, settings: Settings, raw: bytes) -> WriteRequest:
    given = request.headers.getlist("idempotency-key")
    key: str | None = None
    fingerprints: tuple[bytes, ...] = ()
    if given:
        key = given[0]
        if len(given) > 1 or not _KEY.fullmatch(key):
            raise Invalid(
                (
                    ("header", "Idempotency-Key"),
                    "Must be 1 to 255 visible ASCII characters, sent once.",
                    "idempotency_key",
                )
            )
        path = _one_spelling(request.scope["path"])
        machine_id = request.state.principal.machine_id
        if machine_id is not None:
            # Records of its own: an executor can neither see nor take the keys of its organization. No header has a space.
            path = f"{machine_id}{path}"
            key = f"{machine_id} {key}"
        keys = [settings.server_key, settings.server_key_previous]
        fingerprints = tuple(
            fingerprint(server_key.get_secret_value(), request.method, path, raw)
            for server_key in keys
            if server_key is not None
        )
    principal = request.state.principal
    most_bytes = 0 if key is None else services(request).replies.most_bytes(principal.organization_id)
    state = request.state
    return WriteRequest(
        principal, key, fingerprints, settings.idempotency_ttl_seconds, most_bytes, state.request_id, state.traceparent
    )
