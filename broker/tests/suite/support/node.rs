//! A RabbitMQ node that belongs to one test, which may stop it, kill it and start it again with its data.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

use super::Management;

/// It takes 5 to 8 s on an idle machine; the build may be running beside it.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) struct Node {
    home: TempDir,
    pub(crate) port: u16,
    script: Option<Child>,
}

impl Node {
    /// A place for a node that does not run yet, on free ports.
    pub(crate) fn prepared() -> Self {
        let home = TempDir::with_prefix("rabbit-").expect("a directory for RabbitMQ");
        let port = free_ports();
        let dir = home.path().to_str().expect("a path in UTF-8");
        make_certificates(home.path());
        let tls = format!(
            "listeners.ssl.1 = 127.0.0.1:{}\nssl_options.cacertfile = {dir}/ca.pem\n\
             ssl_options.certfile = {dir}/server.pem\nssl_options.keyfile = {dir}/server.key\n\
             ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n",
            port + 4
        );
        std::fs::write(home.path().join("extra.conf"), tls).expect("its settings");
        Self { home, port, script: None }
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    /// The listener that wants a certificate of whoever comes.
    pub(crate) fn tls_url(&self) -> String {
        format!("amqps://guest:guest@127.0.0.1:{}", self.port + 4)
    }

    /// `ca.pem`, `client.pem`, `client.key`.
    pub(crate) fn pem(&self, name: &str) -> String {
        std::fs::read_to_string(self.home.path().join(name)).expect("a PEM file")
    }

    pub(crate) fn management(&self) -> Management {
        Management::at(&format!("http://127.0.0.1:{}", self.port + 1))
    }

    /// Starts it, on its data and its ports, and waits until it takes connections.
    pub(crate) fn start(&mut self) {
        self.launch();
        let path = format!("health/checks/port-listener/{}", self.port);
        let management = self.management();
        let start = Instant::now();
        while management.call("GET", &path, None).is_err() {
            let ended =
                self.script.as_mut().is_some_and(|script| !matches!(script.try_wait(), Ok(None)));
            assert!(!ended && start.elapsed() < PATIENCE, "RabbitMQ did not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn launch(&mut self) {
        let log = self.home.path().join("out.log");
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/services");
        let child = Command::new(script)
            .arg("rabbit")
            .arg(self.home.path())
            .arg(self.port.to_string())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("tests/services");
        self.script = Some(child);
    }

    /// A clean stop: connections are closed with a reason.
    pub(crate) fn stop(&mut self) {
        self.signal(Signal::TERM);
        self.until_gone();
    }

    /// No goodbye to anybody.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.until_gone();
    }

    /// It is there and does nothing, until [`thaw`](Self::thaw).
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Runs code inside the node.
    pub(crate) fn eval(&self, code: &str) -> String {
        let output = Command::new("/usr/lib/rabbitmq/bin/rabbitmqctl")
            .args(["-n", &format!("t{}@localhost", self.port), "--quiet", "eval", code])
            .env("HOME", self.home.path())
            .env("ERL_EPMD_PORT", (self.port + 3).to_string())
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .output()
            .expect("rabbitmqctl");
        assert!(output.status.success(), "{code}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn signal(&self, signal: Signal) {
        let pid = std::fs::read_to_string(self.home.path().join("rabbit.pid")).expect("a pid file");
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("a running node");
    }

    fn until_gone(&mut self) {
        let start = Instant::now();
        let mut script = self.script.take().expect("a running node");
        while script.try_wait().expect("a child").is_none() {
            assert!(start.elapsed() < PATIENCE, "RabbitMQ did not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        // Its epmd stays behind, and would serve the next node from a group that nobody ends.
        end_group(&script);
        // A clean stop has removed it.
        let _ = std::fs::remove_file(self.home.path().join("rabbit.pid"));
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("out.log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let Some(mut script) = self.script.take() else { return };
        end_group(&script);
        let _ = script.wait();
    }
}

/// The script, its epmd and the node are one process group; helpers of the node end when it does.
fn end_group(script: &Child) {
    if let Some(group) = i32::try_from(script.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// An authority, and what it signed for the server and for a client.
fn make_certificates(dir: &Path) {
    let openssl = |arguments: &str| {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(dir)
            .output()
            .expect("openssl");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {arguments}: {said}");
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=authority -days 2"));
    std::fs::write(dir.join("names"), "subjectAltName=IP:127.0.0.1").expect("a file of names");
    for who in ["server", "client"] {
        openssl(&format!("req {key} -keyout {who}.key -out {who}.csr -subj /CN={who}"));
        openssl(&format!(
            "x509 -req -in {who}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names -days 2 -out {who}.pem"
        ));
    }
}

/// A port below 32768 with its four successors free: above, the kernel may give the port of a node that is down to
/// somebody's outgoing connection, and the node could not start again.
fn free_ports() -> u16 {
    let start = u16::try_from(std::process::id() % 2_000).expect("less than 2000");
    (0..2_000)
        .map(|number| 10_000 + (start + number) % 2_000 * 10)
        .find(|port| (*port..port + 5).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()))
        .expect("free ports below 32768")
}
