//! What of an archive a schema or a table is made of: the entries that belong to it, and those that it needs besides.
//!
//! `pg_restore` is told them by number. Its own `--schema` and `--table` leave out what belongs to something by need alone: the schema
//! itself, and of a table its defaults, sequences, indexes, constraints and triggers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Contents, Entry};

/// What `--table` may name.
const RELATIONS: [&str; 5] = ["TABLE", "FOREIGN TABLE", "VIEW", "MATERIALIZED VIEW", "SEQUENCE"];
/// What is about one thing, which is the first that it needs.
const ABOUT: [&str; 3] = ["ACL", "COMMENT", "SECURITY LABEL"];
/// What has the name of its relation, and after a space its own.
const OF_RELATION: [&str; 7] =
    ["CHECK CONSTRAINT", "CONSTRAINT", "DEFAULT", "FK CONSTRAINT", "POLICY", "RULE", "TRIGGER"];
/// What has the name of its relation.
const NAMED_AS_RELATION: [&str; 5] =
    ["MATERIALIZED VIEW DATA", "ROW SECURITY", "SEQUENCE OWNED BY", "SEQUENCE SET", "TABLE DATA"];
/// What is put together where there are partitions.
const ATTACHED: [&str; 4] = ["CONSTRAINT", "FOREIGN TABLE", "INDEX", "TABLE"];
/// What a table can be without.
const SPARED: [&str; 3] = ["FK CONSTRAINT", "POLICY", "TRIGGER"];
/// Definitions that come along with a table of the same schema that needs them.
const BROUGHT: [&str; 13] = [
    "AGGREGATE",
    "COLLATION",
    "DOMAIN",
    "FUNCTION",
    "OPERATOR",
    "OPERATOR CLASS",
    "OPERATOR FAMILY",
    "PROCEDURE",
    "SEQUENCE",
    "SHELL TYPE",
    "TEXT SEARCH CONFIGURATION",
    "TEXT SEARCH DICTIONARY",
    "TYPE",
];
/// The schema that every database is made with, and that an archive may say nothing of.
const PUBLIC: &[u8] = b"public";
/// The name of what is about it, which may need an entry that there is not.
const ABOUT_PUBLIC: &[u8] = b"SCHEMA public";

/// What was named, and what belongs to that.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    contents: &'a Contents,
    by_id: HashMap<u32, &'a Entry>,
    /// Schemas of which everything is wanted; none where tables were named.
    whole: BTreeSet<&'a [u8]>,
    /// Relations that were named.
    named: BTreeSet<u32>,
    chosen: BTreeSet<u32>,
}

/// A part as it can be loaded into a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled<'a> {
    /// What is to be loaded.
    pub ids: BTreeSet<u32>,
    /// Schemas that are made because they are not there.
    pub schemas: Vec<&'a Entry>,
    /// Definitions that were not named, and come along because something needs them.
    pub brought: Vec<&'a Entry>,
    /// What is used of the database.
    pub used: Vec<&'a Entry>,
    /// What can be done without and is left out, and what it lacks.
    pub left_out: Vec<(&'a Entry, Vec<&'a Entry>)>,
    /// What cannot be done without, and is neither brought nor there.
    pub lacks: Vec<&'a Entry>,
}

/// What an entry needs that is not chosen.
#[derive(Debug, Default)]
struct Way {
    brought: BTreeSet<u32>,
    used: BTreeSet<u32>,
    lacks: BTreeSet<u32>,
}

