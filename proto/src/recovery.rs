//! Recovery beyond the end of a backup: to which moment, along which timeline, and what the server does there.
//!
//! A person's words become a [`RecoveryTarget`] here, with the time and the zone as parameters. What is ambiguous is refused,
//! and the refusal says how to write it.

use std::fmt;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Span, SpanRound, Timestamp, ToSpan as _, Unit, Zoned};
use serde::{Deserialize, Serialize};

use crate::{Lsn, Timeline};

/// A restore point's name is shorter than the server's `MAXFNAMELEN`, 64 bytes with its end.
pub const RESTORE_POINT_MAX_BYTES: usize = 63;
/// The first transaction id that a transaction can have; those below mean something else to the server.
const FIRST_NORMAL_TRANSACTION: u32 = 3;

/// Where recovery ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryTarget {
    /// At the end of the archived WAL.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// At the first commit after this time, by the clock of the server that wrote it. Microseconds.
    Time(Timestamp),
    /// At this position.
    Lsn(Lsn),
    /// At the end of this transaction, as `pg_current_xact_id` tells it; the epoch does not matter.
    Xid(u64),
    /// At a restore point, `pg_create_restore_point`.
    Name(String),
}

/// What a server does when it has reached the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// Opens on a new timeline.
    #[default]
    Promote,
    /// Waits, and answers queries that only read, until a person promotes it.
    Pause,
    /// Shuts down; the next start replays to the same target.
    Shutdown,
}

impl TargetAction {
    /// As the server reads it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

/// Everything a restore has to know to go beyond the end of its backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of its own on the command line"
)]
pub struct Recovery {
    /// Where it ends.
    pub to: RecoveryTarget,
    /// Along which timeline; the newest that descends from a backup when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
    /// Stop just before the target instead of just after it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub before: bool,
    /// What the server does there.
    #[serde(default)]
    pub action: TargetAction,
    /// The server goes on following the archive as a standby.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub standby: bool,
    /// Run the server and see that it reached the target.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub start: bool,
    /// Leave `archive_mode` as the source had it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_archiving: bool,
    /// The port the server listens at, instead of the one in the files of the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl Recovery {
    /// To a target, with everything else as usual.
    pub fn to(target: RecoveryTarget) -> Self {
        Self {
            to: target,
            timeline: None,
            before: false,
            action: TargetAction::Promote,
            standby: false,
            start: false,
            keep_archiving: false,
            port: None,
        }
    }

    /// What contradicts itself, for people.
    pub fn check(&self) -> Result<(), &'static str> {
        let open_end = self.to == RecoveryTarget::Latest;
        if self.standby && !open_end {
            return Err(
                "a standby follows the archive and stops nowhere: leave --to away, or --standby",
            );
        }
        if self.standby && self.timeline.is_some() {
            return Err(
                "a standby goes over to every newer timeline, so there is no --timeline for it",
            );
        }
        if self.standby && self.action != TargetAction::Promote {
            return Err("a standby reaches no target, so there is no --action for it");
        }
        if open_end && self.action != TargetAction::Promote {
            return Err(
                "at the end of the WAL a server always opens; --action needs a target before that end",
            );
        }
        if self.before
            && matches!(
                self.to,
                RecoveryTarget::Latest | RecoveryTarget::Immediate | RecoveryTarget::Name(_)
            )
        {
            return Err("--before needs a time, a position or a transaction");
        }
        if let RecoveryTarget::Name(name) = &self.to {
            check_name(name)?;
        }
        if let RecoveryTarget::Xid(xid) = self.to
            && low_half(xid) < FIRST_NORMAL_TRANSACTION
        {
            return Err("no transaction has an id below 3");
        }
        if self.to == RecoveryTarget::Lsn(Lsn::INVALID) {
            return Err("0/0 is no position");
        }
        Ok(())
    }
}

