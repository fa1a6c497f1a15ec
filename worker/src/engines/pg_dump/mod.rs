//! Logical backups: `pg_dump` for each database, `pg_dumpall` for what belongs to none, straight into the repository.
//!
//! What makes one right: every program ended with exit code 0; what it wrote was read as an archive to its end while it was
//! stored, and has all that its contents name; and `pg_restore` lists what the repository gives back. Only then COMMIT.

mod backup;
mod children;
mod choice;
mod contents;
mod counting;
mod failure;
mod lists;
mod load;
mod parallel;
mod part;
mod rehearse;
mod snapshots;
mod source;

use backup::read_text;
pub use backup::{BackupRequest, back_up};
pub use contents::{Contents, contents};
pub use load::{LoadOutcome, LoadPlan, LoadRequest, load, plan};
pub use rehearse::{Rehearsal, Rehearsed, rehearse, was_killed};

/// The entry with roles, memberships and tablespaces.
pub const GLOBALS: &str = "globals.sql";

/// The path of a database's dump: its name, in which everything but plain characters is `%XX`.
pub fn dump_path(database: &proto::DatabaseName) -> String {
    use std::fmt::Write as _;

    let mut path = String::new();
    for (at, byte) in database.as_str().bytes().enumerate() {
        let plain =
            byte.is_ascii_alphanumeric() || b"_-".contains(&byte) || (byte == b'.' && at > 0);
        if plain {
            path.push(char::from(byte));
        } else {
            let _ = write!(path, "%{byte:02X}");
        }
    }
    path.push_str(".dump");
    path
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_has_a_path_of_its_own_that_is_one_component() {
        let names = ["shop", "..", ".", "a/b", "a%2Fb", "é", "a\nb", "\"", "globals.sql", "-x"];
        let paths: BTreeSet<String> =
            names.iter().map(|name| dump_path(&name.parse().unwrap())).collect();
        assert_eq!(paths.len(), names.len());
        assert!(paths.iter().all(|path| !path.starts_with('.') && !path.contains(['/', '\n'])));
        assert_eq!(dump_path(&"a/b é".parse().unwrap()), "a%2Fb%20%C3%A9.dump");
        let longest = dump_path(&"é".repeat(31).parse().unwrap());
        assert!(longest.len() <= 255);
    }
}
