//! What a person types. Exactly that, only checked for shape; what it means is found out in `commands/`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use proto::{
    ClusterName, JobId, JobState, LineageId, ProofLevel, SiteName, WalFileName, WorkerName,
};
use repository::Slice;
use worker::config::BackupConfig;

pub use crate::backup_ref::BackupRef;

/// The heading of the options that every command has.
const GLOBAL: &str = "Options of every command";

/// Keeps a fleet of PostgreSQL clusters recoverable, and proves it by restoring.
///
/// Begin with `pgmuster demo` (a throwaway cluster, broken and repaired before your eyes) or `pgmuster up` (coordinator and
/// worker in one process, for the server on this machine).
#[derive(Debug, Parser)]
#[command(name = "pgmuster", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How to print what was asked for: `table` for people, `json` for programs.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table, value_name = "FORMAT",
        hide_possible_values = true, help_heading = GLOBAL)]
    pub output: Output,
    /// Where the coordinator is: the path of its socket, or an `https://` (on this machine also `http://`) URL.
    #[arg(long, global = true, env = "PGMUSTER_COORDINATOR", value_name = "SOCKET|URL", hide_env_values = true,
        help_heading = GLOBAL)]
    pub coordinator: Option<String>,
    /// File with the token for a coordinator reached by URL.
    #[arg(long, global = true, env = "PGMUSTER_TOKEN_FILE", value_name = "FILE", hide_env_values = true,
        help_heading = GLOBAL)]
    pub token_file: Option<PathBuf>,
    /// How much the program logs on standard error: `error`, `warn`, `info`, `debug`, or a filter such as `worker=debug`.
    #[arg(long, global = true, env = "PGMUSTER_LOG", value_name = "FILTER", hide_env_values = true,
        help_heading = GLOBAL)]
    pub log: Option<String>,
}

/// `pgmuster wal …` as a server's settings have it, without the options of every command. A server starts it for each segment, and all
/// the other commands are most of what there is to be made ready for reading.
#[derive(Debug, Parser)]
pub struct ServersCall {
    /// What the server wants.
    #[command(subcommand)]
    pub command: WalCommand,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: one JSON document.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole product in one process for one server.
    ///
    /// Starts a coordinator, one worker and a broker inside this process, with a SQLite catalog and a repository in a
    /// directory with a fresh key. Takes a backup, proves it by restoring it, says the result in one sentence, and keeps
    /// running until Ctrl-C or SIGTERM.
    Up(Up),
    /// Show what pgmuster does on a throwaway cluster.
    ///
    /// Creates a cluster with data, backs it up, proves the backup, damages the cluster, restores it and compares. Leaves
    /// nothing behind.
    Demo(Demo),
    /// Run a coordinator.
    Coordinator(Role),
    /// Run a worker, or enroll one.
    Worker(WorkerArgs),
    /// Order a backup, or take one.
    ///
    /// With a cluster's name alone, a worker does it. With `--server`, `--repository` and `--key`, this process does it, needing
    /// nothing else: no coordinator, no broker, no catalog.
    Backup(Backup),
    /// Order the proof of a backup: restore it in a sandbox and check it.
    Verify(Verify),
    /// Restore a backup into a directory.
    ///
    /// With a cluster's name, a worker does it below one of its restore roots. With `--repository` and `--key`, this process
    /// does it, needing nothing else: no coordinator, no broker, no catalog.
    Restore(Restore),
    /// Order maintenance of a cluster.
    Maintain(Maintain),
    /// Say which clusters can be recovered, which cannot, and why.
    ///
    /// The exit code is 3 when one cannot.
    Status,
    /// Look at clusters.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Look at backups and their proofs, give backups up, hold them.
    #[command(subcommand)]
    Backups(BackupsCommand),
    /// Look at jobs, follow, stop and repeat them.
    #[command(subcommand)]
    Job(JobCommand),
    /// Create a repository, list, check and clean one.
    #[command(subcommand)]
    Repo(RepoCommand),
    /// Archive WAL, and bring it back: for `archive_command` and `restore_command`.
    #[command(subcommand)]
    Wal(WalCommand),
    /// Say to which moments clusters can be recovered.
    #[command(subcommand)]
    Recovery(RecoveryCommand),
    /// Make, list and remove the tokens of callers elsewhere.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Check this machine, the coordinator, its workers and their clusters.
    ///
    /// With `--config`, also what a worker's configuration can reach; a coordinator need not answer then. The exit code is 3
    /// when something is wrong.
    Doctor(Doctor),
    /// Check configuration files, or print them with their defaults.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `up`.
#[derive(Debug, Args)]
pub struct Up {
    /// The server: `postgres://user@host/db`, `host=… user=…` or `service=…` [default: the one on this machine].
    pub url: Option<String>,
    /// What to call the cluster.
    #[arg(long, default_value = "main")]
    pub name: ClusterName,
    /// Directory of catalog, repository and key [default: `$PGMUSTER_HOME`, else `~/.local/share/pgmuster`].
    #[arg(long, value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// The server's data directory, where it differs from what the server says.
    #[arg(long, value_name = "DIR")]
    pub data_directory: Option<PathBuf>,
    /// Stop after the first backup and its proof instead of running on.
    #[arg(long)]
    pub once: bool,
    /// How far to prove: 1 present, 2 readable, 3 restored and consistent, 4 the server's own checks, 5 same content.
    #[arg(long, default_value = "5", value_name = "N", value_parser = level_without_a_file)]
    pub level: ProofLevel,
}

/// Assertions stand in a worker's configuration, and what `up` runs has no file for them.
fn level_without_a_file(text: &str) -> Result<ProofLevel, String> {
    let level = text.parse().ok().filter(|level| *level < ProofLevel::L6);
    level.ok_or_else(|| "1 to 5; assertions need a worker with a configuration file".to_owned())
}

/// `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// How much data, as pgbench's scale factor (1 is 100,000 rows and about 15 MiB).
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub scale: u32,
    /// Major version of PostgreSQL [default: the newest installed].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(14..=18))]
    pub major: Option<u32>,
    /// Where to work; needs room for three copies of the data [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// A production role.
#[derive(Debug, Args)]
pub struct Role {
    /// The coordinator's configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// `worker`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct WorkerArgs {
    /// Enrolling, instead of running.
    #[command(subcommand)]
    pub command: Option<WorkerCommand>,
    /// The worker's configuration.
    #[arg(long, value_name = "FILE", required = true)]
    pub config: Option<PathBuf>,
}

/// `worker …`.
#[derive(Debug, Subcommand)]
pub enum WorkerCommand {
    /// Make a worker's key and have the coordinator certify it.
    Enroll(Enroll),
    /// On the coordinator's machine: print a one-time token for enrolling one worker.
    Token(EnrollToken),
}

/// `worker enroll`.
#[derive(Debug, Args)]
pub struct Enroll {
    /// The worker's configuration; its `state_dir` receives the identity.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// File with the one-time token; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub enroll_token: PathBuf,
}

/// `worker token`.
#[derive(Debug, Args)]
pub struct EnrollToken {
    /// The worker it is for.
    pub worker: WorkerName,
    /// The worker's site.
    pub site: SiteName,
}

/// `token …`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// On the coordinator's machine: print a new token for a caller elsewhere.
    ///
    /// It is shown once and kept nowhere: the coordinator remembers a SHA-256 of it. Write it where only the caller can read it:
    /// `(umask 077; pgmuster token new alice --role operator > alice.token)`.
    New(NewToken),
    /// List the tokens there are, without what is secret.
    List,
    /// Remove a token; whoever has it is refused from then on.
    Remove {
        /// Its name.
        #[arg(value_parser = token_name)]
        name: String,
    },
}

