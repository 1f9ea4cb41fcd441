//! The way to an etcd: a port on loopback that passes everything on, until it is told otherwise.

use loden_tests::etcd::Etcd;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    /// Connections stay, and nothing comes through.
    Held,
    /// Connections end, and new ones end at once.
    Cut,
}

pub(crate) struct Way {
    pub(crate) endpoint: String,
    state: watch::Sender<State>,
}

impl Way {
    pub(crate) async fn to(etcd: &Etcd) -> Self {
        let target = etcd.endpoint().strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (state, receiver) = watch::channel(State::Open);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (target, mut state) = (target.clone(), receiver.clone());
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = pass(near_in, far_out, state.clone()) => {}
                        () = pass(far_in, near_out, state.clone()) => {}
                        _ = state.wait_for(|state| *state == State::Cut) => {}
                    }
                });
            }
        });
        Self { endpoint, state }
    }

    pub(crate) fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    pub(crate) fn hold(&self) {
        self.state.send_replace(State::Held);
    }

    pub(crate) fn mend(&self) {
        self.state.send_replace(State::Open);
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        if state.wait_for(|state| *state == State::Open).await.is_err() {
            return;
        }
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                // What was read while the way was shut waits as well.
                let open = state.wait_for(|state| *state == State::Open).await.is_ok();
                if !open || to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}
