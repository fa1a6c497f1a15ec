//! A RabbitMQ of one's own: not there yet, stopped, killed, frozen, out of memory, out of patience.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::node::Node;
use crate::support::{eventually, within};
use broker::{
    Broker, ClientIdentity, Consumer, Declaration, Declared, Delivery, Error, ExchangeKind, Link,
    Publish, PublishError, Published, Queue, RabbitOptions, Settled,
};
use proto::topology;
use secrecy::SecretString;

/// Longer than a node takes to boot beside a build.
const PATIENCE: Duration = Duration::from_mins(1);

fn declaration() -> Declaration {
    Declaration::default()
        .exchange("test", ExchangeKind::Direct)
        .exchange(topology::DEAD, ExchangeKind::Fanout)
        .bound(Queue::quorum("q"), "test", "q")
        .bound(Queue::classic("unread"), "test", "unread")
}

fn message(id: &str) -> Publish {
    Publish::new("test", "q", "test", id, "")
}

fn options(node: &Node) -> RabbitOptions {
    RabbitOptions {
        publish_limit: Duration::from_secs(1),
        answer_limit: Duration::from_secs(5),
        longest_back_off: Duration::from_millis(500),
        ..RabbitOptions::new(SecretString::from(format!("{}?heartbeat=1", node.url())), "test")
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    within("a delivery", consumer.next()).await.expect("a delivery")
}

/// What senders know of their messages.
#[derive(Default)]
struct Sent {
    confirmed: Mutex<BTreeSet<String>>,
    /// Sent again, because the outcome was unknown.
    doubtful: Mutex<BTreeSet<String>>,
    number: AtomicU64,
    stop: AtomicBool,
}

/// Sends one message after the other, each until it is confirmed.
async fn keep_sending(broker: Broker, sent: Arc<Sent>) {
    while !sent.stop.load(Ordering::Relaxed) {
        let id = sent.number.fetch_add(1, Ordering::Relaxed).to_string();
        loop {
            match broker.publish(message(&id)).await {
                Ok(published) => {
                    assert_eq!(published, Published::Routed, "message {id}: the queue is durable");
                    break;
                }
                Err(PublishError::Unknown { .. }) => {
                    sent.doubtful.lock().expect("a lock").insert(id.clone());
                }
                Err(PublishError::NotSent { .. }) => {}
            }
        }
        sent.confirmed.lock().expect("a lock").insert(id);
    }
}

async fn more(sent: &Sent, count: usize) {
    let before = sent.confirmed.lock().expect("a lock").len();
    eventually("more confirmed messages", || async {
        (sent.confirmed.lock().expect("a lock").len() >= before + count).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_comes_late_stops_and_dies_loses_nothing_confirmed() {
    let node = Node::prepared();
    let broker = Broker::rabbit(options(&node));
    assert_eq!(broker.declare(&[declaration()]).await, Ok(Declared::Later));
    let mut consumer = broker.consume("q", 10);
    let early = broker.publish(message("early")).await.expect_err("nobody is there");
    assert!(matches!(early, PublishError::NotSent { .. }), "{early:?}");
    let error = broker.wait_up(Duration::from_millis(10)).await.expect_err("nobody is there");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");

    let mut node = started(node).await;
    broker.wait_up(PATIENCE).await.expect("a link to a broker that came late");
    // Up means declared, what nobody consumes included.
    let unread = Publish { routing_key: "unread".to_owned(), ..message("unread") };
    assert_eq!(broker.publish(unread).await, Ok(Published::Routed));
    let sent = Arc::new(Sent::default());
    let senders: Vec<_> =
        (0..8).map(|_| tokio::spawn(keep_sending(broker.clone(), sent.clone()))).collect();
    more(&sent, 200).await;
    let in_hand = next(&mut consumer).await;

    // Each outage in the middle of the sending; the sending goes on by itself.
    for kill in [false, true] {
        let mut down = broker.link();
        node = tokio::task::spawn_blocking(move || {
            if kill {
                node.kill();
            } else {
                node.stop();
            }
            node
        })
        .await
        .expect("a node that is down");
        within("the loss being noticed", down.wait_for(|link| !link.is_up()))
            .await
            .expect("a link");
        node = started(node).await;
        broker.wait_up(PATIENCE).await.expect("a link after an outage");
        more(&sent, 200).await;
    }
    assert_eq!(in_hand.ack().await, Settled::Stale);

    sent.stop.store(true, Ordering::Relaxed);
    for sender in senders {
        within("the last message", sender).await.expect("a sender");
    }
    let confirmed = sent.confirmed.lock().expect("a lock").clone();
    let doubtful = sent.doubtful.lock().expect("a lock").clone();
    let mut received: BTreeMap<String, u32> = BTreeMap::new();
    while received.len() < confirmed.len() {
        let delivery = next(&mut consumer).await;
        let id = delivery.message_id.clone();
        if delivery.ack().await == Settled::Done {
            *received.entry(id).or_default() += 1;
        }
    }
    let lost: Vec<&String> = confirmed.iter().filter(|id| !received.contains_key(*id)).collect();
    assert!(lost.is_empty(), "{} of {} confirmed messages got lost", lost.len(), confirmed.len());
    let twice: Vec<&String> = received
        .iter()
        .filter(|(id, count)| **count > 1 && !doubtful.contains(*id))
        .map(|(id, _)| id)
        .collect();
    assert!(twice.is_empty(), "messages came twice that were sent once: {twice:?}");
    println!("{} confirmed, {} of them sent more than once", confirmed.len(), doubtful.len());
    broker.close().await;
}

async fn started(mut node: Node) -> Node {
    tokio::task::spawn_blocking(move || {
        node.start();
        node
    })
    .await
    .expect("a node")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_out_of_memory_patience_or_breath_stops_nothing_of_ours() {
    let node = started(Node::prepared()).await;
    // How long a queue waits for the dead letters' queue before it tries again.
    node.eval("application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 500).");
    let broker = Broker::rabbit(options(&node));
    broker.wait_up(PATIENCE).await.expect("a link");
    assert_eq!(broker.declare(&[declaration()]).await, Ok(Declared::Now));
    over_tls(&node).await;
    out_of_graves(&broker).await;
    out_of_memory(&node, &broker).await;
    out_of_patience(&node, &broker).await;
    out_of_breath(&node, &broker).await;
    broker.close().await;
}

/// A certificate is checked on both sides.
async fn over_tls(node: &Node) {
    let strange = RabbitOptions::new(SecretString::from(node.tls_url()), "test");
    let error = wait_up_briefly(strange.clone()).await.expect_err("an authority nobody knows");
    assert!(
        matches!(&error, Error::Unreachable { cause, .. } if cause.contains("certificate")),
        "{error:?}"
    );
    let nameless = RabbitOptions { ca_pem: Some(node.pem("ca.pem")), ..strange };
    let error = wait_up_briefly(nameless.clone()).await.expect_err("no certificate of ours");
    assert!(matches!(&error, Error::Unreachable { .. }), "{error:?}");
    let identity = ClientIdentity {
        certificate_pem: node.pem("client.pem"),
        key_pem: SecretString::from(node.pem("client.key")),
    };
    let broker = Broker::rabbit(RabbitOptions { identity: Some(identity), ..nameless });
    broker.wait_up(PATIENCE).await.expect("a link over TLS");
    assert_eq!(broker.declare(&[declaration()]).await, Ok(Declared::Now));
    assert_eq!(broker.publish(message("sealed")).await, Ok(Published::Routed));
    let mut consumer = broker.consume("q", 1);
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.message_id, "sealed");
    assert_eq!(delivery.ack().await, Settled::Done);
    broker.close().await;
}

/// Long enough for a few tries to connect.
async fn wait_up_briefly(options: RabbitOptions) -> Result<(), Error> {
    Broker::rabbit(options).wait_up(Duration::from_millis(1500)).await
}

/// A dead letter of a quorum queue stays where it died until there is a place for it.
async fn out_of_graves(broker: &Broker) {
    let grave = Queue::classic("grave");
    let dying = Queue { dead_letter_exchange: Some("graves".to_owned()), ..Queue::quorum("dying") };
    let before = Declaration::default()
        .exchange("graves", ExchangeKind::Fanout)
        .bound(dying, "test", "dying");
    assert_eq!(broker.declare(&[declaration(), before]).await, Ok(Declared::Now));
    for id in ["dead", "alive"] {
        let message = Publish { routing_key: "dying".to_owned(), ..message(id) };
        assert_eq!(broker.publish(message).await, Ok(Published::Routed));
    }
    let mut consumer = broker.consume("dying", 1);
    assert_eq!(next(&mut consumer).await.reject().await, Settled::Done);
    // The second message comes when the first is settled.
    assert_eq!(next(&mut consumer).await.ack().await, Settled::Done);
    consumer.stop().await;
    let after =
        Declaration::default().exchange("graves", ExchangeKind::Fanout).bound(grave, "graves", "");
    assert_eq!(broker.declare(&[after]).await, Ok(Declared::Now));
    let mut mourner = broker.consume("grave", 1);
    let letter = next(&mut mourner).await;
    assert_eq!(
        (letter.message_id.as_str(), letter.deaths[0].reason.as_str()),
        ("dead", "rejected")
    );
    assert_eq!(letter.ack().await, Settled::Done);
}

/// Publishing is blocked and says so in time; what was delivered can be settled all the while.
async fn out_of_memory(node: &Node, broker: &Broker) {
    let mut consumer = broker.consume("q", 2);
    for id in ["1", "2"] {
        assert_eq!(broker.publish(message(id)).await, Ok(Published::Routed));
    }
    let (first, second) = (next(&mut consumer).await, next(&mut consumer).await);
    node.eval("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1000}).");
    // RabbitMQ tells a connection when it next publishes; that message hangs in the socket.
    let error = eventually("a publisher being blocked", || async {
        broker.publish(message("x")).await.err()
    })
    .await;
    assert!(
        matches!(&error, PublishError::Unknown { .. } | PublishError::NotSent { .. }),
        "{error:?}"
    );
    let mut link = broker.link();
    let says =
        |link: &Link| matches!(link, Link::Blocked { reason, .. } if reason.contains("memory"));
    within("the link saying so", link.wait_for(says)).await.expect("a link");
    let error = within("an answer", broker.publish(message("y"))).await.expect_err("blocked");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Blocked { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(within("an answer", first.ack()).await, Settled::Done);
    assert_eq!(within("an answer", second.requeue()).await, Settled::Done);
    // Settling works while blocked. Some of the later messages came in before the alarm did.
    loop {
        let delivery = next(&mut consumer).await;
        let (id, redelivered) = (delivery.message_id.clone(), delivery.redelivered);
        assert_eq!(within("an answer", delivery.ack()).await, Settled::Done);
        if id == "2" {
            assert!(redelivered);
            break;
        }
    }

    node.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4).");
    within("the end of the blockade", link.wait_for(Link::is_up)).await.expect("a link");
    assert_eq!(broker.publish(message("3")).await, Ok(Published::Routed));
    // Unknown was the truth: some of the blocked ones arrive now.
    loop {
        let delivery = next(&mut consumer).await;
        let id = delivery.message_id.clone();
        assert_eq!(delivery.ack().await, Settled::Done);
        if id == "3" {
            break;
        }
        assert_eq!(id, "x", "it was never sent, or settled before");
    }
    consumer.stop().await;
}

/// A delivery that is held too long costs the channel; the consumer is there again by itself.
async fn out_of_patience(node: &Node, broker: &Broker) {
    // How long an unsettled delivery is tolerated, and how often a channel looks; new channels heed it.
    node.eval("application:set_env(rabbit, consumer_timeout, 2000), application:set_env(rabbit, channel_tick_interval, 500).");
    let mut consumer = broker.consume("q", 1);
    assert_eq!(broker.publish(message("held")).await, Ok(Published::Routed));
    let held = next(&mut consumer).await;
    let again = next(&mut consumer).await;
    assert_eq!((again.message_id.as_str(), again.redelivered), ("held", true));
    assert_eq!(held.ack().await, Settled::Stale, "too late");
    assert_eq!(again.ack().await, Settled::Done);
    assert!(broker.link().borrow().is_up(), "the connections had no part in it");
    assert_eq!(broker.publish(message("after")).await, Ok(Published::Routed));
    assert_eq!(next(&mut consumer).await.ack().await, Settled::Done);
    consumer.stop().await;
}

/// A node that is there and does nothing: everything has an answer in time.
async fn out_of_breath(node: &Node, broker: &Broker) {
    let mut consumer = broker.consume("q", 1);
    assert_eq!(broker.publish(message("before")).await, Ok(Published::Routed));
    let in_hand = next(&mut consumer).await;
    node.freeze();
    let error = within("an answer", broker.publish(message("while"))).await.expect_err("frozen");
    assert!(matches!(&error, PublishError::Unknown { .. }), "{error:?}");
    let mut link = broker.link();
    within("the loss being noticed", link.wait_for(|link| !link.is_up())).await.expect("a link");
    // The two connections notice at different times; an answer on the one that has not yet may still arrive.
    let settled = within("an answer", in_hand.ack()).await;
    node.thaw();
    within("the link coming back", link.wait_for(Link::is_up)).await.expect("a link");
    assert_eq!(broker.publish(message("after")).await, Ok(Published::Routed));
    let mut came = BTreeSet::new();
    while !came.contains("after") || (settled == Settled::Stale && !came.contains("before")) {
        let delivery = next(&mut consumer).await;
        came.insert(delivery.message_id.clone());
        let _: Settled = delivery.ack().await;
    }
    consumer.stop().await;
}
