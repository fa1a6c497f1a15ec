//! A schema or a table of a dump: which of its entries are loaded, what comes along, what is left out, and what is missing.

use std::collections::BTreeSet;
use std::ops::Range;

use postgres::archive::{Entry, Settled};
use postgres::{Purpose, connect, quote};
use proto::backup::{DatabaseDump, DumpLayout};
use proto::{Action, Code, Failure};
use repository::Backup;

use super::lists::Head;
use super::load::{How, LoadRequest};
use crate::context::JobContext;
use crate::jobs::session_owner;

/// The language that every database is made with.
const PLPGSQL: &[u8] = b"plpgsql";
/// Names in one line of a plan.
const NAMES_MAX: usize = 40;

/// What is loaded of a dump.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) head: Head,
    /// Entries that are not loaded.
    pub(super) leave: BTreeSet<u32>,
    /// For a plan: what was named, in words.
    pub(super) what: String,
    /// For a plan: what comes along, what is used of the database, what is left out.
    pub(super) lines: Vec<String>,
    /// What is left out, and why.
    pub(super) left_out: Vec<String>,
}

impl Piece {
    /// Where in the file of the dump it is; all of the file where that was not stored.
    pub(super) fn parts(&self, layout: Option<&DumpLayout>, size: u64) -> Vec<Range<u64>> {
        let Some(layout) = layout else { return whole(size) };
        let mut parts = whole(layout.contents_bytes);
        let mut start = layout.contents_bytes;
        for (id, bytes) in &layout.blocks {
            let part = start..start.saturating_add(*bytes);
            start = part.end;
            match parts.last_mut() {
                _ if self.leave.contains(id) => {}
                Some(last) if last.end == part.start => last.end = part.end,
                _ => parts.push(part),
            }
        }
        parts
    }
}

/// All of so many bytes, in one part.
pub(super) fn whole(bytes: u64) -> Vec<Range<u64>> {
    std::iter::once(0..bytes).collect()
}

/// Finds out what is loaded of a dump into a database, which is there or not, and that it can be.
pub(super) async fn choose(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
    dump: &DatabaseDump,
    is_there: bool,
) -> Result<(How, Piece), Failure> {
    let content = backup.file_content(dump.file.as_bytes()).await?;
    let head = cx.until_stopped(Head::read(&content)).await??;
    let part = head.contents.part(&request.schemas, &request.tables);
    let named: Vec<&Entry> = part.named().collect();
    if let Some(schema) = request.schemas.iter().find(|name| !part.has_schema(name)) {
        return Err(unknown(dump, "schema", schema));
    }
    let has_table = |name: &str| named.iter().any(|entry| entry.name == name.as_bytes());
    if let Some(table) = request.tables.iter().find(|name| !has_table(name)) {
        return Err(unknown(dump, "table", table));
    }
    let outside = part.outside();
    let entries = head.contents.entries.iter();
    let outside: Vec<&Entry> = entries.filter(|entry| outside.contains(&entry.id)).collect();
    let (how, there, schemas_there) = if is_there {
        let name = dump.database.as_str();
        let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
        let session = connect(&request.target.with_database(name), &purpose).await?;
        let whole = if request.tables.is_empty() { &request.schemas[..] } else { &[] };
        let made: Vec<&Entry> = part.makes().filter(|_| !request.tables.is_empty()).collect();
        let in_the_way = session.relations_in_the_way(whole, &made).await?;
        let there = session.there(&outside).await?;
        let schemas = session.schemas().await?;
        session.close().await;
        if !in_the_way.is_empty() {
            return Err(occupied(request, dump, &in_the_way));
        }
        (How::Fill, there, schemas)
    } else {
        let is_made = |entry: &&&Entry| entry.kind == "EXTENSION" && entry.name == PLPGSQL;
        let there = outside.iter().filter(is_made).map(|entry| entry.id).collect();
        (How::CreatePlain, there, BTreeSet::new())
    };
    let kept = part.schemas().into_iter().filter(|schema| schemas_there.contains(*schema));
    let kept: Vec<String> =
        kept.map(|schema| String::from_utf8_lossy(schema).into_owned()).collect();
    let settled = part.settle(&there, &schemas_there);
    if !settled.lacks.is_empty() {
        return Err(lacking(request, dump, &settled.lacks, is_there));
    }
    let what = if named.is_empty() {
        format!("schemas {} with all that is in them", request.schemas.join(", "))
    } else {
        let names: Vec<String> = named.iter().map(|entry| entry.told_name()).collect();
        let names = names.join(", ");
        format!(
            "tables {names} with rows, own sequences, indexes, constraints, triggers and partitions"
        )
    };
    let (lines, left_out) = lines(&settled, &kept, &head);
    let all = head.contents.entries.iter().map(|entry| entry.id);
    let leave = all.filter(|id| !settled.ids.contains(id)).collect();
    Ok((how, Piece { head, leave, what, lines, left_out }))
}

