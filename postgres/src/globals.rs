//! What `pg_dumpall --globals-only` says, statement by statement: roles, memberships, tablespaces. It is never given to
//! `psql`, which runs commands that a text can hold; a line of such a command is dropped where it is one of `pg_dumpall`'s own,
//! and an error otherwise.

use crate::error::Error;
use crate::session::Session;

/// What was done of the globals.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GlobalsRun {
    /// Roles that were created.
    pub roles_created: u64,
    /// Roles that were there already; neither their passwords nor their attributes were touched.
    pub roles_kept: Vec<String>,
    /// Tablespaces that were created.
    pub tablespaces_created: u64,
    /// Tablespaces that were there already.
    pub tablespaces_kept: Vec<String>,
}

/// A statement, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    CreateRole(String),
    AlterRole(String),
    CreateTablespace(String),
    AlterTablespace(String),
    Other,
}

/// The statements of a dump of globals, without comments.
pub fn statements(text: &str) -> Result<Vec<String>, Error> {
    let wrong = |what: &str| Error::Answer {
        what: "read the roles and tablespaces".to_owned(),
        answer: what.to_owned(),
    };
    let mut statements = Vec::new();
    let mut statement = String::new();
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '-' if rest.peek() == Some(&'-') => {
                rest.by_ref().find(|&c| c == '\n');
            }
            '\\' if statement.trim().is_empty() => {
                let command: String = rest.by_ref().take_while(|&c| c != '\n').collect();
                let word = command.split_whitespace().next().unwrap_or_default();
                if !matches!(word, "restrict" | "unrestrict") {
                    return Err(wrong("there is a command of psql among the statements"));
                }
            }
            '\'' | '"' => {
                let escapes = next == '\'' && statement.ends_with(['E', 'e']);
                statement.push(next);
                loop {
                    let inner = rest.next().ok_or_else(|| wrong("a quotation does not end"))?;
                    statement.push(inner);
                    if inner == '\\' && escapes {
                        statement.extend(rest.next());
                    } else if inner == next {
                        if rest.peek() != Some(&next) {
                            break;
                        }
                        statement.extend(rest.next());
                    }
                }
            }
            ';' => {
                let done = std::mem::take(&mut statement).trim().to_owned();
                if !done.is_empty() {
                    statements.push(done);
                }
            }
            other => statement.push(other),
        }
    }
    if statement.trim().is_empty() {
        Ok(statements)
    } else {
        Err(wrong("the last statement does not end"))
    }
}

fn kind(statement: &str) -> Kind {
    let after = |prefix: &str| statement.strip_prefix(prefix).and_then(first_identifier);
    if let Some(role) = after("CREATE ROLE ") {
        return Kind::CreateRole(role);
    }
    if let Some(role) = after("ALTER ROLE ").or_else(|| after("COMMENT ON ROLE ")) {
        return Kind::AlterRole(role);
    }
    if let Some(space) = after("CREATE TABLESPACE ") {
        return Kind::CreateTablespace(space);
    }
    let alters = ["ALTER TABLESPACE ", "COMMENT ON TABLESPACE "];
    match alters.into_iter().find_map(after) {
        Some(space) => Kind::AlterTablespace(space),
        None => Kind::Other,
    }
}

/// The name at the beginning of a text, unquoted.
fn first_identifier(text: &str) -> Option<String> {
    let Some(quoted) = text.strip_prefix('"') else {
        return text.split([' ', ';', '\n']).next().map(str::to_owned);
    };
    let mut name = String::new();
    let mut rest = quoted.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '"' if rest.peek() == Some(&'"') => name.extend(rest.next()),
            '"' => return Some(name),
            other => name.push(other),
        }
    }
    None
}

/// The roles and tablespaces that a dump of globals would create.
pub fn named(statements: &[String]) -> (Vec<String>, Vec<String>) {
    let (mut roles, mut tablespaces) = (Vec::new(), Vec::new());
    for statement in statements {
        match kind(statement) {
            Kind::CreateRole(role) => roles.push(role),
            Kind::CreateTablespace(space) => tablespaces.push(space),
            Kind::AlterRole(_) | Kind::AlterTablespace(_) | Kind::Other => {}
        }
    }
    (roles, tablespaces)
}

impl Session {
    /// Which of these roles and tablespaces the server has.
    pub async fn existing_globals(
        &self,
        roles: &[String],
        tablespaces: &[String],
    ) -> Result<(Vec<String>, Vec<String>), Error> {
        let what = "look for roles and tablespaces";
        let names = |rows: Vec<tokio_postgres::Row>| rows.iter().map(|row| row.get(0)).collect();
        let sql = "SELECT rolname::text FROM pg_roles WHERE rolname::text = ANY ($1) ORDER BY 1";
        let there = names(self.query(what, sql, &[&roles]).await?);
        let sql =
            "SELECT spcname::text FROM pg_tablespace WHERE spcname::text = ANY ($1) ORDER BY 1";
        Ok((there, names(self.query(what, sql, &[&tablespaces]).await?)))
    }

    /// Runs a dump of globals. What is there already is left as it is, so it may be run again; the first statement that the
    /// server refuses ends it.
    pub async fn run_globals(&self, statements: &[String]) -> Result<GlobalsRun, Error> {
        let (roles, tablespaces) = named(statements);
        let (roles_kept, tablespaces_kept) = self.existing_globals(&roles, &tablespaces).await?;
        let mut run = GlobalsRun { roles_kept, tablespaces_kept, ..GlobalsRun::default() };
        for statement in statements {
            match kind(statement) {
                Kind::CreateRole(role) | Kind::AlterRole(role)
                    if run.roles_kept.contains(&role) =>
                {
                    continue;
                }
                Kind::CreateTablespace(space) | Kind::AlterTablespace(space)
                    if run.tablespaces_kept.contains(&space) =>
                {
                    continue;
                }
                Kind::CreateRole(_) => run.roles_created += 1,
                Kind::CreateTablespace(_) => run.tablespaces_created += 1,
                Kind::AlterRole(_) | Kind::AlterTablespace(_) | Kind::Other => {}
            }
            self.run("create roles and tablespaces", statement).await?;
        }
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_cut_where_they_end_and_nowhere_else() {
        let text = "--\n-- a; comment's\n--\n\n\\restrict Ab1\n\nSET x = 'a;''b';\nCREATE ROLE \"o;\"\"\n-- no\";\n\
                    ALTER ROLE r SET y TO E'\\\\\\'; z';\n\\unrestrict Ab1\n";
        let cut = statements(text).unwrap();
        assert_eq!(
            cut,
            [
                "SET x = 'a;''b'",
                "CREATE ROLE \"o;\"\"\n-- no\"",
                "ALTER ROLE r SET y TO E'\\\\\\'; z'"
            ]
        );
        assert_eq!(kind(&cut[1]), Kind::CreateRole("o;\"\n-- no".to_owned()));
        assert_eq!(kind(&cut[2]), Kind::AlterRole("r".to_owned()));
        assert_eq!(named(&cut).0, ["o;\"\n-- no"]);
    }

    #[test]
    fn what_is_cut_off_or_meant_for_psql_is_refused() {
        for text in ["CREATE ROLE a", "CREATE ROLE \"a;\n", "\\! rm -rf /\n", "SET a = 'b;"] {
            assert!(statements(text).is_err(), "{text}");
        }
        assert_eq!(statements("\n-- nothing\n").unwrap(), Vec::<String>::new());
    }
}
