-- What a cluster can be recovered from, found without looking at all of its history.

-- What a backup is worth to its cluster: 2 a physical one, 1 a dump of all databases, 0 a dump that leaves out some.
ALTER TABLE backups ADD COLUMN worth BIGINT NOT NULL DEFAULT 0;
-- Since when it is known that the repository has it no more, or that somebody gave it up.
ALTER TABLE backups ADD COLUMN gone_at_ms BIGINT;
-- Whether a proof says anything that later ones of its backup do not.
ALTER TABLE proofs ADD COLUMN tells BIGINT NOT NULL DEFAULT 1;
-- Archived WAL that proofs could not replay.
ALTER TABLE clusters ADD COLUMN broken_wal TEXT;
-- What was written before is judged by the program, once, when it opens the catalog.
UPDATE backups SET shown = 'unjudged';

DROP INDEX backups_by_proof;
CREATE INDEX backups_by_worth ON backups (cluster, worth, stopped_at_ms, id) WHERE gone_at_ms IS NULL;
CREATE INDEX backups_by_shown ON backups (cluster, shown, worth, stopped_at_ms, id) WHERE gone_at_ms IS NULL;
CREATE INDEX proofs_that_tell ON proofs (backup, at_ms) WHERE tells = 1;
