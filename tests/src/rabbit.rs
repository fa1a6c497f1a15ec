//! RabbitMQ for tests: a virtual host of one's own on the run's node, or a node of one's own to be killed.
//!
//! Talks to the management API with plain blocking HTTP, so that it also works while dropping. Messages themselves
//! are the business of `broker`.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{eventually, services};

/// A node boots in 5 to 8 s on an idle machine; the build may be running beside it.
const BOOT_BOUND: Duration = Duration::from_mins(1);
/// A stop takes 6 to 8 s.
const STOP_BOUND: Duration = Duration::from_secs(30);
const REQUEST_BOUND: Duration = Duration::from_secs(10);

/// A virtual host that belongs to one test and goes when this is dropped, with all that is in it.
#[derive(Debug)]
pub struct Vhost {
    name: String,
    amqp: String,
    management: Management,
}

impl Vhost {
    /// A new one on the run's node.
    pub fn create() -> anyhow::Result<Self> {
        let management = Management::at(&services::amqp_management()?)?;
        let name = format!("test-{}", unique()?);
        management.put(&format!("vhosts/{name}"), &json!({}))?;
        let rights = json!({"configure": ".*", "write": ".*", "read": ".*"});
        management.put(&format!("permissions/{name}/guest"), &rights)?;
        Ok(Self { amqp: services::amqp()?, name, management })
    }

    /// `amqp://user:password@host:port/vhost`.
    pub fn url(&self) -> String {
        format!("{}/{}", self.amqp, self.name)
    }

    /// The same virtual host reached through another port of this machine: a proxy's.
    pub fn url_through(&self, port: u16) -> String {
        let login = self.amqp.rsplit_once('@').map_or("", |(login, _)| login);
        format!("{login}@127.0.0.1:{port}/{}", self.name)
    }

    /// The name, for calls to the management API.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The management API of the node this lives on.
    pub fn management(&self) -> &Management {
        &self.management
    }

    /// How many messages a queue holds, delivered and unacknowledged ones included; `None` when there is no such queue.
    /// The broker refreshes this figure every few seconds only: wait for it, do not compare it once.
    pub fn depth(&self, queue: &str) -> anyhow::Result<Option<u64>> {
        let queues = self.management.get(&format!("queues/{}", self.name))?;
        let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some(queue);
        Ok(queues
            .as_array()
            .context("read the list of queues")?
            .iter()
            .find(named)
            .map(|entry| entry.get("messages").and_then(Value::as_u64).unwrap_or(0)))
    }

    /// Publishes a message as somebody who can reach the broker, and nothing else, could.
    pub fn publish(&self, exchange: &str, key: &str, kind: &str, body: &str) -> anyhow::Result<()> {
        let message = json!({"routing_key": key, "payload": body, "payload_encoding": "string",
            "properties": {"type": kind, "message_id": unique()?, "delivery_mode": 2}});
        let path = format!("exchanges/{}/{exchange}/publish", self.name);
        let answer = self.management.post(&path, &message)?;
        ensure!(answer["routed"] == true, "nobody has a queue for {key} of {exchange}");
        Ok(())
    }

    /// From now on keeps a copy of every message of an exchange with this routing key; gives the queue's name, for
    /// [`Vhost::heard`].
    pub fn overhear(&self, exchange: &str, key: &str) -> anyhow::Result<String> {
        let queue = format!("overheard.{exchange}.{key}");
        self.management.put(&format!("queues/{}/{queue}", self.name), &json!({"durable": true}))?;
        let path = format!("bindings/{}/e/{exchange}/q/{queue}", self.name);
        self.management.post(&path, &json!({"routing_key": key}))?;
        Ok(queue)
    }

