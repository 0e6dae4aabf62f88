//! A way to the registry that counts the blobs which are asked for, and can hold back what comes.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use moxlet_tests_component::registry;

#[derive(Default)]
struct State {
    blobs: AtomicUsize,
    /// Answers wait once more blobs were asked for than this.
    before: AtomicUsize,
    holds: AtomicBool,
}

/// It ends with the test program.
pub(crate) struct Proxy {
    address: String,
    state: Arc<State>,
}

impl Proxy {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(registry::address()) else { return };
                let (up, down) = ((client.try_clone(), server.try_clone()), (server, client));
                let (counting, holding) = (Arc::clone(&shared), Arc::clone(&shared));
                if let (Ok(from), Ok(to)) = up {
                    thread::spawn(move || pass(from, to, |bytes| counting.count(bytes)));
                }
                thread::spawn(move || pass(down.0, down.1, |_| holding.wait()));
            }
        });
        Self { address, state }
    }

    /// An image of the registry, by way of the proxy.
    pub(crate) fn name(&self, path: &str) -> String {
        format!("{}/{path}", self.address)
    }

    /// How many blobs were asked for.
    pub(crate) fn blobs(&self) -> usize {
        self.state.blobs.load(Ordering::SeqCst)
    }

    /// Whether nothing comes any more once the next blob was asked for.
    pub(crate) fn hold(&self, holds: bool) {
        self.state.before.store(self.blobs(), Ordering::SeqCst);
        self.state.holds.store(holds, Ordering::SeqCst);
    }
}

impl State {
    /// Requests of this client are not longer than a piece, and one comes after the answer to the other.
    fn count(&self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let blobs = text.lines().filter(|l| l.starts_with("GET ") && l.contains("/blobs/")).count();
        self.blobs.fetch_add(blobs, Ordering::SeqCst);
    }

    fn wait(&self) {
        let of = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        while self.holds.load(Ordering::SeqCst) && of(&self.blobs) > of(&self.before) {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut before: impl FnMut(&[u8])) {
    let mut piece = [0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut piece) {
        before(&piece[..n]);
        if to.write_all(&piece[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
