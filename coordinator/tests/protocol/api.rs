//! The API at its edge: who may call, what is refused and how it is told.

use std::os::unix::fs::PermissionsExt;

use coordinator::api::types::{
    ClusterView, EnrolRequest, EnrolResponse, EnrolmentTokenRequest, JobList, JobView, Role,
    TokenRequest, TokenResponse,
};
use policy::state::ClusterState;
use proto::backup::SilentChanges;
use proto::envelope::{Credentials, SigningKey};
use proto::failure::Code;
use proto::job::Outcome;
use proto::message::ReportBody;
use proto::{Failure, JobState};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Fleet, START, Worker, backup_outcome, backup_request, http};

async fn tcp(
    fleet: &Fleet,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: Option<String>,
) -> (u16, String) {
    let stream = tokio::net::TcpStream::connect(fleet.handle().tcp().unwrap()).await.unwrap();
    let bearer = token.map(|token| format!("Bearer {token}"));
    let headers: Vec<(&str, &str)> =
        bearer.iter().map(|value| ("authorization", value.as_str())).collect();
    let (code, body) = http(stream, method, path, body, &headers).await;
    (code.as_u16(), body)
}

fn code(body: &str) -> Code {
    serde_json::from_str::<Failure>(body).unwrap().code
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_the_owners_alone() {
    let fleet = Fleet::new().await;
    let mode = std::fs::metadata(fleet.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = coordinator::Options {
        config: fleet.config.clone(),
        catalog_url: fleet.catalog_url.as_str().into(),
        signing_key: SigningKey::from_seed(&crate::support::SEED),
    };
    let refused =
        coordinator::Coordinator::start(second, fleet.broker.another("x"), fleet.clock.clone())
            .await;
    let error = proto::failure::chain(&refused.unwrap_err());
    assert!(error.contains("another process answers there"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tcp_a_token_decides_what_is_allowed() {
    let fleet = Fleet::new().await;
    let _w1 = Worker::new(&fleet, "w1").await;
    let token = async |name: &str, role| {
        let request = TokenRequest { name: name.to_owned(), role, valid_ms: Some(60_000) };
        fleet.post::<TokenResponse>("/v1/tokens", &request).await.token
    };
    let viewer = token("ann", Role::Viewer).await;
    let operator = token("bob", Role::Operator).await;
    let order = || Some(serde_json::to_string(&backup_request()).unwrap());

    let (status, body) = tcp(&fleet, None, "GET", "/v1/status", None).await;
    assert_eq!((status, code(&body)), (401, Code::Unauthorized));
    for wrong in ["", "nonsense", &viewer[..viewer.len() - 1]] {
        let (status, body) = tcp(&fleet, Some(wrong), "GET", "/v1/status", None).await;
        assert_eq!((status, code(&body)), (401, Code::Unauthorized), "{wrong:?}");
    }
    for path in ["/metrics", "/v1/jobs", "/v1/tokens", "/v1/workers", "/v1/events"] {
        assert_eq!(tcp(&fleet, None, "GET", path, None).await.0, 401, "{path}");
    }
    assert_eq!(tcp(&fleet, None, "GET", "/healthz", None).await.0, 200);
    assert_eq!(tcp(&fleet, Some(&viewer), "GET", "/v1/status", None).await.0, 200);
    let (status, body) = tcp(&fleet, Some(&viewer), "POST", "/v1/jobs", order()).await;
    assert_eq!((status, code(&body)), (403, Code::NotAllowed));
    let (status, body) = tcp(&fleet, Some(&operator), "POST", "/v1/jobs", order()).await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(serde_json::from_str::<JobView>(&body).unwrap().requested_by, "bob");
    let more = serde_json::to_string(&TokenRequest {
        name: "eve".to_owned(),
        role: Role::Admin,
        valid_ms: None,
    });
    assert_eq!(
        tcp(&fleet, Some(&operator), "POST", "/v1/tokens", Some(more.unwrap())).await.0,
        403
    );

    assert_eq!(fleet.request("DELETE", "/v1/tokens/bob", None).await.0.as_u16(), 204);
    assert_eq!(tcp(&fleet, Some(&operator), "GET", "/v1/status", None).await.0, 401, "removed");
    fleet.hand.advance(60_000);
    assert_eq!(tcp(&fleet, Some(&viewer), "GET", "/v1/status", None).await.0, 401, "expired");
    let (_, listed) = fleet.request("GET", "/v1/tokens", None).await;
    assert!(listed.contains("ann") && !listed.contains(&viewer) && !listed.contains("digest"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_enrolled_once_by_its_token() {
    let fleet = Fleet::new().await;
    let request = EnrolmentTokenRequest {
        worker: "w7".parse().unwrap(),
        site: "fra1".parse().unwrap(),
        valid_ms: Some(10_000),
    };
    let made: TokenResponse = fleet.post("/v1/workers/tokens", &request).await;
    assert!(made.token.starts_with("pgmuster_enrol_"));
    let key = |seed| SigningKey::from_seed(&[seed; 32]);
    let ask = |seed, token: &str| {
        let request = EnrolRequest {
            token: token.to_owned(),
            public_key: key(seed).public(),
            worker: None,
            site: None,
        };
        Some(serde_json::to_string(&request).unwrap())
    };
    // A token is not used up by a worker that takes itself for another one.
    let mistaken = EnrolRequest {
        token: made.token.clone(),
        public_key: key(9).public(),
        worker: Some("w8".parse().unwrap()),
        site: None,
    };
    let body = Some(serde_json::to_string(&mistaken).unwrap());
    let (status, body) = tcp(&fleet, None, "POST", "/v1/workers/enrol", body).await;
    assert!(status == 401 && body.contains("worker w7 of site fra1"), "{body}");
    let (status, body) = tcp(&fleet, None, "POST", "/v1/workers/enrol", ask(1, &made.token)).await;
    assert_eq!(status, 201, "{body}");
    let answer: EnrolResponse = serde_json::from_str(&body).unwrap();
    let first_at_ms = answer.certificate.verify(&answer.coordinator_key).unwrap().issued_at_ms;
    let credentials = Credentials::new(key(1), answer.certificate, answer.coordinator_key).unwrap();
    assert_eq!(credentials.identity().worker.as_str(), "w7");
    assert_eq!(answer.coordinator_key, fleet.handle().public_key());
    let (status, body) = tcp(&fleet, None, "POST", "/v1/workers/enrol", ask(1, &made.token)).await;
    assert_eq!(status, 201, "the answer may have got lost");
    let again: EnrolResponse = serde_json::from_str(&body).unwrap();
    let again_at_ms = again.certificate.verify(&again.coordinator_key).unwrap().issued_at_ms;
    assert!(again_at_ms > first_at_ms, "the later one replaces the one before, in one moment too");
    let by_hand = fleet.handle().certify(&request.worker, &request.site, key(1).public());
    let by_hand = by_hand.verify(&fleet.handle().public_key()).unwrap();
    assert!(by_hand.issued_at_ms > again_at_ms);
    let (status, body) = tcp(&fleet, None, "POST", "/v1/workers/enrol", ask(2, &made.token)).await;
    assert_eq!((status, code(&body)), (401, Code::Unauthorized), "another key");
    let told: Failure = serde_json::from_str(&body).unwrap();
    let when = jiff::Timestamp::from_millisecond(START / 1_000 * 1_000).unwrap();
    let said = format!("was used at {when} by worker {}", request.worker);
    assert!(told.message.contains(&said), "{told}");
    let cure = format!("pgmuster worker token {} {}", request.worker, request.site);
    assert!(told.hint.contains(&cure), "{}", told.hint);
    let (status, _) =
        tcp(&fleet, None, "POST", "/v1/workers/enrol", ask(1, "pgmuster_enrol_x")).await;
    assert_eq!(status, 401);
    fleet.hand.advance(10_000);
    let (status, _) = tcp(&fleet, None, "POST", "/v1/workers/enrol", ask(1, &made.token)).await;
    assert_eq!(status, 401, "expired");
    assert_eq!(fleet.events("worker_enrolled").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_is_told_as_a_failure() {
    let fleet = Fleet::new().await;
    let _w1 = Worker::new(&fleet, "w1").await;
    let order = |text: &str| Some(text.to_owned());
    let table = [
        ("GET", "/nowhere", None, 400, Code::RequestInvalid),
        ("PUT", "/v1/jobs", None, 400, Code::RequestInvalid),
        ("GET", "/v1/jobs/not-an-id", None, 400, Code::RequestInvalid),
        ("GET", "/v1/jobs?limit=0", None, 400, Code::RequestInvalid),
        ("GET", "/v1/jobs?colour=red", None, 400, Code::RequestInvalid),
        ("GET", "/v1/jobs/01990000-0000-7000-8000-000000000000", None, 404, Code::JobUnknown),
        ("GET", "/v1/clusters/nobody", None, 404, Code::ClusterUnknown),
        ("GET", "/v1/clusters/No%20Name", None, 400, Code::RequestInvalid),
        ("POST", "/v1/jobs", order("{"), 400, Code::RequestInvalid),
        (
            "POST",
            "/v1/jobs",
            order(r#"{"cluster":"orders","task":{"backup":{"sql":"x"}}}"#),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(r#"{"cluster":"nobody","task":{"backup":{}}}"#),
            404,
            Code::ClusterUnknown,
        ),
        (
            "POST",
            "/v1/jobs",
            order(r#"{"cluster":"orders","task":{"backup":{}},"worker":"w9"}"#),
            404,
            Code::WorkerUnknown,
        ),
        (
            "POST",
            "/v1/jobs",
            order(r#"{"cluster":"orders","task":{"backup":{"compression_level":99}}}"#),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(
                r#"{"cluster":"orders","task":{"verify_restore":{"level":"L5","backup":"01990000-0000-7000-8000-000000000000"}}}"#,
            ),
            404,
            Code::BackupUnknown,
        ),
        (
            "POST",
            "/v1/jobs",
            order(
                r#"{"cluster":"orders","task":{"probe":{"attempt":"01990000-0000-7000-8000-000000000000"}}}"#,
            ),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(r#"{"cluster":"orders","task":{"analyze":{"lock_timeout_ms":1}},"verify":"L5"}"#),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(
                r#"{"cluster":"orders","task":{"restore":{"target":{"root":"/r","directory":"d"},"keep_archiving":true}}}"#,
            ),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(
                r#"{"cluster":"orders","task":{"restore":{"target":{"root":"/r","directory":"d"},"tablespaces":{"7":{"root":"/r","directory":"d/7"}}}}}"#,
            ),
            400,
            Code::RequestInvalid,
        ),
        (
            "POST",
            "/v1/jobs",
            order(
                r#"{"cluster":"orders","task":{"restore":{"target":{"root":"/r","directory":"d"},"tablespaces":{"7":{"root":"/r","directory":"../7"}}}}}"#,
            ),
            400,
            Code::RequestInvalid,
        ),
    ];
    for (method, path, body, status, code) in table {
        let (seen, failure) = fleet.refused(method, path, body.clone()).await;
        assert_eq!((seen, failure.code), (status, code), "{method} {path} {body:?}: {failure}");
        assert!(!failure.message.is_empty());
    }
    let jobs: JobList = fleet.get("/v1/jobs").await;
    assert!(jobs.jobs.is_empty(), "nothing was written");
    // It is answered before it was read to its end, so whoever sends it may find the way closed.
    let stream = tokio::net::UnixStream::connect(fleet.socket()).await.unwrap();
    let (mut answers, mut requests) = stream.into_split();
    let size = 2 << 20;
    let head =
        format!("POST /v1/jobs HTTP/1.1\r\nhost: pgmuster\r\ncontent-length: {size}\r\n\r\n");
    let sending = tokio::spawn(async move {
        let large = head + &"x".repeat(size);
        requests.write_all(large.as_bytes()).await
    });
    let mut answer = Vec::new();
    while answer.len() < b"HTTP/1.1 413 ".len() {
        assert!(answers.read_buf(&mut answer).await.unwrap() > 0, "it ends without an answer");
    }
    assert!(answer.starts_with(b"HTTP/1.1 413 "), "{}", answer.escape_ascii());
    drop(answers);
    let _ = sending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_is_the_same_job() {
    let fleet = Fleet::new().await;
    let _w1 = Worker::new(&fleet, "w1").await;
    let post = async |request: &_, key: &str| {
        let stream = tokio::net::UnixStream::connect(fleet.socket()).await.unwrap();
        let body = serde_json::to_string(request).unwrap();
        http(stream, "POST", "/v1/jobs", Some(body), &[("idempotency-key", key)]).await
    };
    let (first, body) = post(&backup_request(), "k1").await;
    let (second, again) = post(&backup_request(), "k1").await;
    assert_eq!((first.as_u16(), second.as_u16()), (201, 200));
    let id = |body: &str| serde_json::from_str::<JobView>(body).unwrap().id;
    assert_eq!(id(&body), id(&again));
    let mut other = backup_request();
    other.attempts_max = Some(1);
    let (status, body) = post(&other, "k1").await;
    assert_eq!((status.as_u16(), code(&body)), (409, Code::StateConflict));
    let jobs: JobList = fleet.get("/v1/jobs?cluster=orders&kind=backup").await;
    assert_eq!(jobs.jobs.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_with_the_change_it_waits_for() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let now = fleet.until(job.id, "ticketed", |job| job.attempt.is_some()).await;
    let path = format!("/v1/jobs/{}?after_version={}&wait_s=20", job.id, now.version);
    let (waited, _work) = tokio::join!(fleet.get::<JobView>(&path), w1.take(&ticket));
    assert_eq!(waited.state, JobState::Running);
    let began = tokio::time::Instant::now();
    let path = format!("/v1/jobs/{}?after_version={}&wait_s=1", job.id, waited.version + 10);
    let same: JobView = fleet.get(&path).await;
    assert_eq!(same.state, JobState::Running);
    assert!(began.elapsed() < std::time::Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_found_what_no_time_had_told_puts_its_cluster_at_risk() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let metric = r#"pgmuster_backup_last_silent_changes{cluster="orders"}"#;
    for (units, state) in [(3, ClusterState::AtRisk), (0, ClusterState::Taken)] {
        let job = fleet.backup().await;
        let ticket = w1.ticket().await;
        let mut work = w1.take(&ticket).await;
        let mut outcome = backup_outcome(work.grant.attempt);
        if let Outcome::Backup(done) = &mut outcome {
            let files = vec!["base/5/16384".to_owned()];
            done.silent_changes = (units > 0).then_some(SilentChanges { units, files });
            done.stopped_at_ms += 1 - i64::try_from(units).unwrap();
        }
        let body = ReportBody::Succeeded { outcome: Box::new(outcome), steps: vec![] };
        w1.end(&mut work, body).await;
        fleet.until_state(job.id, JobState::Succeeded).await;
        let view: ClusterView = fleet.get("/v1/clusters/orders").await;
        assert_eq!(view.state, state, "{}", view.reason);
        assert_eq!(view.reason.contains("SILENT_CHANGE"), units > 0, "{}", view.reason);
        assert_eq!(fleet.metric(metric).await, Some(if units > 0 { 3.0 } else { 0.0 }));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_name_what_is_there() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    for (line, value) in [
        (r#"pgmuster_jobs_total{kind="backup",result="succeeded"}"#, 1.0),
        (r#"pgmuster_cluster_state{cluster="orders",state="TAKEN"}"#, 1.0),
        (r#"pgmuster_cluster_state{cluster="orders",state="PROVED"}"#, 0.0),
        (r#"pgmuster_cluster_eligible_workers{cluster="orders"}"#, 1.0),
        (r#"pgmuster_workers{state="alive"}"#, 1.0),
        (r#"pgmuster_backup_last_size_bytes{cluster="orders"}"#, 1000.0),
        ("pgmuster_leader", 1.0),
        ("pgmuster_broker_up", 1.0),
    ] {
        assert_eq!(fleet.metric(line).await, Some(value), "{line}");
    }
}
