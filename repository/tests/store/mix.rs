//! A bad day drawn by chance: a share of all requests meets one of the faults that a store, or the way to it, is known
//! for. What is drawn depends on the seed and on the order in which requests arrive, and on nothing else.

use crate::proxy::{Canned, Fault, Harm, refusal};

/// A fault by what the client sees of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// 500, and nothing was done.
    InternalError,
    /// 500, and it was done.
    InternalErrorAfterwards,
    /// 503 `SlowDown`.
    SlowDown,
    /// 429, as some servers say it.
    TooManyRequests,
    /// 504 of a gateway that did not wait for the end.
    GatewayTimeout,
    /// A reset at any byte of the request.
    ResetRequest,
    /// A reset at any byte of the answer.
    ResetAnswer,
    /// It was done, and no answer comes.
    LostAnswer,
    /// No answer comes and the connection stays.
    Hang,
    /// The body stands still.
    StalledBody,
    /// The body ends too early.
    CutBody,
    /// A bit of an object's bytes is wrong when they arrive.
    FlippedBit,
    /// Another range than was asked for.
    WrongRange,
    /// 200 with an error inside, and the upload was not completed.
    ErrorInside,
    /// 200 with an error inside, and the upload was completed.
    ErrorInsideAfterwards,
    /// The upload is completed, and the answer is that there is none.
    UploadGone,
    /// 409 to a conditional write, and nothing was done.
    Conflict,
    /// 409 to a conditional write, and it was done.
    ConflictAfterwards,
    /// 412 to a conditional write that was done.
    OwnObject,
}

impl Kind {
    /// Every kind, with how often it is drawn beside the others that fit: what fits few requests is drawn often, what
    /// costs a time-out seldom.
    pub(crate) const ALL: [(Self, u32); 19] = [
        (Self::InternalError, 16),
        (Self::InternalErrorAfterwards, 16),
        (Self::SlowDown, 24),
        (Self::TooManyRequests, 8),
        (Self::GatewayTimeout, 8),
        (Self::ResetRequest, 16),
        (Self::ResetAnswer, 16),
        (Self::LostAnswer, 16),
        (Self::Hang, 1),
        (Self::StalledBody, 2),
        (Self::CutBody, 12),
        (Self::FlippedBit, 16),
        (Self::WrongRange, 16),
        (Self::ErrorInside, 60),
        (Self::ErrorInsideAfterwards, 60),
        (Self::UploadGone, 60),
        (Self::Conflict, 30),
        (Self::ConflictAfterwards, 30),
        (Self::OwnObject, 30),
    ];

    /// Whether it needs an upload in parts, of which a day has too few to be sure of each kind.
    pub(crate) fn is_of_uploads(self) -> bool {
        matches!(self, Self::ErrorInside | Self::ErrorInsideAfterwards | Self::UploadGone)
    }

    /// Whether it can happen to such a request.
    fn fits(self, request: &Request<'_>) -> bool {
        match self {
            Self::StalledBody | Self::CutBody => request.method == "GET",
            Self::FlippedBit => request.reads_object(),
            Self::WrongRange => request.reads_object() && request.has_header("range"),
            Self::ErrorInside | Self::ErrorInsideAfterwards | Self::UploadGone => {
                request.method == "POST" && request.target.contains("uploadId=")
            }
            Self::Conflict | Self::ConflictAfterwards | Self::OwnObject => {
                request.has_header("if-none-match")
            }
            _ => true,
        }
    }

    fn fault(self, byte: usize) -> Fault {
        let inside = Canned { status: 200, ..refusal(200, "InternalError") };
        match self {
            Self::InternalError => Fault::Answer(refusal(500, "InternalError")),
            Self::InternalErrorAfterwards => {
                Fault::CarryOutAndAnswer(refusal(500, "InternalError"))
            }
            Self::SlowDown => Fault::Answer(refusal(503, "SlowDown")),
            Self::TooManyRequests => Fault::Answer(refusal(429, "TooManyRequests")),
            Self::GatewayTimeout => Fault::CarryOutAndAnswer(Canned {
                status: 504,
                headers: &[],
                body: "<html>gateway</html>".to_owned(),
            }),
            Self::ResetRequest => Fault::Somewhere(Harm::CutRequest, byte),
            Self::ResetAnswer => Fault::Somewhere(Harm::CutAnswer, byte),
            Self::LostAnswer => Fault::LoseAnswer,
            Self::Hang => Fault::Hang,
            Self::StalledBody => Fault::Somewhere(Harm::StallBody, byte),
            Self::CutBody => Fault::Somewhere(Harm::CutBody, byte),
            Self::FlippedBit => Fault::Somewhere(Harm::FlipBody, byte),
            Self::WrongRange => Fault::Answer(Canned {
                status: 206,
                headers: &[("content-range", "bytes 7-10/2000000")],
                body: "0123".to_owned(),
            }),
            Self::ErrorInside => Fault::Answer(inside),
            Self::ErrorInsideAfterwards => Fault::CarryOutAndAnswer(inside),
            Self::UploadGone => Fault::CarryOutAndAnswer(refusal(404, "NoSuchUpload")),
            Self::Conflict => Fault::Answer(refusal(409, "ConditionalRequestConflict")),
            Self::ConflictAfterwards => {
                Fault::CarryOutAndAnswer(refusal(409, "ConditionalRequestConflict"))
            }
            Self::OwnObject => Fault::CarryOutAndAnswer(refusal(412, "PreconditionFailed")),
        }
    }
}

/// A request as far as a fault asks about it.
struct Request<'a> {
    method: &'a str,
    target: &'a str,
    head: &'a str,
}

impl Request<'_> {
    fn has_header(&self, name: &str) -> bool {
        self.head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .any(|(found, _)| found.eq_ignore_ascii_case(name))
    }

    /// Not a listing: the bytes of those are the store's own, and nothing but the line's encryption guards them.
    fn reads_object(&self) -> bool {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        self.method == "GET" && !query.contains("list-type") && !query.contains("uploads")
    }
}

/// What was drawn for one request.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) kind: Kind,
    pub(crate) fault: Fault,
}

/// Draws faults.
#[derive(Debug)]
pub(crate) struct Mix {
    /// Of a hundred requests.
    rate: u64,
    seed: u64,
    draws: u64,
}

impl Mix {
    pub(crate) fn new(rate: u64, seed: u64) -> Self {
        Self { rate, seed, draws: 0 }
    }

    fn number(&mut self, below: u64) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(&self.draws.to_le_bytes());
        self.draws += 1;
        let mut bytes = [0; 8];
        hasher.finalize_xof().fill(&mut bytes);
        u64::from_le_bytes(bytes) % below
    }

    /// The fault that the next request meets, if any.
    pub(crate) fn draw(&mut self, method: &str, target: &str, head: &str) -> Option<Drawn> {
        let (met, which, byte) =
            (self.number(100) < self.rate, self.number(1 << 32), self.number(1 << 32));
        if !met {
            return None;
        }
        let request = Request { method, target, head };
        let fitting = Kind::ALL.iter().filter(|(kind, _)| kind.fits(&request));
        let whole: u64 = fitting.clone().map(|(_, weight)| u64::from(*weight)).sum();
        let mut left = which % whole;
        let drawn = fitting.clone().find(|(_, weight)| {
            let here = left < u64::from(*weight);
            left = left.saturating_sub(u64::from(*weight));
            here
        });
        let (kind, _) = drawn?;
        Some(Drawn { kind: *kind, fault: kind.fault(usize::try_from(byte).ok()?) })
    }
}
