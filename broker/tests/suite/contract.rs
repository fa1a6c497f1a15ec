//! What a broker must do for us, run on both twins. A test that passes on one and not on the other is a lie in one.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::{Fixture, eventually, within};
use broker::{
    Binding, Broker, Consumer, Declaration, Declared, Delivery, Depth, Error, ExchangeKind,
    Publish, PublishError, Published, Queue, QueueKind, Settled,
};
use proto::topology::{self, TicketQueue};
use proto::{Action, Code, Failure, Lane, SiteName, WorkerName};

macro_rules! on_both {
    ($($test:ident,)*) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(&super::Fixture::memory()).await; })*
        }
        mod rabbit {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(&super::Fixture::rabbit().await).await; })*
        }
    };
}

on_both! {
    a_message_arrives_as_it_was_sent,
    a_mandatory_message_nobody_wants_is_told,
    a_missing_exchange_is_an_error,
    no_more_is_in_hand_than_asked_for,
    what_is_handed_back_comes_again,
    what_is_dropped_comes_again,
    what_is_rejected_is_a_dead_letter,
    what_expires_is_a_dead_letter,
    a_queues_own_ttl_counts_too,
    what_fails_too_often_is_a_dead_letter,
    a_full_queue_drops_its_oldest,
    a_stopped_consumer_hands_back_what_it_fetched,
    a_dropped_consumer_hands_back_what_it_fetched,
    a_queue_without_consumers_goes_and_takes_its_messages,
    a_queue_with_a_consumer_stays,
    consumers_take_turns,
    a_consumer_may_come_before_its_queue,
    tickets_reach_their_queue_and_no_other,
    a_beacon_reaches_every_worker_and_a_grant_one,
    either_side_may_declare_first,
    other_settings_are_a_conflict_that_names_the_queue,
    a_closed_client_gives_everything_back,
    a_lost_link_makes_deliveries_stale_and_they_come_again,
    what_was_fetched_over_a_lost_link_is_not_given_out,
    a_lost_link_is_mended_for_publishers,
    two_thousand_at_once_and_not_one_mistaken,
}

const EXCHANGE: &str = "test";

/// A direct exchange and these queues, each bound with its name.
async fn declare(broker: &Broker, queues: &[Queue]) {
    let mut all = Declaration::default()
        .exchange(EXCHANGE, ExchangeKind::Direct)
        .exchange(topology::DEAD, ExchangeKind::Fanout)
        .bound(Queue::classic(topology::DEAD), topology::DEAD, "");
    for queue in queues {
        all = all.bound(queue.clone(), EXCHANGE, &queue.name);
    }
    assert_eq!(broker.declare(&[all]).await, Ok(Declared::Now));
}

fn buried(queue: Queue) -> Queue {
    Queue { dead_letter_exchange: Some(topology::DEAD.to_owned()), ..queue }
}

fn message(queue: &str, id: &str) -> Publish {
    Publish::new(EXCHANGE, queue, "test", id, format!("body of {id}"))
}

async fn send(broker: &Broker, queue: &str, ids: &[&str]) {
    for id in ids {
        assert_eq!(broker.publish(message(queue, id)).await, Ok(Published::Routed), "{id}");
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    within("a delivery", consumer.next()).await.expect("a delivery")
}

async fn waiting(broker: &Broker, queue: &str) -> Option<u32> {
    broker.depth(queue).await.expect("the depth").map(|depth| depth.messages)
}

async fn a_message_arrives_as_it_was_sent(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    let mut consumer = broker.consume("q", 1);
    let headers = vec![("traceparent".to_owned(), "00-ä-01".to_owned())];
    let sent = message("q", "m-1").with_headers(headers.clone());
    assert_eq!(broker.publish(sent).await, Ok(Published::Routed));
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.body, "body of m-1");
    assert_eq!((delivery.message_id.as_str(), delivery.kind.as_str()), ("m-1", "test"));
    assert_eq!((delivery.exchange.as_str(), delivery.routing_key.as_str()), (EXCHANGE, "q"));
    assert_eq!(delivery.headers, headers);
    assert!(!delivery.redelivered);
    assert!(delivery.deaths.is_empty());
    assert_eq!(delivery.ack().await, Settled::Done);
    consumer.stop().await;
    assert_eq!(broker.depth("q").await, Ok(Some(Depth { messages: 0, consumers: 0 })));
}

