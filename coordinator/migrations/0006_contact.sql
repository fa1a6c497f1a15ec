-- Since when the workers of a cluster have not been silent for longer than they may.
ALTER TABLE clusters ADD COLUMN contact_since_at_ms BIGINT;
