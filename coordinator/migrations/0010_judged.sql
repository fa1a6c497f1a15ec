-- While coordinators are replaced one after the other, one of before may still lead, and record what it cannot judge. What does not
-- say that this program judged it is judged when a catalog is opened, and when a leader begins; a backup is worth nothing until then.

-- Whether it is written what a backup is worth, by a program that knows.
ALTER TABLE backups ADD COLUMN judged BIGINT NOT NULL DEFAULT 0;
-- Whether a proof was held against its backup, and against archived WAL, by a program that knows.
ALTER TABLE proofs ADD COLUMN taken_in BIGINT NOT NULL DEFAULT 0;
-- What is here: only a program that knows has said that a backup is worth something, and it has seen these proofs, or will when it
-- judges the others.
UPDATE backups SET judged = 1 WHERE worth > 0 AND shown <> 'unjudged';
UPDATE proofs SET taken_in = 1;

CREATE INDEX backups_not_judged ON backups (id) WHERE judged = 0;
CREATE INDEX proofs_not_taken_in ON proofs (at_ms, id) WHERE taken_in = 0;