async fn a_mandatory_message_nobody_wants_is_told(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    assert_eq!(broker.publish(message("nobody", "a")).await, Ok(Published::Unroutable));
    assert_eq!(broker.publish(message("nobody", "b").optional()).await, Ok(Published::Routed));
    assert_eq!(broker.publish(message("q", "c")).await, Ok(Published::Routed));
    assert_eq!(waiting(broker, "q").await, Some(1));
}

async fn a_missing_exchange_is_an_error(fixture: &Fixture) {
    let message = Publish::new("no-such-exchange", "q", "test", "m-1", "");
    let error = fixture.broker.publish(message).await.expect_err("there is no exchange");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Refused { .. }, .. }),
        "{error:?}"
    );
    assert!(error.cause().to_string().contains("no-such-exchange"), "{error:?}");
    // The channel it cost is not missed.
    declare(&fixture.broker, &[Queue::classic("q")]).await;
    send(&fixture.broker, "q", &["m-2"]).await;
}

async fn no_more_is_in_hand_than_asked_for(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["1", "2", "3", "4", "5"]).await;
    let mut consumer = broker.consume("q", 2);
    let first = next(&mut consumer).await;
    let second = next(&mut consumer).await;
    assert_eq!((first.message_id.as_str(), second.message_id.as_str()), ("1", "2"));
    assert_eq!(waiting(broker, "q").await, Some(3), "the rest waits in the queue, not in us");
    assert_eq!(second.ack().await, Settled::Done);
    let third = next(&mut consumer).await;
    assert_eq!(third.message_id, "3");
    assert_eq!(waiting(broker, "q").await, Some(2));
    assert_eq!(first.ack().await, Settled::Done);
    assert_eq!(third.ack().await, Settled::Done);
}

async fn what_is_handed_back_comes_again(fixture: &Fixture) {
    let broker = &fixture.broker;
    for (name, queue) in
        [("classic", Queue::classic("classic")), ("quorum", Queue::quorum("quorum"))]
    {
        declare(broker, &[queue]).await;
        send(broker, name, &["m", "behind it"]).await;
        let mut consumer = broker.consume(name, 1);
        let delivery = next(&mut consumer).await;
        assert!(!delivery.redelivered, "{name}");
        assert_eq!(delivery.requeue().await, Settled::Done);
        let again = next(&mut consumer).await;
        assert_eq!((again.message_id.as_str(), again.redelivered), ("m", true), "{name}");
        assert_eq!(again.ack().await, Settled::Done);
        assert_eq!(next(&mut consumer).await.message_id, "behind it");
    }
}

async fn what_is_dropped_comes_again(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["m"]).await;
    let mut consumer = broker.consume("q", 1);
    drop(next(&mut consumer).await);
    let again = next(&mut consumer).await;
    assert_eq!((again.message_id.as_str(), again.redelivered), ("m", true));
    // A future that is dropped before it runs is a drop, too.
    drop(again.ack());
    let again = next(&mut consumer).await;
    assert_eq!(again.message_id, "m");
    assert_eq!(again.ack().await, Settled::Done);
}

async fn what_is_rejected_is_a_dead_letter(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(
        broker,
        &[buried(Queue::classic("classic")), Queue::quorum("quorum"), Queue::classic("bare")],
    )
    .await;
    let mut dead = broker.consume(topology::DEAD, 1);
    for name in ["classic", "quorum"] {
        send(broker, name, &[name]).await;
        let mut consumer = broker.consume(name, 1);
        assert_eq!(next(&mut consumer).await.reject().await, Settled::Done);
        let letter = next(&mut dead).await;
        assert_eq!((letter.message_id.as_str(), letter.exchange.as_str()), (name, topology::DEAD));
        let death = letter.deaths.first().expect("a death");
        assert_eq!(
            (death.queue.as_str(), death.reason.as_str(), death.count),
            (name, "rejected", 1)
        );
        assert_eq!((death.exchange.as_str(), death.routing_key.as_str()), (EXCHANGE, name));
        assert_eq!(letter.ack().await, Settled::Done);
    }
    send(broker, "bare", &["gone", "stays"]).await;
    let mut bare = broker.consume("bare", 1);
    assert_eq!(next(&mut bare).await.reject().await, Settled::Done);
    assert_eq!(next(&mut bare).await.message_id, "stays");
}

