-- name: horizon
-- purpose: who keeps dead rows of this database from being removed: the oldest snapshots, and what they belong to.
--   VACUUM removes a row only when no snapshot can still see it.
-- versions: 14 to 18
-- rights: pg_read_all_stats (in pg_monitor) to see other roles' sessions; without it only one's own and the slots
-- cost: one look at the running sessions, slots and prepared transactions
-- columns: holder (what keeps it, in words), held_transactions (how many transactions back), held_s (seconds, null:
--   not recorded)
SELECT holder, held_transactions::int8, held_s::int8
FROM (
    SELECT
        pg_catalog.format('session %s of %s (%s), %s', a.pid, a.usename,
            coalesce(nullif(a.application_name, ''), 'no application name'), coalesce(a.state, a.backend_type)) AS holder,
        pg_catalog.age(coalesce(a.backend_xmin, a.backend_xid)) AS held_transactions,
        extract(epoch FROM pg_catalog.clock_timestamp() - coalesce(a.xact_start, a.backend_start)) AS held_s
    FROM pg_catalog.pg_stat_activity a
    WHERE coalesce(a.backend_xmin, a.backend_xid) IS NOT NULL
      -- Snapshots of other databases do not matter here; those of walsenders (datname is null) do.
      AND (a.datname IS NULL OR a.datname = pg_catalog.current_database())
      AND a.pid <> pg_catalog.pg_backend_pid()
      -- A vacuum does not hold another one back.
      AND a.backend_type <> 'autovacuum worker'
    UNION ALL
    SELECT pg_catalog.format('replication slot %I', s.slot_name), pg_catalog.age(s.xmin), NULL
    FROM pg_catalog.pg_replication_slots s
    WHERE s.xmin IS NOT NULL
    UNION ALL
    SELECT pg_catalog.format('prepared transaction %L of %I', p.gid, p.owner), pg_catalog.age(p.transaction),
           extract(epoch FROM pg_catalog.clock_timestamp() - p.prepared)
    FROM pg_catalog.pg_prepared_xacts p
    WHERE p.database = pg_catalog.current_database()
) h
ORDER BY held_transactions DESC
LIMIT 5
