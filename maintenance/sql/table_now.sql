-- name: table_now
-- purpose: one table immediately before and after work on it: is it still there, under which name, may we, is
--   somebody at it, and its counters. Found by OID, so that a renamed table is still the planned one.
-- versions: 14 to 18
-- rights: none; without pg_read_all_stats (in pg_monitor) the kind of another session is unknown, and taken for
--   autovacuum
-- cost: catalogs, counters, and one look at the lock table
-- columns: schema, name, kind, owner, may_maintain, dead_rows, live_rows, vacuums (manual ones so far), worker_pid
--   and worker_kind (a session that vacuums or analyzes the table now, null: none)
SELECT
    n.nspname::text AS schema,
    c.relname::text AS name,
    c.relkind::text AS kind,
    pg_catalog.pg_get_userbyid(c.relowner)::text AS owner,
    (pg_catalog.pg_has_role(c.relowner, 'USAGE')
        OR pg_catalog.pg_has_role(d.datdba, 'USAGE')
        OR CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 170000
                THEN pg_catalog.has_table_privilege(c.oid, 'MAINTAIN') ELSE false END) AS may_maintain,
    coalesce(pg_catalog.pg_stat_get_dead_tuples(c.oid), 0)::int8 AS dead_rows,
    coalesce(pg_catalog.pg_stat_get_live_tuples(c.oid), 0)::int8 AS live_rows,
    coalesce(pg_catalog.pg_stat_get_vacuum_count(c.oid), 0)::int8 AS vacuums,
    w.pid AS worker_pid,
    w.kind AS worker_kind
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
LEFT JOIN LATERAL (
    -- VACUUM and ANALYZE hold this lock while they work. Waiting for it longer than deadlock_timeout would cancel an
    -- autovacuum that is doing the same work already.
    SELECT l.pid, coalesce(a.backend_type, 'unknown') AS kind
    FROM pg_catalog.pg_locks l
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation'
      AND l.database = d.oid
      AND l.relation = c.oid
      AND l.mode = 'ShareUpdateExclusiveLock'
      AND l.granted
      AND l.pid <> pg_catalog.pg_backend_pid()
    LIMIT 1
) w ON true
WHERE c.oid = $1