async fn what_expires_is_a_dead_letter(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[buried(Queue::classic("classic")), Queue::quorum("quorum")]).await;
    let mut dead = broker.consume(topology::DEAD, 1);
    for name in ["classic", "quorum"] {
        let short_lived = message(name, name).expiring(20);
        assert_eq!(broker.publish(short_lived).await, Ok(Published::Routed));
        let letter = next(&mut dead).await;
        let death = letter.deaths.first().expect("a death");
        assert_eq!((death.queue.as_str(), death.reason.as_str()), (name, "expired"));
        assert_eq!(letter.ack().await, Settled::Done);
        assert_eq!(waiting(broker, name).await, Some(0));
    }
}

async fn a_queues_own_ttl_counts_too(fixture: &Fixture) {
    let broker = &fixture.broker;
    let ttl = Some(Duration::from_millis(20));
    declare(broker, &[Queue { message_ttl: ttl, ..buried(Queue::classic("q")) }]).await;
    let mut dead = broker.consume(topology::DEAD, 1);
    assert_eq!(broker.publish(message("q", "m").expiring(60_000)).await, Ok(Published::Routed));
    let letter = next(&mut dead).await;
    assert_eq!((letter.message_id.as_str(), letter.deaths[0].reason.as_str()), ("m", "expired"));
}

async fn what_fails_too_often_is_a_dead_letter(fixture: &Fixture) {
    let broker = &fixture.broker;
    let limited = Queue { kind: QueueKind::Quorum { delivery_limit: 2 }, ..Queue::quorum("q") };
    declare(broker, &[limited]).await;
    send(broker, "q", &["poison"]).await;
    let mut consumer = broker.consume("q", 1);
    let mut dead = broker.consume(topology::DEAD, 1);
    for _ in 0..3 {
        assert_eq!(next(&mut consumer).await.requeue().await, Settled::Done);
    }
    let letter = next(&mut dead).await;
    assert_eq!(letter.message_id, "poison");
    assert_eq!(letter.deaths[0].reason, "delivery_limit");
}

async fn a_full_queue_drops_its_oldest(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue { max_length: Some(3), ..Queue::classic("q") }]).await;
    send(broker, "q", &["1", "2", "3", "4", "5"]).await;
    assert_eq!(waiting(broker, "q").await, Some(3));
    let mut consumer = broker.consume("q", 1);
    for id in ["3", "4", "5"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.message_id, id);
        assert_eq!(delivery.ack().await, Settled::Done);
    }
}

async fn a_stopped_consumer_hands_back_what_it_fetched(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["1", "2", "3"]).await;
    let mut consumer = broker.consume("q", 5);
    let in_hand = next(&mut consumer).await;
    eventually("everything being fetched", || async {
        (waiting(broker, "q").await == Some(0)).then_some(())
    })
    .await;
    consumer.stop().await;
    assert_eq!(broker.depth("q").await, Ok(Some(Depth { messages: 2, consumers: 0 })));
    assert_eq!(in_hand.ack().await, Settled::Done, "what was in hand is still ours to settle");
    let mut successor = broker.consume("q", 5);
    for id in ["2", "3"] {
        let delivery = next(&mut successor).await;
        assert_eq!(delivery.message_id, id);
        assert_eq!(delivery.ack().await, Settled::Done);
    }
    assert_eq!(waiting(broker, "q").await, Some(0));
}

async fn a_dropped_consumer_hands_back_what_it_fetched(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["1", "2", "3"]).await;
    let mut consumer = broker.consume("q", 5);
    let in_hand = next(&mut consumer).await;
    drop(consumer);
    eventually("the rest going back", || async {
        let depth = broker.depth("q").await.expect("the depth");
        (depth == Some(Depth { messages: 2, consumers: 0 })).then_some(())
    })
    .await;
    drop(in_hand);
    eventually("the last going back", || async {
        (waiting(broker, "q").await == Some(3)).then_some(())
    })
    .await;
}

