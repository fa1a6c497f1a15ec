//! What a logical backup has, by its own tables of contents: read from the repository, not from what was written into it.

use postgres::clients::Clients;
use proto::backup::LogicalFacts;
use proto::failure::chain;
use proto::{Action, Code, DatabaseName, Failure};
use repository::Backup;

use super::children::feed;
use super::{GLOBALS, read_text};
use crate::context::JobContext;

/// What is kept of a table of contents. Extensions stand near its beginning, behind the schemas.
const LIST_BYTES: usize = 4 << 20;
/// How `pg_dumpall` ends: a text that was cut has something else there.
const GLOBALS_END: &str = "PostgreSQL database cluster dump complete";

/// What is in a logical backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// The statements that make roles and tablespaces.
    pub globals: Vec<String>,
    /// Extensions that its databases ask for.
    pub extensions: Vec<(DatabaseName, String)>,
}

/// Has `pg_restore` find the table of contents of every dump, and looks that the roles are there to the last line.
pub async fn contents(
    cx: &JobContext,
    backup: &Backup,
    clients: &Clients,
    logical: &LogicalFacts,
) -> Result<Contents, Failure> {
    let list = clients.pg_restore().arg("--list");
    let mut extensions = Vec::new();
    for dump in &logical.databases {
        let content = backup.file_content(dump.file.as_bytes()).await?;
        let what = format!("what is stored of database {}", dump.database);
        let listed = cx.until_stopped(feed(&what, &list, content.stream(), LIST_BYTES)).await??;
        let names = listed.lines().filter_map(extension);
        extensions.extend(names.map(|name| (dump.database.clone(), name.to_owned())));
    }
    let content = backup.file_content(GLOBALS.as_bytes()).await?;
    let text = cx.until_stopped(read_text(&content)).await??;
    let globals = postgres::globals::statements(&text)
        .map_err(|error| not_whole(&format!(": failed to {}", chain(&error))))?;
    if !text.contains(GLOBALS_END) {
        return Err(not_whole(" does not end as it should"));
    }
    Ok(Contents { globals, extensions })
}

fn not_whole(why: &str) -> Failure {
    let message = format!("what pg_dumpall wrote of roles and tablespaces{why}");
    Failure::new(Code::DumpFailed, Action::Retry, message)
        .with_hint("Nothing was committed. Look at the programs in use and at this machine.")
}

/// The extension of a line of a table of contents: `2; 3079 16385 EXTENSION - pg_trgm `.
fn extension(line: &str) -> Option<&str> {
    let (_, entry) = line.split_once("; ")?;
    let mut words = entry.splitn(3, ' ');
    let (_, _, rest) = (words.next()?, words.next()?, words.next()?);
    Some(rest.strip_prefix("EXTENSION - ")?.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_found_in_a_table_of_contents() {
        let list = ";\n; Selected TOC Entries:\n;\n6; 2615 16384 SCHEMA - shop boss\n\
                    2; 3079 16385 EXTENSION - pg_trgm \n4321; 0 0 COMMENT - EXTENSION pg_trgm \n\
                    7; 3079 16390 EXTENSION - uuid-ossp \n9; 1259 1 TABLE shop EXTENSION - x boss\n";
        let found: Vec<&str> = list.lines().filter_map(extension).collect();
        assert_eq!(found, ["pg_trgm", "uuid-ossp"]);
    }
}
