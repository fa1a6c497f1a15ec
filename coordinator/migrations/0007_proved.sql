-- What the proofs of a backup say of it together: 'none' before one restored it, 'proved', or 'bad' since one found something
-- wrong. Backups that are here already are taken by their records, which the program wrote itself.
ALTER TABLE backups ADD COLUMN shown TEXT NOT NULL DEFAULT 'none';
UPDATE backups SET shown = 'proved' WHERE EXISTS (
    SELECT 1 FROM proofs WHERE proofs.backup = backups.id AND (
        record LIKE '%"level_reached":"L3","passed":true%'
        OR record LIKE '%"level_reached":"L4","passed":true%'
        OR record LIKE '%"level_reached":"L5","passed":true%'));
UPDATE backups SET shown = 'bad' WHERE EXISTS (
    SELECT 1 FROM proofs WHERE proofs.backup = backups.id AND record LIKE '%"outcome":"failed"%'
        AND NOT EXISTS (SELECT 1 FROM proofs AS later WHERE later.backup = proofs.backup AND later.at_ms > proofs.at_ms));
CREATE INDEX backups_by_proof ON backups (cluster, shown, stopped_at_ms);
