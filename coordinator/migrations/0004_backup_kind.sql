-- Physical or logical. A cluster is judged by its newest physical backup, and by a logical one where there is no other.
ALTER TABLE backups ADD COLUMN kind TEXT NOT NULL DEFAULT 'physical';
