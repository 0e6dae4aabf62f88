//! `moxlet uninstall`: takes from the host what Moxlet made on it, and says of each thing whether it is gone and of the rest how it goes.

use anyhow::{Context, Result, bail};

use clap::Args;

use crate::{
    args::HostArgs,
    config::{Config, Engine, Role},
    run,
};

/// What `moxlet uninstall` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Also delete the root directory: images on OverlayFS, logs, keys. A ZFS dataset is left
    #[arg(long)]
    pub(crate) delete_files: bool,
}

/// Uninstalls.
///
/// # Errors
/// A Moxlet runs, pods are left, or something could not be taken down.
pub(crate) fn main(args: &UninstallArgs) -> Result<()> {
    let config = Config::host(&args.host)?;
    if !rustix::process::geteuid().is_root() {
        bail!("it must run as root (try: sudo moxlet uninstall …)");
    }
    if !config.root_dir.exists() {
        println!("there is nothing: {} does not exist", config.root_dir.display());
        return Ok(());
    }
    run::init_logs(&config)?;
    let _locks = run::lock(&config.root_dir, Role::Up)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let agent = run::agent_config(&config, Role::Agent)?;
    let steps = runtime
        .block_on(moxlet_agent::uninstall(&agent, args.delete_files))
        .context("nothing has been removed")?;
    let mut failed = 0;
    for step in steps {
        match step.outcome {
            Ok(()) => println!("done: {}", step.what),
            Err(error) => {
                failed += 1;
                println!("FAILED: {}: {}", step.what, moxlet_errors::chain(&error));
            }
        }
    }
    for left in left(&config, args.delete_files) {
        println!("left: {left}");
    }
    if failed > 0 {
        bail!("{failed} of these steps failed; see to what they say and run it again");
    }
    Ok(())
}

/// What stays, with what removes it.
fn left(config: &Config, files_deleted: bool) -> Vec<String> {
    let mut left = Vec::new();
    if !files_deleted {
        let root = config.root_dir.display();
        left.push(format!("images, logs and keys in {root} (moxlet uninstall --delete-files)"));
    }
    if let Some(dataset) = &config.zfs_dataset {
        left.push(format!("the images in the dataset {dataset} (zfs destroy -r {dataset})"));
    }
    if config.engine == Engine::Lxc {
        left.push(
            "the line root:100000:65536 in /etc/subuid and /etc/subgid, which other CTs may use".to_owned(),
        );
    }
    left.push("the Node, if there is one (kubectl delete node NAME)".to_owned());
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_named_with_what_removes_it() {
        let mut config = Config { zfs_dataset: Some("rpool/moxlet".into()), ..Config::default() };
        let text = left(&config, false).join("\n");
        for part in ["/var/lib/moxlet", "--delete-files", "zfs destroy -r rpool/moxlet", "/etc/subuid"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        config.engine = Engine::Pve;
        let text = left(&config, true).join("\n");
        assert!(!text.contains("--delete-files") && !text.contains("subuid"), "{text}");
    }
}
