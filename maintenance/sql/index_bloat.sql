-- name: index_bloat
-- purpose: how much larger each B-tree is than its entries need, estimated from statistics alone; for reports.
--   An entry takes its line pointer (4 bytes), its header (8 bytes, 16 where a key can be NULL) and its keys (average
--   width from pg_stats, rounded up to 8); a leaf page gives its size less 24 and 16 bytes, to the index's fillfactor
--   (90). One page is the index's own, inner pages are about one in 200 and not counted.
--   Equal keys are stored once from PostgreSQL 13 on, so an index with many of them is smaller than "needed", and a
--   bloated one of that kind does not show. Comparing an index with its own size after its last rebuild is better.
-- versions: 14 to 18
-- rights: SELECT on the tables (pg_read_all_data); without, the index is not estimable
-- cost: catalogs and statistics only; about 2 s for 2,500 indexes
-- columns: oid, schema, name, table_oid, table_name, size_bytes (null: locked exclusively), needed_bytes (null: not
--   estimable), is_valid
WITH exclusive AS MATERIALIZED (
    SELECT DISTINCT l.relation
    FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = pg_catalog.current_database()
    WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
),
subject AS (
    SELECT
        i.oid, ins.nspname AS schema, i.relname AS name, t.oid AS table_oid,
        tns.nspname AS table_schema, t.relname AS table_name, x.indkey, x.indnatts, x.indisvalid, x.indisprimary,
        i.reltuples,
        CASE WHEN el.relation IS NULL THEN pg_catalog.pg_relation_size(i.oid) END AS size_bytes,
        coalesce((SELECT o.option_value::float8 FROM pg_catalog.pg_options_to_table(i.reloptions) o
                  WHERE o.option_name = 'fillfactor'), 90) / 100 AS fill,
        pg_catalog.current_setting('block_size')::float8 AS page_bytes
    FROM pg_catalog.pg_index x
    JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    JOIN pg_catalog.pg_namespace ins ON ins.oid = i.relnamespace
    JOIN pg_catalog.pg_class t ON t.oid = x.indrelid
    JOIN pg_catalog.pg_namespace tns ON tns.oid = t.relnamespace
    LEFT JOIN exclusive el ON el.relation IN (i.oid, t.oid)
    WHERE i.relkind = 'i'
      AND i.relam = (SELECT am.oid FROM pg_catalog.pg_am am WHERE am.amname = 'btree')
      AND t.relkind IN ('r', 'm')
      AND i.relpersistence <> 't'
      AND tns.nspname NOT IN ('pg_catalog', 'information_schema')
),
width AS (
    SELECT s.oid, count(p.attname) AS known_keys,
           sum((1 - p.null_frac) * p.avg_width) AS data_bytes, max(p.null_frac) AS null_frac
    FROM subject s
    CROSS JOIN LATERAL unnest(s.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
    -- The statistics of a plain column belong to the table; those of an expression to the index itself.
    LEFT JOIN pg_catalog.pg_attribute a
           ON a.attrelid = CASE WHEN k.attnum = 0 THEN s.oid ELSE s.table_oid END
          AND a.attnum = CASE WHEN k.attnum = 0 THEN k.position ELSE k.attnum END
    LEFT JOIN pg_catalog.pg_stats p
           ON p.schemaname = CASE WHEN k.attnum = 0 THEN s.schema ELSE s.table_schema END
          AND p.tablename = CASE WHEN k.attnum = 0 THEN s.name ELSE s.table_name END
          AND p.attname = a.attname
          AND NOT p.inherited
    GROUP BY s.oid
)
SELECT
    s.oid,
    s.schema::text AS schema,
    s.name::text AS name,
    s.table_oid,
    s.table_name::text AS table_name,
    s.size_bytes::int8 AS size_bytes,
    CASE WHEN s.reltuples >= 0 AND w.known_keys = s.indnatts THEN
        (s.page_bytes * (1 + ceil(s.reltuples / greatest(floor(
            (s.page_bytes - 24 - 16) * s.fill
            / (4 + CASE WHEN w.null_frac > 0 THEN 16 ELSE 8 END + ceil(w.data_bytes::float8 / 8) * 8)), 1))))::int8
    END AS needed_bytes,
    s.indisvalid AS is_valid
FROM subject s
JOIN width w ON w.oid = s.oid
ORDER BY s.oid
