//! `moxlet image`: the images of an agent, or of a store of one's own.

mod args;
mod connect;
mod login;
mod migrate;
mod output;
mod progress;
mod transfer;

use std::{
    io::Write,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use moxlet_cri::host::{self, image_pull_update::Update};
use tokio::signal::unix::{SignalKind, signal};

use crate::log_filter;
pub(crate) use args::ImageArgs;
use args::{GcArgs, ImageCommand, ListArgs, Output, PullArgs, PushArgs};
use connect::Connection;
use login::Logins;
use progress::Bars;

/// Runs a command to its end, or to SIGINT or SIGTERM.
///
/// # Errors
/// What failed, in words for the person at the terminal.
pub(crate) fn main(args: &ImageArgs) -> Result<()> {
    let filter = log_filter::parse("--log", &args.store.log)?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            outcome = run(args) => outcome,
            _ = term.recv() => bail!("stopped by SIGTERM; what is half done is removed or taken up by the next command"),
            _ = int.recv() => bail!("interrupted; what is half done is removed or taken up by the next command"),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(10));
    outcome
}

async fn run(args: &ImageArgs) -> Result<()> {
    if let ImageCommand::Migrate { to } = &args.command {
        return migrate::migrate(&args.store, to).await;
    }
    let (registry, images) = match &args.command {
        ImageCommand::Pull(pull) => (Some(&pull.registry), pull.images.images.clone()),
        ImageCommand::Push(push) => {
            (Some(&push.registry), vec![push.target.as_ref().unwrap_or(&push.image).clone()])
        }
        _ => (None, Vec::new()),
    };
    let may_make = matches!(args.command, ImageCommand::Pull(_) | ImageCommand::Import(_));
    let mut store = Connection::open(&args.store, registry, &images, may_make).await?;
    let outcome = command(&mut store, &args.command).await;
    let closed = store.close().await;
    outcome.and(closed)
}

async fn command(store: &mut Connection, command: &ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Pull(args) => pull(store, args).await,
        ImageCommand::List(args) => list(store, args).await,
        ImageCommand::Inspect(args) => inspect(store, &args.images).await,
        ImageCommand::Tag { image, name } => {
            let request = host::ImageTagRequest { image: image.clone(), tag: name.clone() };
            let done = store.client.tag(request).await.map_err(|e| store.failed(&e))?;
            say(&done.into_inner().id)
        }
        ImageCommand::Remove(args) => remove(store, &args.images).await,
        ImageCommand::Pin(args) => pin(store, &args.images, true).await,
        ImageCommand::Unpin(args) => pin(store, &args.images, false).await,
        ImageCommand::Mount { image, directory } => {
            let request = host::ImageMountRequest { image: image.clone(), path: absolute(directory)? };
            let done = store.client.mount(request).await.map_err(|e| store.failed(&e))?;
            say(&done.into_inner().id)
        }
        ImageCommand::Umount { directory } => {
            let request = host::ImageUnmountRequest { path: absolute(directory)? };
            store.client.unmount(request).await.map_err(|e| store.failed(&e))?;
            Ok(())
        }
        ImageCommand::Push(args) => push(store, args).await,
        ImageCommand::Export(args) => transfer::export(store, args).await,
        ImageCommand::Import(args) => transfer::import(store, args).await,
        ImageCommand::Verify { images, repair } => verify(store, images, *repair).await,
        ImageCommand::Migrate { .. } => bail!("a migration opens its stores itself"),
        ImageCommand::Gc(args) => collect(store, garbage(args)).await,
        ImageCommand::Prune { min_age, dry_run: true } => would_remove(store, min_age.0).await,
        ImageCommand::Prune { min_age, dry_run: false } => {
            let request = host::ImageGarbageRequest {
                everything_unused: true,
                min_age_seconds: min_age.0.as_secs(),
                ..host::ImageGarbageRequest::default()
            };
            collect(store, request).await
        }
    }
}

/// Prints a line of the result. A reader that has gone is no failure worth a message.
fn say(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))?;
    path.into_os_string().into_string().map_err(|p| anyhow::anyhow!("{} is not UTF-8", p.display()))
}

