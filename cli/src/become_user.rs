//! Started as root, the program becomes the user whose files it works with: PostgreSQL refuses to run as root, and a
//! backup tool needs no more rights than the server it backs up.
//!
//! `setpriv` (util-linux) does it, and the program replaces itself, once.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command as Process;

use postgres::process::Account;
use proto::{Action, Code, Failure};

use crate::args::{Cli, Command, Engine, WorkerCommand};
use crate::commands::sockets;
use crate::environment;

/// Set for the replaced program, so that it never replaces itself again.
const MARK: &str = "PGMUSTER_BECAME";

/// Replaces this process when it runs as root and the command works with a server's files. Returns when there is
/// nothing to do.
pub(crate) async fn become_owner(cli: &Cli) -> Result<(), Failure> {
    if !Account::current().is_root() || environment::variable(MARK).is_some() {
        return Ok(());
    }
    let Some(account) = whom(cli).await? else { return Ok(()) };
    let refused = |what: String| {
        Failure::new(Code::PermissionDenied, Action::FixConfig, what).with_hint(
            "Run pgmuster as the server's user, for example: sudo -u postgres pgmuster …",
        )
    };
    if account.is_root() {
        return Err(refused(
            "the files belong to root, as whom PostgreSQL does not run".to_owned(),
        ));
    }
    let program = std::env::current_exe()
        .map_err(|error| refused(format!("failed to find this program: {error}")))?;
    let user =
        std::fs::read_to_string("/etc/passwd").ok().and_then(|text| user(&text, account.uid));
    // `--init-groups` wants a user's name.
    let (name, groups, home) = match user {
        Some(user) => (user.name, "--init-groups", user.home),
        None => (account.uid.to_string(), "--clear-groups", PathBuf::from("/tmp")),
    };
    // The current directory stays: relative paths on the command line keep their meaning.
    let error = Process::new("setpriv")
        .arg(format!("--reuid={name}"))
        .arg(format!("--regid={}", account.gid))
        .args([groups, "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .env("HOME", home)
        .env_remove("XDG_DATA_HOME")
        .exec();
    Err(refused(format!("failed to become user {}: {error}", account.uid)))
}

/// The user a command should run as; `None` where root is right, or does no harm.
async fn whom(cli: &Cli) -> Result<Option<Account>, Failure> {
    let postgres = async || Ok(Some(Account::named("postgres").await?));
    match &cli.command {
        Command::Demo(_) => postgres().await,
        Command::Up(args) => {
            if let Some(directory) = &args.data_directory {
                return Ok(Some(Account::owner_of(directory)?));
            }
            match socket_owner(args.url.as_deref()) {
                Some(owner) => Ok(Some(owner)),
                None => postgres().await,
            }
        }
        Command::Worker(args) => match (&args.command, &args.config) {
            (None, Some(config))
            | (Some(WorkerCommand::Enroll(crate::args::Enroll { config, .. })), _) => {
                worker_owner(config).await
            }
            _ => Ok(None),
        },
        Command::Backup(args) if args.server.is_some() && args.engine == Engine::Native => {
            Ok(socket_owner(args.server.as_deref()))
        }
        Command::Restore(args) if args.repository.is_some() => {
            let mut above = args.into.iter().flat_map(|into| into.ancestors());
            let existing = above.find(|place| place.exists());
            // A target that belongs to root is restored for root, who hands it on.
            Ok(existing.and_then(|place| Account::owner_of(place).ok()).filter(|a| !a.is_root()))
        }
        _ => Ok(None),
    }
}

/// Who runs the server that a URL means, told by the owner of its socket; `None` where several could be meant.
fn socket_owner(url: Option<&str>) -> Option<Account> {
    let (directory, port) = meant(url, sockets())?;
    Account::owner_of(&directory.join(format!(".s.PGSQL.{port}"))).ok()
}

/// The one socket a URL can mean.
fn meant(url: Option<&str>, mut found: Vec<(PathBuf, u16)>) -> Option<(PathBuf, u16)> {
    if let Some(url) = url {
        found.retain(|(directory, _)| url.contains(&*directory.to_string_lossy()));
        if found.len() > 1 {
            found.retain(|(_, port)| url.contains(&port.to_string()));
        }
    }
    let one = found.pop()?;
    found.is_empty().then_some(one)
}

/// The owner of the data directory a worker's configuration names, else of its state directory.
async fn worker_owner(config: &Path) -> Result<Option<Account>, Failure> {
    let config = crate::configs::read(config, worker::config::WorkerConfig::problems)?;
    let named = config.clusters.iter().find_map(|cluster| cluster.data_directory.as_ref());
    for place in named.into_iter().chain([&config.state_dir]) {
        if let Ok(owner) = Account::owner_of(place.as_std_path())
            && !owner.is_root()
        {
            return Ok(Some(owner));
        }
    }
    Ok(Some(Account::named("postgres").await?))
}

/// What `/etc/passwd` says of a user.
#[derive(Debug, PartialEq, Eq)]
struct User {
    name: String,
    home: PathBuf,
}

/// The user of a number, in the text of `/etc/passwd`.
fn user(passwd: &str, uid: u32) -> Option<User> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, number, _, _, home, ..] = fields[..] else { return None };
        let is_it = number.parse::<u32>().is_ok_and(|number| number == uid);
        is_it.then(|| User { name: name.to_owned(), home: PathBuf::from(home) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_its_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\npostgres:x:101:104::/var/lib/postgresql:/bin/sh\n+\n";
        let found = User { name: "postgres".to_owned(), home: "/var/lib/postgresql".into() };
        assert_eq!(user(passwd, 101), Some(found));
        assert_eq!(user(passwd, 10), None);
    }

    #[test]
    fn among_several_servers_none_is_guessed() {
        let run = || (PathBuf::from("/var/run/postgresql"), 5432);
        let second = || (PathBuf::from("/var/run/postgresql"), 5433);
        let tmp = || (PathBuf::from("/tmp"), 5432);
        assert_eq!(meant(None, vec![]), None);
        assert_eq!(meant(None, vec![tmp()]), Some(tmp()));
        assert_eq!(meant(None, vec![run(), tmp()]), None);
        let all = || vec![run(), second(), tmp()];
        assert_eq!(meant(Some("host=/tmp dbname=postgres"), all()), Some(tmp()));
        assert_eq!(meant(Some("host=/var/run/postgresql port=5433"), all()), Some(second()));
        assert_eq!(meant(Some("host=/var/run/postgresql"), all()), None);
        assert_eq!(meant(Some("postgres://db1.example/postgres"), all()), None);
    }
}