/// A transaction id without its epoch.
pub fn low_half(xid: u64) -> u32 {
    u32::try_from(xid & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// Refuses a copy that would archive on the timeline of its source, for people. A server that recovers nothing opens on that
/// timeline, and writes other WAL under the same names; one that recovers begins a timeline of its own.
pub fn check_archiving(keep_archiving: bool, recovers: bool) -> Result<(), &'static str> {
    if keep_archiving && !recovers {
        return Err(
            "--keep-archiving needs --to or --standby: this copy would open on the timeline of its source, and archive under the same names",
        );
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > RESTORE_POINT_MAX_BYTES {
        return Err("a restore point's name has 1 to 63 bytes");
    }
    if name.chars().any(char::is_control) {
        return Err(
            "a restore point's name with control characters cannot be written into a settings file",
        );
    }
    Ok(())
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the WAL"),
            Self::Immediate => f.write_str("the end of the backup"),
            Self::Time(time) => write!(f, "{time}"),
            Self::Lsn(lsn) => write!(f, "position {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point {name:?}"),
        }
    }
}

/// Words that do not say one moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("understand {text:?} as a moment: {what}")]
pub struct TargetError {
    text: String,
    what: String,
}

/// How long ago, at most: a hundred years.
const AGO_MAX_S: i64 = 100 * 366 * 86_400;

impl RecoveryTarget {
    /// Reads a person's words. `now` is the person's clock, and its zone the one in which `today 09:30` is meant.
    pub fn read(text: &str, now: &Zoned) -> Result<Self, TargetError> {
        let wrong = |what: String| TargetError { text: text.chars().take(80).collect(), what };
        let text = text.trim();
        match text.split_once(':') {
            Some(("xid", digits)) => {
                let xid = digits.trim().parse::<u64>();
                return xid.map(Self::Xid).map_err(|_| wrong("write xid:1234".to_owned()));
            }
            Some(("name", name)) => {
                check_name(name).map_err(|what| wrong(what.to_owned()))?;
                return Ok(Self::Name(name.to_owned()));
            }
            Some(("lsn", position)) => {
                let position = position.trim().parse().map(Self::Lsn);
                return position.map_err(|_| wrong("write lsn:0/3000148".to_owned()));
            }
            _ => {}
        }
        match text {
            "latest" => return Ok(Self::Latest),
            "immediate" => return Ok(Self::Immediate),
            "now" => {
                return Err(wrong(
                    "what is happening now is not archived yet; write latest for all there is"
                        .to_owned(),
                ));
            }
            _ => {}
        }
        if let Ok(lsn) = text.parse() {
            return Ok(Self::Lsn(lsn));
        }
        moment(text, now).map(Self::Time).map_err(wrong)
    }
}

/// A point in time. The error says how to write it.
fn moment(text: &str, now: &Zoned) -> Result<Timestamp, String> {
    if let Some(ago) = text.strip_prefix('-') {
        return before(ago, now);
    }
    for (word, days) in [("today", 0), ("yesterday", 1)] {
        let Some(rest) = text.strip_prefix(word) else { continue };
        let time = rest.trim();
        let time: Time =
            time.parse().map_err(|_| format!("write {word} 09:30 or {word} 09:30:15"))?;
        let day = now.date().checked_sub(days.days()).map_err(|error| error.to_string())?;
        return in_zone(day.to_datetime(time), now.time_zone());
    }
    let spaced = || {
        // `2026-11-27 09:30:00 +01:00` and `… UTC`, as servers print it.
        let (rest, zone) = text.rsplit_once(' ')?;
        match zone {
            "UTC" | "GMT" => Some(format!("{rest}Z")),
            _ if zone.starts_with(['+', '-']) => Some(format!("{rest}{zone}")),
            _ => None,
        }
    };
    let with_zone = spaced().unwrap_or_else(|| text.to_owned());
    if let Ok(time) = with_zone.parse::<Timestamp>() {
        return Ok(to_microseconds(time));
    }
    if let Ok(zoned) = text.parse::<Zoned>() {
        return Ok(to_microseconds(zoned.timestamp()));
    }
    if text.parse::<Date>().is_ok() && text.len() <= 10 {
        return Err(format!(
            "which time of that day? Write {text}T09:30:00{}",
            now.strftime("%:z")
        ));
    }
    if let Ok(local) = text.parse::<DateTime>() {
        let here = match in_zone(local, now.time_zone()) {
            Ok(time) => {
                time.to_zoned(now.time_zone().clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
            }
            Err(_) => format!("{local}Z"),
        };
        return Err(format!("in which zone? Write {here} or {local}Z"));
    }
    if text.contains(':') && text.parse::<Time>().is_ok() {
        return Err(format!("on which day? Write \"today {text}\" or \"yesterday {text}\""));
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
        return Err(format!("is it a transaction? Write xid:{text}"));
    }
    if check_name(text).is_ok() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(format!("is it a restore point? Write name:{text}"));
    }
    Err("write a time with its zone (2026-11-27T09:30:00+01:00), \"today 09:30\", \"yesterday 18:00\", -15min, \
         a position (0/3000148), xid:1234, name:before_release, immediate or latest"
        .to_owned())
}

