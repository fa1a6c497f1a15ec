//! What people run from cron: the scripts in `scripts/backup`, as they are, against real servers.

mod desk;
mod receiver;
mod scripts;
