//! A proxy in front of the S3 server that can misbehave. It imitates no S3: every answer that is not an injected fault is
//! the server's own.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::lab::{client, endpoint};
use crate::mix::{Drawn, Kind, Mix};

/// What happens to one request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The request is carried out; its answer never arrives.
    LoseAnswer,
    /// The request is carried out; this is answered instead.
    CarryOutAndAnswer(Canned),
    /// The request is not passed on; this is answered.
    Answer(Canned),
    /// The connection ends after so many bytes of the request.
    CutRequest(usize),
    /// The answer's head and so many bytes of its body arrive, then the connection ends.
    CutBody(usize),
    /// The answer's head and so many bytes of its body arrive, then nothing.
    StallBody(usize),
    /// One byte of the answer's body after another, with a pause between.
    Drip(Duration),
    /// So many bytes of the answer arrive, its head included, then the connection is reset.
    CutAnswer(usize),
    /// The answer's body arrives with one wrong bit, in this byte.
    FlipBody(usize),
    /// The request is carried out with one wrong bit in this byte of its body.
    FlipRequest(usize),
    /// One of these, at a byte counted modulo the length of what is on its way.
    Somewhere(Harm, usize),
    /// The request is read and nothing ever comes back.
    Hang,
    /// `If-None-Match` is not looked at: what stands under the key is replaced.
    IgnoreCondition,
    /// Refused like this when its head has one of these texts, for a server that does not know it.
    RefuseHeaders(&'static [&'static str], Canned),
    /// Metadata of the answer that begins with this is taken out.
    StripHeader(&'static str),
}

/// What can happen at any byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Harm {
    CutRequest,
    CutAnswer,
    CutBody,
    StallBody,
    FlipBody,
}

impl Harm {
    /// The fault, now that it is known how long the thing is that it happens to.
    fn at(self, byte: usize, length: usize) -> Fault {
        let byte = byte % length.max(1);
        match self {
            Self::CutRequest => Fault::CutRequest(byte),
            Self::CutAnswer => Fault::CutAnswer(byte),
            Self::CutBody => Fault::CutBody(byte),
            Self::StallBody => Fault::StallBody(byte),
            Self::FlipBody => Fault::FlipBody(byte),
        }
    }
}

/// An answer that is not the server's.
#[derive(Debug, Clone)]
pub(crate) struct Canned {
    pub(crate) status: u16,
    pub(crate) headers: &'static [(&'static str, &'static str)],
    pub(crate) body: String,
}

/// An S3 error with a code.
pub(crate) fn refusal(status: u16, code: &str) -> Canned {
    Canned {
        status,
        headers: &[("content-type", "application/xml")],
        body: format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>"
        ),
    }
}

/// The next `times` requests of `method` whose target contains `target` meet `fault`.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) method: &'static str,
    pub(crate) target: &'static str,
    pub(crate) times: usize,
    pub(crate) fault: Fault,
}

#[derive(Debug, Default)]
struct State {
    rules: VecDeque<Rule>,
    every: Option<(usize, Fault)>,
    mix: Option<Mix>,
    seen: Vec<String>,
    heads: Vec<String>,
    connections: usize,
    forwarded: usize,
    drawn: Vec<(Kind, String)>,
}