/// `token new`.
#[derive(Debug, Args)]
pub struct NewToken {
    /// Whose it is, as `requested_by` of jobs shows: 1 to 63 characters of A-Z, a-z, 0-9 and -_.@.
    #[arg(value_parser = token_name)]
    pub name: String,
    /// What it allows: `viewer` looks (and scrapes `/metrics`), `operator` also orders, cancels and retries jobs, `admin` also enrolls
    /// workers, makes tokens, pauses and adopts clusters.
    #[arg(long, value_enum, value_name = "ROLE", hide_possible_values = true)]
    pub role: TokenRole,
    /// How many days it is good, 1 to 366.
    #[arg(long, default_value_t = 90, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=366))]
    pub days: u64,
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// Look.
    Viewer,
    /// And order.
    Operator,
    /// And everything else.
    Admin,
}

/// A name that can stand in the path of a request.
fn token_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    let is_name = (1..=63).contains(&text.len()) && text.chars().all(plain);
    let is_path = text.chars().all(|c| c == '.');
    (is_name && !is_path)
        .then(|| text.to_owned())
        .ok_or_else(|| "1 to 63 characters of A-Z, a-z, 0-9 and -_.@".to_owned())
}

/// Waiting for a job.
#[derive(Debug, Clone, Args)]
pub struct Waiting {
    /// Wait until the job is over; the exit code tells how it went.
    #[arg(long)]
    pub wait: bool,
    /// Wait, and show the steps as they happen.
    #[arg(long)]
    pub watch: bool,
    /// How long to wait. Afterwards the exit code is 10, and the job goes on.
    #[arg(long, default_value_t = 86_400, value_name = "SECONDS")]
    pub timeout: u64,
}