/// `15min` before now.
fn before(ago: &str, now: &Zoned) -> Result<Timestamp, String> {
    let digits = ago.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = ago.split_at(digits);
    let how = || "write -90s, -15min, -2h or -1d".to_owned();
    let number: i64 = number.parse().map_err(|_| how())?;
    let seconds = match unit.trim() {
        "s" | "sec" => 1,
        "min" => 60,
        "h" => 3_600,
        "d" => 86_400,
        "m" => return Err(format!("m may be minutes or months: write -{number}min")),
        _ => return Err(how()),
    };
    let seconds = number.checked_mul(seconds).filter(|seconds| *seconds <= AGO_MAX_S);
    let ago = seconds.ok_or_else(|| "that is more than a hundred years ago".to_owned())?;
    let then = now.timestamp().checked_sub(ago.seconds());
    then.map(to_microseconds).map_err(|error| error.to_string())
}

fn in_zone(local: DateTime, zone: &TimeZone) -> Result<Timestamp, String> {
    let ambiguous = zone.to_ambiguous_timestamp(local);
    ambiguous.unambiguous().map(to_microseconds).map_err(|_| {
        format!(
            "clocks were changed then, so {local} was not once: write it with its offset, as in {local}+01:00"
        )
    })
}

/// The server knows microseconds.
fn to_microseconds(time: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
}

