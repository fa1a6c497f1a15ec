//! In which order what is in an archive can be loaded by several programs at once: the order of `pg_restore` itself.

use std::collections::hash_map::Entry::Vacant;
use std::collections::{BTreeSet, HashMap};

use super::{Contents, Entry, Section};

/// When something is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The database, and definitions that rows need.
    Before,
    /// Rows, large objects, positions of sequences.
    Rows,
    /// Indexes, constraints, triggers; then rights, which could keep an owner from what was to be done before; then whatever
    /// acts on all that.
    After,
}

impl Contents {
    /// Every entry with its phase.
    pub fn phases(&self) -> impl Iterator<Item = (&Entry, Phase)> {
        let mut now = Section::PreData;
        self.entries.iter().map(move |entry| {
            now = entry.section.unwrap_or(now);
            (entry, entry.phase(now))
        })
    }

    /// Entries that fill materialised views which show rows of foreign tables, however far behind other views: they can be
    /// filled only where those tables can be read.
    pub fn filled_from_afar(&self) -> BTreeSet<u32> {
        let by_id: HashMap<u32, &Entry> =
            self.entries.iter().map(|entry| (entry.id, entry)).collect();
        let mut foreign: HashMap<u32, bool> = HashMap::new();
        let mut found = BTreeSet::new();
        for entry in self.entries.iter().filter(|entry| entry.kind == "MATERIALIZED VIEW DATA") {
            if shows_foreign(entry.id, &by_id, &mut foreign) {
                found.insert(entry.id);
            }
        }
        found
    }
}

/// Whether an entry needs a foreign table. What was looked at is remembered; what is being looked at needs nothing through itself.
fn shows_foreign(id: u32, by_id: &HashMap<u32, &Entry>, known: &mut HashMap<u32, bool>) -> bool {
    // Each entry is looked at before and after what it needs.
    let mut open = vec![(id, false)];
    while let Some((id, is_done)) = open.pop() {
        let Some(entry) = by_id.get(&id) else { continue };
        if is_done {
            let foreign = entry.kind == "FOREIGN TABLE"
                || entry.needs.iter().any(|need| known.get(need) == Some(&true));
            known.insert(id, foreign);
        } else if let Vacant(unknown) = known.entry(id) {
            unknown.insert(false);
            open.push((id, true));
            open.extend(entry.needs.iter().map(|need| (*need, false)));
        }
    }
    known.get(&id) == Some(&true)
}

impl Entry {
    fn phase(&self, section: Section) -> Phase {
        let kind = self.kind.as_str();
        let is_about = |what: &[u8]| self.name.starts_with(what);
        let belongs = matches!(kind, "ACL" | "COMMENT" | "SECURITY LABEL");
        if matches!(kind, "DATABASE" | "DATABASE PROPERTIES") || (belongs && is_about(b"DATABASE "))
        {
            return Phase::Before;
        }
        let late =
            ["ACL", "DEFAULT ACL", "EVENT TRIGGER", "MATERIALIZED VIEW DATA", "STATISTICS DATA"];
        if late.contains(&kind) || (belongs && is_about(b"EVENT TRIGGER ")) {
            return Phase::After;
        }
        match section {
            Section::PreData => Phase::Before,
            Section::Data => Phase::Rows,
            Section::PostData => Phase::After,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Phase::{After, Before, Rows};
    use super::*;

    fn entry(id: u32, kind: &str, name: &str, section: Option<Section>, needs: &[u32]) -> Entry {
        Entry {
            id,
            kind: kind.to_owned(),
            name: name.as_bytes().to_vec(),
            schema: None,
            section,
            has_data: false,
            has_rows: false,
            needs: needs.to_vec(),
        }
    }

    fn contents(entries: Vec<Entry>) -> Contents {
        Contents { bytes: 0, entries }
    }

    #[test]
    fn rights_come_last_and_what_belongs_to_something_goes_with_it() {
        let (pre, data, post) = (Section::PreData, Section::Data, Section::PostData);
        let all = contents(vec![
            entry(1, "DATABASE", "shop", Some(pre), &[]),
            entry(2, "ACL", "DATABASE shop", None, &[1]),
            entry(3, "TABLE", "item", Some(pre), &[]),
            entry(4, "COMMENT", "TABLE item", None, &[3]),
            entry(5, "ACL", "TABLE item", None, &[3]),
            entry(6, "TABLE DATA", "item", Some(data), &[3]),
            entry(7, "COMMENT", "LARGE OBJECT 5", None, &[]),
            entry(8, "INDEX", "item_key", Some(post), &[3]),
            entry(9, "COMMENT", "INDEX item_key", None, &[8]),
            entry(10, "EVENT TRIGGER", "no", Some(post), &[]),
        ]);
        let phases: Vec<Phase> = all.phases().map(|(_, phase)| phase).collect();
        assert_eq!(
            phases,
            [Before, Before, Before, Before, After, Rows, Rows, After, After, After]
        );
    }

    #[test]
    fn a_view_of_a_view_of_a_foreign_table_is_filled_from_afar() {
        let all = contents(vec![
            entry(1, "FOREIGN TABLE", "far", None, &[]),
            entry(2, "TABLE", "near", None, &[]),
            entry(3, "VIEW", "v", None, &[1, 2]),
            entry(4, "MATERIALIZED VIEW", "of_v", None, &[3, 2]),
            entry(5, "MATERIALIZED VIEW", "of_near", None, &[2, 99]),
            entry(6, "MATERIALIZED VIEW DATA", "of_near", None, &[5]),
            entry(7, "MATERIALIZED VIEW DATA", "of_v", None, &[4, 8]),
            entry(8, "MATERIALIZED VIEW DATA", "of_of_v", None, &[4, 7]),
        ]);
        assert_eq!(all.filled_from_afar(), BTreeSet::from([7, 8]));
    }
}