    /// The bodies that were overheard since the last call, oldest first.
    pub fn heard(&self, queue: &str) -> anyhow::Result<Vec<String>> {
        let how = json!({"count": 1_000, "ackmode": "ack_requeue_false", "encoding": "auto"});
        let path = format!("queues/{}/{queue}/get", self.name);
        let messages = self.management.post(&path, &how)?;
        let bodies = messages.as_array().context("read the messages")?.iter();
        Ok(bodies.filter_map(|one| one["payload"].as_str().map(str::to_owned)).collect())
    }

    /// Ends every connection to this virtual host, as an operator or a failing network would.
    pub fn close_connections(&self) -> anyhow::Result<usize> {
        let connections = self.management.get(&format!("vhosts/{}/connections", self.name))?;
        let mut closed = 0;
        for connection in connections.as_array().context("read the list of connections")? {
            if let Some(name) = connection.get("name").and_then(Value::as_str) {
                self.management.delete(&format!("connections/{}", escape(name)))?;
                closed += 1;
            }
        }
        Ok(closed)
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        // The node goes at the end of the run anyway; a failure here must not hide the test's own.
        let _ = self.management.delete(&format!("vhosts/{}", self.name));
    }
}

/// A RabbitMQ node that belongs to one test, which may stop it, kill it and start it again with its data.
#[derive(Debug)]
pub struct Rabbit {
    home: TempDir,
    port: u16,
    script: Child,
}

impl Rabbit {
    /// Starts a node and waits until it takes connections.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with("")
    }

    /// The same with more lines for its `rabbitmq.conf`, such as `consumer_timeout = 10000`.
    pub fn start_with(settings: &str) -> anyhow::Result<Self> {
        let home = TempDir::with_prefix("rabbit-").context("make a directory for RabbitMQ")?;
        std::fs::write(home.path().join("extra.conf"), settings).context("write its settings")?;
        let port = free_ports()?;
        let script = launch(&home, port)?;
        let node = Self { home, port, script };
        node.wait_until_ready()?;
        Ok(node)
    }

    /// `amqp://user:password@host:port` of the default virtual host, which is this test's own here.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    /// The port it takes connections at, also while it is down: for a proxy in front of it.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its management API.
    pub fn management(&self) -> anyhow::Result<Management> {
        Management::at(&format!("http://127.0.0.1:{}", self.port + 1))
    }

    /// kill -9: no goodbye to anybody, nothing more written to disk.
    ///
    /// Waits before that until the node has written down which quorum queues it has. RabbitMQ 3.10 does so every half
    /// second only; a queue declared since then exists after the restart, but never answers again.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        eventually("the list of quorum queues on disk", STOP_BOUND, || self.queues_written())?;
        kill_process(self.pid()?, Signal::KILL).context("kill RabbitMQ")?;
        self.wait_until_gone()
    }

    /// A clean stop: connections are closed with a reason, durable state is written.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        kill_process(self.pid()?, Signal::TERM).context("stop RabbitMQ")?;
        self.wait_until_gone()
    }

    /// Starts the stopped or killed node again, on its data and its ports.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.script.try_wait()?.is_some(), "RabbitMQ is still running");
        self.script = launch(&self.home, self.port)?;
        self.wait_until_ready()
    }

    /// Each quorum queue has a folder; the node's list of them is the file beside the folders.
    fn queues_written(&self) -> anyhow::Result<Option<()>> {
        let node = format!("t{}@localhost", self.port);
        let folder = self.home.path().join("mnesia").join(&node).join("quorum").join(&node);
        let list = std::fs::read(folder.join("names.dets"))?;
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            if entry.file_type()?.is_dir() && !list.windows(name.len()).any(|part| part == name) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        let path = self.home.path().join("rabbit.pid");
        let text = std::fs::read_to_string(&path).context("read the node's pid file")?;
        let number = text.trim().parse().context("read the node's pid")?;
        Pid::from_raw(number).context("read the node's pid: it is 0")
    }

    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let management = self.management()?;
        let path = format!("health/checks/port-listener/{}", self.port);
        eventually("RabbitMQ taking connections", BOOT_BOUND, || management.get(&path).map(Some))
            .with_context(|| std::fs::read_to_string(self.log()).unwrap_or_default())?;
        Ok(())
    }

    fn wait_until_gone(&mut self) -> anyhow::Result<()> {
        let script = &mut self.script;
        eventually("the end of RabbitMQ", STOP_BOUND, || Ok(script.try_wait()?))?;
        // Its epmd stays behind, and would serve the next node from a group that nobody ends.
        self.end_group();
        // A node that stopped cleanly has removed it by itself.
        match std::fs::remove_file(self.home.path().join("rabbit.pid")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("remove the pid file")
            }
            _ => Ok(()),
        }
    }

    /// The script, its epmd and the node are one process group; helpers of the node end when it does.
    fn end_group(&self) {
        if let Some(group) = i32::try_from(self.script.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }

    fn log(&self) -> PathBuf {
        self.home.path().join("out.log")
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        self.end_group();
        let _ = self.script.wait();
    }
}

