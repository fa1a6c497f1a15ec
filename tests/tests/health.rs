//! Whether a coordinator can do its work, as a load balancer or a supervisor asks it, and who is let in to ask.

use std::io::{ErrorKind, Read as _};
use std::net::TcpListener;

use anyhow::{Context as _, ensure};
use postgres::instance::StopMode;
use serde_json::Value;
use tests::{Cluster, Fleet, Pgmuster, Place, Proxy, SOON, Vhost, eventually};

fn health(fleet: &Fleet) -> anyhow::Result<(u16, Value)> {
    let (status, body) = fleet.http("GET", "/healthz", &[], "")?;
    Ok((status, serde_json::from_str(&body)?))
}

/// Waits until the coordinator says this of its catalog and its broker.
fn becomes(fleet: &Fleet, catalog: bool, broker: bool) -> anyhow::Result<()> {
    eventually(format!("catalog {catalog}, broker {broker}"), SOON, || {
        let (status, body) = health(fleet)?;
        ensure!(body["catalog"] == catalog && body["broker"] == broker, "{status}: {body}");
        let expected = if catalog && broker { 200 } else { 503 };
        ensure!(status == expected, "{status}: {body}");
        Ok(Some(()))
    })
    .with_context(|| fleet.said())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_without_its_catalog_or_its_broker_says_503() -> anyhow::Result<()> {
    let (vhost, mut catalog) = (Vhost::create()?, Cluster::start_with_tcp(15).await?);
    catalog.run("CREATE DATABASE catalog").await?;
    let amqp: u16 = vhost.url().rsplit([':', '/']).nth(1).context("a port")?.parse()?;
    let proxy = Proxy::to(amqp)?;
    let url = catalog.tcp_url("catalog")?;
    let mut fleet = Fleet::prepare(&vhost.url_through(proxy.port()), &url, Place::Directory)?;
    fleet.start_coordinator()?;
    becomes(&fleet, true, true)?;

    proxy.cut();
    becomes(&fleet, true, false)?;
    let doctor = fleet.run(&["doctor"])?;
    ensure!(doctor.code() == 3, "{doctor}");
    ensure!(doctor.stdout.contains("no job is given out"), "{doctor}");
    proxy.heal();
    becomes(&fleet, true, true)?;

    catalog.server.stop(StopMode::Fast).await?;
    becomes(&fleet, false, true)?;
    // Whoever asks how it is does not wait as long as one who wants something of the catalog: the first is answered in two
    // seconds while the other, who came before and is answered in five, still waits.
    let mut patient = fleet.ask("GET", "/v1/status", &[], "")?;
    let (status, body) = health(&fleet)?;
    ensure!(status == 503, "{status}: {body}");
    patient.set_nonblocking(true)?;
    let answered = patient.read(&mut [0; 1]);
    ensure!(answered.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    drop(patient);
    let doctor = fleet.run(&["doctor"])?;
    ensure!(doctor.code() == 3, "{doctor}");
    ensure!(doctor.stdout.contains("nothing can be ordered"), "{doctor}");
    let refused = fleet.run(&["status"])?;
    ensure!(refused.code() == 8, "{refused}");
    ensure!(refused.stderr.contains("CATALOG_UNAVAILABLE"), "{refused}");
    catalog.server.start().await?;
    becomes(&fleet, true, true)?;
    // And it leads again, by itself.
    eventually("the coordinator to lead", SOON, || {
        Ok((health(&fleet)?.1["leader"] == true).then_some(()))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_elsewhere_is_let_in_by_a_token_that_a_command_made_until_one_removes_it()
-> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    fleet.tcp_port = Some(port);
    fleet.start_coordinator()?;
    let made = fleet.run(&["token", "new", "alice@desk", "--role", "viewer", "--days", "1"])?;
    let token = made.stdout.trim();
    ensure!(made.code() == 0 && token.starts_with("pgmuster_api_"), "{made}");
    ensure!(!made.stderr.contains(token) && made.stderr.contains("good until"), "{made}");
    let listed = fleet.expect(&["token", "list"])?;
    ensure!(listed.contains("alice@desk  viewer"), "{listed}");
    ensure!(!listed.contains(token), "{listed}");
    let again = fleet.run(&["token", "new", "alice@desk", "--role", "admin"])?;
    ensure!(again.stderr.contains("pgmuster token remove"), "{again}");

    let file = fleet.path("alice.token");
    std::fs::write(&file, token)?;
    let url = format!("http://127.0.0.1:{port}");
    let from_afar = |arguments: &[&str]| {
        let file = file.to_str().context("a path")?;
        let own = ["--coordinator", &url, "--token-file", file];
        Pgmuster::start(&[&own[..], arguments].concat())?.wait(SOON)
    };
    let status = from_afar(&["status"])?;
    ensure!(status.code() == 0, "{status}");
    let more = from_afar(&["token", "new", "eve", "--role", "admin"])?;
    ensure!(more.code() == 5 && more.stderr.contains("NOT_ALLOWED"), "{more}");
    fleet.expect(&["token", "remove", "alice@desk"])?;
    let refused = from_afar(&["status"])?;
    ensure!(refused.code() == 4 && refused.stderr.contains("UNAUTHORIZED"), "{refused}");
    ensure!(refused.stderr.contains("pgmuster token new"), "{refused}");
    Ok(())
}
