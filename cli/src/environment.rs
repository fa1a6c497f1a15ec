//! The only place of this crate that reads the environment.

use std::path::PathBuf;

/// The value of a variable, when it is set and not empty.
pub(crate) fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where this user's pgmuster keeps what it has to remember: `$PGMUSTER_HOME`, `$XDG_DATA_HOME/pgmuster` or
/// `~/.local/share/pgmuster`.
pub(crate) fn home() -> PathBuf {
    if let Some(home) = variable("PGMUSTER_HOME") {
        return home.into();
    }
    let data = variable("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".local").join("share")));
    data.unwrap_or_else(std::env::temp_dir).join("pgmuster")
}

/// Unix time in milliseconds.
pub(crate) fn now_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the one clock of the command line")]
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The time here, in the zone of whoever is here.
pub(crate) fn now() -> jiff::Zoned {
    let now = jiff::Timestamp::from_millisecond(now_ms()).unwrap_or_default();
    now.to_zoned(jiff::tz::TimeZone::system())
}

/// What a server needs of this environment to call this program for WAL: where keys and an object store's credentials are.
pub(crate) fn for_fetching() -> Vec<(String, String)> {
    let wanted = |name: &str| {
        // A service that this program was given is none for a server that outlives it.
        name != worker::archive::service::SOCKET_VARIABLE
            && (name == "HOME" || ["AWS_", "PGMUSTER_"].iter().any(|start| name.starts_with(start)))
    };
    std::env::vars().filter(|(name, _)| wanted(name)).collect()
}
