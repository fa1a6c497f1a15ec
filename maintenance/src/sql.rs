//! The SQL files, compiled in. Each begins with what it is for; a test holds that.

pub(crate) const DATABASES: &str = include_str!("../sql/databases.sql");
pub(crate) const HORIZON: &str = include_str!("../sql/horizon.sql");
pub(crate) const INDEX_BLOAT: &str = include_str!("../sql/index_bloat.sql");
pub(crate) const TABLE_BLOAT: &str = include_str!("../sql/table_bloat.sql");
pub(crate) const TABLE_NOW: &str = include_str!("../sql/table_now.sql");
pub(crate) const TABLE_SIZE: &str = include_str!("../sql/table_size.sql");
pub(crate) const TABLE_STATISTICS: &str = include_str!("../sql/table_statistics.sql");

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn every_file_says_what_it_is_for() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
        let mut files = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(text.starts_with(&format!("-- name: {name}\n")), "{}", path.display());
            for part in ["purpose", "versions", "rights", "cost", "columns"] {
                assert!(
                    text.contains(&format!("\n-- {part}: ")),
                    "{} lacks {part}",
                    path.display()
                );
            }
            let statement = text.lines().filter(|line| !line.trim_start().starts_with("--"));
            let one = statement.into_iter().all(|line| !line.contains(';'));
            assert!(one, "{}: one statement, no more", path.display());
            files += 1;
        }
        assert_eq!(files, 7, "each file has its constant here");
    }
}
