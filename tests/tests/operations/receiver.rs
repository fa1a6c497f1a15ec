//! A webhook's other end: takes what is posted to it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

/// It listens as long as the test runs.
#[derive(Debug)]
pub(crate) struct Receiver {
    port: u16,
    got: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    /// One that answers every request with this status.
    pub(crate) fn answering(status: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let receiver = Self { port: listener.local_addr()?.port(), got: Arc::default() };
        let got = Arc::clone(&receiver.got);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Kept before it is answered: whoever has the answer finds it.
                if let Ok(body) = take(&stream) {
                    got.lock().unwrap_or_else(PoisonError::into_inner).push(body);
                    let _ = answer(&stream, status);
                }
            }
        });
        Ok(receiver)
    }

    /// Where to post to. The path is the secret of such a URL.
    pub(crate) fn url(&self, secret: &str) -> String {
        format!("http://127.0.0.1:{}/services/{secret}", self.port)
    }

    /// The texts of all messages so far.
    pub(crate) fn texts(&self) -> anyhow::Result<Vec<String>> {
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |body: &String| {
            let message: Value = serde_json::from_str(body).with_context(|| body.clone())?;
            Ok(message["text"].as_str().context("a message has a text")?.to_owned())
        };
        got.iter().map(read).collect()
    }
}

fn take(stream: &TcpStream) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut lines = BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    while lines.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        line.clear();
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body)?;
    Ok(String::from_utf8(body)?)
}

fn answer(mut stream: &TcpStream, status: u16) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
}
