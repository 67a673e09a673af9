"""Search: what a text means in SQL. It is looked for as it stands, but for case; `%`, `_` and `\\` mean themselves."""

from uuid import UUID

# Digits of an id without dashes that are looked for among all ids, not only in what a scan looks at.
ID_DIGITS = 8


def pattern(text: str) -> str:
    """For ILIKE: it stands anywhere."""
    return "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


def found_in(*texts: str) -> str:
    """A condition: one of these SQL texts holds it. They are read one after the other, until one does."""
    return " OR ".join(f"coalesce({text} ILIKE :pattern, false)" for text in texts)


def ids_beginning(text: str) -> tuple[UUID, UUID] | None:
    """The first and the last id that begin like this text; None if it is no beginning of an id, or a short one."""
    digits = text.replace("-", "").lower()
    if not ID_DIGITS <= len(digits) <= 32 or not set(digits) <= set("0123456789abcdef"):
        return None
    first, last = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
    return (first, last) if text.lower() in (digits, str(first)[: len(text)]) else None