/// `backup`.
#[derive(Debug, Args)]
pub struct Backup {
    /// The cluster.
    pub cluster: ClusterName,
    /// Spread the starting checkpoint instead of forcing it.
    #[arg(long)]
    pub spread_checkpoint: bool,
    /// Read every byte, also of files that look unchanged.
    #[arg(long)]
    pub full_read: bool,
    /// Threads that read, compress and seal, at most what the worker gives. A dump is read by one session, whatever their
    /// number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub processes: Option<u32>,
    /// Read no more than this from the server's files in a second, `50MiB`; at most what the worker allows.
    #[arg(long, value_name = "SIZE")]
    pub rate_limit: Option<bytesize::ByteSize>,
    /// What takes the backup: `native` copies the cluster's files, `pg_dump` dumps its databases, one by one.
    #[arg(long, value_enum, default_value_t = Engine::Native, value_name = "ENGINE", hide_possible_values = true)]
    pub engine: Engine,
    /// Dump only databases of this name; `*` and `?` stand for any characters and for one. May be given several times.
    #[arg(long = "database", value_name = "PATTERN")]
    pub databases: Vec<proto::job::DatabasePattern>,
    /// Do not dump databases of this name. May be given several times.
    #[arg(long = "exclude-database", value_name = "PATTERN")]
    pub exclude_databases: Vec<proto::job::DatabasePattern>,
    /// Prove the backup afterwards, at this level: 1 to 6, see `pgmuster help verify`.
    #[arg(long, value_name = "N", conflicts_with = "server")]
    pub verify: Option<ProofLevel>,
    /// Take it here, without a coordinator, from this server: `postgres://user@host/postgres`, `host=… user=…` or `service=…`;
    /// the password belongs into `.pgpass`. A copy of its files needs its host and user.
    #[arg(long, value_name = "URL", requires = "repository")]
    pub server: Option<String>,
    /// Where it goes then: `file:///path` or `s3://bucket/prefix`.
    #[arg(long, value_name = "URL", requires_all = ["server", "backup_opener"])]
    pub repository: Option<String>,
    /// That repository's key file: a path, or `env:NAME` or `exec:/program` for what is not a file.
    #[arg(long, value_name = "FILE", requires = "repository", group = "backup_opener")]
    pub key: Option<PathBuf>,
    /// Where its passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE", requires = "repository", group = "backup_opener")]
    pub passphrase: Option<String>,
    /// Read what nothing says has changed once within so many days all the same, 1 to 365, a share by each backup
    /// [default: 30].
    #[arg(long, value_name = "DAYS", requires = "server", value_parser = reread_days)]
    pub reread_days: Option<u32>,
    /// Waiting.
    #[command(flatten)]
    pub waiting: Waiting,
}

fn reread_days(text: &str) -> Result<u32, String> {
    let days = text.parse().ok().filter(|days| BackupConfig::REREAD_DAYS.contains(days));
    days.ok_or_else(|| BackupConfig::REREAD_DAYS_ARE.to_owned())
}

