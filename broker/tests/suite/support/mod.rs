//! What the tests of this crate share: the run's RabbitMQ with a virtual host per test, its management API, and
//! waiting with a bound. Panics on anything odd: it is used in tests only.

pub(crate) mod node;
pub(crate) mod proxy;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use broker::{Broker, RabbitOptions};
use secrecy::SecretString;
use serde_json::{Value, json};

/// Nothing in these tests takes longer on a machine that is busy building.
pub(crate) const BOUND: Duration = Duration::from_secs(20);

/// Looks until `check` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(start.elapsed() < BOUND, "{what} did not happen within {BOUND:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for a future, within the bound.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(BOUND, future).await;
    assert!(done.is_ok(), "{what} did not happen within {BOUND:?}");
    done.expect("what happened in time")
}

fn variable(name: &str) -> String {
    #[expect(clippy::disallowed_methods, reason = "the one place of these tests for this")]
    let value = std::env::var(name);
    assert!(value.is_ok(), "{name} is not set; run ./tests/run, which starts the services");
    value.expect("a variable that is set")
}

/// A virtual host of the run's RabbitMQ that belongs to one test.
pub(crate) struct Vhost {
    pub(crate) name: String,
    pub(crate) management: Management,
    login_and_host: String,
}

impl Vhost {
    pub(crate) fn create() -> Self {
        let management = Management::at(&variable("PGMUSTER_TEST_AMQP_MANAGEMENT"));
        let mut random = [0; 8];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .expect("random bytes");
        let name = format!("broker-{:016x}", u64::from_ne_bytes(random));
        management.put(&format!("vhosts/{name}"), &json!({}));
        let rights = json!({"configure": ".*", "write": ".*", "read": ".*"});
        management.put(&format!("permissions/{name}/guest"), &rights);
        Self { name, management, login_and_host: variable("PGMUSTER_TEST_AMQP") }
    }

    pub(crate) fn url(&self) -> SecretString {
        SecretString::from(format!("{}/{}", self.login_and_host, self.name))
    }

    pub(crate) fn options(&self) -> RabbitOptions {
        RabbitOptions::new(self.url(), "test")
    }

    /// Ends every connection to this virtual host, as an operator would. The management learns of a connection some
    /// seconds after it was made, so this looks until it has seen `expected`.
    pub(crate) async fn close_connections(&self, expected: usize) {
        let list = format!("vhosts/{}/connections", self.name);
        let names: Vec<String> = eventually("the management seeing the connections", || async {
            let all = self.management.get(&list);
            let names: Vec<String> = all
                .as_array()?
                .iter()
                .filter_map(|one| Some(one.get("name")?.as_str()?.to_owned()))
                .collect();
            (names.len() >= expected).then_some(names)
        })
        .await;
        for name in names {
            self.management.delete(&format!("connections/{}", escape(&name)));
        }
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.management.delete(&format!("vhosts/{}", self.name));
    }
}

/// RabbitMQ's management API, as guest.
#[derive(Clone)]
pub(crate) struct Management {
    address: String,
}

impl Management {
    pub(crate) fn at(url: &str) -> Self {
        let address = url.strip_prefix("http://").expect("an http URL");
        Self { address: address.trim_end_matches('/').to_owned() }
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.call("GET", path, None).expect("an answer of RabbitMQ's management")
    }

    pub(crate) fn put(&self, path: &str, body: &Value) {
        self.call("PUT", path, Some(body)).expect("an answer of RabbitMQ's management");
    }

    pub(crate) fn delete(&self, path: &str) {
        // What is to be removed may be gone.
        let _ = self.call("DELETE", path, None);
    }

    /// The answer, or the status that is none of success.
    pub(crate) fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, String> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let answer = self.exchange(method, path, &body).map_err(|error| error.to_string())?;
        let (head, text) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        match head.split(' ').nth(1).and_then(|status| status.parse().ok()) {
            Some(200..300) => Ok(serde_json::from_str(text).unwrap_or(Value::Null)),
            status => Err(format!("{method} {path}: {status:?} {text}")),
        }
    }

    /// HTTP/1.0: the answer ends where the connection does.
    fn exchange(&self, method: &str, path: &str, body: &str) -> std::io::Result<String> {
        let login = base64::engine::general_purpose::STANDARD.encode("guest:guest");
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(BOUND))?;
        let length = body.len();
        write!(
            stream,
            "{method} /api/{path} HTTP/1.0\r\nAuthorization: Basic {login}\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// One of the twins, and how to break its link.
pub(crate) struct Fixture {
    pub(crate) broker: Broker,
    vhost: Option<Vhost>,
}

impl Fixture {
    pub(crate) fn memory() -> Self {
        Self { broker: Broker::memory(), vhost: None }
    }

    pub(crate) async fn rabbit() -> Self {
        let vhost = Vhost::create();
        let broker = Broker::rabbit(vhost.options());
        broker.wait_up(BOUND).await.expect("a link to RabbitMQ");
        Self { broker, vhost: Some(vhost) }
    }

    /// The link is lost and comes back: every client's on RabbitMQ, this one's in memory.
    pub(crate) async fn break_link(&self, clients: usize) {
        let mut link = self.broker.link();
        link.mark_unchanged();
        if let Some(vhost) = &self.vhost {
            vhost.close_connections(2 * clients).await;
            let lost = link.wait_for(|link| !link.is_up());
            within("the loss of the link", lost).await.expect("a link");
        } else {
            let faults = self.broker.memory_faults().expect("faults of the twin in memory");
            faults.cut();
            faults.restore();
        }
        within("the link coming back", link.wait_for(broker::Link::is_up)).await.expect("a link");
    }
}
