//! Header blocks: name/value pairs, compressed by zlib with one window a direction and connection (SPDY/3.1, 2.6.10).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;
use crate::error::{Error, Result};

/// The longest header block after decompression, in bytes.
const MAX_BLOCK: usize = 256 << 10;
/// The most headers of one block.
const MAX_HEADERS: usize = 128;

/// Headers in the order of the block; names are lower case.
pub(crate) type Headers = Vec<(String, String)>;

/// The first value of a header.
pub(crate) fn header<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
}

/// Decompresses the header blocks of one connection, in order.
pub(crate) struct Inflater(Decompress);

impl Inflater {
    pub(crate) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Decompresses and parses one block.
    pub(crate) fn headers(&mut self, block: &[u8]) -> Result<Headers> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        loop {
            if out.len() >= MAX_BLOCK {
                return Err(Error::spdy(format!("a header block is longer than {MAX_BLOCK} bytes")));
            }
            out.reserve(1024);
            let before = self.0.total_in();
            let produced = out.len();
            match self.0.decompress_vec(block, &mut out, FlushDecompress::Sync) {
                Ok(status) => {
                    let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
                    block = block.get(used..).unwrap_or_default();
                    let full = out.len() == out.capacity();
                    if matches!(status, Status::StreamEnd) || (block.is_empty() && !full) {
                        return Ok(out);
                    }
                    if used == 0 && out.len() == produced {
                        return Err(Error::spdy("a header block does not decompress"));
                    }
                }
                Err(e) if e.needs_dictionary().is_some() => {
                    let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
                    block = block.get(used..).unwrap_or_default();
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|e| Error::spdy(format!("a header block has another dictionary: {e}")))?;
                }
                Err(e) => return Err(Error::spdy(format!("a header block does not decompress: {e}"))),
            }
        }
    }
}

/// Compresses the header blocks of one connection, in order.
pub(crate) struct Deflater(Compress);

impl Deflater {
    pub(crate) fn new() -> Result<Self> {
        let mut compress = Compress::new(Compression::fast(), true);
        compress.set_dictionary(&DICTIONARY).map_err(|e| Error::spdy(format!("zlib: {e}")))?;
        Ok(Self(compress))
    }

    /// One compressed block.
    pub(crate) fn headers(&mut self, headers: &Headers) -> Result<Vec<u8>> {
        let plain = encode(headers);
        let mut out = Vec::with_capacity(plain.len() + 64);
        let mut rest = plain.as_slice();
        loop {
            let before = self.0.total_in();
            self.0
                .compress_vec(rest, &mut out, FlushCompress::Sync)
                .map_err(|e| Error::spdy(format!("zlib: {e}")))?;
            let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            rest = rest.get(used..).unwrap_or_default();
            if rest.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(256);
        }
    }
}

fn encode(headers: &Headers) -> Vec<u8> {
    let mut out = Vec::new();
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
    out.extend(number(headers.len()));
    for (name, value) in headers {
        for text in [name.to_ascii_lowercase(), value.clone()] {
            out.extend(number(text.len()));
            out.extend(text.as_bytes());
        }
    }
    out
}

fn parse(mut block: &[u8]) -> Result<Headers> {
    let count = take_u32(&mut block)?;
    if count > MAX_HEADERS {
        return Err(Error::spdy(format!("a header block of {count} headers, more than {MAX_HEADERS}")));
    }
    let mut headers = Vec::with_capacity(count);
    for _ in 0..count {
        let name = take_text(&mut block)?.to_ascii_lowercase();
        if name.is_empty() {
            return Err(Error::spdy("a header without a name"));
        }
        for value in take_text(&mut block)?.split('\0') {
            headers.push((name.clone(), value.to_owned()));
        }
    }
    Ok(headers)
}

fn take_u32(block: &mut &[u8]) -> Result<usize> {
    let (number, rest) =
        block.split_first_chunk::<4>().ok_or_else(|| Error::spdy("a header block ends early"))?;
    *block = rest;
    Ok(usize::try_from(u32::from_be_bytes(*number)).unwrap_or(usize::MAX))
}

fn take_text(block: &mut &[u8]) -> Result<String> {
    let length = take_u32(block)?;
    let (text, rest) =
        block.split_at_checked(length).ok_or_else(|| Error::spdy("a header block ends early"))?;
    *block = rest;
    String::from_utf8(text.to_vec()).map_err(|_| Error::spdy("a header is not UTF-8"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_of_one_connection_share_a_window() {
        let (mut out, mut back) = (Deflater::new().unwrap(), Inflater::new());
        for n in 0..50 {
            let headers =
                vec![("streamtype".to_owned(), "data".to_owned()), ("port".to_owned(), n.to_string())];
            let block = out.headers(&headers).unwrap();
            assert_eq!(back.headers(&block).unwrap(), headers);
        }
        assert!(back.headers(&out.headers(&vec![]).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn a_long_value_comes_back_whole() {
        let headers = vec![("x".to_owned(), "0123456789abcdef".repeat(4000))];
        let block = Deflater::new().unwrap().headers(&headers).unwrap();
        assert_eq!(Inflater::new().headers(&block).unwrap(), headers);
    }

    #[test]
    fn a_bomb_is_refused() {
        let headers = vec![("x".to_owned(), "a".repeat(MAX_BLOCK * 4))];
        let block = Deflater::new().unwrap().headers(&headers).unwrap();
        assert!(Inflater::new().headers(&block).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let _ = Inflater::new().headers(&bytes);
            let _ = parse(&bytes);
        }
    }
}
