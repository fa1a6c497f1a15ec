//! Names by which the directories of a server are known. Only words: nothing here looks at a disk.

/// What every data directory has, and nothing else.
pub const CONTROL_FILE_PATH: &str = "global/pg_control";

/// Whether a server has given this name to its own directory in the place of a tablespace: `PG_15_202209061`.
pub fn is_in_tablespace(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let versions = name.strip_prefix("PG_").and_then(|versions| versions.split_once('_'));
    versions.is_some_and(|(major, catalog)| is_number(major) && is_number(catalog))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_directory_in_a_tablespace_is_known_by_its_name() {
        assert!(is_in_tablespace("PG_15_202209061"));
        for other in ["PG_VERSION", "PG_15", "PG_15_", "PG_x_202209061", "pg_15_202209061", "5"] {
            assert!(!is_in_tablespace(other), "{other}");
        }
    }
}
