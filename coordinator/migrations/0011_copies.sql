-- Where copies of a backup are, as repositories that have it say: JSON, NULL when none ever did.
ALTER TABLE backups ADD COLUMN copies TEXT;