/// A proxy in front of the S3 server; headers pass unchanged, so signatures hold.
pub(crate) struct Proxy {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
    accepting: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Proxy {
    pub(crate) async fn start() -> Self {
        let server = endpoint().strip_prefix("http://").expect("a plain endpoint").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                shared.lock().expect("lock").connections += 1;
                let (server, shared) = (server.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    // A connection that ends in the middle is what this proxy is for.
                    let _ = serve(client, &server, &shared).await;
                });
            }
        });
        Self { url, state, accepting }
    }

    pub(crate) fn inject(
        &self,
        method: &'static str,
        target: &'static str,
        times: usize,
        fault: Fault,
    ) {
        self.state.lock().expect("lock").rules.push_back(Rule { method, target, times, fault });
    }

    /// Every n-th request of all meets the fault.
    pub(crate) fn inject_every(&self, n: usize, fault: Fault) {
        self.state.lock().expect("lock").every = Some((n, fault));
    }

    /// A share of all requests meets faults by chance.
    pub(crate) fn inject_mix(&self, mix: Mix) {
        self.state.lock().expect("lock").mix = Some(mix);
    }

    /// The faults of the mix that happened, each with its request as `METHOD target`.
    pub(crate) fn drawn(&self) -> Vec<(Kind, String)> {
        self.state.lock().expect("lock").drawn.clone()
    }

    /// Requests that the server got to see, in part or whole.
    pub(crate) fn forwarded(&self) -> usize {
        self.state.lock().expect("lock").forwarded
    }

    /// Takes back every fault that has not happened.
    pub(crate) fn forgive(&self) {
        let mut state = self.state.lock().expect("lock");
        state.rules.clear();
        state.mix = None;
    }

    /// The requests since the last call, as `METHOD target`.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().expect("lock").seen)
    }

    /// The heads of all requests, signature and all.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.state.lock().expect("lock").heads.clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.state.lock().expect("lock").connections
    }

    /// Whether every injected fault has happened.
    pub(crate) fn is_spent(&self) -> bool {
        self.state.lock().expect("lock").rules.is_empty()
    }
}

fn fault_for(state: &Mutex<State>, method: &str, target: &str, head: &str) -> Option<Fault> {
    let mut state = state.lock().expect("lock");
    state.seen.push(format!("{method} {target}"));
    if let Some(Drawn { kind, fault }) =
        state.mix.as_mut().and_then(|mix| mix.draw(method, target, head))
    {
        state.drawn.push((kind, format!("{method} {target}")));
        return Some(fault);
    }
    let count = state.seen.len();
    if let Some((n, fault)) = &state.every
        && count.is_multiple_of(*n)
    {
        return Some(fault.clone());
    }
    let at = state
        .rules
        .iter()
        .position(|rule| rule.method == method && target.contains(rule.target))?;
    let rule = state.rules.get_mut(at)?;
    rule.times -= 1;
    let fault = rule.fault.clone();
    if rule.times == 0 {
        state.rules.remove(at);
    }
    Some(fault)
}

/// One message of HTTP/1.1: its head with the empty line, and how its body ends.
struct Head {
    bytes: Vec<u8>,
}

/// A connection of which more may have been read than one message.
type Connection = BufReader<TcpStream>;

impl Head {
    async fn read(from: &mut Connection) -> std::io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            match from.read_u8().await {
                Ok(byte) => bytes.push(byte),
                Err(_) if bytes.is_empty() => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Self { bytes }))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn header(&self, name: &str) -> Option<String> {
        self.text().lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    }

    /// The body as it stands on the wire.
    async fn body(&self, from: &mut Connection) -> std::io::Result<Vec<u8>> {
        if let Some(length) = self.header("content-length") {
            let mut body = vec![0; length.parse().expect("a length")];
            from.read_exact(&mut body).await?;
            return Ok(body);
        }
        let mut body = Vec::new();
        if self
            .header("transfer-encoding")
            .is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
        {
            while !body.ends_with(b"0\r\n\r\n") {
                body.push(from.read_u8().await?);
            }
        }
        Ok(body)
    }
}

async fn connect(server: &str, state: &Mutex<State>) -> std::io::Result<Connection> {
    state.lock().expect("lock").forwarded += 1;
    let upstream = TcpStream::connect(server).await?;
    upstream.set_nodelay(true)?;
    Ok(BufReader::new(upstream))
}

