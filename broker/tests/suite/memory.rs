//! What can be done to the twin in memory and not to RabbitMQ: faults on demand, and time that is made to pass.

use std::time::Duration;

use crate::support::within;
use broker::{
    Broker, Consumer, Declaration, Declared, Delivery, Error, ExchangeKind, Link, MemoryFaults,
    Publish, PublishError, Published, Queue, Settled,
};
use tokio::time::Instant;

fn declaration() -> Declaration {
    let expires = Some(Duration::from_mins(10));
    Declaration::default()
        .exchange("test", ExchangeKind::Direct)
        .bound(Queue::classic("q"), "test", "q")
        .bound(Queue { expires, ..Queue::classic("expiring") }, "test", "expiring")
}

fn message(queue: &str, id: &str) -> Publish {
    Publish::new("test", queue, "test", id, "")
}

async fn ready() -> (Broker, MemoryFaults) {
    let broker = Broker::memory();
    assert_eq!(broker.declare(&[declaration()]).await, Ok(Declared::Now));
    let faults = broker.memory_faults().expect("faults");
    (broker, faults)
}

async fn next(consumer: &mut Consumer) -> Delivery {
    within("a delivery", consumer.next()).await.expect("a delivery")
}

async fn waiting(broker: &Broker) -> u32 {
    broker.depth("q").await.expect("the depth").expect("the queue").messages
}

#[tokio::test]
async fn a_lost_answer_leaves_the_message_there_and_a_lost_message_does_not() {
    let (broker, faults) = ready().await;
    faults.lose_answers(1);
    let error = broker.publish(message("q", "1")).await.expect_err("no answer");
    assert!(matches!(error, PublishError::Unknown { .. }), "{error:?}");
    assert_eq!(waiting(&broker).await, 1);
    faults.lose_messages(1);
    let error = broker.publish(message("q", "2")).await.expect_err("no answer");
    assert!(matches!(error, PublishError::Unknown { .. }), "{error:?}");
    assert_eq!(waiting(&broker).await, 1);
    assert_eq!(broker.publish(message("q", "2")).await, Ok(Published::Routed));
    assert_eq!(waiting(&broker).await, 2);
}

#[tokio::test]
async fn a_duplicated_delivery_comes_twice_and_each_is_settled() {
    let (broker, faults) = ready().await;
    faults.duplicate_deliveries(1);
    let mut consumer = broker.consume("q", 1);
    for id in ["1", "2"] {
        assert_eq!(broker.publish(message("q", id)).await, Ok(Published::Routed));
    }
    for (id, redelivered) in [("1", false), ("1", true), ("2", false)] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.message_id.as_str(), delivery.redelivered), (id, redelivered));
        assert_eq!(delivery.ack().await, Settled::Done);
    }
    assert_eq!(waiting(&broker).await, 0);
}

#[tokio::test]
async fn a_cut_takes_one_client_away_and_nobody_else() {
    let (broker, faults) = ready().await;
    let other = broker.another("other");
    let mut cut_off = broker.consume("q", 5);
    assert_eq!(broker.publish(message("q", "1")).await, Ok(Published::Routed));
    let in_hand = next(&mut cut_off).await;
    faults.cut();
    assert!(matches!(&*broker.link().borrow(), Link::Connecting { last_error: Some(_), .. }));
    assert!(other.link().borrow().is_up());
    assert_eq!(in_hand.ack().await, Settled::Stale);
    let mut heir = other.consume("q", 5);
    let again = next(&mut heir).await;
    assert_eq!((again.message_id.as_str(), again.redelivered), ("1", true));
    assert_eq!(again.ack().await, Settled::Done);
    drop(heir);
    assert_eq!(other.publish(message("q", "2")).await, Ok(Published::Routed));
    faults.restore();
    assert_eq!(next(&mut cut_off).await.message_id, "2");
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_expires_during_a_cut_is_there_again_after_it() {
    let (broker, faults) = ready().await;
    let other = broker.another("other");
    let mut consumer = broker.consume("expiring", 1);
    assert_eq!(other.publish(message("expiring", "1")).await, Ok(Published::Routed));
    assert_eq!(next(&mut consumer).await.ack().await, Settled::Done);
    // Used as long as there is a consumer, whatever the time.
    tokio::time::sleep(Duration::from_hours(1)).await;
    assert_eq!(other.publish(message("expiring", "2")).await, Ok(Published::Routed));
    faults.cut();
    tokio::time::sleep(Duration::from_mins(9)).await;
    assert_eq!(other.publish(message("expiring", "3")).await, Ok(Published::Routed));
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(other.publish(message("expiring", "4")).await, Ok(Published::Unroutable));
    faults.restore();
    assert_eq!(other.publish(message("expiring", "5")).await, Ok(Published::Routed));
    assert_eq!(next(&mut consumer).await.message_id, "5");
}

#[tokio::test(start_paused = true)]
async fn a_blocked_or_cut_publisher_waits_for_the_end_of_it_or_of_its_patience() {
    let (broker, faults) = ready().await;
    faults.block();
    let mut consumer = broker.consume("q", 1);
    let before = Instant::now();
    let error = broker.publish(message("q", "1")).await.expect_err("blocked");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Blocked { .. }, .. }),
        "{error:?}"
    );
    assert!(before.elapsed() >= Duration::from_secs(5));
    let (sent, ()) = tokio::join!(broker.publish(message("q", "2")), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        faults.unblock();
    });
    assert_eq!(sent, Ok(Published::Routed));
    assert_eq!(next(&mut consumer).await.message_id, "2");
    faults.cut();
    assert_eq!(broker.declare(&[declaration()]).await, Ok(Declared::Later));
    let error = broker.publish(message("q", "3")).await.expect_err("cut");
    assert!(
        matches!(&error, PublishError::NotSent { cause: Error::Unreachable { .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn the_hub_goes_when_its_last_client_does_and_not_before() {
    let (broker, _) = ready().await;
    let other = broker.another("other");
    let mut consumer = broker.consume("q", 1);
    drop(broker);
    assert_eq!(other.publish(message("q", "1")).await, Ok(Published::Routed));
    assert_eq!(next(&mut consumer).await.ack().await, Settled::Done, "a consumer keeps its client");
}