/// Asking for a queue would keep it alive.
async fn until_unroutable(broker: &Broker, queue: &str) {
    eventually("the queue going", || async {
        let sent = broker.publish(message(queue, "m")).await;
        (sent == Ok(Published::Unroutable)).then_some(())
    })
    .await;
}

async fn a_queue_without_consumers_goes_and_takes_its_messages(fixture: &Fixture) {
    let broker = &fixture.broker;
    let expires = Some(Duration::from_millis(300));
    declare(broker, &[Queue { expires, ..buried(Queue::classic("q")) }]).await;
    send(broker, "q", &["ticket"]).await;
    until_unroutable(broker, "q").await;
    assert_eq!(waiting(broker, "q").await, None);
    // RabbitMQ buries nobody who goes with a queue: whoever sent the ticket has to ask again by timer.
    assert_eq!(waiting(broker, topology::DEAD).await, Some(0));
    // Declared again it works again.
    declare(broker, &[Queue { expires, ..buried(Queue::classic("q")) }]).await;
    send(broker, "q", &["again"]).await;
}

async fn a_queue_with_a_consumer_stays(fixture: &Fixture) {
    let broker = &fixture.broker;
    let expires = Some(Duration::from_millis(300));
    let used = Queue { expires, ..Queue::classic("used") };
    let unused = Queue { expires, ..Queue::classic("unused") };
    declare(broker, std::slice::from_ref(&used)).await;
    let mut consumer = broker.consume("used", 1);
    send(broker, "used", &["1"]).await;
    assert_eq!(next(&mut consumer).await.ack().await, Settled::Done);
    // Began to count later and goes first.
    declare(broker, &[unused]).await;
    until_unroutable(broker, "unused").await;
    send(broker, "used", &["2"]).await;
    assert_eq!(next(&mut consumer).await.message_id, "2");
}

async fn consumers_take_turns(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    let other = broker.another("other");
    let mut one = broker.consume("q", 1);
    let mut two = other.consume("q", 1);
    eventually("both consuming", || async {
        let depth = broker.depth("q").await.expect("the depth")?;
        (depth.consumers == 2).then_some(())
    })
    .await;
    send(broker, "q", &["1", "2"]).await;
    let (first, second) = (next(&mut one).await, next(&mut two).await);
    let got: BTreeSet<&str> = [first.message_id.as_str(), second.message_id.as_str()].into();
    assert_eq!(got, ["1", "2"].into());
}

async fn a_consumer_may_come_before_its_queue(fixture: &Fixture) {
    let broker = &fixture.broker;
    let mut consumer = broker.consume("q", 1);
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["m"]).await;
    assert_eq!(next(&mut consumer).await.message_id, "m");
}

fn site() -> SiteName {
    "fra1".parse().expect("a name")
}

fn workers() -> [WorkerName; 2] {
    ["db1", "db2"].map(|name| name.parse().expect("a name"))
}

async fn tickets_reach_their_queue_and_no_other(fixture: &Fixture) {
    let broker = &fixture.broker;
    let [db1, db2] = workers();
    let all = [Declaration::worker(&db1, &site()), Declaration::worker(&db2, &site())];
    assert_eq!(broker.declare(&all).await, Ok(Declared::Now));
    let queues: Vec<TicketQueue> = Lane::ALL
        .into_iter()
        .flat_map(|lane| {
            [
                TicketQueue::Site(site(), lane),
                TicketQueue::Worker(db1.clone(), lane),
                TicketQueue::Worker(db2.clone(), lane),
            ]
        })
        .collect();
    for queue in &queues {
        let ticket =
            Publish::new(topology::JOBS, queue.routing_key(), "ticket", queue.to_string(), "");
        assert_eq!(broker.publish(ticket).await, Ok(Published::Routed), "{queue}");
    }
    for queue in &queues {
        let mut consumer = broker.consume(&queue.to_string(), 10);
        assert_eq!(next(&mut consumer).await.message_id, queue.to_string());
        assert_eq!(waiting(broker, &queue.to_string()).await, Some(0), "{queue}");
    }
    let elsewhere = TicketQueue::Site("ams1".parse().expect("a name"), Lane::Urgent);
    let ticket = Publish::new(topology::JOBS, elsewhere.routing_key(), "ticket", "x", "");
    assert_eq!(broker.publish(ticket).await, Ok(Published::Unroutable));
}