async fn serve(client: TcpStream, server: &str, state: &Mutex<State>) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let mut client = BufReader::new(client);
    while let Some(head) = Head::read(&mut client).await? {
        let text = head.text();
        let mut words = text.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default().to_owned();
        let mut fault = fault_for(state, &method, &target, &text);
        state.lock().expect("lock").heads.push(text.clone());

        let mut body = head.body(&mut client).await?;
        if let Some(Fault::Somewhere(harm @ Harm::CutRequest, byte)) = fault {
            fault = Some(harm.at(byte, head.bytes.len() + body.len()));
        }
        match &fault {
            Some(Fault::CutRequest(after)) => {
                let mut upstream = connect(server, state).await?;
                let request = [&head.bytes[..], &body].concat();
                upstream.write_all(&request[..(*after).min(request.len() - 1)]).await?;
                return client.get_ref().set_zero_linger();
            }
            Some(Fault::FlipRequest(at)) => {
                if let Some(byte) = body.get_mut(*at) {
                    *byte ^= 1;
                }
            }
            Some(Fault::Answer(canned)) => {
                answer(&mut client, &method, canned).await?;
                continue;
            }
            Some(Fault::RefuseHeaders(headers, canned))
                if headers.iter().any(|header| text.to_ascii_lowercase().contains(header)) =>
            {
                answer(&mut client, &method, canned).await?;
                continue;
            }
            Some(Fault::Hang) => {
                // Until the client gives up.
                let _ = client.read_u8().await;
                return Ok(());
            }
            Some(Fault::IgnoreCondition) => replace(&target).await,
            _ => {}
        }

        let mut upstream = connect(server, state).await?;
        upstream.write_all(&head.bytes).await?;
        upstream.write_all(&body).await?;
        let Some(mut reply) = Head::read(&mut upstream).await? else { return Ok(()) };
        let bodiless =
            method == "HEAD" || text_status(&reply) == "204" || text_status(&reply) == "304";
        let mut body = if bodiless { Vec::new() } else { reply.body(&mut upstream).await? };
        if let Some(Fault::Somewhere(harm, byte)) = fault {
            let whole = if harm == Harm::CutAnswer { reply.bytes.len() } else { 0 } + body.len();
            fault = Some(harm.at(byte, whole));
        }
        match fault {
            Some(Fault::LoseAnswer) => return Ok(()),
            Some(Fault::CarryOutAndAnswer(canned)) => {
                answer(&mut client, &method, &canned).await?;
                continue;
            }
            Some(Fault::CutAnswer(after)) => {
                let whole = [&reply.bytes[..], &body].concat();
                client.write_all(&whole[..after.min(whole.len() - 1)]).await?;
                return client.get_ref().set_zero_linger();
            }
            Some(Fault::CutBody(after)) => {
                client.write_all(&reply.bytes).await?;
                client.write_all(&body[..after.min(body.len())]).await?;
                return Ok(());
            }
            Some(Fault::StallBody(after)) => {
                client.write_all(&reply.bytes).await?;
                client.write_all(&body[..after.min(body.len())]).await?;
                let _ = client.read_u8().await;
                return Ok(());
            }
            Some(Fault::FlipBody(at)) => {
                if let Some(byte) = body.get_mut(at) {
                    *byte ^= 1;
                }
            }
            Some(Fault::Drip(pause)) => {
                client.write_all(&reply.bytes).await?;
                for byte in std::mem::take(&mut body) {
                    client.write_all(&[byte]).await?;
                    tokio::time::sleep(pause).await;
                }
                continue;
            }
            Some(Fault::StripHeader(name)) => {
                let text = reply.text();
                let kept = text
                    .split_inclusive("\r\n")
                    .filter(|line| !line.to_ascii_lowercase().starts_with(name));
                reply.bytes = kept.collect::<String>().into_bytes();
            }
            _ => {}
        }
        client.write_all(&reply.bytes).await?;
        client.write_all(&body).await?;
    }
    Ok(())
}

/// Takes away what stands under the target of a conditional write, so that the server carries it out: what a store does
/// that does not know the condition.
async fn replace(target: &str) {
    let path = target.split('?').next().unwrap_or_default();
    if let Some((bucket, key)) = path.trim_start_matches('/').split_once('/') {
        let deleted = client().delete_object().bucket(bucket).key(key).send().await;
        deleted.expect("delete what is replaced");
    }
}

fn text_status(reply: &Head) -> String {
    reply.text().split(' ').nth(1).unwrap_or_default().to_owned()
}

async fn answer(client: &mut Connection, method: &str, canned: &Canned) -> std::io::Result<()> {
    let mut head =
        format!("HTTP/1.1 {} Injected\r\ncontent-length: {}\r\n", canned.status, canned.body.len());
    for (name, value) in canned.headers {
        write!(head, "{name}: {value}\r\n").expect("text");
    }
    head.push_str("\r\n");
    client.write_all(head.as_bytes()).await?;
    // The answer to HEAD tells of a body and has none.
    let body = if method == "HEAD" { "" } else { canned.body.as_str() };
    client.write_all(body.as_bytes()).await
}
