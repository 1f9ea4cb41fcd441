//! etcd's JSON gateway: many writes over one connection, where a process for each would cost more than the write.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::Etcd;

/// What etcd takes in one transaction.
const BATCH: usize = 128;

/// One change of a key.
#[derive(Clone, Debug)]
pub enum Write {
    /// Give it this value, without a lease.
    Put(String, String),
    /// Remove it.
    Delete(String),
}

impl Write {
    fn request(&self) -> Value {
        let text = |text: &str| BASE64_STANDARD.encode(text);
        match self {
            Self::Put(key, value) => json!({ "requestPut": { "key": text(key), "value": text(value) } }),
            Self::Delete(key) => json!({ "requestDeleteRange": { "key": text(key) } }),
        }
    }
}

/// A connection to the gateway.
#[derive(Debug)]
pub struct Gateway {
    stream: BufReader<TcpStream>,
}

impl Gateway {
    /// Connects; from then on it may be used in any namespace.
    ///
    /// # Errors
    ///
    /// Where etcd does not listen.
    pub fn connect(etcd: &Etcd) -> Result<Self> {
        Ok(Self { stream: BufReader::new(etcd.dial()?) })
    }

    /// Does these writes, as many in one transaction as etcd takes. A key may come once in a call.
    ///
    /// # Errors
    ///
    /// Where etcd refuses one.
    pub fn write(&mut self, writes: &[Write]) -> Result<()> {
        for batch in writes.chunks(BATCH) {
            let requests: Vec<Value> = batch.iter().map(Write::request).collect();
            let answer = self.call("/v3/kv/txn", &json!({ "success": requests }))?;
            ensure!(answer["succeeded"] == true, "etcd answered {answer}");
        }
        Ok(())
    }

    fn call(&mut self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.trim().to_owned();
        let (mut length, mut chunked) = (0, false);
        loop {
            line.clear();
            ensure!(self.stream.read_line(&mut line)? > 0, "etcd hung up after {status:?}");
            let header = line.trim().to_ascii_lowercase();
            match header.split_once(':') {
                Some(("content-length", value)) => length = value.trim().parse()?,
                Some(("transfer-encoding", value)) => chunked = value.trim() == "chunked",
                Some(_) => {}
                None => break,
            }
        }
        let answer = if chunked { self.chunks()? } else { self.bytes(length)? };
        let answer = String::from_utf8(answer)?;
        if !status.contains(" 200 ") {
            bail!("etcd answered {status}: {answer}");
        }
        serde_json::from_str(&answer).with_context(|| format!("etcd answered {answer:?}"))
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// A body in chunks (RFC 9112, 7.1): each with its length in hexadecimal before it and a line's end after it.
    fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            let length =
                usize::from_str_radix(line.trim(), 16).with_context(|| format!("chunk length {line:?}"))?;
            all.extend(self.bytes(length)?);
            self.bytes(2)?;
            if length == 0 {
                return Ok(all);
            }
        }
    }
}
