//! The service on a store that can be watched, kept waiting and made to fail.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use proto::{Code, Failure, LineageId, WalFileName};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{PutOutcome, Store, StoreError};
use repository::{Encryption, InitOptions, KeyFile, Repository, WalStored};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};

use super::words::{self, Answer, Question};
use super::{Archives, Asking, Heard, OpenArchive, Service, another_repository};
use crate::archive::tests::segment;
use crate::archive::{Got, Whose};

const SOON: Duration = Duration::from_secs(20);

/// A store that notes which files of the archive are stored and fetched, in which order, and can keep them waiting.
#[derive(Debug)]
struct Watched {
    inner: DirectoryStore,
    stored: Mutex<Vec<String>>,
    fetched: Mutex<Vec<String>>,
    fails: Mutex<Option<String>>,
    /// The one file that is kept waiting, if not all are.
    held: Mutex<Option<String>>,
    open: watch::Sender<bool>,
}

fn file_of(key: &str) -> Option<String> {
    key.contains("/wal/").then(|| key.rsplit('/').next().unwrap().to_owned())
}

#[async_trait]
impl Layer for Watched {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        if let Some(file) = file_of(key) {
            let held = self.held.lock().unwrap().clone();
            if held.is_none_or(|held| held == file) {
                self.open.subscribe().wait_for(|open| *open).await.unwrap();
            }
            if self.fails.lock().unwrap().as_ref() == Some(&file) {
                let source = std::io::Error::from(std::io::ErrorKind::PermissionDenied).into();
                return Err(StoreError::Forbidden {
                    operation: "create",
                    key: key.to_owned(),
                    source,
                });
            }
            self.stored.lock().unwrap().push(file);
        }
        self.inner.put_if_absent(key, bytes).await
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        if let Some(file) = file_of(key) {
            self.open.subscribe().wait_for(|open| *open).await.unwrap();
            self.fetched.lock().unwrap().push(file);
        }
        self.inner.get(key, limit_bytes).await
    }
}

#[derive(Debug)]
struct Opens(Arc<Watched>, KeyFile);

#[async_trait]
impl OpenArchive for Opens {
    async fn open(&self, _: Whose, named: Option<String>) -> Result<Repository, Failure> {
        if let Some(named) = named.filter(|named| named != "ours") {
            return Err(another_repository(&named));
        }
        Ok(Repository::open(Arc::clone(&self.0) as _, Some(&self.1)).await?)
    }

    fn has_written_down(&self, cluster: &proto::ClusterName) -> bool {
        cluster.as_str() == "written-down"
    }
}

/// A service, and the `pg_wal` of what it takes for a server.
struct Scene {
    place: tempfile::TempDir,
    store: Arc<Watched>,
    opens: Arc<Opens>,
    archives: Arc<Archives>,
    service: Service,
}

fn name(number: u64) -> String {
    format!("0000000100000000{number:08X}")
}

