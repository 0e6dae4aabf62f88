//! Something between a client and the registry that counts what the registry sends.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};

/// It serves until the program ends.
pub(crate) struct Proxy {
    pub(crate) address: String,
    moved: Arc<AtomicU64>,
}

impl Proxy {
    pub(crate) fn start(registry: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
        let address = listener.local_addr().context("a listener without an address")?.to_string();
        let moved = Arc::new(AtomicU64::new(0));
        let (registry, counter) = (registry.to_owned(), Arc::clone(&moved));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if let Err(error) = connect(client, &registry, &counter) {
                    eprintln!("a connection to the registry failed: {error}");
                }
            }
        });
        Ok(Self { address, moved })
    }

    /// Bytes that the registry has sent.
    pub(crate) fn moved(&self) -> u64 {
        self.moved.load(Ordering::SeqCst)
    }
}

fn connect(client: TcpStream, registry: &str, moved: &Arc<AtomicU64>) -> io::Result<()> {
    let server = TcpStream::connect(registry)?;
    let (from_client, from_server) = (client.try_clone()?, server.try_clone()?);
    let moved = Arc::clone(moved);
    thread::spawn(move || copy(from_client, server, |_| {}));
    thread::spawn(move || {
        copy(from_server, client, |n| {
            moved.fetch_add(n, Ordering::SeqCst);
        });
    });
    Ok(())
}

/// Copies until one side is done; that ends the other as well.
fn copy(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        count(n as u64);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    // The other side may have gone.
    let _ = to.shutdown(Shutdown::Write);
}
