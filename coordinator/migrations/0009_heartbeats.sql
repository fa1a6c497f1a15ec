-- Commits that workers made in their servers, for proofs to ask restored servers for. When a worker's was heard is by the
-- coordinator's clock, everything else by the server's own; a landmark is the first that was heard in its hour, and stays longer.
CREATE TABLE heartbeats (
    cluster TEXT NOT NULL,
    system_identifier TEXT NOT NULL,
    timeline BIGINT NOT NULL,
    ended_lsn BIGINT NOT NULL,
    transaction_number BIGINT NOT NULL,
    ended_at_ms BIGINT NOT NULL,
    heard_at_ms BIGINT NOT NULL,
    landmark BIGINT NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (cluster, system_identifier, timeline, ended_lsn, transaction_number)
);
CREATE INDEX heartbeats_by_age ON heartbeats (cluster, landmark, heard_at_ms);
