//! Work that waits for the kernel, on the threads that the runtime keeps for it.

use std::io;

/// Runs `work` on a thread for blocking work and waits for it. It is not ended when the caller stops waiting.
///
/// # Errors
/// What the work answers; an [`io::Error`] where it panicked or the runtime shuts down before it has begun.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<io::Error> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(E::from(io::Error::other(error))),
    }
}
