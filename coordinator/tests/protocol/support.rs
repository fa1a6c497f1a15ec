//! A fleet of one coordinator and scripted workers.

use std::path::PathBuf;
use std::time::Duration;

use broker::{Broker, Consumer, Declaration, Publish, Published};
use bytes::Bytes;
use coordinator::api::types::{EventView, JobView, SubmitRequest, TraceView};
use coordinator::config::{BrokerConfig, CatalogConfig, JobsConfig, ListenConfig, TimingConfig};
use coordinator::objectives::ObjectivesConfig;
use coordinator::{Clock, Config, Coordinator, Hand, Handle, Options};
use http_body_util::{BodyExt, Full};
use hyper::StatusCode;
use hyper_util::rt::TokioIo;
use proto::envelope::{Credentials, Signed, SigningKey};
use proto::job::{Backup, BackupOutcome, JobKind, Task};
use proto::message::{
    Beacon, Claim, ClaimMessage, ClusterOffer, Control, Decline, DeclineReason, DenialReason,
    Grant, Holdings, Nonce, Offers, Pulse, Report, ReportBody, RepositoryAway, RepositoryLook,
    RepositoryOffer, RunningAttempt, SCHEMA, Slots, Spec, Ticket, WalStanding,
};
use proto::topology::{self, TicketQueue};
use proto::{
    AttemptId, BackupId, BootId, ClusterHeartbeat, ClusterName, Failure, JobId, JobState, Lane,
    LineageId, Lsn, Outcome, Proof, ProofLevel, SiteName, SystemIdentifier, Timeline, WorkerName,
};
use secrecy::SecretString;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Nothing in these tests takes this long.
const PATIENCE: Duration = Duration::from_secs(20);
/// When the tests begin.
pub(crate) const START: i64 = 1_790_000_000_000;
/// The seed of the coordinator's key.
pub(crate) const SEED: [u8; 32] = [7; 32];

pub(crate) struct Fleet {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) broker: Broker,
    pub(crate) clock: Clock,
    pub(crate) hand: Hand,
    pub(crate) handle: Option<Handle>,
    pub(crate) config: Config,
    pub(crate) catalog_url: String,
}

