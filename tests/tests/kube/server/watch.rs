//! Watches: a line of JSON an event, for as long as both sides want.

use std::{convert::Infallible, io, time::Duration};

use axum::body::{Body, Bytes};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::store::Change;

/// How a watch ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    /// As the server ends one whose time is over.
    Clean,
    /// In the middle of a line, with the connection.
    MidLine,
    /// With an event that says so: the version is too old.
    Gone,
}

/// What goes into a body.
type Piece = Result<Bytes, io::Error>;

/// Somebody who watches.
pub(super) struct Watcher {
    pub(super) number: u64,
    only: Option<String>,
    metadata_only: bool,
    bookmarks: bool,
    slow: bool,
    pieces: UnboundedSender<Piece>,
}

/// What was asked for.
#[derive(Debug, Default)]
pub(super) struct Wish {
    pub(super) only: Option<String>,
    pub(super) metadata_only: bool,
    pub(super) bookmarks: bool,
    pub(super) slow: bool,
}

impl Watcher {
    pub(super) fn new(number: u64, wish: Wish) -> (Self, Body) {
        let (pieces, receiver) = unbounded_channel();
        let Wish { only, metadata_only, bookmarks, slow } = wish;
        (Self { number, only, metadata_only, bookmarks, slow, pieces }, body(receiver, slow))
    }

    /// Says whether somebody still listens.
    pub(super) fn tell(&self, change: &Change) -> bool {
        if self.only.as_ref().is_some_and(|only| change.node["metadata"]["name"] != **only) {
            return self.is_open();
        }
        self.line(&json!({ "type": change.kind, "object": self.shown(&change.node) }))
    }

    pub(super) fn bookmark(&self, version: u64) -> bool {
        let (kind, api) = if self.metadata_only { PARTIAL } else { ("Node", "v1") };
        let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
        let object = json!({ "kind": kind, "apiVersion": api, "metadata": metadata });
        !self.bookmarks || self.line(&json!({ "type": "BOOKMARK", "object": object }))
    }

    pub(super) fn cut(self, cut: Cut) {
        match cut {
            Cut::Clean => {}
            Cut::MidLine => {
                let half =
                    r#"{"type":"MODIFIED","object":{"kind":"PartialObjectMetadata","metadata":{"name":"n"#;
                let _ = self.pieces.send(Ok(Bytes::from_static(half.as_bytes())));
                let _ = self.pieces.send(Err(io::ErrorKind::ConnectionReset.into()));
            }
            Cut::Gone => drop(self.line(&gone_event())),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        !self.pieces.is_closed()
    }

    fn shown(&self, node: &Value) -> Value {
        if self.metadata_only { partial(node) } else { node.clone() }
    }

    fn line(&self, event: &Value) -> bool {
        let line = format!("{event}\n");
        if !self.slow {
            return self.pieces.send(Ok(line.into())).is_ok();
        }
        let bytes = Bytes::from(line);
        bytes.chunks(23).all(|piece| self.pieces.send(Ok(bytes.slice_ref(piece))).is_ok())
    }
}

const PARTIAL: (&str, &str) = ("PartialObjectMetadata", "meta.k8s.io/v1");

/// The metadata alone.
pub(super) fn partial(node: &Value) -> Value {
    json!({ "kind": PARTIAL.0, "apiVersion": PARTIAL.1, "metadata": node["metadata"] })
}

/// What the watch cache says of a version that it does not reach back to.
pub(super) fn gone_event() -> Value {
    json!({ "type": "ERROR", "object": gone() })
}

pub(super) fn gone() -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version: 1 (2)", "reason": "Expired", "code": 410 })
}

fn body(receiver: UnboundedReceiver<Piece>, slow: bool) -> Body {
    // Headers go out with the first piece of a body; a real server flushes them at once.
    let first = stream::iter([Ok::<_, io::Error>(Bytes::new())]);
    let rest = stream::unfold(receiver, move |mut receiver| async move {
        let piece = receiver.recv().await?;
        if slow {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Some((piece, receiver))
    });
    Body::from_stream(futures::StreamExt::chain(first, rest))
}

/// Never ends and says nothing.
pub(super) async fn silence() -> Infallible {
    std::future::pending().await
}