/// Does something for each image; all are tried, and what failed is told at the end.
fn outcome(failed: usize, all: usize) -> Result<()> {
    if failed == 0 {
        return Ok(());
    }
    bail!("{failed} of {all} images failed")
}

async fn pull(store: &mut Connection, args: &PullArgs) -> Result<()> {
    let logins = Logins::read(&args.registry)?;
    let mut failed = Vec::new();
    for image in &args.images.images {
        match pull_one(store, image, &logins, args.quiet).await {
            Ok(done) => say(&done.id)?,
            Err(error) => failed.push((image, error)),
        }
    }
    match failed.as_mut_slice() {
        [] => Ok(()),
        [(_, _)] if args.images.images.len() == 1 => Err(failed.remove(0).1),
        all => {
            for (_, error) in all.iter() {
                eprintln!("moxlet: {}", moxlet_errors::chain(error.as_ref()));
            }
            outcome(all.len(), args.images.images.len())
        }
    }
}

async fn pull_one(
    store: &mut Connection,
    image: &str,
    logins: &Logins,
    quiet: bool,
) -> Result<host::ImagePullDone> {
    let request = host::ImagePullRequest {
        image: image.to_owned(),
        logins: logins.logins.clone(),
        docker_configs: logins.docker_configs.clone(),
    };
    let answer = store.client.pull(request).await.map_err(|e| store.failed(&e))?;
    let (mut updates, mut bars) = (answer.into_inner(), Bars::new(image, quiet));
    while let Some(update) = updates.message().await.map_err(|e| store.failed(&e))? {
        match update.update {
            Some(Update::Progress(progress)) => bars.show(&progress),
            Some(Update::Done(done)) => {
                bars.finish(&done.id, done.size_bytes);
                return Ok(done);
            }
            None => {}
        }
    }
    bail!("the pull of {image} ended without a word")
}

async fn images(store: &mut Connection) -> Result<Vec<host::StoredImage>> {
    let answer = store.client.list(host::ImageListRequest {}).await.map_err(|e| store.failed(&e))?;
    Ok(answer.into_inner().images)
}

async fn list(store: &mut Connection, args: &ListArgs) -> Result<()> {
    let images = images(store).await?;
    if args.quiet {
        return images.iter().try_for_each(|i| say(&i.id));
    }
    match args.output {
        Output::Table => say(output::table(&images, SystemTime::now()).trim_end()),
        Output::Json => say(&serde_json::to_string_pretty(&output::json(&images))?),
    }
}

async fn inspect(store: &mut Connection, wanted: &[String]) -> Result<()> {
    let mut all = Vec::new();
    for image in wanted {
        let request = host::ImageInspectRequest { image: image.clone() };
        let answer = store.client.inspect(request).await.map_err(|e| store.failed(&e))?;
        all.push(serde_json::from_slice::<serde_json::Value>(&answer.into_inner().json)?);
    }
    say(&serde_json::to_string_pretty(&all)?)
}

async fn remove(store: &mut Connection, wanted: &[String]) -> Result<()> {
    let mut failed = 0;
    for image in wanted {
        match store.client.remove(host::ImageRemoveRequest { image: image.clone() }).await {
            Ok(done) => match done.into_inner() {
                host::ImageRemoveResponse { name, id } if id.is_empty() => say(&format!("untagged {name}"))?,
                host::ImageRemoveResponse { id, .. } => say(&format!("removed {id}"))?,
            },
            Err(error) if wanted.len() == 1 => return Err(store.failed(&error)),
            Err(error) => {
                eprintln!("moxlet: {:#}", store.failed(&error));
                failed += 1;
            }
        }
    }
    outcome(failed, wanted.len())
}

async fn pin(store: &mut Connection, wanted: &[String], pinned: bool) -> Result<()> {
    for image in wanted {
        let request = host::ImagePinRequest { image: image.clone(), pinned };
        let done = store.client.pin(request).await.map_err(|e| store.failed(&e))?;
        say(&done.into_inner().id)?;
    }
    Ok(())
}

