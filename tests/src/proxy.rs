//! A network that fails on demand: a TCP proxy that can be late, stop forwarding, swallow bytes, or cut every connection.
//!
//! It runs in a thread of its own, so that it goes on while the test blocks. It does not look into what it forwards.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// By how much a slow network is late with each piece: enough that a request takes many times what it takes otherwise.
const LATE: Duration = Duration::from_millis(40);

/// What happens to bytes and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Everything comes, each piece late: a peer far away.
    Slow,
    /// Connections stay open, nothing moves: a peer that hangs.
    Stall,
    /// Bytes are taken and thrown away: a black hole behind a working socket.
    Swallow,
    /// Connections are reset, new ones too: a peer that is gone.
    Cut,
    /// The proxy is being dropped.
    End,
}

/// A proxy on a loopback port in front of one address. Begins by passing everything on.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    mode: watch::Sender<Mode>,
    count: Arc<Count>,
    thread: Option<JoinHandle<()>>,
}

/// Bytes that went through, and how many may.
#[derive(Debug)]
struct Count {
    forwarded: AtomicU64,
    most: AtomicU64,
}

impl Proxy {
    /// A proxy in front of `port` of this machine.
    pub fn to(port: u16) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // A story may be asynchronous itself: nothing here may block on this runtime but its own thread.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = listener.context("listen for the proxy")?;
        listener.set_nonblocking(true)?;
        let (mode, watched) = watch::channel(Mode::Pass);
        let count = Count { forwarded: AtomicU64::new(0), most: AtomicU64::new(u64::MAX) };
        let own = Arc::new(count);
        let own_port = listener.local_addr()?.port();
        let upstream = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let count = Arc::clone(&own);
        let listener = {
            let _entered = runtime.enter();
            TcpListener::from_std(listener)?
        };
        let serve = move || runtime.block_on(accept(listener, upstream, watched, count));
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(serve)?;
        Ok(Self { port: own_port, mode, count: own, thread: Some(thread) })
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many bytes went through, both directions together: to know that something is under way.
    pub fn forwarded_bytes(&self) -> u64 {
        self.count.forwarded.load(Ordering::Relaxed)
    }

    /// Moves about so many bytes more and then stalls, whoever is slow meanwhile. It does not heal.
    pub fn stall_after(&self, bytes: u64) {
        self.count.most.store(self.forwarded_bytes() + bytes, Ordering::Relaxed);
    }

    /// Whether all the bytes it was to move have gone through.
    pub fn has_stalled(&self) -> bool {
        self.count.is_spent()
    }

    /// Passes everything on again; stalled bytes first.
    pub fn heal(&self) {
        self.mode.send_replace(Mode::Pass);
    }

    /// Passes everything on late.
    pub fn slow(&self) {
        self.mode.send_replace(Mode::Slow);
    }

    /// Keeps connections open and moves nothing.
    pub fn stall(&self) {
        self.mode.send_replace(Mode::Stall);
    }

    /// Takes bytes and throws them away. The connections are spoilt: cut them before healing.
    pub fn swallow(&self) {
        self.mode.send_replace(Mode::Swallow);
    }

    /// Resets every connection, and new ones until healed.
    pub fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }
}

impl Count {
    fn is_spent(&self) -> bool {
        self.forwarded.load(Ordering::Relaxed) >= self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mode.send_replace(Mode::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(
    listener: TcpListener,
    upstream: SocketAddr,
    mode: watch::Receiver<Mode>,
    count: Arc<Count>,
) {
    let mut end = std::pin::pin!(until(mode.clone(), |mode| mode == Mode::End));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut end => return,
        };
        let Ok((client, _)) = accepted else { continue };
        if *mode.borrow() == Mode::Cut {
            reset(&client);
            continue;
        }
        tokio::spawn(forward(client, upstream, mode.clone(), Arc::clone(&count)));
    }
}

async fn forward(
    mut client: TcpStream,
    upstream: SocketAddr,
    mode: watch::Receiver<Mode>,
    count: Arc<Count>,
) {
    let Ok(mut server) = TcpStream::connect(upstream).await else { return reset(&client) };
    {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        // Half-closed connections are legal: each direction ends on its own.
        let both = async {
            tokio::join!(
                pump(from_client, to_server, mode.clone(), &count),
                pump(from_server, to_client, mode.clone(), &count),
            )
        };
        tokio::select! {
            _ = both => return,
            () = until(mode.clone(), |mode| matches!(mode, Mode::Cut | Mode::End)) => {}
        }
    }
    reset(&client);
    reset(&server);
}

/// One direction, until its end or its error.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut mode: watch::Receiver<Mode>,
    count: &Count,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        if mode.wait_for(|mode| *mode != Mode::Stall).await.is_err() {
            return;
        }
        if count.is_spent() {
            // What ends a stall of this kind is the end of the connection.
            return std::future::pending().await;
        }
        let read = tokio::select! {
            _ = mode.changed() => continue,
            read = from.read(&mut buffer) => read,
        };
        let Ok(length) = read else { return };
        // The mode may have changed while these bytes came.
        let hidden = |mode: &Mode| *mode == Mode::Stall || (*mode == Mode::Swallow && length == 0);
        let Ok(now) = mode.wait_for(|mode| !hidden(mode)).await.map(|now| *now) else { return };
        if length == 0 {
            let _ = to.shutdown().await;
            return;
        }
        if now == Mode::Swallow {
            continue;
        }
        if now == Mode::Slow {
            tokio::time::sleep(LATE).await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
        count.forwarded.fetch_add(u64::try_from(length).unwrap_or(0), Ordering::Relaxed);
    }
}

async fn until(mut mode: watch::Receiver<Mode>, reached: impl Fn(Mode) -> bool) {
    let _ = mode.wait_for(|mode| reached(*mode)).await;
}

/// Makes the coming drop of the socket a reset instead of an orderly end.
fn reset(socket: &TcpStream) {
    let _ = socket.set_zero_linger();
}