impl Contents {
    /// Everything of these schemas; or these relations, in these schemas where some are named, with all that belongs to them.
    pub fn part(&self, schemas: &[String], tables: &[String]) -> Part<'_> {
        let has = |names: &[String], name: &[u8]| names.iter().any(|one| one.as_bytes() == name);
        let by_id = self.entries.iter().map(|entry| (entry.id, entry)).collect();
        let mut part = Part {
            contents: self,
            by_id,
            whole: BTreeSet::new(),
            named: BTreeSet::new(),
            chosen: BTreeSet::new(),
        };
        if tables.is_empty() {
            part.whole = self.schemas().filter(|name| has(schemas, name)).collect();
        }
        for entry in &self.entries {
            let Some(schema) = entry.schema.as_deref() else { continue };
            if part.whole.contains(schema) {
                part.chosen.insert(entry.id);
            } else if entry.is_relation()
                && has(tables, &entry.name)
                && (schemas.is_empty() || has(schemas, schema))
            {
                part.named.insert(entry.id);
            }
        }
        part.chosen.extend(&part.named);
        part.grow();
        part
    }

    /// Schemas that it makes or has something of; some of them several times.
    fn schemas(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().filter_map(|entry| match entry.kind.as_str() {
            "SCHEMA" => Some(&entry.name[..]),
            _ => entry.schema.as_deref(),
        })
    }
}

impl<'a> Part<'a> {
    /// Whether the archive has this schema.
    pub fn has_schema(&self, name: &str) -> bool {
        self.contents.schemas().any(|schema| schema == name.as_bytes())
    }

