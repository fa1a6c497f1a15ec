//! A [`Target`] in the words of libpq, for PostgreSQL's own client programs: variables of the child's environment, never
//! arguments, which everybody on the machine could read. A password goes into a private file that is gone with the login.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};

use secrecy::ExposeSecret as _;
use tempfile::TempDir;

use crate::error::Error;
use crate::process::Program;
use crate::target::Target;
use crate::tls;

/// The setting of a session by which the server ends it soon after its client is gone.
const NOTICES_DEATH: &str = "-c client_connection_check_interval=2000";

/// How a client program logs in. The password file lives as long as this.
#[derive(Debug)]
pub struct Login {
    variables: Vec<(&'static str, OsString)>,
    password: Option<TempDir>,
}

impl Login {
    /// For the server, role and database of a target; `application_name` shows in `pg_stat_activity`.
    pub fn new(target: &Target, application_name: &str) -> Result<Self, Error> {
        let mut variables: Vec<(&'static str, OsString)> = target
            .libpq_words()
            .into_iter()
            .chain([
                ("PGAPPNAME", application_name.to_owned()),
                // A backend that waits for a lock notices only so that its client was killed.
                ("PGOPTIONS", format!("{} {NOTICES_DEATH}", target.options()).trim().to_owned()),
                // As our own sessions: the rest of what libpq tries by itself would be another connection.
                ("PGGSSENCMODE", "disable".to_owned()),
            ])
            .map(|(name, value)| (name, value.into()))
            .collect();
        let paths = [
            ("PGSSLCERT", target.tls().certificate.clone()),
            ("PGSSLKEY", target.tls().key.clone()),
        ];
        for (name, path) in paths {
            variables.extend(path.map(|path| (name, path.into_os_string())));
        }
        match &target.tls().roots {
            Some(tls::Roots::File(path)) => variables.push(("PGSSLROOTCERT", path.into())),
            Some(tls::Roots::System) => variables.push(("PGSSLROOTCERT", "system".into())),
            None => {}
        }
        let mut password = None;
        if let Some(secret) = target.resolve_password()? {
            let directory = password_file(secret.expose_secret())?;
            variables.push(("PGPASSFILE", directory.path().join("pgpass").into_os_string()));
            password = Some(directory);
        }
        Ok(Self { variables, password })
    }

    /// For a program that writes: also where the role or the database says that transactions only read.
    #[must_use]
    pub fn writing(mut self) -> Self {
        for (_, options) in self.variables.iter_mut().filter(|(name, _)| *name == "PGOPTIONS") {
            options.push(" -c default_transaction_read_only=off");
        }
        self
    }

    /// Gives a program what it needs to log in.
    #[must_use]
    pub fn apply(&self, program: Program) -> Program {
        self.variables.iter().fold(program, |program, (name, value)| program.env(name, value))
    }

    /// Whether it brings a password.
    pub fn has_password(&self) -> bool {
        self.password.is_some()
    }
}

/// A private directory with a password file for every server, database and role: the child is told where to log in.
fn password_file(secret: &str) -> Result<TempDir, Error> {
    if secret.contains(['\n', '\r']) {
        let what = "the password has a line break, which no password file can hold".to_owned();
        return Err(Error::Target { what });
    }
    let failed = |source| Error::Io {
        what: "write a private password file below".to_owned(),
        path: std::env::temp_dir(),
        source,
    };
    let private = std::fs::Permissions::from_mode(0o700);
    let directory = tempfile::Builder::new()
        .prefix("pgmuster-login-")
        .permissions(private)
        .tempdir()
        .map_err(failed)?;
    let path = directory.path().join("pgpass");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    let escaped = secret.replace('\\', "\\\\").replace(':', "\\:");
    file.write_all(format!("*:*:*:*:{escaped}\n").as_bytes()).map_err(failed)?;
    Ok(directory)
}

/// A connection string that means one database, whatever its name is; the rest comes from the environment.
pub fn database(name: &str) -> String {
    format!("dbname='{}'", name.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Environment;

    #[test]
    fn no_secret_is_an_argument_or_a_variable_and_its_file_goes_away() {
        let url = "host=db1,db2 port=5433,5434 user=o'b dbname=shop sslmode=verify-full sslrootcert=/r.pem password='a:b\\\\c'";
        let target = Target::parse(url, &Environment::default()).unwrap();
        let login = Login::new(&target, "pgmuster/1").unwrap();
        let of = |name: &str| {
            let (_, value) = login.variables.iter().find(|(known, _)| *known == name).unwrap();
            value.to_str().unwrap().to_owned()
        };
        assert_eq!((of("PGHOST"), of("PGPORT")), ("db1,db2".to_owned(), "5433,5434".to_owned()));
        assert_eq!((of("PGUSER"), of("PGDATABASE")), ("o'b".to_owned(), "shop".to_owned()));
        assert_eq!(of("PGSSLMODE"), "verify-full");
        assert_eq!(of("PGSSLROOTCERT"), "/r.pem");
        let shown = format!("{:?} {:?}", login, login.apply(Program::new("pg_dump")));
        assert!(!shown.contains("a:b"), "{shown}");
        let file = std::path::PathBuf::from(of("PGPASSFILE"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "*:*:*:*:a\\:b\\\\c\n");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let parent = file.parent().unwrap();
        assert_eq!(parent.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        drop(login);
        assert!(!file.exists());
    }

    #[test]
    fn a_hostile_name_is_one_database() {
        assert_eq!(database("a' host='evil"), "dbname='a\\' host=\\'evil'");
        assert_eq!(database("postgres://x/\\"), "dbname='postgres://x/\\\\'");
    }
}