/// What takes a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Copies files.
    Native,
    /// Dumps databases.
    #[value(name = "pg_dump")]
    PgDump,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// The cluster.
    pub cluster: ClusterName,
    /// The backup: its id or the beginning of it, `@last` or `@proved` [default: the newest].
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupRef>,
    /// How far to go: 1 present, 2 readable, 3 restored and consistent, 4 the server's own checks, 5 same content, 6 what the
    /// worker's configuration asserts holds [default: 5, with --to 4].
    #[arg(long, value_name = "N")]
    pub level: Option<ProofLevel>,
    /// Replay archived WAL beyond the backup to this moment: a time with its zone, a position, `latest`, or `random` for a
    /// position between the end of the backup and the newest that can be reached.
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    pub to: Option<String>,
    /// Waiting.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `restore`.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub struct Restore {
    /// The cluster. With `--repository`, needed only when the repository holds several.
    #[arg(required_unless_present = "repository")]
    pub cluster: Option<ClusterName>,
    /// Where to: an empty directory, or one that an interrupted restore left; see also `--delta`.
    #[arg(long, value_name = "DIR", required_unless_present = "into_server")]
    pub into: Option<PathBuf>,
    /// The backup: its id or the beginning of it, `@last` or `@proved` [default: the newest].
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupRef>,
    /// The worker that shall do it [default: one with a restore root above DIR].
    #[arg(long, value_name = "WORKER", conflicts_with = "repository")]
    pub on: Option<WorkerName>,
    /// Use again what is right in DIR, the data directory of a stopped server of the same cluster, and fetch the rest.
    ///
    /// Files that the backup does not have are removed, those in `pg_wal` too; `--plan` lists them and says how much would be
    /// fetched.
    #[arg(long)]
    pub delta: bool,
    /// Believe what memory has of the files in DIR. Without it their disk is read, which may not have kept what it was given.
    #[arg(long, requires_all = ["delta", "repository"])]
    pub believe_cache: bool,
    /// Threads that fetch, unpack and write [default: one a processor].
    #[arg(long, value_name = "N", requires = "repository", conflicts_with = "into_server",
        value_parser = clap::value_parser!(u32).range(1..=256))]
    pub processes: Option<u32>,
    /// Only say what would be done.
    #[arg(long)]
    pub plan: bool,
    /// Going beyond the end of the backup.
    #[command(flatten)]
    pub moment: MomentArgs,
    /// Restore from here, without a coordinator: `file:///path` or `s3://bucket/prefix`.
    #[arg(long, value_name = "URL", requires = "restore_opener")]
    pub repository: Option<String>,
    /// The repository's key file: a path, or `env:NAME` or `exec:/program` for what is not a file.
    #[arg(long, value_name = "FILE", requires = "repository", group = "restore_opener")]
    pub key: Option<PathBuf>,
    /// Where its passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE", requires = "repository", group = "restore_opener")]
    pub passphrase: Option<String>,
    /// Put a tablespace elsewhere: its OID and the new directory, without `--repository` below a restore root as DIR is [default:
    /// `DIR-tablespaces/OID`]. May be given several times.
    #[arg(long, value_name = "OID=DIR", value_parser = tablespace)]
    pub tablespace: Vec<(u32, PathBuf)>,
    /// Load a logical backup into this server: `postgres://user@host/postgres`, `host=… user=…` or `service=…`; the password
    /// belongs into `.pgpass`. Roles and tablespaces come first; what is there is left as it is.
    #[arg(long, value_name = "URL", requires = "repository", conflicts_with_all = ["into", "delta", "tablespace"])]
    pub into_server: Option<String>,
    /// Load only this database, and no roles. May be given several times.
    #[arg(long = "database", value_name = "NAME", requires = "into_server")]
    pub databases: Vec<proto::DatabaseName>,
    /// Load only this schema of the one database, with all that is in it; it is made where it is missing. May be given several
    /// times.
    #[arg(long = "schema", value_name = "NAME", requires = "databases")]
    pub schemas: Vec<String>,
    /// Load only this table of the one database, with rows, own sequences, indexes, constraints, triggers and partitions; its
    /// schema is made where it is missing, and a foreign key to a table that is not there is left out. May be given several times.
    #[arg(long = "table", value_name = "NAME", requires = "databases")]
    pub tables: Vec<String>,
    /// Drop this database on the server first, whatever is in it. May be given several times.
    #[arg(long = "overwrite", value_name = "NAME", requires = "into_server")]
    pub overwrite: Vec<proto::DatabaseName>,
    /// Let everything belong to the role that loads, and grant nobody anything.
    #[arg(long, requires = "into_server")]
    pub no_owner: bool,
    /// Sessions that load one database at once. A dump that an earlier version stored needs room in the directory of temporary
    /// files where it is more than one.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "into_server",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub jobs: u32,
    /// Waiting.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Going beyond the end of a backup.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Recovery to a moment")]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct MomentArgs {
    /// Go beyond the end of the backup, along archived WAL, to this moment.
    ///
    /// A time with its zone (`2026-11-27T09:30:00+01:00`), "today 09:30", "yesterday 18:00", `-15min`; a position (`0/3000148`);
    /// `xid:1234`; `name:before_release` (`pg_create_restore_point`); `immediate`, the end of the backup; `latest`, the end of the
    /// WAL. The backup is the newest that was complete before. What cannot be reached is refused before anything is written.
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true, conflicts_with = "into_server")]
    pub to: Option<String>,
    /// Along this timeline [default: the newest; you are asked where it is not plain on which the cluster lives].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub timeline: Option<u32>,
    /// Stop just before the moment instead of just after it: without the transaction that did the harm.
    #[arg(long)]
    pub before: bool,
    /// What the server does at the moment: `promote` (open), `pause` (answer queries and wait) or `shutdown` [default: promote].
    #[arg(long, value_enum, value_name = "ACTION", hide_possible_values = true)]
    pub action: Option<AtTarget>,
    /// Make a standby that follows the archive.
    #[arg(long, conflicts_with = "into_server")]
    pub standby: bool,
    /// Start the server, see that it came to the moment, and leave it running.
    #[arg(long)]
    pub start: bool,
    /// Have the server listen at this port, instead of the one in its files: beside the server that it is a copy of.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Leave `archive_mode` as the backup has it, instead of switching it off.
    ///
    /// For the server that takes the place of the old one. It needs `--to` or `--standby`: so the server archives on a timeline of
    /// its own, and nothing under the names of its source.
    #[arg(long)]
    pub keep_archiving: bool,
}

/// What a server does at its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AtTarget {
    /// Opens.
    Promote,
    /// Waits.
    Pause,
    /// Shuts down.
    Shutdown,
}

fn tablespace(text: &str) -> Result<(u32, PathBuf), String> {
    let (oid, directory) = text.split_once('=').ok_or("write OID=DIR")?;
    let oid = oid.parse().map_err(|_| format!("{oid:?} is no OID"))?;
    if !directory.starts_with('/') {
        return Err(format!("{directory:?} is no absolute path"));
    }
    Ok((oid, directory.into()))
}

/// `maintain`.
#[derive(Debug, Args)]
pub struct Maintain {
    /// The cluster.
    pub cluster: ClusterName,
    /// What to do.
    #[arg(long, value_enum)]
    pub task: MaintenanceTask,
    /// Only these databases [default: all]. May be given several times.
    #[arg(long = "database", value_name = "NAME")]
    pub databases: Vec<proto::DatabaseName>,
    /// Vacuum tables whose size is more than this many times the estimated need.
    #[arg(long, default_value_t = 2.0, value_name = "RATIO")]
    pub bloat_ratio: f64,
    /// Only say what would be done.
    #[arg(long)]
    pub plan: bool,
    /// Waiting.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// A maintenance task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MaintenanceTask {
    /// Refresh the planner's statistics of every user table.
    Analyze,
    /// Vacuum the tables that are bloated.
    Vacuum,
}

/// `cluster …`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// All clusters, worst first.
    List,
    /// One cluster: state, why, backups, proofs.
    Show {
        /// The cluster.
        cluster: ClusterName,
    },
    /// Have the server archive its WAL into the cluster's repository, and see it arrive.
    ///
    /// The worker beside the server sets `wal_level`, `archive_mode`, `archive_command` and `archive_timeout` as far as they are not
    /// right, says whether the server must be restarted, and once it need not, ends a segment and waits until the
    /// repository has it. Run it again at any time: it changes only what is not as it should be. The role needs ALTER SYSTEM.
    EnableWal(EnableWal),
}