impl Fleet {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let catalog_url = format!("sqlite:{}/catalog.sqlite", directory.path().display());
        Self::on(directory, catalog_url).await
    }

    pub(crate) async fn on(directory: tempfile::TempDir, catalog_url: String) -> Self {
        let config = config("c1", directory.path().join("api.sock"));
        Self::as_configured(directory, catalog_url, config).await
    }

    /// One whose coordinator promises something for its clusters.
    pub(crate) async fn promising(objectives: ObjectivesConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let catalog_url = format!("sqlite:{}/catalog.sqlite", directory.path().display());
        let config = config("c1", directory.path().join("api.sock"));
        Self::as_configured(directory, catalog_url, Config { objectives, ..config }).await
    }

    async fn as_configured(
        directory: tempfile::TempDir,
        catalog_url: String,
        config: Config,
    ) -> Self {
        let (clock, hand) = Clock::manual(START);
        let mut fleet = Self {
            directory,
            broker: Broker::memory(),
            clock,
            hand,
            handle: None,
            config,
            catalog_url,
        };
        fleet.start().await;
        fleet
    }

    /// Starts a coordinator (again) and waits until it leads.
    pub(crate) async fn start(&mut self) {
        let handle = self.another(self.config.clone()).await;
        self.handle = Some(handle);
        self.wait_until_it_leads().await;
    }

    pub(crate) async fn another(&self, config: Config) -> Handle {
        let options = Options {
            config,
            catalog_url: SecretString::from(self.catalog_url.as_str()),
            signing_key: SigningKey::from_seed(&SEED),
        };
        Coordinator::start(options, self.broker.another("coordinator"), self.clock.clone())
            .await
            .unwrap()
    }

    pub(crate) async fn wait_until_it_leads(&self) {
        eventually("the coordinator leads", || async { self.handle().leads().then_some(()) }).await;
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.handle.as_ref().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.config.listen.socket.clone().unwrap()
    }

    /// One HTTP request over the socket.
    pub(crate) async fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> (StatusCode, String) {
        let stream = tokio::net::UnixStream::connect(self.socket()).await.unwrap();
        http(stream, method, path, body, &[]).await
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        let (code, body) = self.request("GET", path, None).await;
        assert_eq!(code, StatusCode::OK, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> T {
        let body = serde_json::to_string(body).unwrap();
        let (code, body) = self.request("POST", path, Some(body)).await;
        assert!(code.is_success(), "{path}: {code} {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// A request that is refused: the status and the failure.
    pub(crate) async fn refused(
        &self,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> (u16, Failure) {
        let (code, body) = self.request(method, path, body).await;
        assert!(!code.is_success(), "{path}: {code} {body}");
        (code.as_u16(), serde_json::from_str(&body).unwrap())
    }

    pub(crate) async fn submit(&self, request: &SubmitRequest) -> JobView {
        self.post("/v1/jobs", request).await
    }

    pub(crate) async fn backup(&self) -> JobView {
        self.submit(&backup_request()).await
    }

    pub(crate) async fn job(&self, id: JobId) -> JobView {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    pub(crate) async fn trace(&self, id: JobId) -> TraceView {
        self.get(&format!("/v1/jobs/{id}/trace")).await
    }

    pub(crate) async fn events(&self, name: &str) -> Vec<EventView> {
        let all: Vec<EventView> = self.get("/v1/events").await;
        all.into_iter().filter(|event| event.name == name).collect()
    }

    /// Waits until a job is so.
    pub(crate) async fn until(
        &self,
        id: JobId,
        what: &str,
        so: impl Fn(&JobView) -> bool,
    ) -> JobView {
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            let job = self.job(id).await;
            if so(&job) {
                return job;
            }
            assert!(tokio::time::Instant::now() < end, "never came: {what}: {job:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) async fn until_state(&self, id: JobId, state: JobState) -> JobView {
        self.until(id, state.as_str(), |job| job.state == state).await
    }

    /// Lets time pass, a little at a time, until something is so.
    pub(crate) async fn pass_until<T, F: Future<Output = Option<T>>>(
        &self,
        what: &str,
        so: impl Fn() -> F,
    ) -> T {
        eventually(what, || async {
            self.hand.advance(200);
            tokio::task::yield_now().await;
            so().await
        })
        .await
    }

    /// Lets time pass until a job is so.
    pub(crate) async fn pass_until_job(
        &self,
        id: JobId,
        what: &str,
        so: impl Fn(&JobView) -> bool,
    ) -> JobView {
        self.pass_until(what, || async {
            let job = self.job(id).await;
            so(&job).then_some(job)
        })
        .await
    }

    pub(crate) async fn metric(&self, line: &str) -> Option<f64> {
        let (_, page) = self.request("GET", "/metrics", None).await;
        let found = page
            .lines()
            .find(|l| l.strip_prefix(line).is_some_and(|rest| rest.starts_with(' ')))?;
        found.rsplit(' ').next()?.parse().ok()
    }
}

pub(crate) fn config(name: &str, socket: PathBuf) -> Config {
    Config {
        name: name.parse().unwrap(),
        signing_key: "env:KEY".parse().unwrap(),
        catalog: CatalogConfig { url: "env:CATALOG".to_owned() },
        broker: BrokerConfig { url: "memory".to_owned() },
        listen: ListenConfig {
            socket: Some(socket),
            tcp: Some("127.0.0.1:0".parse().unwrap()),
            plaintext_beyond_loopback: false,
        },
        timing: TimingConfig {
            lease_ms: 2_000,
            patience_ms: 20_000,
            beacon_ms: 500,
            ticket_ms: 5_000,
            leader_ms: 3_000,
        },
        jobs: JobsConfig { attempts_max: 3, retry_first_ms: 1_000, ..JobsConfig::default() },
        objectives: ObjectivesConfig::default(),
    }
}

/// One HTTP request over any stream.
pub(crate) async fn http(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    method: &str,
    path: &str,
    body: Option<String>,
    headers: &[(&str, &str)],
) -> (StatusCode, String) {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "pgmuster");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let code = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (code, String::from_utf8(body.to_vec()).unwrap())
}

/// Waits, with a bound, until something is so.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    so: impl Fn() -> F,
) -> T {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(value) = so().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < end, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) fn orders() -> ClusterName {
    "orders".parse().unwrap()
}

pub(crate) fn backup_request() -> SubmitRequest {
    SubmitRequest::new(orders(), Task::Backup(Backup::default()))
}

/// A worker that does what the test says, and says what a real one would.
pub(crate) struct Worker {
    pub(crate) name: WorkerName,
    pub(crate) site: SiteName,
    pub(crate) boot: BootId,
    pub(crate) credentials: Credentials,
    pub(crate) broker: Broker,
    pub(crate) clusters: Vec<&'static str>,
    pub(crate) slots: Slots,
    pub(crate) running: Vec<RunningAttempt>,
    /// What its pulses say of archives.
    pub(crate) wal: Vec<WalStanding>,
    /// What they say of backups.
    pub(crate) holdings: Vec<Holdings>,
    /// What its offers say of the repository.
    pub(crate) repository_away: Option<RepositoryAway>,
    pub(crate) repository_look: Option<RepositoryLook>,
    /// Where its repository is.
    pub(crate) location: String,
    /// What they say of heartbeats.
    pub(crate) heartbeats: Vec<ClusterHeartbeat>,
    /// What its cluster shows.
    pub(crate) identifier: SystemIdentifier,
    pub(crate) every_ms: u32,
    seq: u64,
    own: [Consumer; 2],
    shared: [Consumer; 2],
    control: Consumer,
}

impl Worker {
    /// Enrolled, declared, and announced by its first pulse; it serves `orders`.
    pub(crate) async fn new(fleet: &Fleet, name: &str) -> Self {
        Self::serving(fleet, name, &["orders"]).await
    }

    /// The same for other clusters, or none.
    pub(crate) async fn serving(fleet: &Fleet, name: &str, clusters: &[&'static str]) -> Self {
        let mut worker = Self::undeclared(fleet, name, 1);
        worker.clusters = clusters.to_vec();
        let declaration = Declaration::worker(&worker.name, &worker.site);
        worker.broker.declare(&[declaration]).await.unwrap();
        worker.announce(fleet).await;
        worker
    }

    pub(crate) fn undeclared(fleet: &Fleet, name: &str, life: u8) -> Self {
        let name: WorkerName = name.parse().unwrap();
        let site: SiteName = "fra1".parse().unwrap();
        let key = || {
            let mut seed = [1; 32];
            seed[..name.as_str().len()].copy_from_slice(name.as_str().as_bytes());
            SigningKey::from_seed(&seed)
        };
        let certificate = fleet.handle().certify(&name, &site, key().public());
        let pinned = fleet.handle().public_key();
        let broker = fleet.broker.another(name.as_str());
        let own = Lane::ALL
            .map(|lane| broker.consume(&TicketQueue::Worker(name.clone(), lane).to_string(), 1));
        let shared = Lane::ALL
            .map(|lane| broker.consume(&TicketQueue::Site(site.clone(), lane).to_string(), 1));
        Self {
            credentials: Credentials::new(key(), certificate, pinned).unwrap(),
            boot: BootId::mint(1, [life; 10]),
            clusters: vec!["orders"],
            slots: Slots { urgent_free: 1, routine_free: 2 },
            running: Vec::new(),
            wal: Vec::new(),
            holdings: Vec::new(),
            repository_away: None,
            repository_look: None,
            location: "file:///backups".to_owned(),
            heartbeats: Vec::new(),
            identifier: SystemIdentifier(42),
            every_ms: 1_000,
            seq: 0,
            own,
            shared,
            control: broker.consume(&topology::control_queue(&name), 8),
            broker,
            name,
            site,
        }
    }

    /// The next life of the same worker.
    pub(crate) fn restart(&mut self) {
        let life = self.boot.as_bytes()[15] + 1;
        self.boot = BootId::mint(1, [life; 10]);
        self.seq = 0;
        self.running.clear();
    }

    pub(crate) fn offers(&self) -> Offers {
        Offers {
            version: "0".to_owned(),
            kinds: JobKind::ALL.to_vec(),
            clusters: self
                .clusters
                .iter()
                .map(|name| ClusterOffer {
                    name: name.parse().unwrap(),
                    labels: [("tier".to_owned(), "gold".to_owned())].into(),
                    repository: Some("main".to_owned()),
                    system_identifier: Some(self.identifier),
                    server_version_num: Some(150_018),
                    files: true,
                    remote: false,
                    problem: None,
                    archive: None,
                    repository_away: self.repository_away.clone(),
                    repository_look: self.repository_look.clone(),
                    heartbeat: None,
                    assertions: false,
                    reads_little: None,
                })
                .collect(),
            repositories: vec![RepositoryOffer {
                name: "main".to_owned(),
                location: self.location.clone(),
            }],
            restore_roots: vec!["/restore".to_owned()],
            postgres_majors: vec![15],
        }
    }

    async fn say(&self, exchange: &str, kind: &str, body: String) {
        let id = format!("{}-{kind}-{}", self.name, self.seq);
        let publish = Publish::new(exchange, exchange, kind, id, body);
        assert_eq!(self.broker.publish(publish).await.unwrap(), Published::Routed);
    }

    pub(crate) async fn pulse_with(&mut self, offers: Option<Offers>) {
        self.seq += 1;
        let pulse = Pulse {
            schema: SCHEMA,
            worker: self.name.clone(),
            site: self.site.clone(),
            boot: self.boot,
            seq: self.seq,
            at_ms: START,
            every_ms: self.every_ms,
            slots: self.slots,
            draining: false,
            running: self.running.clone(),
            offers,
            wal: self.wal.clone(),
            holdings: self.holdings.clone(),
            heartbeats: self.heartbeats.clone(),
        };
        let body = serde_json::to_string(&self.credentials.sign(&pulse)).unwrap();
        self.say(topology::PULSE, "pulse", body).await;
    }

    pub(crate) async fn pulse(&mut self) {
        self.pulse_with(None).await;
    }

    /// A pulse with offers, and the wait until the coordinator has it.
    pub(crate) async fn announce(&mut self, fleet: &Fleet) {
        self.pulse_with(Some(self.offers())).await;
        self.heard(fleet).await;
    }

    /// Waits until this boot is the one the coordinator knows, and alive.
    pub(crate) async fn heard(&self, fleet: &Fleet) {
        eventually("the worker is known", || async {
            let all: Vec<coordinator::api::types::WorkerView> = fleet.get("/v1/workers").await;
            all.iter()
                .any(|w| w.name == self.name && w.boot == Some(self.boot) && w.alive)
                .then_some(())
        })
        .await;
    }

    /// The next ticket for this worker alone.
    pub(crate) async fn ticket(&mut self) -> Ticket {
        let [urgent, routine] = &mut self.own;
        next_ticket(urgent, routine).await
    }

    /// The next ticket, whether it is for this worker or for anybody of its site.
    pub(crate) async fn any_ticket(&mut self) -> Ticket {
        let [urgent, routine] = &mut self.own;
        let [shared_urgent, shared_routine] = &mut self.shared;
        tokio::select! {
            ticket = next_ticket(urgent, routine) => ticket,
            ticket = next_ticket(shared_urgent, shared_routine) => ticket,
        }
    }

    /// The next ticket for anybody of its site.
    pub(crate) async fn site_ticket(&mut self) -> Ticket {
        let [urgent, routine] = &mut self.shared;
        next_ticket(urgent, routine).await
    }

    pub(crate) fn claim_of(&self, ticket: &Ticket, nonce: &str) -> ClaimMessage {
        ClaimMessage::Claim(Claim {
            schema: SCHEMA,
            job: ticket.job,
            attempt: ticket.attempt,
            worker: self.name.clone(),
            boot: self.boot,
            nonce: Nonce(nonce.to_owned()),
        })
    }

    pub(crate) async fn send_claim(&self, message: &ClaimMessage) {
        let body = serde_json::to_string(&self.credentials.sign(message)).unwrap();
        self.say(topology::CLAIMS, "claim", body).await;
    }

    pub(crate) async fn send_raw_claim(&self, body: String) {
        self.say(topology::CLAIMS, "claim", body).await;
    }

    pub(crate) async fn decline(&self, ticket: &Ticket, reason: DeclineReason) {
        let decline = ClaimMessage::Decline(Decline {
            schema: SCHEMA,
            job: ticket.job,
            attempt: ticket.attempt,
            worker: self.name.clone(),
            boot: self.boot,
            reason,
            detail: String::new(),
        });
        self.send_claim(&decline).await;
    }

    /// The next answer on the control queue, and the exact bytes of it.
    pub(crate) async fn answer(&mut self) -> (Control, String) {
        let answer = async {
            loop {
                let delivery = self.control.next().await.unwrap();
                let (kind, body) = (delivery.kind.clone(), delivery.body.clone());
                let _ = delivery.ack().await;
                if kind == "control" {
                    let text = String::from_utf8(body.to_vec()).unwrap();
                    let signed: Signed<Control> = serde_json::from_str(&text).unwrap();
                    return (signed.verify(self.credentials.coordinator()).unwrap(), text);
                }
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.expect("an answer comes")
    }

    /// The next beacon that satisfies a condition.
    pub(crate) async fn beacon(&mut self, so: impl Fn(&Beacon) -> bool) -> Beacon {
        let found = async {
            loop {
                let delivery = self.control.next().await.unwrap();
                let (kind, body) = (delivery.kind.clone(), delivery.body.clone());
                let _ = delivery.ack().await;
                if kind == "beacon" {
                    let signed: Signed<Beacon> = serde_json::from_slice(&body).unwrap();
                    let beacon = signed.verify(self.credentials.coordinator()).unwrap();
                    if so(&beacon) {
                        return beacon;
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("a beacon comes")
    }

    /// Claims a ticket and gets the grant.
    pub(crate) async fn take(&mut self, ticket: &Ticket) -> Work {
        self.send_claim(&self.claim_of(ticket, "n1")).await;
        match self.answer().await.0 {
            Control::Grant(grant) => self.begin(*grant),
            other => panic!("no grant: {other:?}"),
        }
    }

    pub(crate) async fn denied(&mut self, ticket: &Ticket, nonce: &str) -> DenialReason {
        self.send_claim(&self.claim_of(ticket, nonce)).await;
        match self.answer().await.0 {
            Control::Denial(denial) => {
                assert_eq!(denial.nonce.0, nonce);
                denial.reason
            }
            other => panic!("no denial: {other:?}"),
        }
    }

    fn begin(&mut self, grant: Grant) -> Work {
        let spec: Spec = serde_json::from_value(grant.spec.clone()).unwrap();
        self.running.push(RunningAttempt {
            attempt: grant.attempt,
            token: grant.token,
            progress: None,
        });
        Work { grant, spec, seq: 0 }
    }

    pub(crate) async fn report(&self, work: &mut Work, body: ReportBody) {
        work.seq += 1;
        self.report_as(work, work.seq, work.grant.token, body).await;
    }

    pub(crate) async fn report_as(&self, work: &Work, seq: u64, token: u64, body: ReportBody) {
        let report = Report {
            schema: SCHEMA,
            job: work.spec.job,
            attempt: work.grant.attempt,
            token,
            worker: self.name.clone(),
            boot: work.grant.boot,
            seq,
            at_ms: START,
            body,
        };
        let body = serde_json::to_string(&self.credentials.sign(&report)).unwrap();
        self.say(topology::REPORTS, "report", body).await;
    }

    /// Reports success of a backup.
    pub(crate) async fn succeed(&mut self, work: &mut Work) {
        let body = ReportBody::Succeeded {
            outcome: Box::new(backup_outcome(work.grant.attempt)),
            steps: vec![],
        };
        self.end(work, body).await;
    }

    pub(crate) async fn fail(&mut self, work: &mut Work, failure: Failure) {
        self.end(work, ReportBody::Failed { failure, outcome: None, steps: vec![] }).await;
    }

    pub(crate) async fn end(&mut self, work: &mut Work, body: ReportBody) {
        self.running.retain(|running| running.attempt != work.grant.attempt);
        self.report(work, body).await;
    }
}

async fn next_ticket(urgent: &mut Consumer, routine: &mut Consumer) -> Ticket {
    let delivery = tokio::time::timeout(PATIENCE, async {
        tokio::select! {
            delivery = urgent.next() => delivery,
            delivery = routine.next() => delivery,
        }
    });
    let delivery = delivery.await.expect("a ticket comes").unwrap();
    assert_eq!(delivery.kind, "ticket");
    assert!(
        delivery.headers.iter().any(|(name, value)| name == "traceparent" && value.len() == 55)
    );
    let ticket = serde_json::from_slice(&delivery.body).unwrap();
    let _ = delivery.ack().await;
    ticket
}

/// A grant in hand.
pub(crate) struct Work {
    pub(crate) grant: Grant,
    pub(crate) spec: Spec,
    pub(crate) seq: u64,
}

pub(crate) fn backup_outcome(attempt: AttemptId) -> Outcome {
    Outcome::Backup(BackupOutcome {
        backup: BackupId::from(attempt),
        lineage: LineageId::mint(1, [1; 10]),
        repository: "file:///backups".to_owned(),
        system_identifier: SystemIdentifier(42),
        server_version_num: 150_018,
        timeline: Timeline(1),
        start_lsn: Lsn(1),
        stop_lsn: Lsn(2),
        wal_to: None,
        started_at_ms: START,
        stopped_at_ms: START + 1,
        holds_to_ms: None,
        ended_at_ms: None,
        files: 10,
        size_bytes: 1_000,
        read_bytes: 1_000,
        stored_bytes: 100,
        taken_over_bytes: 0,
        reread_bytes: 0,
        reread_by_ms: None,
        wal_bytes: 16,
        bad_pages: 0,
        silent_changes: None,
        forbidden: None,
        compared_with: None,
        changed_files: None,
        logical: None,
    })
}

/// A proof that `w1` made of such a backup, in which nothing is shown yet.
pub(crate) fn proof_of(backup: BackupId, level: ProofLevel) -> Proof {
    let (lineage, worker) = (LineageId::mint(1, [1; 10]), "w1".parse().unwrap());
    Proof::of(backup, lineage, orders(), SystemIdentifier(42), worker, level)
}
