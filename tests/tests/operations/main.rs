//! What people run by hand and from cron: the scripts in `scripts/backup` and the runbooks in `docs/runbooks`, as they are,
//! against real servers.

mod desk;
mod receiver;
mod runbooks;
mod scripts;
