//! A log in a directory, written, rotated and spoilt as a container can do it, and what a reader gets of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs::{self, OpenOptions},
    io::Write,
    time::Instant,
};

use tempfile::TempDir;
use tokio_stream::StreamExt;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// A log that a test writes, named as those of containers are.
struct Log {
    dir: TempDir,
    rotations: u32,
}

impl Log {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("web")).unwrap();
        Self { dir, rotations: 0 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("web/0.log")
    }

    fn write(&self, text: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(self.path()).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn line(&self, text: &str) {
        self.write(&line(text));
    }

    fn rotate(&mut self) {
        self.rotations += 1;
        let name = format!("0.log.20240501-100000.{:09}", self.rotations);
        fs::rename(self.path(), self.path().with_file_name(name)).unwrap();
    }

    fn job(&self, follow: bool) -> Job {
        let base = self.dir.path().to_owned();
        Job { base, path: PathBuf::from("web/0.log"), follow, tail: None, filter: Filter::default() }
    }
}

fn line(text: &str) -> String {
    format!("2024-05-01T10:00:00.000000001Z stdout F {text}\n")
}

/// A reader at work.
struct Reading {
    stream: LogStream,
    over: CancellationToken,
    read: String,
}

impl Reading {
    fn start(job: Job) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let over = CancellationToken::new();
        let own = over.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = run(job, &own, &sender) => {}
                () = sender.closed() => {}
            }
        });
        Self { stream: ReceiverStream::new(receiver), over, read: String::new() }
    }

    async fn next(&mut self) -> Option<std::result::Result<(), Status>> {
        let chunk =
            tokio::time::timeout(LIMIT, self.stream.next()).await.expect("something is read in time")?;
        Some(chunk.map(|c| self.read.push_str(std::str::from_utf8(&c.data).unwrap())))
    }

    async fn until(&mut self, end: &str) {
        while !self.read.ends_with(end) {
            self.next().await.unwrap_or_else(|| panic!("it ended with {:?}", self.read)).unwrap();
        }
    }

    async fn all(mut self) -> std::result::Result<String, Status> {
        self.over.cancel();
        while let Some(chunk) = self.next().await {
            chunk?;
        }
        Ok(self.read)
    }
}

async fn all(job: Job) -> String {
    Reading::start(job).all().await.unwrap()
}

#[tokio::test]
async fn rotated_files_are_read_oldest_first() {
    let mut log = Log::new();
    for text in ["a", "b", "c"] {
        log.line(text);
        log.rotate();
    }
    log.line("d");
    fs::write(log.path().with_file_name("0.log.keep"), line("x")).unwrap();
    fs::write(log.path().with_file_name("1.log"), line("x")).unwrap();
    assert_eq!(all(log.job(false)).await, "a\nb\nc\nd\n");
}

#[tokio::test]
async fn the_tail_goes_over_files_and_counts_parts() {
    let mut log = Log::new();
    log.line("a");
    log.line("b");
    log.rotate();
    log.write("2024-05-01T10:00:00.000000001Z stdout P c\n");
    log.line("d");
    log.rotate();
    log.line("e");
    for (count, shown) in [
        (0, ""),
        (1, "e\n"),
        (2, "d\ne\n"),
        (3, "cd\ne\n"),
        (4, "b\ncd\ne\n"),
        (5, "a\nb\ncd\ne\n"),
        (u64::MAX, "a\nb\ncd\ne\n"),
    ] {
        let job = Job { tail: Some(count), ..log.job(false) };
        assert_eq!(all(job).await, shown, "{count}");
    }
}

#[tokio::test]
async fn the_tail_of_a_long_file_is_found_block_by_block() {
    let log = Log::new();
    let many: String = (0..20_000).map(|n| line(&format!("line {n} {}", "x".repeat(n % 100)))).collect();
    log.write(&many);
    for count in [1, 999, 7_777, 19_999] {
        let shown = all(Job { tail: Some(count), ..log.job(false) }).await;
        assert_eq!(shown.lines().count() as u64, count);
        assert!(shown.starts_with(&format!("line {} ", 20_000 - count)), "{count}");
    }
}

#[tokio::test]
async fn limit_and_since_hold_over_files() {
    let mut log = Log::new();
    log.write("2024-05-01T10:00:00.000000000Z stdout F old\n");
    log.write("2024-05-01T10:00:05.000000000Z stdout F new\n");
    log.rotate();
    log.write("2024-05-01T10:00:06.000000000Z stderr F err\n");
    let mut job = log.job(false);
    job.filter.set_since(1_714_557_605_000_000_000);
    job.filter.limit = Some(6);
    assert_eq!(all(job).await, "new\ner");
}