/// `cluster enable-wal`.
#[derive(Debug, Args)]
pub struct EnableWal {
    /// The cluster.
    pub cluster: ClusterName,
    /// The longest that a segment which is not full stays with the server; 0 leaves the setting as it is.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub archive_timeout: u32,
    /// Take the place of another `archive_command` or `archive_library`.
    #[arg(long)]
    pub replace: bool,
    /// Only say what would be set.
    #[arg(long)]
    pub plan: bool,
    /// Waiting.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `backups …`.
#[derive(Debug, Subcommand)]
pub enum BackupsCommand {
    /// The backups of a cluster, newest first.
    List {
        /// The cluster [default: all].
        cluster: Option<ClusterName>,
    },
    /// One backup and its proofs.
    Show {
        /// The backup: its id or the beginning of it, `@last` or `@proved`.
        backup: BackupRef,
    },
    /// Give a backup up: its space is freed by a later `repo gc`.
    ///
    /// The same as `repo delete`. Refused for the newest backup, for the newest one that was proved, and for one that is held. A
    /// coordinator has no key and gives nothing up: without --repository it only says where the backup is.
    Delete {
        /// Which backup.
        #[command(flatten)]
        at: BackupAt,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
        /// Give up what cannot be used and keeps `repo gc` from working, see `repo delete`.
        #[arg(long)]
        damaged: bool,
    },
    /// Take back that a backup was given up, while it is there. The same as `repo undelete`.
    Undelete {
        /// Which backup.
        #[command(flatten)]
        at: BackupAt,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
    },
    /// Keep a backup from being given up until it is released. The same as `repo hold`.
    Hold {
        /// Which backup.
        #[command(flatten)]
        at: BackupAt,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
    },
    /// End the hold of a backup. The same as `repo release`.
    Release {
        /// Which backup.
        #[command(flatten)]
        at: BackupAt,
    },
}

/// A backup, and what it takes to write a wish beside it.
#[derive(Debug, Args)]
pub struct BackupAt {
    /// The backup: its id or the beginning of it, `@last` or `@proved`.
    pub backup: BackupRef,
    /// The repository it is in: `file:///path` or `s3://bucket/prefix`.
    #[arg(long, value_name = "URL", requires = "MaybeOpenerArgs")]
    pub repository: Option<String>,
    /// What opens it.
    #[command(flatten)]
    pub opener: MaybeOpenerArgs,
}

/// `job …`.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Jobs, newest first.
    List {
        /// Only of this cluster.
        #[arg(long)]
        cluster: Option<ClusterName>,
        /// Only in this state.
        #[arg(long)]
        state: Option<JobState>,
        /// At most so many.
        #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// One job.
    Show {
        /// The job, or `@last`.
        job: JobRef,
    },
    /// Follow a job to its end.
    Watch {
        /// The job, or `@last`.
        job: JobRef,
        /// How long to wait. Afterwards the exit code is 10, and the job goes on.
        #[arg(long, default_value_t = 86_400, value_name = "SECONDS")]
        timeout: u64,
    },
    /// The steps of a job as a waterfall.
    Trace {
        /// The job, or `@last`.
        job: JobRef,
    },
    /// Stop a job.
    Cancel {
        /// The job, or `@last`.
        job: JobRef,
    },
    /// Order the same again.
    Retry {
        /// The job, or `@last`.
        job: JobRef,
        /// Waiting.
        #[command(flatten)]
        waiting: Waiting,
    },
}

/// A job by its id, or the newest one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobRef {
    /// This one.
    Id(JobId),
    /// The newest.
    Last,
}

impl std::str::FromStr for JobRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "@last" {
            return Ok(Self::Last);
        }
        text.parse().map(Self::Id).map_err(|_| format!("{text:?} is no job id and not @last"))
    }
}

