//! The thread that reads a container's output: into its log, to whoever is attached, and its end when all is drained.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use crate::{
    container::Container,
    log::{Lines, Stream},
    pod::Pod,
    sys::{lock, wait_ready},
};

/// A dead container's pipe that someone outside its PID namespace holds is waited for so long after its last byte.
const LINGER: Duration = Duration::from_millis(250);
/// A terminal that nobody has open says so at once and always: look again after this.
const IDLE_TERMINAL: Duration = Duration::from_millis(100);

/// One stream of a container.
pub(crate) struct Source {
    pub(crate) stream: Stream,
    pub(crate) fd: OwnedFd,
    pub(crate) terminal: bool,
}

/// Reads until the container is dead and drained, then finishes it.
pub(crate) fn run(pod: &Pod, container: &Arc<Container>, sources: Vec<Source>) {
    let mut sources: Vec<(Source, Lines)> = sources
        .into_iter()
        .map(|s| {
            let lines = Lines::new(s.stream);
            (s, lines)
        })
        .collect();
    let mut buffer = vec![0; 32 << 10];
    let mut idle = false;
    loop {
        let over = container.is_over();
        if over && sources.is_empty() {
            break;
        }
        let ready = {
            let mut fds = vec![PollFd::new(container.wake.fd(), PollFlags::IN)];
            if !idle || over {
                fds.extend(sources.iter().map(|(s, _)| PollFd::new(&s.fd, PollFlags::IN)));
            }
            let limit = if over { Some(LINGER) } else { idle.then_some(IDLE_TERMINAL) };
            let any = wait_ready(&mut fds, limit);
            if !any && over {
                end_all(container, &mut sources);
                continue;
            }
            fds.iter().map(|f| !f.revents().is_empty()).collect::<Vec<_>>()
        };
        if ready[0] {
            container.wake.clear();
        }
        idle = false;
        let mut at = 0;
        for readable in ready.into_iter().skip(1) {
            if readable {
                match read(container, &mut sources[at], &mut buffer) {
                    Next::More => {}
                    Next::Idle if !over => idle = true,
                    Next::Idle | Next::End => {
                        let (source, mut lines) = sources.remove(at);
                        lines.finish(&mut lock(&container.log));
                        container.readers.end(source.stream);
                        continue;
                    }
                }
            }
            at += 1;
        }
        lock(&container.log).flush();
    }
    lock(&container.log).flush();
    drop(buffer);
    container.finish(pod);
    crate::sys::trim_memory();
}

enum Next {
    More,
    Idle,
    End,
}

fn read(container: &Container, (source, lines): &mut (Source, Lines), buffer: &mut [u8]) -> Next {
    match rustix::io::read(&source.fd, &mut *buffer) {
        Ok(0) => Next::End,
        Ok(length) => {
            lines.push(&buffer[..length], &mut lock(&container.log));
            container.readers.copy(source.stream, &buffer[..length]);
            Next::More
        }
        Err(Errno::INTR | Errno::AGAIN) => Next::More,
        // Nobody has the terminal open just now.
        Err(Errno::IO) if source.terminal => Next::Idle,
        Err(_) => Next::End,
    }
}

fn end_all(container: &Container, sources: &mut Vec<(Source, Lines)>) {
    for (source, mut lines) in sources.drain(..) {
        lines.finish(&mut lock(&container.log));
        container.readers.end(source.stream);
    }
}
