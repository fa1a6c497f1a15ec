-- How the archive of a cluster's WAL stands, as its worker said last.
ALTER TABLE clusters ADD COLUMN wal TEXT;
