-- name: table_statistics
-- purpose: what the server knows of every table of this database that ANALYZE could be asked for, and whether this
--   role may ask for it. The plan decides; nothing is filtered here but the system's own tables.
-- versions: 14 to 18
-- rights: none; the counters of pg_stat_get_* are visible to everybody
-- cost: catalogs and counters only, no table is touched or locked; a few milliseconds per thousand tables
-- columns: oid, schema, name, kind (pg_class.relkind), persistence (pg_class.relpersistence), parent_oid (of a
--   partition), rows (-1: never analyzed), changes (rows changed since the last analyze), analyzed_at_ms (Unix
--   milliseconds, null: not recorded), autoanalyzed_at_ms (the same, by autovacuum), owner, may_maintain
SELECT
    c.oid,
    n.nspname::text AS schema,
    c.relname::text AS name,
    c.relkind::text AS kind,
    c.relpersistence::text AS persistence,
    CASE WHEN c.relispartition THEN
        (SELECT i.inhparent FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid LIMIT 1)
    END AS parent_oid,
    c.reltuples::float8 AS rows,
    coalesce(pg_catalog.pg_stat_get_mod_since_analyze(c.oid), 0)::int8 AS changes,
    (extract(epoch FROM greatest(
        pg_catalog.pg_stat_get_last_analyze_time(c.oid),
        pg_catalog.pg_stat_get_last_autoanalyze_time(c.oid))) * 1000)::int8 AS analyzed_at_ms,
    (extract(epoch FROM pg_catalog.pg_stat_get_last_autoanalyze_time(c.oid)) * 1000)::int8 AS autoanalyzed_at_ms,
    pg_catalog.pg_get_userbyid(c.relowner)::text AS owner,
    -- What the server itself asks before ANALYZE and VACUUM. Without the right it only warns, and skips the table.
    (pg_catalog.pg_has_role(c.relowner, 'USAGE')
        OR pg_catalog.pg_has_role(d.datdba, 'USAGE')
        OR CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 170000
                THEN pg_catalog.has_table_privilege(c.oid, 'MAINTAIN') ELSE false END) AS may_maintain
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
WHERE c.relkind IN ('r', 'p', 'm', 'f')
  AND n.nspname NOT IN ('pg_catalog', 'information_schema')
ORDER BY c.oid
