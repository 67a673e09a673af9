"""Carried fields: values that a request gives to a run as they are. Create, retry, dry run and replies read this list.

A new carried field is a line here, a field of the schemas (schemas/runs.py: request and reply), and a column (models.py and a
migration). A field that changes where a run may go is not carried: retry_rules.py decides it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from app.stores.statements import json_bytes


def _model_metadata(options: Any) -> dict[str, Any] | None:
    """The field as given; a model that is named beside it is stored in it, as the vendor does."""
    named = getattr(options, "main_agent_model_id", None)
    given: dict[str, Any] | None = options.model_metadata
    return given if named is None else (given or {}) | {"main_agent_model_id": str(named)}


@dataclass(frozen=True, slots=True)
class Carried:
    """One field, which has the same name in requests, replies and the table of runs. Null in a retry keeps the run's value."""

    name: str
    type: str  # PostgreSQL's
    is_replaced: bool = True  # a retry may give another value
    is_long: bool = False  # it counts towards the memory that a reply needs
    is_present: str = "r.{name} IS NOT NULL"  # SQL: the run has a value that a retry keeps
    read: Callable[[Any], Any] | None = None  # how the value is read from a request that creates; None: by its name

    def given(self, options: object) -> Any:
        """The value that a request gives, as Python's; None: it gives none."""
        return getattr(options, self.name) if self.read is None else self.read(options)

    def bound(self, options: object) -> Any:
        """The value that a request gives, as the driver takes it."""
        value = self.given(options)
        return json_bytes(value) if self.type == "json" else value


CARRIED: Final = (
    Carried("input_values", "json", is_long=True, is_present="r.{name} IS NOT NULL AND r.{name}::text <> '{{}}'"),
    Carried("main_prompt", "text", is_replaced=False, is_long=True),
    Carried("model_metadata", "json", is_replaced=False, is_long=True, read=_model_metadata),
)
REPLACED: Final = tuple(one for one in CARRIED if one.is_replaced)

NAMES: Final = ", ".join(one.name for one in CARRIED)
PARAMETERS: Final = ", ".join(f":{one.name}::{one.type}" for one in CARRIED)

# What an UPDATE of runs sets if `seen` has the values of a retry.
REPLACE: Final = ", ".join(f"{one.name} = coalesce(seen.{one.name}, runs.{one.name})" for one in REPLACED)

# A SELECT list of `runs r`: whether a run has each of them.
HAS: Final = ", ".join(f"{one.is_present.format(name=one.name)} AS has_{one.name}" for one in CARRIED)


def parameters(options: object) -> Mapping[str, Any]:
    """The values of PARAMETERS."""
    return {one.name: one.bound(options) for one in CARRIED}
