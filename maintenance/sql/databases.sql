-- name: databases
-- purpose: the databases that a maintenance job visits when it names none. Templates are left out: a session in
--   template1 makes every CREATE DATABASE fail.
-- versions: 14 to 18
-- rights: none; databases without CONNECT for this role are not listed
-- cost: one small catalog
-- columns: datname
SELECT datname::text
FROM pg_catalog.pg_database
WHERE datallowconn
  AND NOT datistemplate
  -- A DROP DATABASE that was interrupted leaves a database nobody may use (from the minor releases of August 2023 on).
  AND datconnlimit <> -2
  AND pg_catalog.has_database_privilege(oid, 'CONNECT')
ORDER BY datname
