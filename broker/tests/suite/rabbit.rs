//! What only the real broker can do to us: refuse, hang, close channels, lose queues. Each test is a trap that lapin
//! or RabbitMQ laid for somebody.

use std::time::Duration;

use crate::support::proxy::Proxy;
use crate::support::{BOUND, Vhost, eventually, within};
use broker::{
    Broker, Declaration, Declared, Error, ExchangeKind, Link, Publish, PublishError, Published,
    Queue, RabbitOptions, Settled,
};
use proto::{Action, Code, Failure};
use secrecy::SecretString;

fn declaration(queue: &str) -> Declaration {
    Declaration::default().exchange("test", ExchangeKind::Direct).bound(
        Queue::classic(queue),
        "test",
        queue,
    )
}

fn message(queue: &str, id: &str) -> Publish {
    Publish::new("test", queue, "test", id, "")
}

/// `host:port` of the run's broker.
fn address(vhost: &Vhost) -> String {
    use secrecy::ExposeSecret as _;
    let url = vhost.url().expose_secret().to_owned();
    let host = url.rsplit('@').next().expect("a host").split('/').next().expect("a host");
    host.to_owned()
}

/// How many of lapin's threads this process has: one for each connection it has not given up.
fn io_loops() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("this process");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("lapin-io-loop"))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_told_as_such_and_not_repeated() {
    let vhost = Vhost::create();
    let url = format!("amqp://guest:hunter2@{}/{}", address(&vhost), vhost.name);
    let broker = Broker::rabbit(RabbitOptions::new(SecretString::from(url), "test"));
    let error = broker.wait_up(Duration::from_secs(3)).await.expect_err("a wrong password");
    assert!(matches!(&error, Error::LoginRefused { user, .. } if user == "guest"), "{error:?}");
    let failure = Failure::from(error.clone());
    assert_eq!((failure.code, failure.action), (Code::BrokerUnreachable, Action::FixConfig));
    let link = broker.link().borrow().clone();
    for text in
        [format!("{failure:?}"), format!("{link:?}"), format!("{broker:?}"), format!("{error}")]
    {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_virtual_host_is_told_as_such() {
    let vhost = Vhost::create();
    let url = format!("amqp://guest:guest@{}/no-such-vhost", address(&vhost));
    let broker = Broker::rabbit(RabbitOptions::new(SecretString::from(url), "test"));
    let error = broker.wait_up(Duration::from_secs(3)).await.expect_err("no such virtual host");
    assert!(
        matches!(&error, Error::VirtualHost { vhost, .. } if vhost == "no-such-vhost"),
        "{error:?}"
    );
    assert!(Failure::from(error).hint.contains("rabbitmqctl add_vhost no-such-vhost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unusable_url_is_told_where_one_looks() {
    let broker =
        Broker::rabbit(RabbitOptions::new(SecretString::from("http://u:hunter2@mq/"), "test"));
    let error = broker.wait_up(Duration::from_millis(50)).await.expect_err("not a URL for AMQP");
    assert!(matches!(&error, Error::Url { .. }), "{error:?}");
    assert!(matches!(&*broker.link().borrow(), Link::Connecting { last_error: Some(_), .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_nobody_there_everything_has_an_answer_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("a port").port();
    drop(listener);
    let url = SecretString::from(format!("amqp://guest:guest@127.0.0.1:{port}"));
    let limit = Duration::from_millis(500);
    let broker =
        Broker::rabbit(RabbitOptions { publish_limit: limit, ..RabbitOptions::new(url, "test") });
    let error = broker.wait_up(limit).await.expect_err("nobody is there");
    assert!(
        matches!(&error, Error::Unreachable { cause, .. } if cause.contains("refused")),
        "{error:?}"
    );
    assert!(Failure::from(error).hint.contains(&port.to_string()));
    assert_eq!(broker.declare(&[declaration("q")]).await, Ok(Declared::Later));
    let error =
        within("an answer", broker.publish(message("q", "m"))).await.expect_err("nobody is there");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Unreachable { .. }, .. }),
        "{error:?}"
    );
    let consumer = broker.consume("q", 1);
    assert!(broker.depth("q").await.is_err());
    within("the end of the consumer", consumer.stop()).await;
    within("the end", broker.close()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_accepts_and_says_nothing_is_given_up_for_good() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("a port").port();
    let url = SecretString::from(format!("amqp://guest:guest@127.0.0.1:{port}"));
    let limit = Duration::from_millis(50);
    let options = RabbitOptions {
        answer_limit: limit,
        longest_back_off: limit,
        ..RabbitOptions::new(url, "test")
    };
    let broker = Broker::rabbit(options);
    let mut silent = Vec::new();
    while silent.len() < 20 {
        silent.push(within("a try to connect", listener.accept()).await.expect("a connection"));
    }
    let error = broker.wait_up(limit).await.expect_err("it says nothing");
    assert!(
        matches!(&error, Error::Unreachable { cause, .. } if cause.contains("no answer")),
        "{error:?}"
    );
    // One thread for each try would go on waiting for ever.
    eventually("the end of earlier tries", || async { (io_loops() <= 4).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_falls_silent_is_noticed_by_its_heartbeat() {
    let vhost = Vhost::create();
    let proxy = Proxy::to(address(&vhost)).await;
    let url = format!("amqp://guest:guest@127.0.0.1:{}/{}?heartbeat=1", proxy.port, vhost.name);
    let options = RabbitOptions {
        publish_limit: Duration::from_millis(500),
        answer_limit: Duration::from_secs(1),
        longest_back_off: Duration::from_millis(200),
        ..RabbitOptions::new(SecretString::from(url), "test")
    };
    let broker = Broker::rabbit(options);
    broker.wait_up(BOUND).await.expect("a link");
    assert_eq!(broker.declare(&[declaration("q")]).await, Ok(Declared::Now));
    let mut consumer = broker.consume("q", 1);
    assert_eq!(broker.publish(message("q", "1")).await, Ok(Published::Routed));
    let in_hand = within("a delivery", consumer.next()).await.expect("a delivery");

    proxy.stall();
    let error = within("an answer", broker.publish(message("q", "2"))).await.expect_err("silence");
    assert!(matches!(&error, PublishError::Unknown { .. }), "{error:?}");
    let mut link = broker.link();
    within("the loss being noticed", link.wait_for(|link| !link.is_up())).await.expect("a link");
    let error = within("an answer", broker.publish(message("q", "3"))).await.expect_err("silence");
    assert!(matches!(&error, PublishError::NotSent { .. }), "{error:?}");
    assert_eq!(within("an answer", in_hand.ack()).await, Settled::Stale);

    proxy.heal();
    within("the link coming back", link.wait_for(Link::is_up)).await.expect("a link");
    eventually("the end of earlier tries", || async { (io_loops() <= 2).then_some(()) }).await;
    let again = within("a delivery", consumer.next()).await.expect("a delivery");
    assert_eq!((again.message_id.as_str(), again.redelivered), ("1", true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_taken_away_comes_back_with_its_consumer() {
    let vhost = Vhost::create();
    let broker = Broker::rabbit(vhost.options());
    broker.wait_up(BOUND).await.expect("a link");
    assert_eq!(broker.declare(&[declaration("q")]).await, Ok(Declared::Now));
    let mut consumer = broker.consume("q", 1);
    assert_eq!(broker.publish(message("q", "1")).await, Ok(Published::Routed));
    let in_hand = within("a delivery", consumer.next()).await.expect("a delivery");
    vhost.management.delete(&format!("queues/{}/q", vhost.name));
    eventually("the queue coming back", || async {
        (broker.publish(message("q", "2")).await == Ok(Published::Routed)).then_some(())
    })
    .await;
    let next = within("a delivery", consumer.next()).await.expect("a delivery");
    assert_eq!(next.message_id, "2");
    assert_eq!(next.ack().await, Settled::Done);
    // The broker drops an answer for a message it no longer has; nothing of ours breaks.
    let _: Settled = in_hand.ack().await;
    assert_eq!(broker.publish(message("q", "3")).await, Ok(Published::Routed));
    assert_eq!(within("a delivery", consumer.next()).await.expect("a delivery").message_id, "3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_that_is_given_up_confuses_no_other() {
    let vhost = Vhost::create();
    let options = RabbitOptions { channels: 4, ..vhost.options() };
    let broker = Broker::rabbit(options);
    broker.wait_up(BOUND).await.expect("a link");
    assert_eq!(broker.declare(&[declaration("q")]).await, Ok(Declared::Now));
    let mut wrong = Vec::new();
    for round in 0..300_u64 {
        // Given up while it is under way: its return and its confirmation come when nobody waits for them.
        let given_up = broker.publish(message("nobody", &format!("given up {round}")));
        let _ = tokio::time::timeout(Duration::from_micros(round * 5), given_up).await;
        let kept = broker.publish(message("q", &format!("kept {round}"))).await;
        if kept != Ok(Published::Routed) {
            wrong.push((round, kept));
        }
    }
    assert!(wrong.is_empty(), "{} wrong, such as {:?}", wrong.len(), wrong[0]);
    assert_eq!(broker.depth("q").await.expect("the depth").expect("the queue").messages, 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_two_named_connections_with_a_heartbeat() {
    let vhost = Vhost::create();
    let broker = Broker::rabbit(RabbitOptions { name: "db1".to_owned(), ..vhost.options() });
    broker.wait_up(BOUND).await.expect("a link");
    let path = format!("vhosts/{}/connections", vhost.name);
    let connections = eventually("the management seeing them", || async {
        let seen = vhost.management.get(&path).as_array()?.clone();
        (seen.len() == 2 && seen.iter().all(|one| one.get("timeout").is_some())).then_some(seen)
    })
    .await;
    let mut names: Vec<&str> = connections
        .iter()
        .filter_map(|one| one.pointer("/client_properties/connection_name")?.as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["db1 consume", "db1 publish"]);
    for connection in &connections {
        assert_eq!(connection.get("timeout").and_then(serde_json::Value::as_u64), Some(10));
    }
    drop(broker);
    eventually("both ending with their owner", || async {
        (vhost.management.get(&path).as_array()?.is_empty() && io_loops() == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_that_are_missing_are_told_with_the_name() {
    let vhost = Vhost::create();
    let rights = serde_json::json!({"configure": "^pgmuster", "write": ".*", "read": ".*"});
    vhost.management.put(&format!("permissions/{}/guest", vhost.name), &rights);
    let broker = Broker::rabbit(vhost.options());
    broker.wait_up(BOUND).await.expect("a link");
    let all = Declaration::default()
        .queue(Queue::classic("elsewhere"))
        .queue(Queue::classic("pgmuster.x"));
    let error = broker.declare(&[all]).await.expect_err("it may not");
    assert!(
        matches!(&error, Error::Refused { doing, .. } if doing.contains("elsewhere")),
        "{error:?}"
    );
    let failure = Failure::from(error);
    assert_eq!((failure.code, failure.action), (Code::BrokerTopology, Action::FixConfig));
    assert!(broker.depth("pgmuster.x").await.expect("the depth").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_the_broker_will_never_take_is_not_in_doubt() {
    let vhost = Vhost::create();
    let broker = Broker::rabbit(vhost.options());
    broker.wait_up(BOUND).await.expect("a link");
    assert_eq!(broker.declare(&[declaration("q")]).await, Ok(Declared::Now));
    // RabbitMQ refuses an expiration above 2^32 milliseconds, and closes the channel for it.
    let odd = message("q", "1").expiring(1 << 40);
    let error = broker.publish(odd).await.expect_err("an expiration beyond all bounds");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Refused { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(broker.publish(message("q", "2")).await, Ok(Published::Routed));
    let long = Publish { kind: "x".repeat(300), ..message("q", "3") };
    let error = broker.publish(long).await.expect_err("a name beyond all bounds");
    assert!(matches!(error, PublishError::NotSent { .. }), "{error:?}");
    assert_eq!(broker.depth("q").await.expect("the depth").expect("the queue").messages, 1);
}
