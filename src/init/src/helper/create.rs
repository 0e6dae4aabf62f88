//! `moxlet-init create CONTROL BUNDLE STATE-ROOT ID`: a container up to the moment before its command, by libcontainer.
//!
//! Its standard streams are the container's. The container's first process inherits the control socket and waits to be told
//! to start; a command that cannot be executed is reported over that socket.

use std::{
    collections::HashMap,
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::ExitCode,
};

use libcontainer::{
    container::builder::ContainerBuilder,
    syscall::syscall::SyscallType,
    workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError},
};
use moxlet_init_proto::frame;
use oci_spec::runtime::Spec;

use super::{Control, Note, command};

/// Executes the container's command; replaces libcontainer's own, which looks for it at creation already.
#[derive(Clone)]
struct Run(Control);

impl Executor for Run {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref();
        let args = process.and_then(|p| p.args().clone()).unwrap_or_default();
        let mut env = command::environment(process.and_then(|p| p.env().as_ref()).map_or(&[], Vec::as_slice));
        if !env.contains_key("HOME") {
            // libcontainer has looked for it before the root was the container's, and leaves it out for users without a line there.
            let uid = process.map_or(0, |p| p.user().uid());
            env.insert("HOME".into(), std::env::var("HOME").unwrap_or_else(|_| command::home(uid)));
        }
        let reason = command::execute(&args, &env);
        self.0.fail(reason, true);
        // SAFETY: ends this process without unwinding into libcontainer, which has nothing left to do.
        unsafe { libc::_exit(127) }
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(home) = envs.get("HOME") {
            // SAFETY: this process has one thread.
            unsafe { std::env::set_var("HOME", home) };
        }
        Ok(())
    }
}

/// The role's main function.
pub(crate) fn main(mut args: impl Iterator<Item = String>) -> ExitCode {
    let Some(control) = Control::from_arg(args.next()) else { return ExitCode::FAILURE };
    crate::sys::reset_signals();
    let (Some(bundle), Some(root), Some(id)) = (args.next(), args.next(), args.next()) else {
        control.fail("the create helper lacks arguments", false);
        return ExitCode::FAILURE;
    };
    match create(control, Path::new(&bundle), &root, id) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            control.fail(message, false);
            ExitCode::FAILURE
        }
    }
}

fn create(control: Control, bundle: &Path, root: &str, id: String) -> Result<(), String> {
    let spec = Spec::load(bundle.join("config.json")).map_err(|e| chain(&e))?;
    let tty = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
    drop(spec);
    let console: PathBuf = bundle.join("console");
    let listener = match tty {
        true => Some(UnixListener::bind(&console).map_err(|e| format!("console socket: {e}"))?),
        false => None,
    };
    let mut builder = ContainerBuilder::new(id, SyscallType::default())
        .with_root_path(root)
        .map_err(|e| chain(&e))?
        .with_executor(Run(control));
    if tty {
        builder = builder.with_console_socket(Some(&console));
    }
    let container =
        builder.as_init(bundle).with_systemd(false).with_detach(true).build().map_err(|e| chain(&e))?;
    let pid = container.pid().ok_or("libcontainer made no process")?;
    let pid = u32::try_from(pid.as_raw()).map_err(|_| "libcontainer made no process")?;
    let mut master = Vec::new();
    if let Some(listener) = listener {
        let (socket, _) = listener.accept().map_err(|e| format!("console socket: {e}"))?;
        let (_, fds) =
            frame::receive(socket.as_fd(), &mut [0; 4096]).map_err(|e| format!("console socket: {e}"))?;
        let _ = std::fs::remove_file(&console);
        master = fds;
        if master.len() != 1 {
            return Err("libcontainer made no terminal".into());
        }
    }
    control.note(&Note::Pid(pid), &master.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    Ok(())
}

/// An error with its causes: libcontainer's own words often are only "failed to create container".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        let more = c.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = c.source();
    }
    text
}
