"""The server's log: a JSON object on each line of standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LOGGER = logging.getLogger("gpt2fast.serving")
_NAMES = ("gpt2fast.serving", "uvicorn", "asyncio")


class JsonLines(logging.Formatter):
    """A record as JSON: time, level, event, what it is about, and where an exception came from."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = int(record.msecs)
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str) -> None:
    """Send the log of the server and of its libraries to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _NAMES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper() if name == "gpt2fast.serving" else logging.WARNING)


def record(event: str, /, level: int = logging.INFO, error: Any = None, **fields: Any) -> None:
    """Write a line.

    Args:
        event: what has happened.
        level: as of `logging`.
        error: an exception whose traceback is written, too.
        fields: more entries.
    """
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)