async fn a_beacon_reaches_every_worker_and_a_grant_one(fixture: &Fixture) {
    let broker = &fixture.broker;
    let [db1, db2] = workers();
    let all = [Declaration::worker(&db1, &site()), Declaration::worker(&db2, &site())];
    assert_eq!(broker.declare(&all).await, Ok(Declared::Now));
    let beacon = Publish::new(topology::BEACON, "", "beacon", "b", "").optional().transient();
    assert_eq!(broker.publish(beacon).await, Ok(Published::Routed));
    let grant = Publish::new(topology::CONTROL, db2.as_str(), "control", "g", "");
    assert_eq!(broker.publish(grant).await, Ok(Published::Routed));
    let mut one = broker.consume(&topology::control_queue(&db1), 10);
    let mut two = broker.consume(&topology::control_queue(&db2), 10);
    assert_eq!(next(&mut one).await.message_id, "b");
    let mut got = BTreeSet::new();
    for _ in 0..2 {
        let delivery = next(&mut two).await;
        got.insert(delivery.message_id.clone());
        assert_eq!(delivery.ack().await, Settled::Done);
    }
    assert_eq!(got, ["b".to_owned(), "g".to_owned()].into());
    assert_eq!(waiting(broker, &topology::control_queue(&db1)).await, Some(0));
    let nobody = Publish::new(topology::CONTROL, "db3", "control", "x", "");
    assert_eq!(broker.publish(nobody).await, Ok(Published::Unroutable));
}

async fn either_side_may_declare_first(fixture: &Fixture) {
    let [db1, _] = workers();
    let worker = [Declaration::worker(&db1, &site())];
    let coordinator =
        [Declaration::coordinator(), Declaration::site(&site()), Declaration::wake(&db1)];
    let other = fixture.broker.another("coordinator");
    assert_eq!(fixture.broker.declare(&worker).await, Ok(Declared::Now));
    other.wait_up(crate::support::BOUND).await.expect("a link");
    // A worker alone is enough for what it sends to be kept.
    for name in [topology::CLAIMS, topology::REPORTS, topology::PULSE] {
        let message = Publish::new(name, name, "test", "m", "");
        assert_eq!(fixture.broker.publish(message).await, Ok(Published::Routed), "{name}");
    }
    assert_eq!(other.declare(&coordinator).await, Ok(Declared::Now));
    assert_eq!(fixture.broker.declare(&worker).await, Ok(Declared::Now));
    let wake = Publish::new(topology::WAKE, "", "wake", "w", "").optional();
    assert_eq!(other.publish(wake).await, Ok(Published::Routed));
    assert_eq!(waiting(&other, &topology::wake_queue(&db1)).await, Some(1));
    for name in [topology::CLAIMS, topology::REPORTS, topology::PULSE] {
        assert_eq!(waiting(&other, name).await, Some(1), "{name}");
    }
}

async fn other_settings_are_a_conflict_that_names_the_queue(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    let other = broker.another("other");
    other.wait_up(crate::support::BOUND).await.expect("a link");
    let mut wrong = Declaration::default()
        .queue(Queue { max_length: Some(7), ..Queue::classic("q") })
        .queue(Queue::classic("behind it"));
    wrong.bindings.push(Binding {
        exchange: EXCHANGE.to_owned(),
        queue: "behind it".to_owned(),
        routing_key: "behind it".to_owned(),
    });
    let error = other.declare(&[wrong]).await.expect_err("a conflict");
    assert!(
        matches!(&error, Error::Conflict { what: "queue", name, .. } if name == "q"),
        "{error:?}"
    );
    let failure = Failure::from(error);
    assert_eq!((failure.code, failure.action), (Code::BrokerTopology, Action::FixConfig));
    assert!(failure.hint.contains("rabbitmqctl delete_queue q"), "{failure:?}");
    // It keeps nothing else from working.
    send(&other, "behind it", &["m"]).await;
    send(broker, "q", &["m"]).await;
    let exchange = Declaration::default().exchange(EXCHANGE, ExchangeKind::Fanout);
    let error = other.declare(&[exchange]).await.expect_err("a conflict");
    assert!(
        matches!(&error, Error::Conflict { what: "exchange", name, .. } if name == EXCHANGE),
        "{error:?}"
    );
}