/// `repo …`.
#[derive(Debug, Subcommand)]
pub enum RepoCommand {
    /// Create a repository and its keys.
    ///
    /// Writes the key file and prints a recovery sheet. Whoever has the repository and a key can restore; without a key
    /// nobody can. So make two: one for the workers, and with --recovery-key one that is kept where no fire, thief or
    /// mistake reaches both. The sheet is then that of the recovery key.
    Init {
        /// Where to make it: `file:///path` or `s3://bucket/prefix`.
        url: String,
        /// Where to write the key; the file must not exist.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Where to write a second key, to be kept elsewhere; the file must not exist.
        #[arg(long, value_name = "FILE")]
        recovery_key: Option<PathBuf>,
        /// One program at a time will write there: also for a store that ignores conditional writes, and for a directory on
        /// NFS. Such a repository is degraded: two that write at the same time may spoil each other's backups.
        #[arg(long)]
        single_writer: bool,
    },
    /// Look after the keys of a repository: list, add, rotate, retire, check.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The backups in a repository, read from the repository itself.
    List(RepositoryAt),
    /// Give a backup up: its space is freed by a later `repo gc`.
    ///
    /// Refused for the newest backup, for the newest one that was proved, and for one that is held. From a day later on, `repo
    /// gc` deletes what only this backup needs; until then whoever names it can restore it, and `repo undelete` takes it
    /// back. Every other backup restores as before.
    Delete {
        /// Which repository.
        #[command(flatten)]
        at: RepositoryAt,
        /// The backup: its id or the beginning of it, `@last` or `@proved`.
        backup: BackupRef,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
        /// Give up what cannot be used and keeps `repo gc` from working: an attempt whose verdict is damaged, a backup whose
        /// manifest is damaged or lost, be it the newest. Refused for everything else.
        #[arg(long)]
        damaged: bool,
    },
    /// Take back that a backup was given up, while it is there.
    ///
    /// When it says so the backup is whole, and stays. Refused when it was deleted, or when a collection that began before may
    /// be deleting it.
    Undelete {
        /// Which repository.
        #[command(flatten)]
        at: RepositoryAt,
        /// The backup: its id or the beginning of it, `@last` or `@proved`.
        backup: BackupRef,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
    },
    /// Keep a backup from being given up until it is released.
    Hold {
        /// Which repository.
        #[command(flatten)]
        at: RepositoryAt,
        /// The backup: its id or the beginning of it, `@last` or `@proved`.
        backup: BackupRef,
        /// Why; kept in the repository.
        #[arg(long, value_name = "TEXT", default_value = "")]
        why: String,
    },
    /// End the hold of a backup.
    Release {
        /// Which repository.
        #[command(flatten)]
        at: RepositoryAt,
        /// The backup: its id or the beginning of it, `@last` or `@proved`.
        backup: BackupRef,
    },
    /// Delete what no wanted backup needs: what backups that were given up leave, and rests of failed attempts.
    ///
    /// Archived WAL goes with the oldest backup: what stands before the beginning of all that are left. Safe beside running
    /// backups and other collections. While a backup is being written nothing is deleted. Says what goes and what stays; more
    /// than a fifth at once, of the bytes or of the backups, needs --confirm-large; the WAL that goes with one backup does not
    /// count. Needs the right to delete in the store.
    Gc {
        /// Which repository.
        #[command(flatten)]
        at: RepositoryAt,
        /// Only this cluster's.
        #[arg(long, value_name = "CLUSTER")]
        cluster: Option<ClusterName>,
        /// Only say what would be deleted.
        #[arg(long)]
        plan: bool,
        /// Also delete when that is more than a fifth of what is there.
        #[arg(long)]
        confirm_large: bool,
        /// Abort attempts that have been open for more than two days: those of workers that died and were given up.
        #[arg(long)]
        abort_open: bool,
        /// No other program uses the repository until this one ends: needed where it is for a single writer.
        #[arg(long)]
        alone: bool,
        /// Forget readers that began longer ago: a backup that somebody restores, proves or copies stays until then. One that
        /// still reads goes on without protection.
        #[arg(long, value_name = "HOURS", default_value_t = 168)]
        drop_pins_older_than: u32,
        /// Forget collections that began longer ago and never ended. Only when it is certain that none of them still runs: what
        /// they named would be taken for safe, and be deleted.
        #[arg(long, value_name = "HOURS")]
        drop_lists_older_than: Option<u32>,
    },
    /// Look for damage in a repository: what is missing, what was changed, what does not open.
    ///
    /// Names each damaged object and the backups that need it. Packs of file content that are found damaged are marked, so
    /// that the next backup stores that content again. With --slice a schedule reads everything in M days. The exit code is 3
    /// when something is damaged.
    Check(RepoCheck),
    /// Copy backups into a second repository, which the same keys open.
    ///
    /// The target is empty, or an earlier copy of the same repository. Every pack is held against its digest on the way, and a
    /// backup is there only when all of it is. What is there is not sent again; what is missing there is. A backup that
    /// cannot be copied is named, and the others are copied. The WAL archive comes along, the oldest first. The source keeps word
    /// of its copies, which `pgmuster backups show` tells. Safe beside backups and collections on both sides.
    Copy(RepoCopy),
}

/// `repo check`.
#[derive(Debug, Args)]
pub struct RepoCheck {
    /// Which repository.
    #[command(flatten)]
    pub at: RepositoryAt,
    /// Only this cluster's.
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<ClusterName>,
    /// How deep; each level includes the ones before it.
    #[arg(long, value_enum, default_value_t = Depth::Inventory, value_name = "LEVEL")]
    pub level: Depth,
    /// Read only the N-th of M parts of the packs, for instance 3/30 on the third day of thirty. A pack is always in the
    /// same part.
    #[arg(long, value_name = "N/M", default_value_t = Slice::WHOLE, hide_default_value = true)]
    pub slice: Slice,
    /// Packs read in parallel [default: one a processor, 4 at most].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub processes: Option<u8>,
    /// Write nothing into the repository, no marks either.
    #[arg(long)]
    pub no_marks: bool,
}

/// How deep a repository is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Depth {
    /// Everything is there with its size; reads verdicts and manifests.
    Inventory,
    /// And every note is authentic, and the metadata of every backup opens.
    Manifest,
    /// And the packs of the slice have the bytes that were written.
    Read,
    /// And every frame in them opens and unpacks.
    Decrypt,
}

