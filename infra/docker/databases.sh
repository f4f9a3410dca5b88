#!/bin/bash
# Run once, by PostgreSQL's image, on an empty volume: a database for Prefect and one for MLflow (both keep a table
# `alembic_version`, so they cannot share one), each with a user that may use no other. Passwords come from the environment.
set -euo pipefail
: "${POSTGRES_USER:?}" "${PREFECT_DATABASE_PASSWORD:?}" "${MLFLOW_DATABASE_PASSWORD:?}"
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER}" --dbname postgres <<'SQL'
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
CREATE ROLE r1_prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE r1_mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE r1_prefect OWNER r1_prefect TEMPLATE template0 ENCODING 'UTF8';
CREATE DATABASE r1_mlflow OWNER r1_mlflow TEMPLATE template0 ENCODING 'UTF8';
REVOKE ALL ON DATABASE r1_prefect, r1_mlflow FROM PUBLIC;
SQL
