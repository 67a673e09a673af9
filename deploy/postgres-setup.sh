#!/bin/sh
# Make the role that the service has, and set its password. What it may do with the tables, `python -m app migrate` says.
# Needs the owner's PG* variables and APP_PASSWORD; a variable NAME_FILE names a file with the value of NAME. Repeating it is
# harmless.
set -eu
[ -z "${PGPASSWORD_FILE:-}" ] || { PGPASSWORD=$(cat "$PGPASSWORD_FILE"); export PGPASSWORD; }
[ -z "${APP_PASSWORD_FILE:-}" ] || { APP_PASSWORD=$(cat "$APP_PASSWORD_FILE"); export APP_PASSWORD; }
: "${PGHOST:?}" "${PGUSER:?}" "${PGDATABASE:?}" "${APP_PASSWORD:?}"

# Some engines start this before PostgreSQL is ready.
tries=0
until pg_isready --quiet; do
  tries=$((tries + 1))
  if [ "$tries" -gt 60 ]; then
    echo "PostgreSQL at $PGHOST did not answer within 60 s." >&2
    exit 1
  fi
  sleep 1
done

# The password by way of a variable of psql's, which quotes it; not as an argument, which every user of the machine can read.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'SQL'
\getenv password APP_PASSWORD
SELECT 'CREATE ROLE runs_app' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'runs_app') \gexec
ALTER ROLE runs_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
SQL
