-- The lineage whose archive was seen to have a heartbeat: a proof asks for it from then on, also when that archive ends before it. What
-- is here is marked when its archive is seen next.
ALTER TABLE heartbeats ADD COLUMN archived_in TEXT;
CREATE INDEX heartbeats_not_archived ON heartbeats (cluster, system_identifier, timeline, ended_lsn) WHERE archived_in IS NULL;
