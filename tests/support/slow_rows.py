"""Rows that take long to look at, however fast the machine is."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.stack import Stack


@contextmanager
def slow_rows(stack: Stack, organization: str) -> Iterator[None]:
    """Each run of this organization that is older than ten days takes the service's role 10 ms to look at."""
    stack.sql("ALTER TABLE runs ENABLE ROW LEVEL SECURITY")
    try:
        stack.sql(
            f"CREATE POLICY slow ON runs USING (organization_id <> '{organization}'"
            " OR created_at > now() - interval '10 days' OR pg_sleep(0.01) IS NOT NULL)"
        )
        yield
    finally:
        stack.sql("DROP POLICY IF EXISTS slow ON runs")
        stack.sql("ALTER TABLE runs DISABLE ROW LEVEL SECURITY")