/// How far one time lies before another, in words of at most two units.
pub fn span(earlier: Timestamp, later: Timestamp) -> String {
    let seconds = later.as_second().saturating_sub(earlier.as_second()).max(0);
    let span: Option<Span> = Span::new()
        .try_seconds(seconds)
        .ok()
        .and_then(|span| span.round(SpanRound::new().largest(Unit::Hour)).ok());
    span.map_or_else(|| format!("{seconds} s"), |span| format!("{span:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Zoned {
        "2026-11-27T10:00:00.5+01:00[Europe/Berlin]".parse().unwrap()
    }

    fn read(text: &str) -> RecoveryTarget {
        RecoveryTarget::read(text, &now()).unwrap()
    }

    fn time(text: &str) -> RecoveryTarget {
        RecoveryTarget::Time(text.parse().unwrap())
    }

    fn refused(text: &str) -> String {
        RecoveryTarget::read(text, &now()).unwrap_err().to_string()
    }

    #[test]
    fn every_way_to_say_a_moment_is_understood() {
        assert_eq!(read("latest"), RecoveryTarget::Latest);
        assert_eq!(read("immediate"), RecoveryTarget::Immediate);
        assert_eq!(read("0/3000148"), RecoveryTarget::Lsn(Lsn(0x300_0148)));
        assert_eq!(read("lsn:16/B374D848"), RecoveryTarget::Lsn(Lsn(0x16_B374_D848)));
        assert_eq!(read("xid:1234"), RecoveryTarget::Xid(1234));
        assert_eq!(
            read("name:before release: 2"),
            RecoveryTarget::Name("before release: 2".to_owned())
        );
        for text in [
            "2026-11-27T09:30:00+01:00",
            "2026-11-27T08:30:00Z",
            "2026-11-27 08:30Z",
            "2026-11-27 08:30:00+00",
            "2026-11-27 08:30:00 UTC",
            "2026-11-27 09:30:00 +01:00",
            "2026-11-27T09:30[Europe/Berlin]",
            "today 09:30",
            "today 09:30:00",
            " today 09:30 ",
        ] {
            assert_eq!(read(text), time("2026-11-27T08:30:00Z"), "{text}");
        }
        assert_eq!(read("yesterday 18:00"), time("2026-11-26T17:00:00Z"));
        assert_eq!(read("-15min"), time("2026-11-27T08:45:00.5Z"));
        assert_eq!(read("-90s"), time("2026-11-27T08:58:30.5Z"));
        assert_eq!(read("-2h"), time("2026-11-27T07:00:00.5Z"));
        assert_eq!(read("-1d"), time("2026-11-26T09:00:00.5Z"));
        assert_eq!(read("2026-11-27T08:30:00.1234567Z"), time("2026-11-27T08:30:00.123456Z"));
    }

    #[test]
    fn what_may_be_two_moments_is_refused_with_the_way_to_write_it() {
        for (text, cure) in [
            (
                "2026-11-27T09:30:00",
                "in which zone? Write 2026-11-27T09:30:00+01:00 or 2026-11-27T09:30:00Z",
            ),
            ("2026-11-27 09:30", "2026-11-27T09:30:00Z"),
            ("2026-11-27", "which time of that day? Write 2026-11-27T09:30:00+01:00"),
            ("09:30", "Write \"today 09:30\" or \"yesterday 09:30\""),
            ("1234", "xid:1234"),
            ("before_release", "name:before_release"),
            ("-15m", "-15min"),
            ("-15", "-15min"),
            ("now", "latest"),
            ("today", "today 09:30"),
            ("today half past nine", "today 09:30"),
            ("xid:x", "xid:1234"),
            ("lsn:zero", "lsn:0/3000148"),
            ("name:", "1 to 63 bytes"),
            ("name:two\nlines", "control characters"),
            ("-99999999d", "hundred years"),
            ("", "2026-11-27T09:30:00+01:00"),
            ("soon, please", "2026-11-27T09:30:00+01:00"),
        ] {
            let said = refused(text);
            assert!(said.contains(cure), "{text:?}: {said}");
        }
        assert!(refused(&format!("name:{}", "x".repeat(64))).contains("63"));
    }

    #[test]
    fn an_hour_that_was_there_twice_or_never_is_refused() {
        let after: Zoned = "2026-10-25T12:00[Europe/Berlin]".parse().unwrap();
        let twice = RecoveryTarget::read("today 02:30", &after).unwrap_err().to_string();
        assert!(twice.contains("was not once"), "{twice}");
        let after: Zoned = "2026-03-29T12:00[Europe/Berlin]".parse().unwrap();
        assert!(RecoveryTarget::read("today 02:30", &after).is_err());
        assert!(RecoveryTarget::read("today 03:30", &after).is_ok());
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let to = Recovery::to;
        let lsn = RecoveryTarget::Lsn(Lsn(1));
        assert_eq!(to(lsn.clone()).check(), Ok(()));
        assert_eq!(Recovery { before: true, ..to(lsn.clone()) }.check(), Ok(()));
        assert_eq!(Recovery { standby: true, ..to(RecoveryTarget::Latest) }.check(), Ok(()));
        for wrong in [
            Recovery { standby: true, ..to(lsn.clone()) },
            Recovery { standby: true, action: TargetAction::Pause, ..to(RecoveryTarget::Latest) },
            Recovery { action: TargetAction::Pause, ..to(RecoveryTarget::Latest) },
            Recovery { standby: true, timeline: Some(Timeline(2)), ..to(RecoveryTarget::Latest) },
            Recovery { before: true, ..to(RecoveryTarget::Immediate) },
            Recovery { before: true, ..to(RecoveryTarget::Name("x".to_owned())) },
            to(RecoveryTarget::Xid(2)),
            to(RecoveryTarget::Xid(1 << 32)),
            to(RecoveryTarget::Lsn(Lsn::INVALID)),
            to(RecoveryTarget::Name("a\nb".to_owned())),
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_job_with_a_word_it_does_not_know_is_refused() {
        let recovery = Recovery::to(read("today 09:30"));
        let text = serde_json::to_string(&recovery).unwrap();
        assert_eq!(text, r#"{"to":{"time":"2026-11-27T08:30:00Z"},"action":"promote"}"#);
        assert_eq!(serde_json::from_str::<Recovery>(&text).unwrap(), recovery);
        let odd = text.replace("action", "reaction");
        assert!(serde_json::from_str::<Recovery>(&odd).is_err());
    }
}
