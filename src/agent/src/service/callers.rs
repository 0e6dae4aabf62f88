//! Who connects to the agent's port before it has proved to be a node: how many at one time, and what of it is worth a line in the log.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Connections of one address that shake hands at one time, so that one machine keeps no other out.
const MAX_OF_ONE: usize = 8;
/// Of all.
const MAX_OF_ALL: usize = 256;
/// How often the refusal of an address is logged.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Addresses of which it is known when they were logged; of more nothing is logged.
const MAX_LOGGED: usize = 64;

/// Counts them.
#[derive(Debug, Default)]
pub(super) struct Callers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    shaking: HashMap<IpAddr, usize>,
    logged: HashMap<IpAddr, Instant>,
}

/// One of them, until its handshake has ended.
#[derive(Debug)]
pub(super) struct Turn {
    callers: Arc<Callers>,
    address: IpAddr,
}

impl Callers {
    /// Lets an address shake hands, unless too many do.
    pub(super) fn begin(self: &Arc<Self>, address: IpAddr) -> Option<Turn> {
        let address = address.to_canonical();
        let mut state = self.0.lock();
        let own = state.shaking.get(&address).copied().unwrap_or(0);
        if own >= MAX_OF_ONE || state.shaking.values().sum::<usize>() >= MAX_OF_ALL {
            return None;
        }
        state.shaking.insert(address, own + 1);
        Some(Turn { callers: self.clone(), address })
    }

    /// Whether a refusal of this address is to be logged now: once a minute.
    pub(super) fn logs(&self, address: IpAddr, now: Instant) -> bool {
        let logged = &mut self.0.lock().logged;
        logged.retain(|_, at| now.saturating_duration_since(*at) < LOG_EVERY);
        let address = address.to_canonical();
        let logs = logged.len() < MAX_LOGGED && !logged.contains_key(&address);
        if logs {
            logged.insert(address, now);
        }
        logs
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.callers.0.lock();
        match state.shaking.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(state.shaking.remove(&self.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_machine_keeps_no_other_out() {
        let callers = Arc::new(Callers::default());
        let stranger: Vec<_> = (0..MAX_OF_ONE).map(|_| callers.begin(ip("10.0.0.66")).unwrap()).collect();
        assert!(callers.begin(ip("::ffff:10.0.0.66")).is_none(), "the same, by another name");
        let node = callers.begin(ip("10.0.0.5")).unwrap();
        drop(stranger);
        drop(callers.begin(ip("10.0.0.66")).unwrap());
        drop(node);
        assert!(callers.0.lock().shaking.is_empty());
    }

    #[test]
    fn all_together_are_bounded() {
        let callers = Arc::new(Callers::default());
        let many: Vec<_> = (0..400_u16).filter_map(|n| callers.begin(ip(&format!("fd00::{n:x}")))).collect();
        assert_eq!(many.len(), MAX_OF_ALL);
    }

    #[test]
    fn refusals_are_logged_once_a_minute_for_each_of_a_few_addresses() {
        let (callers, now) = (Callers::default(), Instant::now());
        assert!(callers.logs(ip("10.0.0.66"), now) && !callers.logs(ip("10.0.0.66"), now));
        let logged = (0..200_u8).filter(|n| callers.logs(ip(&format!("10.0.1.{n}")), now)).count();
        assert_eq!(logged, MAX_LOGGED - 1);
        assert!(callers.logs(ip("10.0.0.66"), now + LOG_EVERY));
    }
}
