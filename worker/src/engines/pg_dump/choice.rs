//! Which databases go into a logical backup, and why the others do not.

use postgres::databases::Database;
use proto::backup::SkippedDatabase;
use proto::job::PgDump;
use proto::{Action, Code, Failure};

/// What is dumped and what is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) dumped: Vec<Database>,
    /// Not those that were excluded, or not asked for.
    pub(super) skipped: Vec<SkippedDatabase>,
    /// How many databases are not dumped that have something in them, whoever left them out.
    pub(super) left_out: u64,
}

/// Chooses among the databases of a server.
pub(super) fn choose(task: &PgDump, databases: Vec<Database>) -> Result<Choice, Failure> {
    for pattern in &task.databases {
        if !databases.iter().any(|database| pattern.fits(&database.name)) {
            let there: Vec<&str> =
                databases.iter().map(|database| database.name.as_str()).take(20).collect();
            return Err(Failure::new(
                Code::RequestInvalid,
                Action::FixConfig,
                format!("no database fits '{pattern}', which was to be backed up"),
            )
            .with_hint(format!("The server has: {}.", there.join(", "))));
        }
    }
    let mut choice = Choice { dumped: Vec::new(), skipped: Vec::new(), left_out: 0 };
    for database in databases {
        let name = &database.name;
        let asked = task.databases.is_empty() || task.databases.iter().any(|p| p.fits(name));
        if !asked || task.exclude.iter().any(|pattern| pattern.fits(name)) {
            choice.left_out += u64::from(has_something(&database));
            continue;
        }
        let why = if database.is_invalid {
            Some("its creation or its removal did not finish; drop it")
        } else if !database.allows_connections {
            Some("it allows no connections")
        } else {
            None
        };
        match why {
            None => choice.dumped.push(database),
            Some(why) => {
                choice.left_out += u64::from(has_something(&database));
                // Whoever asks for it by name must not be told that it worked.
                if let Some(named) = task.databases.iter().find(|p| p.is_plain() && p.fits(name)) {
                    let message = format!("database {named} cannot be dumped: {why}");
                    return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
                        .with_hint("Leave it out, or make it accessible."));
                }
                let skipped = SkippedDatabase { database: name.clone(), why: why.to_owned() };
                choice.skipped.push(skipped);
            }
        }
    }
    if choice.dumped.is_empty() {
        let message = "there is no database to be dumped: the patterns leave none";
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint("Give other patterns: --database and --exclude-database."));
    }
    Ok(choice)
}

/// The template that nobody connects to is as every server makes it, and of one that is half made nothing can be had.
fn has_something(database: &Database) -> bool {
    database.name.as_str() != "template0" && !database.is_invalid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(name: &str) -> Database {
        Database {
            name: name.parse().unwrap(),
            allows_connections: !["template0", "closed"].contains(&name),
            is_invalid: name == "half",
            size_bytes: Some(1),
            encoding: "UTF8".to_owned(),
            collate: "C".to_owned(),
            ctype: "C".to_owned(),
            collation: "c".to_owned(),
        }
    }

    fn task(databases: &[&str], exclude: &[&str]) -> PgDump {
        let patterns = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
        PgDump { databases: patterns(databases), exclude: patterns(exclude) }
    }

    fn chosen(task: &PgDump) -> Result<(Vec<String>, Vec<String>, u64), Failure> {
        let all = ["half", "postgres", "shop", "shop_test", "template0", "template1"];
        let choice = choose(task, all.map(database).to_vec())?;
        Ok((
            choice.dumped.iter().map(|row| row.name.to_string()).collect(),
            choice.skipped.iter().map(|row| row.database.to_string()).collect(),
            choice.left_out,
        ))
    }

    #[test]
    fn what_is_left_out_is_said_and_what_was_asked_for_by_name_is_not_left_out() {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let (dumped, skipped, left_out) = chosen(&task(&[], &[])).unwrap();
        assert_eq!(dumped, owned(&["postgres", "shop", "shop_test", "template1"]));
        assert_eq!((skipped, left_out), (owned(&["half", "template0"]), 0), "nothing is in these");
        let (dumped, skipped, left_out) = chosen(&task(&["shop*"], &["*_test"])).unwrap();
        assert_eq!((dumped, skipped, left_out), (owned(&["shop"]), vec![], 3));
        let closed = choose(&task(&[], &[]), ["closed", "shop"].map(database).to_vec()).unwrap();
        assert_eq!((closed.dumped.len(), closed.left_out), (1, 1), "its rows are in no dump");
        for bad in [task(&["sho"], &[]), task(&["shop", "half"], &[]), task(&[], &["*"])] {
            assert_eq!(chosen(&bad).unwrap_err().code, Code::RequestInvalid, "{bad:?}");
        }
    }
}