/// What a plan says beside what was named; and what of that tells what is left out.
fn lines(settled: &Settled<'_>, kept: &[String], head: &Head) -> (Vec<String>, Vec<String>) {
    let mut lines = Vec::new();
    if !settled.schemas.is_empty() {
        lines.push(format!("create {}", names(&settled.schemas)));
    }
    if !kept.is_empty() {
        let kept = kept.join(", ");
        lines.push(format!("leave owner, rights and comments of schemas that are there: {kept}"));
    }
    if !settled.brought.is_empty() {
        lines.push(format!("bring along what is needed: {}", names(&settled.brought)));
    }
    if !settled.used.is_empty() {
        lines.push(format!("use of the database what is needed: {}", names(&settled.used)));
    }
    let mut left_out = Vec::new();
    for (entry, lacks) in &settled.left_out {
        // What a key needs of a table that is not there is not worth a word.
        let tables: Vec<&Entry> =
            lacks.iter().copied().filter(|entry| entry.kind.ends_with("TABLE")).collect();
        let lacks = if tables.is_empty() { lacks } else { &tables };
        left_out.push(format!("{}, for want of {}", entry.told(), names(lacks)));
    }
    if head.contents.entries.iter().any(|entry| entry.kind.starts_with("BLOB")) {
        left_out.push("large objects, which are of no schema and no table".to_owned());
    }
    lines.extend(left_out.iter().map(|what| format!("leave out {what}")));
    (lines, left_out)
}

fn names(entries: &[&Entry]) -> String {
    let told = entries.iter().take(NAMES_MAX).map(|entry| entry.told());
    let mut text = told.collect::<Vec<_>>().join(", ");
    if entries.len() > NAMES_MAX {
        text.extend([" and ", &(entries.len() - NAMES_MAX).to_string(), " more"]);
    }
    text
}

fn unknown(dump: &DatabaseDump, kind: &str, name: &str) -> Failure {
    let what = format!("the dump of database {} has no {kind} {name}", dump.database);
    let hint = "Nothing was changed. Names are as in the catalogue, without quotes; a table's is without its schema, \
                which --schema names.";
    Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(hint)
}

fn occupied(request: &LoadRequest, dump: &DatabaseDump, in_the_way: &[String]) -> Failure {
    let what = in_the_way.join(", ");
    let message = format!("database {} on {} has {what}", dump.database, request.target);
    Failure::new(Code::TargetNotEmpty, Action::FixConfig, message).with_hint(
        "Nothing was changed. Rename or drop them there, or restore the database under another server and move the rows.",
    )
}

fn lacking(
    request: &LoadRequest,
    dump: &DatabaseDump,
    lacks: &[&Entry],
    is_there: bool,
) -> Failure {
    let database = &dump.database;
    let message = format!(
        "what was named of database {database} needs what is not there on {}, and does not come along: {}",
        request.target,
        names(lacks)
    );
    let make = if is_there {
        "Make it there".to_owned()
    } else {
        format!("CREATE DATABASE {} and make it there", quote::identifier(database.as_str()))
    };
    Failure::new(Code::RequestInvalid, Action::FixConfig, message).with_hint(format!(
        "Nothing was changed. {make}, name its schema or table as well, or restore all of the database."
    ))
}
