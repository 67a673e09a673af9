"""Log lines as JSON, one a line, on standard output. Times are ISO 8601, in UTC. It knows nothing of what is logged."""

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson


class JsonFormatter(logging.Formatter):
    """Our records are dictionaries; others become `message`. Exceptions are shown without their text."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, dict):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe(record.exc_info[1])
        return orjson.dumps(line, default=str, option=orjson.OPT_UTC_Z).decode()


def describe(error: BaseException) -> dict[str, str]:
    """An exception's type and frames. Not its text: that can hold what a caller sent."""
    return {"type": type(error).__qualname__, "frames": "".join(traceback.format_tb(error.__traceback__))}


def configure(level: str) -> None:
    """Send everything of this process through the formatter."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It writes down URLs, which can hold a token, and what the other side answered.
    logging.getLogger("urllib3").propagate = False
    # What no line of ours shows need not be found out for each (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
