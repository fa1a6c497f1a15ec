//! What `pg_dumpall --globals-only` says, statement by statement: roles, memberships, tablespaces. It is never given to
//! `psql`, which runs commands that a text can hold; a line of such a command is dropped where it is one of `pg_dumpall`'s own,
//! and an error otherwise.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::error::Error;
use crate::quote;
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
    Some(after_identifier(text)?.0)
}

/// The name at the beginning of a text, unquoted, and what follows it.
fn after_identifier(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', ';', '\n']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut name = String::new();
    let mut rest = quoted.char_indices().peekable();
    while let Some((at, next)) = rest.next() {
        match next {
            '"' if rest.peek().is_some_and(|(_, after)| *after == '"') => {
                rest.next();
                name.push('"');
            }
            '"' => return Some((name, &quoted[at + 1..])),
            other => name.push(other),
        }
    }
    None
}

/// A membership, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Membership<'a> {
    role: String,
    member: String,
    /// The member may grant the role on.
    is_admin: bool,
    grantor: Option<String>,
    /// The statement without who granted it.
    plain: &'a str,
}

fn membership(statement: &str) -> Option<Membership<'_>> {
    let (role, rest) = after_identifier(statement.strip_prefix("GRANT ")?)?;
    let (member, rest) = after_identifier(rest.strip_prefix(" TO ")?)?;
    let (options, grantor) = match rest.split_once(" GRANTED BY ") {
        Some((options, grantor)) => (options, Some(first_identifier(grantor)?)),
        None => (rest, None),
    };
    let plain = &statement[..statement.len() - rest.len() + options.len()];
    let is_admin = options.contains("ADMIN OPTION") || options.contains("ADMIN TRUE");
    Some(Membership { role, member, is_admin, grantor, plain })
}

/// The same statements for a server of version 16 or later. There only the superuser who made the cluster, and members with
/// the admin option, can have granted a membership; what anybody else granted, on an older server or as the superuser who made
/// another cluster, comes from whoever runs the statements.
fn grantable(statements: &[String], bootstrap: &str) -> Vec<String> {
    let mut admins = HashSet::new();
    let mut grantable = Vec::with_capacity(statements.len());
    for statement in statements {
        let Some(Membership { role, member, is_admin, grantor, plain }) = membership(statement)
        else {
            grantable.push(statement.clone());
            continue;
        };
        let stays = grantor.is_none_or(|grantor| {
            grantor == bootstrap || admins.contains(&(role.clone(), grantor))
        });
        grantable.push(if stays { statement.clone() } else { plain.to_owned() });
        if is_admin {
            admins.insert((role, member));
        }
    }
    grantable
}

/// Who made the cluster, as far as its globals tell: `postgres`, where that is a superuser of it, or else its first superuser.
pub fn superuser(statements: &[String]) -> String {
    let superusers = statements.iter().filter_map(|statement| {
        let (role, rest) = after_identifier(statement.strip_prefix("ALTER ROLE ")?)?;
        rest.starts_with(" WITH SUPERUSER ").then_some(role)
    });
    let mut first = None;
    for role in superusers {
        if role == "postgres" {
            return role;
        }
        first.get_or_insert(role);
    }
    first.unwrap_or_else(|| "postgres".to_owned())
}

/// The same statements with every tablespace at a place of the caller's choice: where a dump is only tried out, nothing may be
/// made where the dumped server has its own.
pub fn placed(
    statements: &[String],
    mut place: impl FnMut(usize) -> Result<PathBuf, Error>,
) -> Result<Vec<String>, Error> {
    let mut placed = Vec::with_capacity(statements.len());
    let mut spaces = 0;
    for statement in statements {
        let Some(rest) = statement.strip_prefix("CREATE TABLESPACE ") else {
            placed.push(statement.clone());
            continue;
        };
        let head = before_location(rest).ok_or_else(|| Error::Answer {
            what: "read where a tablespace is".to_owned(),
            answer: statement.clone(),
        })?;
        let path = place(spaces)?;
        spaces += 1;
        let location = quote::literal(&path.display().to_string());
        placed.push(format!("CREATE TABLESPACE {head} LOCATION {location}"));
    }
    Ok(placed)
}