async fn push(store: &mut Connection, args: &PushArgs) -> Result<()> {
    let logins = Logins::read(&args.registry)?;
    let request = host::ImagePushRequest {
        image: args.image.clone(),
        target: args.target.clone().unwrap_or_default(),
        logins: logins.logins,
        docker_configs: logins.docker_configs,
        compression: args.compression.clone(),
    };
    let done = store.client.push(request).await.map_err(|e| store.failed(&e))?;
    say(&done.into_inner().digest)
}

/// A pull does not bring a layer that is here.
const NO_TAPE: &str = "         remove it with every image that shares these layers, and pull it again";

async fn verify(store: &mut Connection, images: &[String], repair: bool) -> Result<()> {
    let request = host::ImageVerifyRequest { images: images.to_vec(), repair };
    let answer = store.client.verify(request).await.map_err(|e| store.failed(&e))?;
    let (mut reports, mut damaged, mut unknown, mut all) = (answer.into_inner(), 0, 0, 0);
    while let Some(report) = reports.message().await.map_err(|e| store.failed(&e))? {
        all += 1;
        let layers = format!("{} of {} layers compared", report.verified, report.layers);
        if report.faults.is_empty() {
            let state = if report.verified < report.layers { "unknown" } else { "ok" };
            say(&format!("{state:<8} {} ({layers})", report.image))?;
            if report.lost > 0 {
                unknown += 1;
                say("         cannot be compared: its tapes are lost")?;
                say(NO_TAPE)?;
            } else if state == "unknown" {
                say("         it came with a version that kept no tapes")?;
                say(NO_TAPE)?;
            }
            continue;
        }
        damaged += 1;
        say(&format!("damaged  {} ({layers})", report.image))?;
        for fault in &report.faults {
            say(&format!("         {fault}"))?;
        }
        if report.removed {
            say("         removed: the next pull brings it anew")?;
        } else if repair {
            say("         not removed: somebody uses it (`moxlet image inspect` says who)")?;
        }
    }
    if damaged > 0 {
        bail!("{damaged} of {all} images are damaged");
    }
    if unknown > 0 {
        bail!("{unknown} of {all} images cannot be compared");
    }
    Ok(())
}

fn garbage(args: &GcArgs) -> host::ImageGarbageRequest {
    host::ImageGarbageRequest {
        everything_unused: false,
        high_percent: args.high.into(),
        low_percent: args.low.into(),
        min_age_seconds: args.min_age.0.as_secs(),
        max_age_seconds: args.max_age.map_or(0, |a| a.0.as_secs()),
    }
}

/// What a removal of all unused images would take.
async fn would_remove(store: &mut Connection, min_age: Duration) -> Result<()> {
    let now = SystemTime::now();
    let old = |at: i64| {
        let at = std::time::UNIX_EPOCH + Duration::from_secs(u64::try_from(at).unwrap_or(0));
        now.duration_since(at).unwrap_or_default() >= min_age
    };
    for image in images(store).await? {
        if image.in_use_by.is_empty() && !image.pinned && old(image.added_at.max(image.last_used_at)) {
            say(&format!("would remove {} {}", image.id, image.repo_tags.join(" ")))?;
        }
    }
    Ok(())
}

async fn collect(store: &mut Connection, request: host::ImageGarbageRequest) -> Result<()> {
    let thresholds = !request.everything_unused;
    let answer = store.client.collect_garbage(request).await.map_err(|e| store.failed(&e))?;
    let done = answer.into_inner();
    for image in &done.removed {
        say(&format!("removed {} {}", image.id, image.repo_tags.join(" ")))?;
    }
    for failure in &done.failures {
        eprintln!("moxlet: {failure}");
    }
    let freed = output::size(done.freed_bytes);
    if thresholds {
        eprintln!("the file system was {} % full; {freed} freed", done.usage_percent);
    } else {
        eprintln!("{freed} freed");
    }
    if !done.failures.is_empty() {
        return outcome(done.failures.len(), done.failures.len() + done.removed.len());
    }
    if done.freed_bytes < done.wanted_bytes {
        bail!(
            "{} had to go to reach the low threshold: the rest of the images is in use, pinned or too young; look at logs, \
             volumes and what else lies on that file system",
            output::size(done.wanted_bytes)
        );
    }
    Ok(())
}
