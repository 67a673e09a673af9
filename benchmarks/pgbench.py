"""(g): what the database alone costs. pgbench runs six plain statements of a retry in one transaction, each on its own run.

On plain tables with nothing but keys (the yardstick of the target), and on the service's own tables with all their
indexes, constraints and foreign keys, which says how much of the distance is the schema's.
"""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Sample
from benchmarks.world import ORGANIZATION, Data, cpu_seconds, history
from dev.stack import Postgres

PLAIN_TABLES = (
    "CREATE TABLE IF NOT EXISTS plain_keys (id uuid, organization_id text, user_id uuid, key_hash bytea PRIMARY KEY)",
    """
    CREATE TABLE IF NOT EXISTS plain_runs (
        id uuid PRIMARY KEY, organization_id text, status text, attempt int, input_values json, output_data json,
        run_message_history json, queued_at timestamptz, started_at timestamptz, ended_at timestamptz
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS plain_attachments (
        id uuid PRIMARY KEY, run_id uuid, attachment_type text, storage_path text
    )
    """,
    "CREATE INDEX IF NOT EXISTS plain_attachments_run ON plain_attachments (run_id, attachment_type)",
    """
    CREATE TABLE IF NOT EXISTS plain_attempts (
        run_id uuid, attempt int, status text, started_at timestamptz, ended_at timestamptz, retried_by uuid,
        PRIMARY KEY (run_id, attempt)
    )
    """,
)

PLAIN_STOCK = (
    "INSERT INTO plain_keys SELECT id, organization_id, user_id, key_hash FROM api_keys ON CONFLICT DO NOTHING",
    """
    INSERT INTO plain_runs (id, organization_id, status, attempt, input_values, output_data, run_message_history,
                            queued_at, started_at, ended_at)
    SELECT md5(n::text)::uuid, 'bench', 'success', 1, '{"customer": "Grace", "amount": 12}', '{"receipt": "R-1"}',
           $3::json, now(), now(), now() FROM generate_series($1::bigint, $2::bigint) AS n
    """,
    """
    INSERT INTO plain_attachments
    SELECT gen_random_uuid(), md5(n::text)::uuid, 'output', 'bench/' || n
    FROM generate_series($1::bigint, $2::bigint) AS n
    """,
)

# Client c of C takes the numbers first + c, first + c + C, ...
SCRIPT = r"""
\set number :first + :client_id + :done * :clients
\set done :done + 1
BEGIN;
SELECT id, organization_id, user_id FROM {keys} WHERE key_hash = decode(:key_hash, 'hex');
SELECT status, input_values FROM {runs}
  WHERE id = md5((:number)::bigint::text)::uuid AND organization_id = :organization FOR UPDATE;
{before_update}UPDATE {runs} SET status = 'scheduling', attempt = attempt + 1, queued_at = now(), {cleared}
  started_at = NULL, ended_at = NULL,
  input_values = '{{"customer": "Ada Lovelace", "amount": 120.5, "urgent": true}}'
  WHERE id = md5((:number)::bigint::text)::uuid;
DELETE FROM {attachments} WHERE run_id = md5((:number)::bigint::text)::uuid AND attachment_type = 'output'
  RETURNING storage_path;
SELECT id FROM {attachments} WHERE run_id = md5((:number)::bigint::text)::uuid AND attachment_type = 'input';
INSERT INTO {attempts} (run_id, attempt, status, {more}) VALUES (md5((:number)::bigint::text)::uuid, 1, 'success', {value});
END;
"""
PLAIN = {
    "keys": "plain_keys",
    "runs": "plain_runs",
    "before_update": "",
    "cleared": "output_data = NULL, run_message_history = NULL,",
    "attachments": "plain_attachments",
    "attempts": "plain_attempts",
    "more": "ended_at",
    "value": "now()",
}
OWN = {
    "keys": "api_keys",
    "runs": "runs",
    "before_update": "WITH superseded AS (UPDATE run_outputs SET is_superseded = true"
    " WHERE run_id = md5((:number)::bigint::text)::uuid)\n",
    "cleared": "",
    "attachments": "run_attachments",
    "attempts": "run_attempts",
    "more": "overridden",
    "value": "ARRAY['input_values']",
}


class SixStatements:
    """pgbench with the script, on either set of tables of one database."""

    def __init__(self, postgres: Postgres, data: Data, folder: Path) -> None:
        self._postgres = postgres
        self._data = data
        self._folder = folder
        self._plain = range(0)
        for statement in PLAIN_TABLES:
            data.sql(statement)

    def on_plain_tables(self, clients: int = 16, each: int = 500) -> Sample:
        count = clients * each
        if len(self._plain) < count:
            begin = self._plain.stop or 1
            self._plain = range(begin, begin + 4 * count)
            keys, runs, attachments = PLAIN_STOCK
            self._data.sql(keys)
            self._data.sql(runs, self._plain.start, self._plain.stop - 1, history(4096))
            self._data.sql(attachments, self._plain.start, self._plain.stop - 1)
            self._data.sql("ANALYZE")
        numbers, self._plain = self._plain[:count], self._plain[count:]
        return self._run(PLAIN, numbers, clients, each)

    def on_own_tables(self, clients: int = 16, each: int = 300) -> Sample:
        count = clients * each
        numbers = self._data.stock(count)[:count]
        self._data.used(count)
        return self._run(OWN, numbers, clients, each)

    def _run(self, tables: dict[str, str], numbers: range, clients: int, each: int) -> Sample:
        script = self._folder / "six.sql"
        # pgbench wants each statement to end with its line's semicolon only; a statement may span lines.
        script.write_text(SCRIPT.format(**tables), encoding="utf-8")
        log = self._folder / "pgbench_log"
        for old in self._folder.glob("pgbench_log*"):
            old.unlink()
        [key_hash] = self._data.sql("SELECT encode(key_hash, 'hex') FROM api_keys")[0].values()
        variables = {"first": numbers.start, "done": 0, "clients": clients, "key_hash": key_hash}
        variables["organization"] = ORGANIZATION
        used = cpu_seconds(self._postgres)
        done = subprocess.run(
            [
                str(self._postgres.binaries / "pgbench"),
                *("--no-vacuum", "--protocol=prepared", "--log", f"--log-prefix={log}", "--failures-detailed"),
                *(f"--client={clients}", "--jobs=1", f"--transactions={each}", f"--file={script}"),
                *(part for name, value in variables.items() for part in ("-D", f"{name}={value}")),
                self._data.url,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
        if done.returncode != 0 or found is None:
            sys.exit(f"pgbench failed: {done.stdout}{done.stderr}")
        took = sorted(
            int(line.split()[2]) / 1000
            for file in self._folder.glob("pgbench_log*")
            for line in file.read_text(encoding="utf-8").splitlines()
        )
        cost = (cpu_seconds(self._postgres) - used) / len(numbers) * 1e6
        return Sample(float(found[1]), took[len(took) // 2], took[len(took) * 99 // 100], {"db us": cost})