fn launch(home: &TempDir, port: u16) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(home.path().join("out.log"))?;
    Command::new(services::scripts().join("services"))
        .arg("rabbit")
        .arg(home.path())
        .arg(port.to_string())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start tests/services rabbit")
}

/// RabbitMQ's management API, as the guest user.
#[derive(Debug, Clone)]
pub struct Management {
    address: String,
}

impl Management {
    fn at(url: &str) -> anyhow::Result<Self> {
        let address = url.strip_prefix("http://").context("read the management API's URL")?;
        Ok(Self { address: address.trim_end_matches('/').to_owned() })
    }

    /// What stands at `/api/PATH`.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call("GET", path, None)
    }

    /// Creates or replaces what stands at `/api/PATH`.
    pub fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.call("PUT", path, Some(body))
    }

    /// Does what `/api/PATH` is for.
    pub fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.call("POST", path, Some(body))
    }

    /// Removes what stands at `/api/PATH`.
    pub fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.call("DELETE", path, None)
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let (status, text) = self
            .exchange(method, path, body)
            .with_context(|| format!("{method} /api/{path} at {}", self.address))?;
        match status {
            200..300 if text.is_empty() => Ok(Value::Null),
            200..300 => serde_json::from_str(&text).context("read RabbitMQ's answer"),
            _ => bail!("{method} /api/{path} was answered with {status}: {text}"),
        }
    }

    /// HTTP/1.0: the answer ends where the connection does.
    fn exchange(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<(u16, String)> {
        let login = base64::engine::general_purpose::STANDARD.encode("guest:guest");
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(REQUEST_BOUND))?;
        stream.set_write_timeout(Some(REQUEST_BOUND))?;
        let length = body.len();
        write!(
            stream,
            "{method} /api/{path} HTTP/1.0\r\nAuthorization: Basic {login}\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, text) = answer.split_once("\r\n\r\n").context("find the answer's body")?;
        let status = head.split(' ').nth(1).context("find the answer's status")?.parse()?;
        Ok((status, text.to_owned()))
    }
}

/// A port below 32768 with its three successors free: above, the kernel may give the port of a node that is down to
/// somebody's outgoing connection, and the node could not start again.
fn free_ports() -> anyhow::Result<u16> {
    for _ in 0..200 {
        let port = 10_000 + random::<2>().map(u16::from_ne_bytes)? % 2_200 * 10;
        let free = |port| TcpListener::bind(("127.0.0.1", port));
        if (port..port + 4).map(free).collect::<Result<Vec<_>, _>>().is_ok() {
            return Ok(port);
        }
    }
    bail!("found no free ports below 32768")
}

/// A name that no other test of this machine has.
pub(crate) fn unique() -> anyhow::Result<String> {
    Ok(format!("{:016x}", u64::from_ne_bytes(random()?)))
}

fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes).context("read random bytes")?;
    Ok(bytes)
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