impl Scene {
    async fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(place.path().join("data/pg_wal/archive_status")).unwrap();
        let store = Arc::new(Watched {
            inner: DirectoryStore::new(place.path().join("repository")),
            stored: Mutex::default(),
            fetched: Mutex::default(),
            fails: Mutex::default(),
            held: Mutex::default(),
            open: watch::Sender::new(true),
        });
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: 1 };
        let made = Repository::init(Arc::clone(&store) as _, options).await.unwrap();
        let opens = Arc::new(Opens(Arc::clone(&store), made.key_file.unwrap().parse().unwrap()));
        let socket = place.path().join("wal.sock");
        let archives = Arc::new(Archives::of(Arc::clone(&opens) as _));
        let service = Service::with(&socket, Arc::clone(&archives)).await.unwrap();
        Self { place, store, opens, archives, service }
    }

    /// The same with segments up to this one in the archive, of which none was fetched.
    async fn archived(last: u64) -> Self {
        let scene = Self::new().await;
        for number in 1..=last {
            scene.fill(number);
            scene.push(number).await.unwrap();
        }
        scene.store.fetched.lock().unwrap().clear();
        scene
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("wal.sock")
    }

    fn path(&self, file: &str) -> PathBuf {
        self.place.path().join("data/pg_wal").join(file)
    }

    /// Writes a segment and marks it as a server does.
    fn fill(&self, number: u64) {
        self.fill_as(&name(number), &segment(1, number << 20, 7));
    }

    fn fill_as(&self, file: &str, content: &[u8]) {
        std::fs::write(self.path(file), content).unwrap();
        std::fs::write(self.path(&format!("archive_status/{file}.ready")), "").unwrap();
    }

    async fn push(&self, number: u64) -> Result<WalStored, Code> {
        self.push_as(&name(number)).await
    }

    async fn push_as(&self, file: &str) -> Result<WalStored, Code> {
        let (socket, path) = (self.socket(), self.path(file));
        let heard = beside(move || asking(&socket, &whose(), None).to_store(&path)).await;
        answer(heard).map(|(_, stored)| stored).map_err(|failure| failure.code)
    }

    /// Where the archive has a file.
    fn object(&self, file: &str) -> PathBuf {
        let lineages = std::fs::read_dir(self.place.path().join("repository/lineages"));
        let lineage = lineages.unwrap().next().unwrap().unwrap().path();
        lineage.join("wal").join(&file[..8]).join(file)
    }

    /// What lies in `pg_wal` beside segments and their marks.
    fn others(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path("")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with("0000") && name != "archive_status").collect()
    }

    /// The same, beside what else is asked.
    fn begin(&self, number: u64) -> JoinHandle<Result<(LineageId, WalStored), Failure>> {
        let (socket, path) = (self.socket(), self.path(&name(number)));
        spawn_blocking(move || answer(asking(&socket, &whose(), None).to_store(&path)))
    }

    async fn get(&self, number: u64) -> Result<Got, Code> {
        let file: WalFileName = name(number).parse().unwrap();
        let to = self.path("RECOVERYXLOG");
        let socket = self.socket();
        let ask = move || asking(&socket, &whose(), None).for_file(&file, &to, None);
        let heard = beside(ask).await;
        answer(heard).map_err(|failure| failure.code)
    }

    fn stored(&self) -> Vec<String> {
        self.store.stored.lock().unwrap().clone()
    }

    fn fetched(&self, number: u64) -> usize {
        let fetched = self.store.fetched.lock().unwrap();
        fetched.iter().filter(|file| **file == name(number)).count()
    }
}

fn asking<'a>(socket: &'a Path, whose: &'a Whose, repository: Option<&'a str>) -> Asking<'a> {
    Asking { socket, whose, repository, within: SOON }
}

/// Asks beside the service: whoever asks waits and does nothing else.
async fn beside<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(ask).await.unwrap()
}

fn answer<T: std::fmt::Debug>(heard: Heard<T>) -> Result<T, Failure> {
    match heard {
        Heard::Answer(answer) => answer,
        Heard::Nobody(why) => why.map_or_else(|| panic!("nobody answers"), Err),
    }
}

fn whose() -> Whose {
    Whose::New("orders".parse().unwrap())
}

