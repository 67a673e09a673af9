"""What processes of the service tell each other, by NOTIFY. It may get lost: what depends on it is also looked for.

It is told outside the transaction that caused it, by one statement for all that has come together: NOTIFY makes the commits of
those who use it wait for each other.
"""

from collections.abc import Iterator

from app.stores.database import Database
from app.stores.statements import statement
from app.stores.wakeups import Wakeups

# The commit need not wait for the disk.
TELL = statement(
    "channels.tell",
    """
    SELECT set_config('synchronous_commit', 'off', true), pg_notify(channel, message)
    FROM unnest(:channels::text[], :messages::text[]) AS told (channel, message)
    """,
)

# A message has less than 8,000 bytes, and a name at most 64.
MOST_NAMES = 100


async def tell(database: Database, wakeups: Wakeups) -> None:
    """Tell the others what has come together. Raises DatabaseUnavailable."""
    untold = wakeups.take_untold()
    messages = [(channel, message) for channel, names in untold.items() for message in _messages(sorted(names))]
    if not messages:
        return
    try:
        async with database.connection() as connection:
            await connection.fetch(
                TELL, channels=[channel for channel, _ in messages], messages=[message for _, message in messages]
            )
    except Exception:
        wakeups.untell(untold)
        raise


def _messages(names: list[str]) -> Iterator[str]:
    for first in range(0, len(names), MOST_NAMES):
        yield ",".join(names[first : first + MOST_NAMES])
