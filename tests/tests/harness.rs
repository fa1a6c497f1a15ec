//! The harness does what the stories rely on: its disturbances disturb, and its services are real.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use tests::{Bucket, Proxy, Rabbit, Vhost, eventually};

const BOUND: Duration = Duration::from_secs(10);
/// How long we watch for bytes that must not come.
const QUIET: Duration = Duration::from_millis(200);

/// A server that sends back what it gets.
fn echo() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut back = stream.try_clone()?;
                std::io::copy(&mut &stream, &mut back)
            });
        }
    });
    Ok(port)
}

fn connect(proxy: &Proxy) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", proxy.port()))?;
    stream.set_read_timeout(Some(BOUND))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> std::io::Result<[u8; 4]> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn hears_nothing(stream: &mut TcpStream) -> anyhow::Result<bool> {
    stream.set_read_timeout(Some(QUIET))?;
    let heard = stream.read(&mut [0; 4]);
    stream.set_read_timeout(Some(BOUND))?;
    Ok(heard.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock))
}

#[test]
fn stalled_proxy_delivers_later() -> anyhow::Result<()> {
    let proxy = Proxy::to(echo()?)?;
    let mut stream = connect(&proxy)?;
    assert_eq!(&ask(&mut stream)?, b"ping");
    eventually("four bytes each way", BOUND, || Ok((proxy.forwarded_bytes() == 8).then_some(())))?;
    proxy.stall();
    stream.write_all(b"late")?;
    assert!(hears_nothing(&mut stream)?, "nothing moves while stalled");
    proxy.heal();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"late");
    Ok(())
}

#[test]
fn slow_proxy_delivers_everything_late() -> anyhow::Result<()> {
    let proxy = Proxy::to(echo()?)?;
    let mut stream = connect(&proxy)?;
    ask(&mut stream)?;
    proxy.slow();
    let begun = Instant::now();
    assert_eq!(&ask(&mut stream)?, b"ping");
    assert!(begun.elapsed() >= Duration::from_millis(80), "late there and back");
    Ok(())
}

#[test]
fn swallowing_proxy_never_delivers() -> anyhow::Result<()> {
    let proxy = Proxy::to(echo()?)?;
    let mut stream = connect(&proxy)?;
    ask(&mut stream)?;
    proxy.swallow();
    stream.write_all(b"lost")?;
    assert!(hears_nothing(&mut stream)?, "the connection stays open and silent");
    proxy.heal();
    assert_eq!(&ask(&mut stream)?, b"ping", "what was swallowed does not come back");
    Ok(())
}

#[test]
fn cut_proxy_resets_old_and_new_connections() -> anyhow::Result<()> {
    let proxy = Proxy::to(echo()?)?;
    let mut stream = connect(&proxy)?;
    ask(&mut stream)?;
    proxy.cut();
    let broken = eventually("the reset", BOUND, || Ok(ask(&mut stream).err()))?;
    assert_ne!(broken.kind(), std::io::ErrorKind::WouldBlock, "broken, not merely silent");
    let refused = connect(&proxy).and_then(|mut stream| Ok(ask(&mut stream)?));
    assert!(refused.is_err(), "a new connection is reset too");
    proxy.heal();
    assert_eq!(&ask(&mut connect(&proxy)?)?, b"ping");
    Ok(())
}

#[test]
fn vhosts_are_separate_and_vanish() -> anyhow::Result<()> {
    let (one, other) = (Vhost::create()?, Vhost::create()?);
    one.management().put(&format!("queues/{}/q", one.name()), &json!({"durable": true}))?;
    eventually("the queue", BOUND, || one.depth("q"))?;
    assert_eq!(other.depth("q")?, None, "another vhost does not see it");
    let (name, management) = (other.name().to_owned(), other.management().clone());
    drop(other);
    assert!(management.get(&format!("vhosts/{name}")).is_err(), "it is gone when dropped");
    Ok(())
}

#[test]
fn killed_rabbit_keeps_durable_messages() -> anyhow::Result<()> {
    let mut rabbit = Rabbit::start()?;
    let management = rabbit.management()?;
    let quorum = json!({"durable": true, "arguments": {"x-queue-type": "quorum"}});
    management.put("queues/%2F/kept", &quorum)?;
    let message = json!({"routing_key": "kept", "payload": "still here", "payload_encoding": "string",
        "properties": {"delivery_mode": 2}});
    management.post("exchanges/%2F/amq.default/publish", &message)?;
    rabbit.kill()?;
    assert!(management.get("overview").is_err(), "a killed node does not answer");
    rabbit.start_again()?;
    let take = json!({"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"});
    let payload = eventually("the message", BOUND, || {
        let taken = management.post("queues/%2F/kept/get", &take)?;
        Ok(taken.pointer("/0/payload").cloned())
    })?;
    assert_eq!(payload, "still here");
    Ok(())
}

#[tokio::test]
async fn bucket_creates_only_if_absent() -> anyhow::Result<()> {
    let bucket = Bucket::create().await?;
    let put = |body: &'static [u8]| {
        let request = bucket.client().put_object().bucket(bucket.name()).key("a/verdict");
        request.if_none_match("*").body(body.to_vec().into()).send()
    };
    put(b"first").await.context("create the object")?;
    let second = put(b"second").await;
    let status = second.err().and_then(|error| Some(error.raw_response()?.status().as_u16()));
    assert_eq!(status, Some(412), "the real server refuses the second creation");
    assert_eq!(bucket.keys("a/").await?, ["a/verdict"]);
    Ok(())
}

#[test]
fn waiting_ends_at_its_bound() {
    let start = Instant::now();
    let bound = Duration::from_millis(100);
    let error = eventually("a miracle", bound, || Ok(None::<()>)).expect_err("nothing happens");
    assert_eq!(error.to_string(), "a miracle did not happen within 100ms");
    assert!(start.elapsed() < BOUND, "and it is not waited for much longer");
}
