-- name: table_bloat
-- purpose: how much larger each table's main file is than its rows need, estimated from statistics alone.
--   The need is computed as if the rows were written anew, page by page: a row takes its line pointer (4 bytes), its
--   header (23 bytes, plus one bit a column where a row can hold NULLs, rounded up to 8) and its data (average width
--   of the columns from pg_stats, rounded up to 8); a page gives its size less 24 bytes, to the table's fillfactor.
--   What the estimate does not see: padding between columns and values cut in pages that are toasted at the next
--   write. It is off by a few percent, and by 20 in bad cases; a ratio of 2 is never padding. TOAST is not judged.
-- versions: 14 to 18
-- rights: SELECT on the tables (pg_read_all_data): pg_stats hides columns one may not read, and the table then counts
--   as not estimable
-- cost: catalogs and statistics only; tables are not read. pg_relation_size waits for exclusive locks, so tables
--   that somebody holds or wants exclusively are not asked. About 2 s for 2,500 tables
-- columns: oid, schema, name, owner, may_maintain, is_partition, size_bytes (null: locked exclusively), live_rows,
--   dead_rows, needed_bytes (null: not estimable), vacuumed_at_ms (Unix milliseconds, null: not recorded)
WITH exclusive AS MATERIALIZED (
    SELECT DISTINCT l.relation
    FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = pg_catalog.current_database()
    WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
),
width AS (
    -- Own rows only (not inherited): those are what lies in this table's file.
    SELECT s.schemaname, s.tablename, count(*) AS columns,
           sum((1 - s.null_frac) * s.avg_width) AS data_bytes, max(s.null_frac) AS null_frac
    FROM pg_catalog.pg_stats s
    WHERE NOT s.inherited
    GROUP BY s.schemaname, s.tablename
),
subject AS (
    SELECT
        c.oid, n.nspname, c.relname, c.relowner, c.relispartition, c.relhasindex,
        CASE WHEN x.relation IS NULL THEN pg_catalog.pg_relation_size(c.oid) END AS size_bytes,
        coalesce(pg_catalog.pg_stat_get_live_tuples(c.oid), 0) AS counted_live,
        coalesce(pg_catalog.pg_stat_get_dead_tuples(c.oid), 0) AS dead_rows,
        coalesce(pg_catalog.pg_stat_get_mod_since_analyze(c.oid), 0) AS changes,
        c.reltuples,
        coalesce((SELECT o.option_value::float8 FROM pg_catalog.pg_options_to_table(c.reloptions) o
                  WHERE o.option_name = 'fillfactor'), 100) / 100 AS fill,
        (SELECT count(*) FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
        w.columns AS known_columns, w.data_bytes, w.null_frac,
        pg_catalog.current_setting('block_size')::float8 AS page_bytes
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN exclusive x ON x.relation = c.oid
    LEFT JOIN width w ON w.schemaname = n.nspname AND w.tablename = c.relname
    WHERE c.relkind IN ('r', 'm')
      AND c.relpersistence <> 't'
      -- Another access method lays its pages out in another way.
      AND c.relam = (SELECT am.oid FROM pg_catalog.pg_am am WHERE am.amname = 'heap')
      AND n.nspname NOT IN ('pg_catalog', 'information_schema')
),
measure AS (
    SELECT t.*,
        -- Statistics of every column, or no estimate. A table never analyzed has none.
        (t.reltuples >= 0 AND t.known_columns = t.columns AND t.columns > 0) AS estimable,
        greatest(floor((t.page_bytes - 24) * t.fill / (
            4
              + ceil((23 + CASE WHEN t.null_frac > 0 THEN ceil(t.columns / 8.0) ELSE 0 END)::float8 / 8) * 8
              + ceil(t.data_bytes::float8 / 8) * 8)), 1) AS rows_per_page
    FROM subject t
),
-- How many rows live. The counter follows every INSERT and DELETE, but a session that loads and analyzes counts its
-- rows twice, and a reset of the statistics forgets them all. Live and dead rows that would not fit into the file
-- (by a fifth) are such a case: then the rows of the last ANALYZE less those that died since must do.
counted AS (
    SELECT m.*,
        CASE WHEN m.counted_live + m.dead_rows > 0
              AND m.counted_live + m.dead_rows <= 1.2 * m.rows_per_page * m.size_bytes / m.page_bytes
             THEN m.counted_live::float8
             ELSE greatest(m.reltuples::float8 - least(m.dead_rows, m.changes), 0) END AS live_rows
    FROM measure m
)
SELECT
    m.oid,
    m.nspname::text AS schema,
    m.relname::text AS name,
    pg_catalog.pg_get_userbyid(m.relowner)::text AS owner,
    (pg_catalog.pg_has_role(m.relowner, 'USAGE')
        OR pg_catalog.pg_has_role(d.datdba, 'USAGE')
        OR CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 170000
                THEN pg_catalog.has_table_privilege(m.oid, 'MAINTAIN') ELSE false END) AS may_maintain,
    m.relispartition AS is_partition,
    m.size_bytes::int8 AS size_bytes,
    m.live_rows::int8 AS live_rows,
    m.dead_rows::int8 AS dead_rows,
    CASE WHEN m.estimable THEN
        (m.page_bytes * ceil(m.live_rows / m.rows_per_page))::int8
    END AS needed_bytes,
    (extract(epoch FROM greatest(
        pg_catalog.pg_stat_get_last_vacuum_time(m.oid),
        pg_catalog.pg_stat_get_last_autovacuum_time(m.oid))) * 1000)::int8 AS vacuumed_at_ms
FROM counted m
JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
ORDER BY m.oid
