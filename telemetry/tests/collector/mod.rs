//! Collectors for the tests, on loopback: one that works, one that accepts and never answers, one that hangs up.
//!
//! The working one is an HTTP/1.1 server just good enough for the exporter's own client.

#![expect(dead_code, reason = "each test binary uses a part of this")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

/// What one export carried.
#[derive(Clone)]
pub(crate) struct Export {
    pub(crate) path: String,
    pub(crate) headers: String,
    pub(crate) request: ExportTraceServiceRequest,
}

/// A collector that keeps what it gets.
pub(crate) struct Collector {
    pub(crate) endpoint: String,
    exports: Arc<Mutex<Vec<Export>>>,
}

impl Collector {
    pub(crate) fn start() -> Self {
        let exports = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&exports);
        let endpoint = listen(move |stream| {
            let kept = Arc::clone(&kept);
            thread::spawn(move || serve(stream, &kept));
        });
        Self { endpoint, exports }
    }

    pub(crate) fn exports(&self) -> Vec<Export> {
        self.exports.lock().unwrap().clone()
    }

    /// Every span so far, by the order of arrival.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let resources = self.exports().into_iter().flat_map(|export| export.request.resource_spans);
        resources.flat_map(|r| r.scope_spans).flat_map(|s| s.spans).collect()
    }

    pub(crate) fn span(&self, name: &str) -> Span {
        let spans = self.spans();
        let mut found = spans.iter().filter(|span| span.name == name);
        let first = found.next().unwrap_or_else(|| panic!("no span {name} among {spans:#?}"));
        assert!(found.next().is_none(), "{name} came twice");
        first.clone()
    }

    /// Waits until a span of that name has arrived.
    pub(crate) fn wait_for(&self, name: &str) -> Span {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.spans().iter().any(|span| span.name == name) {
            assert!(Instant::now() < deadline, "the span {name} never came: {:#?}", self.spans());
            thread::sleep(Duration::from_millis(10));
        }
        self.span(name)
    }
}

/// An endpoint whose connections are accepted and never answered.
pub(crate) fn black_hole() -> String {
    let held = Mutex::new(Vec::new());
    listen(move |stream| held.lock().unwrap().push(stream))
}

/// An endpoint that hangs up at once.
pub(crate) fn hang_up() -> String {
    listen(drop)
}

/// Accepts connections for the rest of the process.
fn listen(handle: impl Fn(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || listener.incoming().flatten().for_each(handle));
    endpoint
}

/// Answers the requests of one connection until the client closes it.
fn serve(mut stream: TcpStream, kept: &Mutex<Vec<Export>>) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(n) => bytes.extend_from_slice(&chunk[..n]),
            }
            continue;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let lower = head.to_ascii_lowercase();
        let length = lower.split("content-length:").nth(1).expect("the exporter sends a length");
        let length: usize = length.lines().next().unwrap().trim().parse().unwrap();
        while bytes.len() < end + 4 + length {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(n) => bytes.extend_from_slice(&chunk[..n]),
            }
        }
        let body: Vec<u8> = bytes.drain(..end + 4 + length).skip(end + 4).collect();
        let path = head.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        let request = ExportTraceServiceRequest::decode(&body[..]).unwrap();
        kept.lock().unwrap().push(Export { path, headers: lower, request });
        if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").is_err() {
            return;
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// The text of an attribute, if the span has it.
pub(crate) fn attribute(span: &Span, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(yes) => yes.to_string(),
        other => format!("{other:?}"),
    })
}