    /// The relations that were named.
    pub fn named(&self) -> impl Iterator<Item = &'a Entry> {
        self.entries(&self.named)
    }

    /// Schemas in which something of it is.
    pub fn schemas(&self) -> BTreeSet<&'a [u8]> {
        let of_chosen = self.entries(&self.chosen).filter_map(|entry| entry.schema.as_deref());
        of_chosen.chain(self.whole.iter().copied()).collect()
    }

    /// What has a name among the relations of its schema, which nothing else there may have.
    pub fn makes(&self) -> impl Iterator<Item = &'a Entry> {
        self.entries(&self.chosen).filter(|entry| entry.is_relation() || entry.kind == "INDEX")
    }

    /// What it needs, directly and through others, that does not belong to it. Whoever settles must say which of that is there.
    pub fn outside(&self) -> BTreeSet<u32> {
        let mut found = BTreeSet::new();
        let mut open: Vec<u32> = self.chosen.iter().copied().collect();
        while let Some(id) = open.pop() {
            let Some(entry) = self.by_id.get(&id) else { continue };
            for need in entry.needs.iter().filter(|need| !self.chosen.contains(need)) {
                let known = self.by_id.get(need).is_some_and(|entry| entry.kind != "SCHEMA");
                if known && found.insert(*need) {
                    open.push(*need);
                }
            }
        }
        found
    }

    /// What is loaded into a database that has these entries, and these schemas.
    pub fn settle(
        mut self,
        there: &BTreeSet<u32>,
        schemas_there: &BTreeSet<Vec<u8>>,
    ) -> Settled<'a> {
        let schemas_asked = self.schemas();
        let (mut seen, mut all) = (BTreeSet::new(), Way::default());
        let mut left_out = BTreeMap::new();
        loop {
            let open: Vec<u32> = self.chosen.difference(&seen).copied().collect();
            if open.is_empty() {
                break;
            }
            seen.extend(&open);
            for id in open {
                let Some(entry) = self.by_id.get(&id).copied() else { continue };
                let way = self.way(entry, there, &schemas_asked);
                let is_left_out = match entry.kind.as_str() {
                    // To be shown to subscribers is for whoever loads to decide.
                    kind if kind.starts_with("PUBLICATION") => true,
                    // A table that is there already makes indexes of its own for what becomes its partition.
                    "TABLE ATTACH" | "INDEX ATTACH" => {
                        let mut parts = self.needs(entry, &ATTACHED);
                        parts.any(|part| !self.chosen.contains(&part.id))
                    }
                    kind => SPARED.contains(&kind) && !way.lacks.is_empty(),
                };
                if is_left_out {
                    left_out
                        .insert(id, way.lacks.union(&way.used).copied().collect::<BTreeSet<_>>());
                    continue;
                }
                self.chosen.extend(&way.brought);
                all.brought.extend(way.brought);
                all.used.extend(way.used);
                all.lacks.extend(way.lacks);
            }
            self.grow();
        }
        self.chosen.retain(|id| !left_out.contains_key(id));
        let is_about_nothing = |entry: &Entry| {
            ABOUT.contains(&entry.kind.as_str())
                && entry.needs.first().is_some_and(|need| left_out.contains_key(need))
        };
        let about_nothing: BTreeSet<u32> =
            self.entries(&self.chosen).filter(|e| is_about_nothing(e)).map(|e| e.id).collect();
        self.chosen.retain(|id| !about_nothing.contains(id));
        for (partition, table) in self.partitions_elsewhere() {
            left_out.insert(partition, BTreeSet::from([table]));
        }
        let schemas = self.take_schemas(schemas_there);
        let left_out = left_out.into_iter().filter_map(|(id, lacks)| {
            let entry = self.by_id.get(&id).copied()?;
            // An index goes as its table does.
            (entry.kind != "INDEX ATTACH").then(|| (entry, self.entries(&lacks).collect()))
        });
        Settled {
            left_out: left_out.collect(),
            schemas,
            brought: self.entries(&all.brought).collect(),
            used: self.entries(&all.used).collect(),
            lacks: self.entries(&all.lacks).collect(),
            ids: self.chosen.clone(),
        }
    }

    fn entries(&self, ids: &BTreeSet<u32>) -> impl Iterator<Item = &'a Entry> + use<'a> {
        let found: Vec<&Entry> = ids.iter().filter_map(|id| self.by_id.get(id).copied()).collect();
        found.into_iter()
    }

    /// Chooses what belongs to what is chosen, and to that, until there is nothing more.
    fn grow(&mut self) {
        loop {
            let before = self.chosen.len();
            for entry in &self.contents.entries {
                if self.chosen.contains(&entry.id) || !self.may_grow_into(entry) {
                    continue;
                }
                if self.belongs(entry) {
                    self.chosen.insert(entry.id);
                    // A table is its partitions.
                    self.chosen.extend(self.attached(entry).map(|(_, partition)| partition));
                }
            }
            if self.chosen.len() == before {
                return;
            }
        }
    }

    /// Of a schema comes what is in it.
    fn may_grow_into(&self, entry: &Entry) -> bool {
        self.whole.is_empty()
            || entry.schema.as_deref().is_none_or(|schema| self.whole.contains(schema))
    }

    fn belongs(&self, entry: &Entry) -> bool {
        let is_chosen = |id: &u32| self.chosen.contains(id);
        let needs = |kinds: &[&str]| self.needs(entry, kinds).any(|need| is_chosen(&need.id));
        match entry.kind.as_str() {
            kind if ABOUT.contains(&kind) => entry.needs.first().is_some_and(is_chosen),
            kind if OF_RELATION.contains(&kind) => {
                self.relation_of(entry).is_some_and(|relation| is_chosen(&relation))
            }
            kind if NAMED_AS_RELATION.contains(&kind) => {
                let mut relations = self.needs(entry, &RELATIONS);
                relations.any(|need| need.is_named_as(entry) && is_chosen(&need.id))
            }
            "INDEX" | "STATISTICS" => needs(&RELATIONS),
            // Only one that is a column's own needs a table.
            "SEQUENCE" | "PUBLICATION TABLE" => needs(&["FOREIGN TABLE", "TABLE"]),
            "STATISTICS DATA" => entry.needs.iter().any(is_chosen),
            "TABLE ATTACH" => self
                .attached(entry)
                .is_some_and(|(table, part)| is_chosen(&table) || is_chosen(&part)),
            "INDEX ATTACH" => {
                let mut parts = self.needs(entry, &ATTACHED).peekable();
                parts.peek().is_some() && parts.all(|part| is_chosen(&part.id))
            }
            _ => false,
        }
    }

    fn needs(&self, entry: &Entry, kinds: &[&str]) -> impl Iterator<Item = &'a Entry> {
        let found = entry.needs.iter().filter_map(move |id| self.by_id.get(id).copied());
        found.filter(move |need| kinds.contains(&need.kind.as_str()))
    }

    /// The relation, or domain, with whose name that of the entry begins; the one with the longest, because names have spaces.
    fn relation_of(&self, entry: &Entry) -> Option<u32> {
        let begins = |need: &&Entry| {
            let rest = entry.name.strip_prefix(&need.name[..]);
            need.schema == entry.schema && rest.is_some_and(|rest| rest.first() == Some(&b' '))
        };
        let owners = entry.needs.iter().filter_map(|id| self.by_id.get(id).copied());
        let owners = owners.filter(|need| need.is_relation() || need.kind == "DOMAIN");
        owners.filter(begins).max_by_key(|need| need.name.len()).map(|need| need.id)
    }

    /// The table and its partition that an entry puts together.
    fn attached(&self, entry: &Entry) -> Option<(u32, u32)> {
        if entry.kind != "TABLE ATTACH" {
            return None;
        }
        let tables = || self.needs(entry, &["FOREIGN TABLE", "TABLE"]);
        let partition = tables().find(|need| need.is_named_as(entry))?.id;
        tables().map(|table| table.id).find(|id| *id != partition).map(|table| (table, partition))
    }

    /// Partitions in schemas that are not wanted of tables in one that is; of each how it is put to its table.
    fn partitions_elsewhere(&self) -> Vec<(u32, u32)> {
        let entries = self.contents.entries.iter().filter(|entry| !self.chosen.contains(&entry.id));
        let attached = entries.filter_map(|entry| Some((entry.id, self.attached(entry)?)));
        let of_chosen = attached.filter(|(_, (table, partition))| {
            self.chosen.contains(table) && !self.chosen.contains(partition)
        });
        of_chosen.map(|(id, (_, partition))| (id, partition)).collect()
    }

    /// Goes from what is not chosen of an entry's needs to the end of each way.
    fn way(&self, entry: &Entry, there: &BTreeSet<u32>, schemas: &BTreeSet<&[u8]>) -> Way {
        let mut way = Way::default();
        let mut open = vec![entry];
        let mut seen = BTreeSet::new();
        while let Some(entry) = open.pop() {
            for need in entry.needs.iter().filter_map(|id| self.by_id.get(id).copied()) {
                if self.chosen.contains(&need.id) || need.kind == "SCHEMA" || !seen.insert(need.id)
                {
                    continue;
                }
                let schema = need.schema.as_deref().unwrap_or_default();
                if there.contains(&need.id) {
                    way.used.insert(need.id);
                } else if BROUGHT.contains(&need.kind.as_str()) && schemas.contains(schema) {
                    way.brought.insert(need.id);
                    open.push(need);
                } else {
                    way.lacks.insert(need.id);
                }
            }
        }
        way
    }

    /// Chooses the schemas of what is chosen that are not there, with their rights and comments.
    fn take_schemas(&mut self, there: &BTreeSet<Vec<u8>>) -> Vec<&'a Entry> {
        let wanted: BTreeSet<&[u8]> =
            self.schemas().into_iter().filter(|schema| !there.contains(*schema)).collect();
        let is_wanted = |entry: &&Entry| entry.kind == "SCHEMA" && wanted.contains(&entry.name[..]);
        let schemas: Vec<&'a Entry> = self.contents.entries.iter().filter(is_wanted).collect();
        self.chosen.extend(schemas.iter().map(|schema| schema.id));
        for entry in self.contents.entries.iter().filter(|entry| entry.schema.is_none()) {
            let is_about_it = entry.needs.first().is_some_and(|need| self.chosen.contains(need))
                || (entry.name == ABOUT_PUBLIC && wanted.contains(PUBLIC));
            if ABOUT.contains(&entry.kind.as_str()) && is_about_it {
                self.chosen.insert(entry.id);
            }
        }
        // It is made with the database, and its entry makes nothing.
        schemas.into_iter().filter(|schema| schema.name != PUBLIC).collect()
    }
}

