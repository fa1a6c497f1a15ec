-- The catalog: one text for SQLite and PostgreSQL. Ids, enums and JSON are TEXT, times BIGINT milliseconds named
-- *_at_ms, booleans 0 or 1. No foreign keys: a catalog that was lost and began anew must accept a report that names
-- a job it does not know.

CREATE TABLE leader (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    epoch BIGINT NOT NULL,
    coordinator TEXT NOT NULL,
    until_at_ms BIGINT NOT NULL,
    next_token BIGINT NOT NULL
);
INSERT INTO leader (id, epoch, coordinator, until_at_ms, next_token) VALUES (1, 0, '', 0, 1);

CREATE TABLE workers (
    name TEXT PRIMARY KEY,
    site TEXT NOT NULL,
    public_key TEXT NOT NULL,
    issued_at_ms BIGINT NOT NULL,
    boot TEXT,
    former_boots TEXT NOT NULL,
    seq BIGINT NOT NULL,
    seen_at_ms BIGINT,
    every_ms BIGINT NOT NULL,
    urgent_free BIGINT NOT NULL,
    routine_free BIGINT NOT NULL,
    draining BIGINT NOT NULL,
    offers TEXT
);

CREATE TABLE clusters (
    name TEXT PRIMARY KEY,
    registered_at_ms BIGINT NOT NULL,
    seen_at_ms BIGINT,
    site TEXT,
    worker TEXT,
    repository TEXT,
    repository_location TEXT,
    system_identifier TEXT,
    announced_identifier TEXT,
    server_version_num BIGINT,
    labels TEXT NOT NULL,
    problem TEXT,
    paused BIGINT NOT NULL
);

CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    idempotency_key TEXT UNIQUE,
    request_digest TEXT,
    cluster TEXT NOT NULL,
    kind TEXT NOT NULL,
    lane TEXT NOT NULL,
    task TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    only_worker TEXT,
    rather_not TEXT,
    refused TEXT NOT NULL,
    requested_by TEXT NOT NULL,
    version BIGINT NOT NULL,
    submitted_at_ms BIGINT NOT NULL,
    not_before_at_ms BIGINT NOT NULL,
    not_after_at_ms BIGINT,
    deadline_ms BIGINT NOT NULL,
    attempts_max BIGINT NOT NULL,
    attempts_used BIGINT NOT NULL,
    traceparent TEXT NOT NULL,
    verify TEXT,
    follows TEXT,
    retry_of TEXT,
    probe_of TEXT,
    attempt TEXT,
    last_attempt TEXT,
    started_at_ms BIGINT,
    ended_at_ms BIGINT,
    cancel_asked_at_ms BIGINT,
    failure TEXT,
    outcome TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, lane, id);
CREATE INDEX jobs_by_cluster ON jobs (cluster, id);
CREATE INDEX jobs_by_follows ON jobs (follows);

CREATE TABLE attempts (
    id TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    cluster TEXT NOT NULL,
    kind TEXT NOT NULL,
    class TEXT NOT NULL,
    lane TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    predecessor TEXT,
    queue TEXT NOT NULL,
    target_worker TEXT,
    target_site TEXT,
    created_at_ms BIGINT NOT NULL,
    ticket_until_at_ms BIGINT NOT NULL,
    tickets_sent BIGINT NOT NULL,
    worker TEXT,
    boot TEXT,
    nonce TEXT,
    token BIGINT,
    grant_text TEXT,
    granted_at_ms BIGINT,
    lease_until_at_ms BIGINT,
    listed_at_ms BIGINT,
    progress TEXT,
    started_at_ms BIGINT,
    ended_at_ms BIGINT,
    suspect_at_ms BIGINT,
    probe TEXT,
    probe_at_ms BIGINT,
    failure TEXT
);
CREATE INDEX attempts_by_job ON attempts (job, id);
CREATE INDEX attempts_by_state ON attempts (state, queue);
CREATE INDEX attempts_by_worker ON attempts (worker, state);
-- One job of a class at a time on a cluster, whatever the code above believes.
CREATE UNIQUE INDEX attempts_one_of_a_class ON attempts (cluster, class) WHERE state IN ('running', 'suspect');

-- Tickets on their way to the broker; gone once it has them.
CREATE TABLE outbox (
    attempt TEXT PRIMARY KEY,
    routing_key TEXT NOT NULL,
    body TEXT NOT NULL,
    traceparent TEXT NOT NULL,
    urgent BIGINT NOT NULL,
    submitted_at_ms BIGINT NOT NULL
);

CREATE TABLE steps (
    attempt TEXT NOT NULL,
    number BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    name TEXT NOT NULL,
    span_id TEXT NOT NULL,
    started_at_ms BIGINT NOT NULL,
    ended_at_ms BIGINT,
    failed BIGINT NOT NULL,
    figures TEXT NOT NULL,
    PRIMARY KEY (attempt, number)
);

CREATE TABLE backups (
    id TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    cluster TEXT NOT NULL,
    worker TEXT NOT NULL,
    stopped_at_ms BIGINT NOT NULL,
    recorded_at_ms BIGINT NOT NULL,
    outcome TEXT NOT NULL
);
CREATE INDEX backups_by_cluster ON backups (cluster, stopped_at_ms);

CREATE TABLE proofs (
    id TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    backup TEXT NOT NULL,
    cluster TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    recorded_at_ms BIGINT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX proofs_by_backup ON proofs (backup, at_ms);
CREATE INDEX proofs_by_cluster ON proofs (cluster, at_ms);

CREATE TABLE events (
    id TEXT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    name TEXT NOT NULL,
    cluster TEXT,
    job TEXT,
    worker TEXT,
    message TEXT NOT NULL
);

-- Tokens are kept as SHA-256: who reads the catalog cannot use them.
CREATE TABLE enrolment_tokens (
    digest TEXT PRIMARY KEY,
    worker TEXT NOT NULL,
    site TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL,
    used_at_ms BIGINT,
    used_key TEXT
);

CREATE TABLE api_tokens (
    digest TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL
);
