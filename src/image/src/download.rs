//! Fetching a blob: piece by piece, going on where it broke off.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::{
    Result,
    error::chain,
    layer::Piece,
    registry::{ATTEMPTS, Session, manifest::Descriptor},
};

/// Progress after which earlier failures no longer count: a large layer over a bad line gets there.
const PROGRESS: u64 = 16 << 20;
const PAUSE: Duration = Duration::from_millis(500);

/// How a stretch of a download ended, other than by a refusal.
enum Stretch {
    /// All is there.
    Complete,
    /// The receiver went away.
    Unwanted,
    Broken(String),
}

/// Sends a blob's pieces to `out`, which blocks while they are not taken: nothing piles up. What was sent is of the
/// right length; its digest is for the receiver to check. Returns early where the receiver goes away.
pub(crate) async fn download(
    session: &Session<'_>,
    blob: &Descriptor,
    part: &str,
    out: mpsc::Sender<Piece>,
) -> Result<()> {
    let (mut sent, mut mark, mut failures) = (0, 0, 0);
    loop {
        let reason = match stretch(session, blob, part, &mut sent, &out).await? {
            Stretch::Complete => {
                // Who went away no longer needs to know.
                let _ = out.send(Piece::End).await;
                return Ok(());
            }
            Stretch::Unwanted => return Ok(()),
            Stretch::Broken(reason) => reason,
        };
        if sent >= mark + PROGRESS {
            (mark, failures) = (sent, 0);
        }
        failures += 1;
        if failures >= ATTEMPTS {
            return Err(session.unreachable(&format!("{part}: {reason}")));
        }
        tracing::debug!(image = %session.reference, part, reason, sent, "a download broke off and goes on");
        tokio::time::sleep(PAUSE * 2_u32.pow(failures - 1)).await;
    }
}

async fn stretch(
    session: &Session<'_>,
    blob: &Descriptor,
    part: &str,
    sent: &mut u64,
    out: &mpsc::Sender<Piece>,
) -> Result<Stretch> {
    let (mut response, mut at) = session.blob(&blob.digest, *sent).await?;
    loop {
        if at == blob.size {
            return Ok(Stretch::Complete);
        }
        let mut bytes = match response.chunk().await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Stretch::Broken(format!("it ended after {at} of {} bytes", blob.size))),
            Err(error) => return Ok(Stretch::Broken(chain(&error.without_url()))),
        };
        if bytes.len() as u64 > blob.size - at {
            return Err(
                session.bad(part, format!("it is larger than the {} bytes of the manifest", blob.size))
            );
        }
        let begin = at;
        at += bytes.len() as u64;
        // A registry that cannot begin in the middle sends again what we have.
        let known = sent.saturating_sub(begin).min(bytes.len() as u64);
        let fresh = bytes.split_off(usize::try_from(known).unwrap_or(bytes.len()));
        if fresh.is_empty() {
            continue;
        }
        *sent = at;
        if out.send(Piece::Bytes(fresh)).await.is_err() {
            return Ok(Stretch::Unwanted);
        }
    }
}