async fn a_closed_client_gives_everything_back(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    let leaver = broker.another("leaver");
    leaver.wait_up(crate::support::BOUND).await.expect("a link");
    let mut consumer = leaver.consume("q", 3);
    send(broker, "q", &["1", "2"]).await;
    let in_hand = next(&mut consumer).await;
    leaver.close().await;
    assert_eq!(*leaver.link().borrow(), broker::Link::Closed);
    // What it had fetched before may still come; nothing can be done with it any more.
    while let Some(delivery) = within("the end of the consumer", consumer.next()).await {
        assert_eq!(delivery.ack().await, Settled::Stale);
    }
    assert_eq!(in_hand.ack().await, Settled::Stale);
    let error = leaver.publish(message("q", "3")).await.expect_err("a closed client");
    assert_eq!(error, PublishError::NotSent { message_id: "3".to_owned(), cause: Error::Closed });
    let mut heir = broker.consume("q", 3);
    for id in ["1", "2"] {
        let delivery = next(&mut heir).await;
        assert_eq!((delivery.message_id.as_str(), delivery.redelivered), (id, true));
        assert_eq!(delivery.ack().await, Settled::Done);
    }
}

async fn a_lost_link_makes_deliveries_stale_and_they_come_again(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("classic"), Queue::quorum("quorum")]).await;
    let mut classic = broker.consume("classic", 1);
    let mut quorum = broker.consume("quorum", 1);
    send(broker, "classic", &["1"]).await;
    send(broker, "quorum", &["1"]).await;
    let (in_hand, other) = (next(&mut classic).await, next(&mut quorum).await);
    fixture.break_link(1).await;
    assert_eq!(in_hand.ack().await, Settled::Stale);
    assert_eq!(other.requeue().await, Settled::Stale);
    for consumer in [&mut classic, &mut quorum] {
        let again = next(consumer).await;
        assert_eq!((again.message_id.as_str(), again.redelivered), ("1", true));
        assert_eq!(again.ack().await, Settled::Done);
    }
    send(broker, "classic", &["2"]).await;
    assert_eq!(next(&mut classic).await.message_id, "2", "the consumer goes on by itself");
}

async fn what_was_fetched_over_a_lost_link_is_not_given_out(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    send(broker, "q", &["1", "2", "3"]).await;
    let mut consumer = broker.consume("q", 3);
    let in_hand = next(&mut consumer).await;
    eventually("everything being fetched", || async {
        (waiting(broker, "q").await == Some(0)).then_some(())
    })
    .await;
    fixture.break_link(1).await;
    assert_eq!(in_hand.ack().await, Settled::Stale);
    for id in ["1", "2", "3"] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.message_id.as_str(), delivery.redelivered), (id, true));
        assert_eq!(
            delivery.ack().await,
            Settled::Done,
            "{id} was given out when it could not be settled"
        );
    }
}

async fn a_lost_link_is_mended_for_publishers(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::quorum("q")]).await;
    send(broker, "q", &["1"]).await;
    fixture.break_link(1).await;
    send(broker, "q", &["2"]).await;
    assert_eq!(waiting(broker, "q").await, Some(2));
}

async fn two_thousand_at_once_and_not_one_mistaken(fixture: &Fixture) {
    let broker = &fixture.broker;
    declare(broker, &[Queue::classic("q")]).await;
    let sending = (0..2000).map(|number| {
        let broker = broker.clone();
        tokio::spawn(async move {
            let wanted = number % 3 != 0;
            let to = if wanted { "q" } else { "nobody" };
            let expected = if wanted { Published::Routed } else { Published::Unroutable };
            let sent = broker.publish(message(to, &number.to_string())).await;
            (number, sent, expected)
        })
    });
    let mut wrong = Vec::new();
    for sent in sending.collect::<Vec<_>>() {
        let (number, sent, expected) = sent.await.expect("a task");
        if sent != Ok(expected) {
            wrong.push((number, sent));
        }
    }
    assert!(wrong.is_empty(), "{} wrong, such as {:?}", wrong.len(), wrong[0]);
    assert_eq!(waiting(broker, "q").await, Some(2000 - 667));
}