/// `repo copy`.
#[derive(Debug, Args)]
pub struct RepoCopy {
    /// From where.
    #[command(flatten)]
    pub at: RepositoryAt,
    /// Where to: `file:///path` or `s3://bucket/prefix`.
    pub to: String,
    /// A key file that opens the copy [default: what opens the source].
    #[arg(long, value_name = "FILE")]
    pub to_key: Option<PathBuf>,
    /// Only this cluster's.
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<ClusterName>,
    /// Only this backup, also when it was given up.
    #[arg(long, value_name = "BACKUP", conflicts_with = "newest")]
    pub backup: Option<BackupRef>,
    /// Only the newest backup of each cluster.
    #[arg(long)]
    pub newest: bool,
    /// A copy that is made is for one program at a time, because its own store needs that: see `repo init`.
    #[arg(long)]
    pub single_writer: bool,
    /// Packs in flight at the same time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub processes: u32,
}

/// A repository and its key.
#[derive(Debug, Args)]
pub struct RepositoryAt {
    /// Where it is: `file:///path` or `s3://bucket/prefix`.
    pub url: String,
    /// What opens it.
    #[command(flatten)]
    pub opener: OpenerArgs,
}

/// What opens a repository: where it is, never the secret itself, which others on this machine could read.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct OpenerArgs {
    /// Its key file: a path, or `env:NAME` or `exec:/program` for what is not a file.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Where its passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE")]
    pub passphrase: Option<String>,
}

/// `repo key …`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// The keys of a repository: which there are, who added them, and whether they are sound.
    List(RepositoryAt),
    /// Add a key, beside those there are.
    ///
    /// A key file is written first, and its recovery sheet is printed. A passphrase is made expensive to guess by Argon2id;
    /// take six random words or more, because whoever has a copy of the repository may guess for years.
    Add {
        /// Which repository, opened with one of its keys.
        #[command(flatten)]
        at: RepositoryAt,
        /// What is added.
        #[command(flatten)]
        new: NewKeyArgs,
        /// What to call it in the list.
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// Replace the key that opens the repository here: add a new one and retire it, in one step.
    ///
    /// Interrupted anywhere, at least one of the two opens the repository. Running jobs go on; give the new key to every
    /// worker before it starts again. What is stored is not encrypted anew: whoever kept the old key and also a copy of the
    /// repository's keys/ from before can still read it. If a key got into wrong hands, make a new repository.
    Rotate {
        /// Which repository, opened with the key that goes.
        #[command(flatten)]
        at: RepositoryAt,
        /// What replaces it.
        #[command(flatten)]
        new: NewKeyArgs,
        /// What to call it in the list.
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// Retire a key: it does not open the repository any more.
    ///
    /// Refused for the key that opens the repository here, so that another one is shown to work; the last one can never be
    /// retired. Every key opens every backup, so no backup is lost. Whoever kept the key and also a copy of the
    /// repository's keys/ from before can still read it.
    Retire {
        /// Which repository, opened with a key that stays.
        #[command(flatten)]
        at: RepositoryAt,
        /// The key, as `repo key list` names it.
        id: String,
    },
    /// Check every key of a repository with one of them.
    ///
    /// Opens with the given one. Of the others it tells damage and loss, without their secrets. The exit code is 3 when
    /// something is wrong, and when there is only one sound key.
    Check(RepositoryAt),
}

/// A new key.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct NewKeyArgs {
    /// Where to write a new key file; the file must not exist.
    #[arg(long, value_name = "FILE")]
    pub new_key: Option<PathBuf>,
    /// Where the new passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE")]
    pub new_passphrase: Option<String>,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Check the servers, repositories and broker of this worker's configuration as well. May be given several times.
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
}

/// `config …`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read configuration files and tell every problem.
    ///
    /// Connects to nothing. The exit code is 2 when a file is wrong.
    ///
    /// Files of workers beside a coordinator's show promises for clusters that none of them has.
    Check {
        /// The files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print a configuration with its defaults filled in.
    Show {
        /// The file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Say for each value whether it comes from the file or is the default.
        #[arg(long)]
        origin: bool,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn assertions_are_asked_where_a_file_has_them() {
        let given = |line: &str| Cli::try_parse_from(line.split(' '));
        given("pgmuster verify orders --level 6").unwrap();
        given("pgmuster up --level 5").unwrap();
        let refused = given("pgmuster up --level 6").unwrap_err().to_string();
        assert!(refused.contains("1 to 5; assertions need a worker"), "{refused}");
    }
}

/// `wal …`.
#[derive(Debug, Subcommand)]
pub enum WalCommand {
    /// Archive one WAL file of a server.
    ///
    /// For `archive_command = 'pgmuster wal push %p …'`. Ends with 0 only when the file is durable in the repository. The same
    /// file again succeeds; other content under the same name is refused and kept aside.
    Push(WalPush),
    /// Bring one WAL file back to a server.
    ///
    /// For `restore_command = 'pgmuster wal get %f %p …'`. Ends with 1 only when it is certain that the archive has neither the
    /// file nor a later one, which PostgreSQL takes for the end of its log; with 200 whenever that is not known, which stops the
    /// recovery instead of ending it early.
    Get(WalGet),
    /// Answer `wal push --socket` and `wal get --socket` on this host, and work ahead of the servers that ask.
    ///
    /// A worker does the same for its clusters; this is for hosts without one. It stores what a server has marked as ready before
    /// the server asks, in the server's order, and fetches what a recovery will ask for next. Run it as the servers' user: the
    /// socket is nobody else's. It ends at SIGTERM.
    Serve(WalServe),
}

/// `wal serve`.
#[derive(Debug, Args)]
pub struct WalServe {
    /// Where to listen. What a dead service left there is replaced.
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// The repository: `file:///path` or `s3://bucket/prefix`.
    #[arg(long, value_name = "URL")]
    pub repository: String,
    /// What opens it.
    #[command(flatten)]
    pub opener: OpenerArgs,
}

/// Whose archive, and who has it.
#[derive(Debug, Args)]
pub struct WalArchive {
    /// Ask the service at this socket: a worker's `wal.sock` in its `state_dir`, or the one of `wal serve`.
    ///
    /// It stores and fetches ahead of the server, so nothing waits that need not. Where nobody answers, the work is done here, if
    /// --repository and what opens it are given as well.
    #[arg(long, value_name = "SOCKET")]
    pub socket: Option<PathBuf>,
    /// The repository: `file:///path` or `s3://bucket/prefix`.
    #[arg(
        long,
        value_name = "URL",
        required_unless_present = "socket",
        requires = "MaybeOpenerArgs"
    )]
    pub repository: Option<String>,
    /// What opens it.
    #[command(flatten)]
    pub opener: MaybeOpenerArgs,
    /// Whose WAL it is.
    #[command(flatten)]
    pub whose: WhoseWal,
}