fn names(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    numbers.into_iter().map(name).collect()
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let looking = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, looking).await.unwrap_or_else(|_| panic!("not so: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_marked_is_stored_before_it_is_asked_for_and_in_order() {
    let scene = Scene::new().await;
    (1..=8).for_each(|number| scene.fill(number));
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    eventually("all are stored", || scene.stored().len() == 8).await;
    assert_eq!(scene.stored(), names(1..=8));
    for number in 2..=8 {
        assert_eq!(scene.push(number).await, Ok(WalStored::Created));
    }
    // Nothing was stored twice, and what is new by now is seen.
    assert_eq!(scene.stored(), names(1..=8));
    scene.fill(9);
    scene.fill(10);
    assert_eq!(scene.push(9).await, Ok(WalStored::Created));
    eventually("the tenth is stored", || scene.stored().len() == 10).await;
    // What a server asks for twice, because it did not hear the answer, is there.
    assert_eq!(scene.push(9).await, Ok(WalStored::AlreadyThere));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_ends_what_it_has_begun_and_begins_no_more() {
    let scene = Scene::new().await;
    (1..=8).for_each(|number| scene.fill(number));
    *scene.store.held.lock().unwrap() = Some(name(3));
    scene.store.open.send_replace(false);
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    eventually("the third is on its way", || scene.store.open.receiver_count() > 0).await;
    let Scene { place, store, archives, service, .. } = scene;
    let stopping = tokio::spawn(service.stop());
    eventually("nothing more is begun", || archives.tasks.are_closing()).await;
    assert!(!stopping.is_finished() && archives.tasks.running() > 0);
    store.open.send_replace(true);
    tokio::time::timeout(SOON, stopping).await.unwrap().unwrap();
    assert_eq!(*store.stored.lock().unwrap(), names(1..=3));
    assert_eq!(archives.tasks.running(), 0);
    drop(place);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_cluster_that_is_written_down_or_said_to_be_new_begins_a_lineage() {
    let scene = Scene::new().await;
    (1..=2).for_each(|number| scene.fill(number));
    let push = async |whose: Whose| {
        let (socket, path) = (scene.socket(), scene.path(&name(1)));
        let heard = beside(move || asking(&socket, &whose, None).to_store(&path)).await;
        answer(heard).map(|(_, stored)| stored)
    };
    let cluster = |name: &str| Whose::Cluster(name.parse().unwrap());
    let refused = push(cluster("orders")).await.unwrap_err();
    assert_eq!(refused.code, Code::ClusterUnknown, "{refused}");
    assert!(!scene.place.path().join("repository/lineages").exists(), "nothing was begun");
    assert_eq!(push(cluster("written-down")).await.unwrap(), WalStored::Created);
    let near = push(cluster("written-dwon")).await.unwrap_err();
    assert!(near.message.ends_with("; did you mean written-down?"), "{near}");
    assert_eq!(push(whose()).await.unwrap(), WalStored::Created);
    assert_eq!(push(cluster("orders")).await.unwrap(), WalStored::AlreadyThere);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_stored_behind_a_segment_that_failed() {
    let scene = Scene::new().await;
    (1..=8).for_each(|number| scene.fill(number));
    *scene.store.fails.lock().unwrap() = Some(name(3));
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    assert_eq!(scene.push(2).await, Ok(WalStored::Created));
    assert_eq!(scene.push(3).await, Err(Code::StoreForbidden));
    assert_eq!(scene.push(3).await, Err(Code::StoreForbidden));
    // Nothing is done in vain behind it.
    assert_eq!(scene.archives.ahead.begun(), 0);
    assert_eq!(scene.stored(), names(1..=2));
    *scene.store.fails.lock().unwrap() = None;
    for number in 3..=8 {
        assert_eq!(scene.push(number).await, Ok(WalStored::Created));
    }
    assert_eq!(scene.stored(), names(1..=8));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_file_that_was_read_is_acknowledged() {
    let scene = Scene::new().await;
    (1..=3).for_each(|number| scene.fill(number));
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    eventually("all are stored", || scene.stored().len() == 3).await;
    let mut other = segment(1, 2 << 20, 7);
    other[1000] = 1;
    std::fs::write(scene.path(&name(2)), other).unwrap();
    assert_eq!(scene.push(2).await, Err(Code::WalConflict));
    // The same content in another file is the same.
    std::fs::remove_file(scene.path(&name(3))).unwrap();
    scene.fill(3);
    assert_eq!(scene.push(3).await, Ok(WalStored::AlreadyThere));
    // And one that has gone is not there.
    (4..=5).for_each(|number| scene.fill(number));
    assert_eq!(scene.push(4).await, Ok(WalStored::Created));
    std::fs::remove_file(scene.path(&name(5))).unwrap();
    assert_eq!(scene.push(5).await, Err(Code::SourceUnreadable));
}

/// A segment of 16 MiB.
fn large(number: u64) -> Vec<u8> {
    let mut bytes = segment(1, number << 24, 7);
    bytes.resize(16 << 20, 0);
    bytes[32..36].copy_from_slice(&(16_u32 << 20).to_ne_bytes());
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_held_than_there_is_room_for() {
    let scene = Scene::new().await;
    (1..=8).for_each(|number| scene.fill_as(&name(number), &large(number)));
    scene.store.open.send_replace(false);
    let first = scene.begin(1);
    // 96 MiB are three segments, each twice, and the one that is asked for.
    eventually("three are begun", || scene.archives.ahead.begun() == 4).await;
    let second = scene.begin(2);
    scene.store.open.send_replace(true);
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    for number in 3..=8 {
        assert_eq!(scene.push(number).await, Ok(WalStored::Created), "{number}");
    }
    assert_eq!(scene.stored(), names(1..=8));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_stored_ahead_over_a_break_or_onto_another_timeline() {
    let scene = Scene::new().await;
    scene.fill(1);
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    // A promotion: what the old timeline has left comes after the history, and before the new one.
    let second = |number: u64| format!("0000000200000000{number:08X}");
    (2..=3).for_each(|number| scene.fill(number));
    scene.fill_as("00000002.history", b"1\t0/400000\tx\n");
    (4..=5).for_each(|number| scene.fill_as(&second(number), &segment(2, number << 20, 7)));
    assert_eq!(scene.push_as("00000002.history").await, Ok(WalStored::Created));
    assert_eq!((scene.stored().len(), scene.archives.ahead.begun()), (2, 0));
    assert_eq!(scene.push(2).await, Ok(WalStored::Created));
    eventually("the third is ahead", || scene.stored().len() == 4).await;
    assert_eq!(scene.push(3).await, Ok(WalStored::Created));
    assert_eq!((scene.stored().len(), scene.archives.ahead.begun()), (4, 0));
    assert_eq!(scene.push_as(&second(4)).await, Ok(WalStored::Created));
    eventually("the fifth is ahead", || scene.stored().len() == 6).await;
    // The seventh is not marked: the server still writes it.
    (6..=9).for_each(|number| scene.fill_as(&second(number), &segment(2, number << 20, 7)));
    std::fs::remove_file(scene.path(&format!("archive_status/{}.ready", second(7)))).unwrap();
    assert_eq!(scene.push_as(&second(5)).await, Ok(WalStored::Created));
    eventually("the sixth is ahead", || scene.stored().len() == 7).await;
    assert_eq!(scene.archives.ahead.begun(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_finds_the_next_segments_fetched_and_the_end_of_the_log_as_it_is() {
    let scene = Scene::archived(6).await;
    for number in 1..=6 {
        assert_eq!(scene.get(number).await, Ok(Got::Written));
        let content = std::fs::read(scene.path("RECOVERYXLOG")).unwrap();
        assert!(content == segment(1, number << 20, 7), "{number}");
        if number < 6 {
            let what = format!("{} is fetched ahead", number + 1);
            eventually(&what, || scene.fetched(number + 1) > 0).await;
        }
        assert_eq!(scene.others(), ["RECOVERYXLOG"], "what lies ready has no name");
    }
    assert!((1..=6).all(|number| scene.fetched(number) == 1));
    // That there is none is not remembered.
    std::fs::remove_file(scene.path(&name(6))).unwrap();
    assert_eq!(scene.get(7).await, Ok(Got::NotThere));
    scene.fill(7);
    scene.push(7).await.unwrap();
    assert_eq!(scene.get(7).await, Ok(Got::Written));
    // Neither is what was there.
    scene.fill(8);
    scene.push(8).await.unwrap();
    for number in [6, 7] {
        std::fs::remove_file(scene.object(&name(number))).unwrap();
    }
    assert_eq!(scene.get(6).await, Err(Code::WalMissing));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_segment_behind_one_is_on_its_way_once() {
    let scene = Scene::archived(3).await;
    let repository = Arc::new(scene.opens.open(whose(), None).await.unwrap());
    let identity = whose().find(&repository, None).await.unwrap();
    let (lineage, to) = (identity.lineage, scene.path("RECOVERYXLOG"));
    for number in 1..=2 {
        let file = name(number).parse().unwrap();
        let found = scene.archives.readahead.fetch(&repository, lineage, &file, &to).await;
        let next = found.unwrap().unwrap().next.unwrap().await.unwrap();
        assert!(next == segment(1, (number + 1) << 20, 7), "{number}");
    }
    assert!((1..=3).all(|number| scene.fetched(number) == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_went_away_is_opened_anew() {
    let scene = Scene::new().await;
    let (repository, away) =
        (scene.place.path().join("repository"), scene.place.path().join("away"));
    scene.fill(1);
    scene.push(1).await.unwrap();
    std::fs::rename(&repository, &away).unwrap();
    std::fs::create_dir(&repository).unwrap();
    scene.fill(2);
    assert_eq!(scene.push(2).await, Err(Code::RepositoryMissing));
    // Nothing was put into the place where it had been.
    std::fs::remove_dir(&repository).unwrap();
    std::fs::rename(&away, &repository).unwrap();
    assert_eq!(scene.push(2).await, Ok(WalStored::Created));

    // What was stored ahead, and is not in the repository that is there now, is stored in it.
    (3..=5).for_each(|number| scene.fill(number));
    assert_eq!(scene.push(3).await, Ok(WalStored::Created));
    eventually("the fifth is ahead", || scene.stored().len() == 5).await;
    std::fs::remove_file(scene.object(&name(4))).unwrap();
    assert_eq!(scene.push(4).await, Ok(WalStored::Created));
    assert!(scene.object(&name(4)).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_put_into_its_place_only_by_somebody_who_still_waits_for_it() {
    let scene = Scene::new().await;
    scene.fill(1);
    scene.push(1).await.unwrap();
    let question = || Question::Fetch {
        whose: whose(),
        repository: None,
        file: name(1),
        to: scene.path("RECOVERYXLOG"),
        until: None,
    };
    scene.store.open.send_replace(false);
    let mut stream = UnixStream::connect(scene.socket()).await.unwrap();
    words::say(&mut stream, question()).await.unwrap();
    eventually("it is asked for", || scene.store.open.receiver_count() > 0).await;
    drop(stream);
    eventually("the question is given up", || scene.store.open.receiver_count() == 0).await;
    scene.store.open.send_replace(true);
    let mut stream = UnixStream::connect(scene.socket()).await.unwrap();
    words::say(&mut stream, question()).await.unwrap();
    let Answer::Fetched { file } = words::hear(&mut stream).await.unwrap() else { panic!() };
    assert!(file.exists() && !scene.path("RECOVERYXLOG").exists());
    drop(stream);
    eventually("what nobody took is gone", || scene.others().is_empty()).await;
    assert_eq!(scene.get(1).await, Ok(Got::Written));
    assert_eq!(scene.others(), ["RECOVERYXLOG"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_another_repository_and_one_that_is_silent_are_none() {
    let scene = Scene::new().await;
    scene.fill(1);
    let to_store = async |socket: PathBuf, repository, within| {
        let path = scene.path(&name(1));
        let ask = move || {
            let whose = whose();
            Asking { within, ..asking(&socket, &whose, repository) }.to_store(&path)
        };
        beside(ask).await
    };
    let other = to_store(scene.socket(), Some("theirs"), SOON).await;
    let Heard::Nobody(Some(failure)) = other else { panic!("{other:?}") };
    assert_eq!(failure.code, Code::ConfigInvalid);
    assert!(scene.stored().is_empty());
    let same = to_store(scene.socket(), Some("ours"), SOON).await;
    assert!(matches!(same, Heard::Answer(Ok(_))), "{same:?}");

    let dumb = scene.place.path().join("dumb.sock");
    let _listener = tokio::net::UnixListener::bind(&dumb).unwrap();
    let silence = to_store(dumb, None, Duration::from_millis(100)).await;
    assert!(matches!(silence, Heard::Nobody(None)), "{silence:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_has_one_service_and_a_dead_one_is_replaced() {
    // Nobody else may open the socket, whatever the umask is. Each test has a process of its own.
    rustix::process::umask(rustix::fs::Mode::empty());
    let scene = Scene::new().await;
    let socket = scene.socket();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let listen = async |path: &Path| Service::listen(path, Arc::clone(&scene.opens) as _).await;
    let error = listen(&socket).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    // A slip must not cost a file.
    let file = scene.place.path().join("a key");
    std::fs::write(&file, "secret").unwrap();
    assert_eq!(listen(&file).await.unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&file).unwrap(), b"secret");
    let dead = scene.place.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    assert!(dead.exists());
    drop(listen(&dead).await.unwrap());
    // Words that are none are answered, and do no harm.
    let mut stream = UnixStream::connect(&socket).await.unwrap();
    stream.write_all(b"{\"store\":{}}\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("REQUEST_INVALID"), "{answer}");
    drop(UnixStream::connect(&socket).await.unwrap());
    scene.fill(1);
    assert_eq!(scene.push(1).await, Ok(WalStored::Created));
    scene.service.stop().await;
    assert!(!socket.exists());
    let path = scene.place.path().join("data/pg_wal").join(name(1));
    let heard = beside(move || asking(&socket, &whose(), None).to_store(&path)).await;
    assert!(matches!(heard, Heard::Nobody(None)), "{heard:?}");
}