/// Name and owner of a tablespace: what stands before its place.
fn before_location(text: &str) -> Option<&str> {
    let (_, mut rest) = after_identifier(text)?;
    if let Some(owner) = rest.strip_prefix(" OWNER ") {
        rest = after_identifier(owner)?.1;
    }
    rest.starts_with(" LOCATION ").then(|| &text[..text.len() - rest.len()])
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
        let sql = "SELECT current_setting('server_version_num')::int4 >= 160000, \
                   (SELECT rolname::text FROM pg_roles WHERE oid = 10)";
        let row = self.one("ask who made the cluster", sql, &[]).await?;
        let rewritten;
        let statements = if row.get::<_, bool>(0) {
            rewritten = grantable(statements, row.get::<_, Option<&str>>(1).unwrap_or_default());
            &rewritten[..]
        } else {
            statements
        };
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
    fn tablespaces_are_made_only_where_the_caller_says() {
        let text = "CREATE TABLESPACE fast OWNER boss LOCATION '/srv/fast';
            CREATE TABLESPACE \"o LOCATION '\"\"'\" OWNER \"a LOCATION b\" LOCATION E'/x\\\\y';
            CREATE TABLESPACE inside LOCATION '';
            ALTER TABLESPACE fast SET (seq_page_cost=1);";
        let placed = placed(&statements(text).unwrap(), |number| {
            Ok(PathBuf::from(format!("/room's/{number}")))
        });
        assert_eq!(
            placed.unwrap(),
            [
                "CREATE TABLESPACE fast OWNER boss LOCATION '/room''s/0'",
                "CREATE TABLESPACE \"o LOCATION '\"\"'\" OWNER \"a LOCATION b\" LOCATION '/room''s/1'",
                "CREATE TABLESPACE inside LOCATION '/room''s/2'",
                "ALTER TABLESPACE fast SET (seq_page_cost=1)",
            ]
        );
        let odd = ["CREATE TABLESPACE a AT '/srv/a'".to_owned()];
        assert!(super::placed(&odd, |_| Ok(PathBuf::new())).is_err());
    }

    #[test]
    fn the_superuser_is_the_one_whom_memberships_name_as_grantor() {
        let with = |role: &str, rest: &str| format!("ALTER ROLE {role} WITH {rest} INHERIT");
        let of = |statements: &[String]| superuser(statements);
        let (boss, plain) = (with("\"the boss\"", "SUPERUSER"), with("a", "NOSUPERUSER"));
        assert_eq!(of(&[plain.clone(), boss.clone(), with("z", "SUPERUSER")]), "the boss");
        assert_eq!(of(&[boss, with("postgres", "SUPERUSER")]), "postgres");
        assert_eq!(of(&[plain]), "postgres");
    }

    #[test]
    fn a_membership_keeps_its_grantor_where_a_server_of_16_lets_it() {
        let text =
            "GRANT a TO \"the boss\" WITH ADMIN OPTION, INHERIT TRUE GRANTED BY \"old boss\";
            GRANT a TO m WITH INHERIT FALSE GRANTED BY \"the boss\";
            GRANT b TO m GRANTED BY \"the boss\";
            GRANT b TO n GRANTED BY postgres;
            GRANT b TO \"x GRANTED BY y\" WITH ADMIN OPTION;
            GRANT SET ON PARAMETER work_mem TO m";
        let all = statements(&format!("{text};")).unwrap();
        assert_eq!(
            grantable(&all, "postgres"),
            [
                "GRANT a TO \"the boss\" WITH ADMIN OPTION, INHERIT TRUE",
                &all[1],
                "GRANT b TO m",
                &all[3],
                &all[4],
                &all[5],
            ]
        );
    }

    #[test]
    fn what_is_cut_off_or_meant_for_psql_is_refused() {
        for text in ["CREATE ROLE a", "CREATE ROLE \"a;\n", "\\! rm -rf /\n", "SET a = 'b;"] {
            assert!(statements(text).is_err(), "{text}");
        }
        assert_eq!(statements("\n-- nothing\n").unwrap(), Vec::<String>::new());
    }
}
