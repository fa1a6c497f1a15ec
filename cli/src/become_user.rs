//! Started as root, the program becomes the user whose files it works with: PostgreSQL refuses to run as root, and a
//! backup tool needs no more rights than the server it backs up.
//!
//! `setpriv` (util-linux) does it, and the program replaces itself, once.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command as Process;

use postgres::process::Account;
use proto::{Action, Code, Failure};

use crate::args::{Cli, Command, WorkerCommand};
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
    let home = home_of(account.uid).unwrap_or_else(|| PathBuf::from("/tmp"));
    let error = Process::new("setpriv")
        .arg(format!("--reuid={}", account.uid))
        .arg(format!("--regid={}", account.gid))
        .args(["--clear-groups", "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .env("HOME", home)
        .env_remove("XDG_DATA_HOME")
        .current_dir("/")
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
        Command::Restore(args) if args.repository.is_some() => {
            let existing = args.into.ancestors().find(|place| place.exists());
            // A target that belongs to root is restored for root, who hands it on.
            Ok(existing.and_then(|place| Account::owner_of(place).ok()).filter(|a| !a.is_root()))
        }
        _ => Ok(None),
    }
}

/// Who runs the server that a URL means, told by the owner of its socket.
fn socket_owner(url: Option<&str>) -> Option<Account> {
    let found = sockets();
    let (directory, port) = match url {
        None => found.first()?.clone(),
        Some(url) => {
            found.iter().find(|(directory, _)| url.contains(&*directory.to_string_lossy()))?.clone()
        }
    };
    Account::owner_of(&directory.join(format!(".s.PGSQL.{port}"))).ok()
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

/// A user's home directory in `/etc/passwd`.
fn home_of(uid: u32) -> Option<PathBuf> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&uid.as_str())).then(|| fields.get(5).map(PathBuf::from))?
    })
}
