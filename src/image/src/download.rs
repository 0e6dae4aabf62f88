//! Fetching a blob: piece by piece, going on where it broke off.

use std::time::Duration;

use tokio::{sync::mpsc, time::Instant};

use crate::{
    Error, Result,
    layer::Piece,
    registry::{ATTEMPTS, Served, Session, manifest::Descriptor},
};

/// Progress after which earlier failures no longer count: a large layer over a bad line gets there.
const PROGRESS: u64 = 1 << 20;
/// Whoever sends less than this for a while is taken for stalled, in bytes a second.
const SLOWEST: u64 = 1 << 10;
/// After this, a receiver that takes nothing waits for something else, perhaps for another download.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a stretch of a download ended, other than by a refusal.
enum Stretch {
    /// All is there.
    Complete,
    /// The receiver went away.
    Unwanted,
    Broken(String),
}

/// Sends a blob's pieces to `out`, which blocks while they are not taken: nothing piles up. What was sent is of the
/// right length; its digest is for the receiver to check. Returns early where the receiver goes away. Who has sent it
/// goes to `served`.
pub(crate) async fn download(
    session: &Session<'_>,
    blob: &Descriptor,
    part: &str,
    out: mpsc::Sender<Piece>,
    served: &mut Served,
) -> Result<()> {
    let (mut sent, mut mark, mut failures) = (0, 0, 0);
    loop {
        let reason = match stretch(session, blob, part, &mut sent, &out, served).await {
            Ok(Stretch::Complete) => {
                // Who went away no longer needs to know.
                let _ = out.send(Piece::End).await;
                return Ok(());
            }
            Ok(Stretch::Unwanted) => return Ok(()),
            Ok(Stretch::Broken(reason)) => reason,
            // A registry that was there and is away comes back, as after an upgrade of it.
            Err(Error::Unreachable { reason, .. }) if sent > 0 => reason,
            Err(error) => return Err(error),
        };
        if sent >= mark + PROGRESS {
            (mark, failures) = (sent, 0);
        }
        failures += 1;
        if failures >= ATTEMPTS {
            return Err(session.unreachable(&format!("{part}: {reason}")));
        }
        tracing::debug!(image = %session.reference, part, reason, sent, "a download broke off and goes on");
        tokio::time::sleep(session.pause(failures - 1)).await;
    }
}

async fn stretch(
    session: &Session<'_>,
    blob: &Descriptor,
    part: &str,
    sent: &mut u64,
    out: &mpsc::Sender<Piece>,
    served: &mut Served,
) -> Result<Stretch> {
    let mut body = session.blob(&blob.digest, *sent).await?;
    body.note(served);
    let mut at = body.begin;
    let mut pace = Pace::new(body.stall());
    loop {
        if at == blob.size {
            return Ok(Stretch::Complete);
        }
        let asked = Instant::now();
        let mut bytes = match body.chunk().await {
            Ok(Some(bytes)) => bytes,
            outcome => {
                body.broke();
                let ended = || format!("it ended after {at} of {} bytes", blob.size);
                return Ok(Stretch::Broken(outcome.err().unwrap_or_else(ended)));
            }
        };
        if bytes.len() as u64 > blob.size - at {
            served.lied = true;
            return Err(
                session.bad(part, format!("it is larger than the {} bytes of the manifest", blob.size))
            );
        }
        if pace.too_slow(asked.elapsed(), bytes.len() as u64) {
            body.broke();
            return Ok(Stretch::Broken(format!("less than {SLOWEST} bytes come in a second")));
        }
        let begin = at;
        at += bytes.len() as u64;
        // A registry that cannot begin in the middle sends again what we have.
        let known = sent.saturating_sub(begin).min(bytes.len() as u64);
        let fresh = bytes.split_off(usize::try_from(known).unwrap_or(bytes.len()));
        if fresh.is_empty() {
            continue;
        }
        let room = match tokio::time::timeout(PATIENCE, out.reserve()).await {
            Ok(room) => room,
            Err(_) => {
                body.rest();
                let room = out.reserve().await;
                body.go_on().await;
                room
            }
        };
        let Ok(room) = room else { return Ok(Stretch::Unwanted) };
        *sent = at;
        room.send(Piece::Bytes(fresh));
    }
}

/// How fast a host sends; time in which the receiver is busy does not count.
struct Pace {
    window: Duration,
    waited: Duration,
    got: u64,
}

impl Pace {
    fn new(stall: Duration) -> Self {
        Self { window: stall.saturating_mul(2), waited: Duration::ZERO, got: 0 }
    }

    fn too_slow(&mut self, waited: Duration, got: u64) -> bool {
        self.waited += waited;
        self.got += got;
        if self.waited < self.window {
            return false;
        }
        let slow = self.got < SLOWEST.saturating_mul(self.waited.as_secs().max(1));
        (self.waited, self.got) = (Duration::ZERO, 0);
        slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_drips_is_stalled_and_who_only_pauses_is_not() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(5 * second);
        assert!((0..9).all(|_| !pace.too_slow(second, 10)));
        assert!(pace.too_slow(second, 10));
        let mut pace = Pace::new(5 * second);
        assert!(!pace.too_slow(9 * second, 1 << 20));
        assert!((0..100).all(|_| !pace.too_slow(second / 2, 600)));
    }
}
