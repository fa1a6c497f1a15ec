//! PostgreSQL's programs under which a backup can run: of its major version, and built for the sizes of its pages.
//!
//! Asked before anything is restored: a server of other sizes refuses the copy only when all of it is there.

use std::path::PathBuf;
use std::pin::pin;

use futures::StreamExt as _;
use postgres::binaries::Binaries;
use postgres::block_sizes::BlockSizes;
use postgres::control_file::{CONTROL_FILE_PATH, ControlFile};
use proto::Failure;
use repository::Backup;

/// The programs for a physical backup, in `bin_dirs` and the usual places.
pub(crate) async fn of(backup: &Backup, bin_dirs: &[PathBuf]) -> Result<Binaries, Failure> {
    let major = backup.facts().server_version_num / 10_000;
    Ok(match Box::pin(sizes(backup)).await {
        Some(sizes) => Binaries::find_for(major, bin_dirs, sizes).await?,
        None => Binaries::find(major, bin_dirs).await?,
    })
}

/// As its control file says. What is wrong with that is for the restore to find, which blames the backup for it.
async fn sizes(backup: &Backup) -> Option<BlockSizes> {
    let content = backup.late_content(CONTROL_FILE_PATH.as_bytes()).await.ok()?;
    let mut bytes = Vec::new();
    let mut pieces = pin!(content.stream());
    while let Some(piece) = pieces.next().await {
        bytes.extend_from_slice(&piece.ok()?);
    }
    ControlFile::parse(&bytes).ok().map(|control| BlockSizes::of(&control))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::sync::Arc;

    use async_trait::async_trait;
    use proto::message::Spec;
    use proto::wal::Segment;
    use proto::{
        AttemptId, ClusterName, Code, JobId, Lsn, ProofLevel, Recovery, RecoveryTarget,
        SystemIdentifier, Task, Timeline, job,
    };
    use repository::store::directory::DirectoryStore;
    use repository::{
        Encryption, InitOptions, Intent, Pin, Repository, Source, SourceEntry, SourceFile,
        WriteOptions,
    };

    use super::*;
    use crate::archive::service::OpenArchive;
    use crate::archive::{Whose, segment_for_tests};
    use crate::context::JobContext;
    use crate::proving::{Workshop, prove};
    use crate::recovering::{FetchFrom, Fetching, Wanted, plan};

    const MIB: u64 = 1 << 20;
    /// Of a server with pages of 16 KiB and small files; what follows in the file is zero.
    const CONTROL: &[u8] = include_bytes!("../../postgres/tests/golden/block_sizes/16k/pg_control");

    struct NoSource;

    impl Source for NoSource {
        fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
            Ok(None)
        }
    }

    #[derive(Debug)]
    struct NoArchive;

    #[async_trait]
    impl OpenArchive for NoArchive {
        async fn open(&self, _: Whose, _: Option<String>) -> Result<Repository, Failure> {
            Err(Failure::bug("nobody asks for WAL before a server runs"))
        }
    }

    /// A repository with a backup that ends in its first segment, and with what its control file says, where it has one.
    async fn repository_with(place: &Path, control: Option<&[u8]>) -> Repository {
        let store = DirectoryStore::new(place.join("repository"));
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let repository = Repository::init(Arc::new(store), options).await.unwrap().repository;
        let cluster: ClusterName = "orders".parse().unwrap();
        let identifier = SystemIdentifier(7);
        let lineage = repository.find_or_mint_lineage(&cluster, identifier, 1).await.unwrap();
        let facts = serde_json::json!({
            "cluster": "orders", "system_identifier": "7", "server_version_num": 150_018,
            "catalog_version": 1, "block_size": 16384, "wal_segment_size": MIB,
            "data_checksums": true, "timeline": 1,
            "start_lsn": Lsn(MIB + 40), "stop_lsn": Lsn(MIB + 400),
            "started_at_ms": 1, "stopped_at_ms": 1, "backup_label": "",
        });
        let attempt = AttemptId::mint(1, [1; 10]);
        let intent = Intent { attempt, follows: None, by: "w".into(), began_at_ms: 1 };
        let attempt = repository.begin(lineage.lineage, intent).await.unwrap();
        let continuity = Some("here".into());
        let mut writer =
            attempt.write(WriteOptions { continuity, ..WriteOptions::default() }).unwrap();
        let entries = vec![Ok(SourceEntry::bytes("PG_VERSION", 0o600, "15\n"))];
        writer.copy(Arc::new(NoSource), entries).await.unwrap();
        let segment = Segment { timeline: Timeline(1), number: 1 };
        let content = segment_for_tests(1, MIB, 7);
        writer.wal().add(&segment.file_name(1 << 20), io::Cursor::new(content)).await.unwrap();
        let late = control.map(|control| {
            let mut file = control.to_vec();
            file.resize(8192, 0);
            SourceEntry::bytes(CONTROL_FILE_PATH, 0o600, file)
        });
        let facts = serde_json::from_value(facts).unwrap();
        let written = writer.finish(Arc::new(NoSource), late.into_iter().collect(), facts);
        written.await.unwrap().commit(2).await.unwrap();
        repository
    }

    /// A `postgres` that tells a version and sizes, and does no more.
    fn programs(place: &Path, name: &str, sizes: BlockSizes) -> PathBuf {
        let directory = place.join(name);
        std::fs::create_dir(&directory).unwrap();
        let BlockSizes { page_bytes, file_pages, wal_page_bytes } = sizes;
        let script = format!(
            "#!/bin/sh\ncase \"$1 $2\" in\n'--version ') echo 'postgres (PostgreSQL) 15.18' ;;\n\
             '-C block_size') echo {page_bytes} ;;\n'-C segment_size') echo {file_pages} ;;\n\
             '-C wal_block_size') echo {wal_page_bytes} ;;\n*) exit 1 ;;\nesac\n"
        );
        let path = directory.join("postgres");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    fn context() -> JobContext {
        let spec = Spec {
            schema: 1,
            job: JobId::mint(1, [1; 10]),
            attempt: AttemptId::mint(1, [1; 10]),
            predecessor: None,
            cluster: "orders".parse().unwrap(),
            system_identifier: None,
            task: Task::Backup(job::Backup::default()),
            deadline_ms: 60_000,
            traceparent: None,
        };
        JobContext::new(spec, Arc::new(|_| {}))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn programs_of_other_sizes_are_passed_over_or_refused_before_anything_is_restored() {
        let place = tempfile::tempdir().unwrap();
        let usual = BlockSizes { page_bytes: 8192, file_pages: 131_072, wal_page_bytes: 8192 };
        let mut control = CONTROL.to_vec();
        control.resize(8192, 0);
        let needed = BlockSizes::of(&ControlFile::parse(&control).unwrap());
        assert_eq!(needed.page_bytes, 16_384);
        // Each size counts for itself.
        let others = [
            programs(place.path(), "usual", usual),
            programs(place.path(), "page", BlockSizes { page_bytes: 8192, ..needed }),
            programs(place.path(), "file", BlockSizes { file_pages: 131_072, ..needed }),
            programs(place.path(), "wal", BlockSizes { wal_page_bytes: 8192, ..needed }),
        ];
        let right = programs(place.path(), "right", needed);

        let repository = repository_with(place.path(), Some(CONTROL)).await;
        let pin = Pin { by: "tester".into(), why: "restore".into(), at_ms: 1 };
        let recovery = Recovery::to(RecoveryTarget::Immediate);
        let wanted = Wanted {
            cluster: None,
            system_identifier: None,
            backup: None,
            rehearses: false,
            recovery: &recovery,
        };
        let from = FetchFrom::Repository(String::new(), ["--key".into(), "file".into()]);
        let fetching = Fetching { program: "/usr/bin/pgmuster".into(), from };
        let (backup, recovery) = plan(&repository, wanted, &fetching, &pin).await.unwrap();

        let found =
            of(&backup, &[&others[..], std::slice::from_ref(&right)].concat()).await.unwrap();
        assert_eq!(found.directory(), right);
        let refused = of(&backup, &others).await.unwrap_err();
        assert_eq!(refused.code, Code::BinariesMissing);
        for part in ["PostgreSQL 15", "16384", "8192", "131072", others[0].to_str().unwrap()] {
            assert!(refused.message.contains(part), "{part} in: {refused}");
        }
        assert!(refused.hint.contains("--with-blocksize=16 --with-wal-blocksize="), "{refused:?}");

        let cx = context();
        let directory = place.path().join("sandbox");
        let workshop = Workshop {
            worker: "w1".parse().unwrap(),
            directory: &directory,
            bin_dirs: others.to_vec(),
            processes: 1,
            assertions: Vec::new(),
        };
        let proof = Box::pin(prove(&cx, &workshop, &backup, ProofLevel::L3)).await.unwrap_err();
        assert_eq!((proof.code, &proof.message), (refused.code, &refused.message));
        assert!(!directory.exists(), "nothing was restored");
        let starter = recovery.starter(&backup, &others, Vec::new(), Arc::new(NoArchive), false);
        let start = starter.await.unwrap_err();
        assert_eq!((start.code, &start.message), (refused.code, &refused.message));
        backup.release().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_control_file_that_tells_nothing_is_left_to_the_restore() {
        for control in [None, Some(&[0; 8192][..])] {
            let place = tempfile::tempdir().unwrap();
            let any = BlockSizes { page_bytes: 1024, file_pages: 64, wal_page_bytes: 1024 };
            let any = programs(place.path(), "any", any);
            let repository = repository_with(place.path(), control).await;
            let backup = crate::restoring::find(&repository, None, None, None).await.unwrap();
            let found = of(&backup, std::slice::from_ref(&any)).await.unwrap();
            assert_eq!(found.directory(), any);
        }
    }
}