impl Entry {
    fn is_relation(&self) -> bool {
        RELATIONS.contains(&self.kind.as_str())
    }

    fn is_named_as(&self, other: &Entry) -> bool {
        self.name == other.name && self.schema == other.schema
    }

    /// For people: `foreign key shop.item item_of_fkey`.
    pub fn told(&self) -> String {
        let kind = match self.kind.as_str() {
            "FK CONSTRAINT" => "foreign key".to_owned(),
            "TABLE ATTACH" => "partition".to_owned(),
            kind if kind.starts_with("PUBLICATION TABLE") => "membership in publication".to_owned(),
            kind => kind.to_lowercase(),
        };
        format!("{kind} {}", self.told_name())
    }

    /// For people, on one line: `shop.item`.
    pub fn told_name(&self) -> String {
        let is_anywhere = self.kind.starts_with("PUBLICATION TABLE");
        let schema = self.schema.as_deref().filter(|_| !is_anywhere);
        let parts = schema.into_iter().chain([&self.name[..]]).map(plain);
        parts.collect::<Vec<_>>().join(".")
    }
}

/// A name for people, on one line.
fn plain(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a line: number, kind, schema or `-`, name, and behind `<` what it needs.
    fn entry(line: &str) -> Entry {
        let (what, needs) = line.split_once('<').unwrap_or((line, ""));
        let mut words = what.split(',').map(str::trim);
        let mut word = || words.next().unwrap().to_owned();
        let (id, kind, schema, name) = (word(), word(), word(), word());
        Entry {
            id: id.parse().unwrap(),
            kind,
            name: name.into_bytes(),
            schema: (schema != "-").then(|| schema.into_bytes()),
            section: None,
            has_data: false,
            has_rows: false,
            needs: needs.split_whitespace().map(|need| need.parse().unwrap()).collect(),
        }
    }

    fn shop() -> Contents {
        let lines = "
            1, SCHEMA, -, shop
            2, SCHEMA, -, far
            3, EXTENSION, -, trgm < 2
            4, COMMENT, -, SCHEMA \"shop\" < 1
            5, ACL, -, SCHEMA \"far\" < 2
            10, TYPE, shop, mood < 1
            11, COMMENT, shop, TYPE mood < 10
            12, FUNCTION, shop, touch() < 1
            13, FUNCTION, far, log() < 2
            20, TABLE, shop, buyer < 1
            21, TABLE, shop, item < 1 10
            22, SEQUENCE, shop, item_id_seq < 21
            23, SEQUENCE OWNED BY, shop, item_id_seq < 22
            24, DEFAULT, shop, item id < 21 22
            25, TABLE, shop, item of < 1
            26, TABLE, far, item < 2
            27, VIEW, shop, items < 21
            30, TABLE DATA, shop, item < 21
            31, TABLE DATA, shop, buyer < 20
            32, SEQUENCE SET, shop, item_id_seq < 22
            40, CONSTRAINT, shop, item item_pkey < 21 21
            41, CONSTRAINT, shop, buyer buyer_pkey < 20
            42, INDEX, shop, item_note_idx < 21 3
            43, COMMENT, shop, INDEX item_note_idx < 42
            44, TRIGGER, shop, item touched < 21 12
            45, TRIGGER, shop, item logged < 13 21
            46, FK CONSTRAINT, shop, item item_buyer_fkey < 21 41 20
            47, COMMENT, shop, CONSTRAINT item_buyer_fkey ON item < 46
            48, FK CONSTRAINT, shop, item of of_item_fkey < 25 40 21
            49, ACL, shop, TABLE item < 21
            50, STATISTICS, shop, item_of_stats < 21
            51, PUBLICATION, -, news
            52, PUBLICATION TABLE, shop, news item < 51 21";
        let entries = lines.lines().filter(|line| !line.trim().is_empty()).map(entry).collect();
        Contents { bytes: 0, entries }
    }

    fn sale() -> Contents {
        let lines = [
            "1, TABLE, a, sale",
            "2, TABLE, a, sale_25",
            "3, TABLE, b, sale_26",
            "4, TABLE ATTACH, a, sale_25 < 1 2",
            "5, TABLE ATTACH, b, sale_26 < 1 3",
            "6, TABLE DATA, a, sale_25 < 2",
            "7, TABLE DATA, b, sale_26 < 3",
            "8, CONSTRAINT, a, sale sale_pkey < 1",
            "9, CONSTRAINT, a, sale_25 sale_25_pkey < 2",
            "10, INDEX ATTACH, a, sale_25_pkey < 8 9 1 2",
        ];
        Contents { bytes: 0, entries: lines.map(entry).to_vec() }
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    fn told(entries: &[&Entry]) -> Vec<String> {
        entries.iter().map(|entry| entry.told()).collect()
    }

    /// Numbers, one behind the other.
    fn ids(settled: &Settled<'_>) -> String {
        settled.ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
    }

    fn left_out(settled: &Settled<'_>) -> Vec<(String, Vec<String>)> {
        settled.left_out.iter().map(|(entry, lacks)| (entry.told(), told(lacks))).collect()
    }

    fn nothing() -> BTreeSet<Vec<u8>> {
        BTreeSet::new()
    }

    #[test]
    fn a_table_comes_with_all_that_is_its_own_and_without_what_needs_another() {
        let all = shop();
        let part = all.part(&names(&["shop"]), &names(&["item"]));
        assert_eq!(part.named().map(Entry::told_name).collect::<Vec<_>>(), ["shop.item"]);
        let made: Vec<String> = part.makes().map(Entry::told).collect();
        let index = "index shop.item_note_idx";
        assert_eq!(made, ["table shop.item", "sequence shop.item_id_seq", index]);
        assert_eq!(part.outside(), BTreeSet::from([3, 10, 12, 13, 20, 41, 51]));
        let settled = part.clone().settle(&BTreeSet::new(), &nothing());
        // With its schema, the type and the function of the same schema; without keys to and of other tables.
        assert_eq!(ids(&settled), "1 4 10 11 12 21 22 23 24 30 32 40 42 43 44 49 50");
        assert_eq!(told(&settled.schemas), ["schema shop"]);
        assert_eq!(told(&settled.brought), ["type shop.mood", "function shop.touch()"]);
        assert_eq!(told(&settled.lacks), ["extension trgm"], "its index cannot be made");
        let of = |entry: &str, lacks: &[&str]| (entry.to_owned(), names(lacks));
        assert_eq!(
            left_out(&settled),
            [
                of("trigger shop.item logged", &["function far.log()"]),
                of(
                    "foreign key shop.item item_buyer_fkey",
                    &["table shop.buyer", "constraint shop.buyer buyer_pkey"]
                ),
                of("membership in publication news item", &["publication news"]),
            ]
        );

        // Where the rest is there, it is used and not made again.
        let there = part.outside();
        let settled = part.settle(&there, &BTreeSet::from([b"shop".to_vec()]));
        assert_eq!(ids(&settled), "21 22 23 24 30 32 40 42 43 44 45 46 47 49 50");
        assert_eq!((settled.lacks.len(), settled.brought.len(), settled.schemas.len()), (0, 0, 0));
        assert_eq!(settled.used.len(), 6, "{:?}", settled.used);
    }

    #[test]
    fn a_table_without_a_schema_is_every_table_of_that_name() {
        let all = shop();
        let part = all.part(&[], &names(&["item"]));
        assert_eq!(
            part.named().map(Entry::told_name).collect::<Vec<_>>(),
            ["shop.item", "far.item"]
        );
        let settled = part.settle(&BTreeSet::from([3]), &nothing());
        assert_eq!(told(&settled.schemas), ["schema shop", "schema far"]);
        assert!(settled.ids.contains(&5), "with the rights of the schema that is made");
        assert!(settled.ids.contains(&45), "the other function's schema is named as well");
        assert_eq!(all.part(&names(&["far"]), &names(&["buyer"])).named().count(), 0);
    }

    #[test]
    fn a_new_database_takes_the_rights_of_the_schema_that_it_is_made_with() {
        let lines = ["1, ACL, -, SCHEMA public < 900", "2, TABLE, public, t"];
        let all = Contents { bytes: 0, entries: lines.map(entry).to_vec() };
        let part = all.part(&names(&["public"]), &[]);
        let settled = part.clone().settle(&BTreeSet::new(), &nothing());
        assert_eq!((ids(&settled).as_str(), settled.schemas.len()), ("1 2", 0));
        assert_eq!(ids(&part.settle(&BTreeSet::new(), &BTreeSet::from([PUBLIC.to_vec()]))), "2");
    }

    #[test]
    fn a_name_with_a_space_is_not_taken_for_another_tables() {
        let all = shop();
        let item = all.part(&[], &names(&["item"])).settle(&BTreeSet::from([3]), &nothing());
        assert!(!item.ids.contains(&48), "it is of the table `item of`");
        let of = all.part(&[], &names(&["item of"])).settle(&BTreeSet::from([21, 40]), &nothing());
        assert_eq!(ids(&of), "1 4 25 48");
    }

    #[test]
    fn a_schema_comes_with_all_that_is_in_it() {
        let all = shop();
        let part = all.part(&names(&["shop"]), &[]);
        assert!(part.has_schema("shop") && !part.has_schema("nope"));
        let settled = part.clone().settle(&BTreeSet::new(), &nothing());
        let numbers = "1 4 10 11 12 20 21 22 23 24 25 27 30 31 32 40 41 42 43 44 46 47 48 49 50";
        assert_eq!(ids(&settled), numbers);
        assert_eq!(told(&settled.lacks), ["extension trgm"]);
        let missed: Vec<String> = settled.left_out.iter().map(|(entry, _)| entry.told()).collect();
        assert_eq!(missed, ["trigger shop.item logged", "membership in publication news item"]);
        // One that is there keeps its rights and its comment.
        let settled = part.settle(&BTreeSet::from([3, 13]), &BTreeSet::from([b"shop".to_vec()]));
        assert_eq!(ids(&settled), numbers.replace("1 4 10", "10").replace("44 46", "44 45 46"));
    }

    #[test]
    fn a_table_comes_with_its_partitions_and_a_partition_without_its_table() {
        let all = sale();
        let settled = all.part(&[], &names(&["sale"])).settle(&BTreeSet::new(), &nothing());
        assert_eq!(ids(&settled), "1 2 3 4 5 6 7 8 9 10");
        assert!(settled.left_out.is_empty() && settled.lacks.is_empty(), "{settled:?}");
        for there in [BTreeSet::new(), BTreeSet::from([1, 8])] {
            let settled = all.part(&[], &names(&["sale_25"])).settle(&there, &nothing());
            assert_eq!(ids(&settled), "2 6 9");
            let missed = ("partition a.sale_25".to_owned(), names(&["table a.sale"]));
            assert_eq!(left_out(&settled), [missed]);
        }
        let settled = all.part(&names(&["a"]), &[]).settle(&BTreeSet::new(), &nothing());
        assert_eq!(ids(&settled), "1 2 4 6 8 9 10");
        let missed = ("partition b.sale_26".to_owned(), names(&["table b.sale_26"]));
        assert_eq!(left_out(&settled), [missed], "its rows are the table's");
    }
}
