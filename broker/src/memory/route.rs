//! Which queues an exchange chooses. Nothing but names and patterns.

use crate::{Binding, ExchangeKind};

/// The queues that get a message, each once, in the order they were bound.
pub(super) fn queues<'a>(
    kind: ExchangeKind,
    bindings: impl Iterator<Item = &'a Binding>,
    routing_key: &str,
) -> Vec<&'a str> {
    let mut chosen: Vec<&str> = Vec::new();
    for binding in bindings {
        let fits = match kind {
            ExchangeKind::Fanout => true,
            ExchangeKind::Direct => binding.routing_key == routing_key,
            ExchangeKind::Topic => {
                let pattern: Vec<&str> = binding.routing_key.split('.').collect();
                let key: Vec<&str> = routing_key.split('.').collect();
                matches(&pattern, &key)
            }
        };
        if fits && !chosen.contains(&binding.queue.as_str()) {
            chosen.push(&binding.queue);
        }
    }
    chosen
}

fn matches(pattern: &[&str], key: &[&str]) -> bool {
    match pattern {
        [] => key.is_empty(),
        ["#", rest @ ..] => (0..=key.len()).any(|skipped| matches(rest, &key[skipped..])),
        ["*", rest @ ..] => !key.is_empty() && matches(rest, &key[1..]),
        [word, rest @ ..] => key.first() == Some(word) && matches(rest, &key[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_match_word_by_word() {
        let fits = |pattern: &str, key: &str| {
            let binding = Binding {
                exchange: "e".to_owned(),
                queue: "q".to_owned(),
                routing_key: pattern.to_owned(),
            };
            !queues(ExchangeKind::Topic, [&binding].into_iter(), key).is_empty()
        };
        assert!(fits("site.fra1.urgent", "site.fra1.urgent"));
        assert!(!fits("site.fra1.urgent", "site.fra1"));
        assert!(fits("site.*.urgent", "site.fra1.urgent"));
        assert!(!fits("site.*", "site.fra1.urgent"));
        assert!(fits("site.#", "site.fra1.urgent"));
        assert!(fits("site.#", "site"));
        assert!(fits("#.urgent", "site.fra1.urgent"));
        assert!(fits("#", ""));
        assert!(!fits("*.*", "one"));
    }

    #[test]
    fn a_queue_bound_twice_gets_a_message_once() {
        let binding = |key: &str| Binding {
            exchange: "e".to_owned(),
            queue: "q".to_owned(),
            routing_key: key.to_owned(),
        };
        let bindings = [binding("a"), binding("#")];
        assert_eq!(queues(ExchangeKind::Topic, bindings.iter(), "a"), ["q"]);
        assert_eq!(queues(ExchangeKind::Fanout, bindings.iter(), "x"), ["q"]);
    }
}
