-- name: table_size
-- purpose: the bytes of one table's main file. On its own because it takes a weak lock: it waits for a session that
--   holds the table exclusively, within lock_timeout.
-- versions: 14 to 18
-- rights: none
-- cost: one stat() per gigabyte of the table
-- columns: size_bytes (null: the table is gone)
SELECT pg_catalog.pg_relation_size($1::oid)::int8 AS size_bytes