#[tokio::test]
async fn a_follower_sees_every_line_once_over_rotations() {
    const COUNT: usize = 3_000;
    let mut log = Log::new();
    log.line("0");
    let mut reading = Reading::start(log.job(true));
    let writer = tokio::task::spawn_blocking(move || {
        for n in 1..COUNT {
            if n % 100 == 0 {
                log.rotate();
            }
            if n % 700 == 0 {
                // Several rotations may pass between two looks, and the log may be missing at one.
                std::thread::sleep(Duration::from_millis(30));
            }
            log.line(&n.to_string());
        }
        log
    });
    reading.until(&format!("\n{}\n", COUNT - 1)).await;
    let mut log = writer.await.unwrap();
    log.rotate();
    log.line("end");
    let read = reading.all().await.unwrap();
    let expected: String = (0..COUNT).map(|n| format!("{n}\n")).chain(["end\n".to_owned()]).collect();
    assert!(read == expected, "{} of {} bytes", read.len(), expected.len());
}

#[tokio::test]
async fn what_is_written_into_a_renamed_log_before_the_next_is_made_is_seen() {
    let mut log = Log::new();
    log.line("a");
    let mut held = OpenOptions::new().append(true).open(log.path()).unwrap();
    let mut reading = Reading::start(log.job(true));
    reading.until("a\n").await;
    log.rotate();
    tokio::time::sleep(Duration::from_millis(50)).await;
    held.write_all(line("b").as_bytes()).unwrap();
    reading.until("b\n").await;
    log.line("c");
    reading.until("c\n").await;
    assert_eq!(reading.all().await.unwrap(), "a\nb\nc\n");
}

#[tokio::test]
async fn a_follower_waits_for_the_log_and_wakes_at_once() {
    let log = Log::new();
    fs::remove_dir(log.dir.path().join("web")).unwrap();
    let mut reading = Reading::start(log.job(true));
    tokio::time::sleep(Duration::from_millis(50)).await;
    fs::create_dir(log.dir.path().join("web")).unwrap();
    log.line("a");
    reading.until("a\n").await;
    let since = Instant::now();
    log.line("b");
    reading.until("b\n").await;
    assert!(since.elapsed() < CHECK, "{:?}", since.elapsed());
    log.write("2024-05-01T10:00:00.000000001Z stdout P end");
    assert_eq!(reading.all().await.unwrap(), "a\nb\nend");
}

#[tokio::test]
async fn a_follower_of_the_tail_goes_on() {
    let mut log = Log::new();
    log.line("a");
    log.line("b");
    log.rotate();
    let mut reading = Reading::start(Job { tail: Some(1), ..log.job(true) });
    reading.until("b\n").await;
    log.line("c");
    assert_eq!(
        {
            reading.until("c\n").await;
            reading.all().await.unwrap()
        },
        "b\nc\n"
    );
}

#[tokio::test]
async fn a_log_that_is_cut_off_is_read_from_its_new_beginning() {
    let log = Log::new();
    log.line("a long line");
    let mut reading = Reading::start(log.job(true));
    reading.until("line\n").await;
    fs::write(log.path(), "").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    log.line("b");
    reading.until("b\n").await;
}

#[tokio::test]
async fn links_and_other_files_are_refused() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), line("secret")).unwrap();
    let log = Log::new();
    std::os::unix::fs::symlink(secret.path(), log.path()).unwrap();
    let rotated = log.path().with_file_name("0.log.20240501-100000.000000001");
    std::os::unix::fs::symlink(secret.path(), &rotated).unwrap();
    let refused = Reading::start(log.job(false)).all().await.unwrap_err();
    assert!(refused.message().contains("0.log"), "{refused}");
    // Of a rotated one no more is seen, and the rest is.
    fs::remove_file(log.path()).unwrap();
    log.line("mine");
    assert_eq!(all(log.job(false)).await, "mine\n");
    // A directory on the way, replaced by a link.
    let other = Log::new();
    other.line("other");
    fs::remove_dir_all(log.dir.path().join("web")).unwrap();
    std::os::unix::fs::symlink(other.dir.path().join("web"), log.dir.path().join("web")).unwrap();
    assert!(Reading::start(log.job(false)).all().await.is_err());
    fs::remove_file(log.dir.path().join("web")).unwrap();
    fs::create_dir_all(log.path()).unwrap();
    assert!(Reading::start(log.job(false)).all().await.is_err());
}

#[tokio::test]
async fn a_log_that_is_not_there_is_not_found() {
    let log = Log::new();
    let missing = Reading::start(log.job(false)).all().await.unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound, "{missing}");
    // A follower whose container ends without a word gets nothing.
    assert_eq!(Reading::start(log.job(true)).all().await.unwrap(), "");
}

#[tokio::test]
async fn a_large_log_comes_in_bounded_chunks() {
    const SIZE: usize = 100 << 20;
    let log = Log::new();
    let one = line(&"x".repeat(100));
    let block = one.repeat((1 << 20) / one.len());
    let mut written = 0;
    while written < SIZE {
        log.write(&block);
        written += block.len();
    }
    let mut reading = Reading::start(log.job(false));
    let (mut read, since) = (0, Instant::now());
    while let Some(chunk) = reading.stream.next().await {
        let data = chunk.unwrap().data;
        assert!(data.len() <= 300 << 10);
        read += data.len();
    }
    let rate = written as f64 / since.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s of log");
    assert_eq!(read, written / one.len() * 101);
}