/// What opens a repository, where one is named.
#[derive(Debug, Args)]
#[group(multiple = false, requires = "repository")]
pub struct MaybeOpenerArgs {
    /// Its key file: a path, or `env:NAME` or `exec:/program` for what is not a file.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Where its passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE")]
    pub passphrase: Option<String>,
}

/// Whose WAL.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct WhoseWal {
    /// The cluster; of its lineages, the one with the server's system identifier.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<ClusterName>,
    /// The lineage, where a cluster has several.
    #[arg(long, value_name = "ID")]
    pub lineage: Option<LineageId>,
}

/// `wal push`.
#[derive(Debug, Args)]
pub struct WalPush {
    /// The file, `%p` in `archive_command`.
    pub path: PathBuf,
    /// Where to.
    #[command(flatten)]
    pub archive: WalArchive,
    /// The repository may never have seen this cluster: its first file begins its lineage, as its first backup would.
    ///
    /// Without it, a cluster that the repository does not know is refused, because its name may be a slip. A worker's socket does
    /// without it for the clusters of its configuration.
    #[arg(long, requires = "cluster")]
    pub new: bool,
    /// How long to try; afterwards PostgreSQL asks again.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub deadline: u32,
}

/// `wal get`.
#[derive(Debug, Args)]
pub struct WalGet {
    /// The file's name, `%f` in `restore_command`.
    pub file: WalFileName,
    /// Where to put it, `%p` in `restore_command`.
    pub path: PathBuf,
    /// Where from.
    #[command(flatten)]
    pub archive: WalArchive,
    /// For a standby that follows: end with 1 also when nothing is known, so that an outage of the repository does not stop it.
    ///
    /// Counts only while `standby.signal` is in the server's data directory: a recovery that ends would take an outage for
    /// the end of its log.
    #[arg(long)]
    pub standby: bool,
    /// How long to try [default: 300, with --standby 30].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub deadline: Option<u32>,
    /// The recovery ends there, at a position or at a time: what lies behind it harms nobody.
    ///
    /// A segment whose replay would make a tablespace where another server has its files is refused, unless that record is behind.
    #[arg(long, value_name = "LSN|TIME")]
    pub until: Option<worker::archive::Until>,
}

/// `recovery …`.
#[derive(Debug, Subcommand)]
pub enum RecoveryCommand {
    /// The stretches of each cluster's log that can be reached from a backup, with their times, and the gaps between them.
    ///
    /// With the URL of a repository, read from there alone, by timeline; with the name of a cluster, what the coordinator has heard of
    /// it. A window begins where its oldest backup ends, and ends where the unbroken line of WAL does; anything between can be
    /// recovered, and TO is when its last transaction ended. The exit code is 3 when there is a gap, or a file that cannot be read;
    /// of a cluster also where a proof could not replay WAL, and where `status` ends with 3 for it.
    Windows {
        /// The repository, `file:///path` or `s3://bucket/prefix`; or a cluster that the coordinator knows.
        #[arg(value_name = "URL|CLUSTER")]
        place: String,
        /// What opens the repository.
        #[command(flatten)]
        opener: WindowsOpener,
        /// Only this cluster of the repository.
        #[arg(long, value_name = "NAME")]
        cluster: Option<ClusterName>,
    },
}

/// What opens a repository that was named instead of a cluster.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct WindowsOpener {
    /// Its key file: a path, or `env:NAME` or `exec:/program` for what is not a file.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Where its passphrase is: `file:/path`, `env:NAME`, `exec:/program`, or `-` for a line of standard input.
    #[arg(long, value_name = "REFERENCE")]
    pub passphrase: Option<String>,
}
